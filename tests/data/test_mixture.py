"""Shares of tasks and sizes of media by step: the paper's numbers, and what is done where data is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openlance.config import Sizes
from openlance.data.mixture import STAGES, Mixture, Schedule, growing, mixture_of
from openlance.errors import InputError
from openlance.sequence.template import Task

GENERATING = {task for task in Task if task.generates}
LEARNT = set(Task) - {Task.CHAT}


def percent(mixture: Mixture, tasks: set[Task]) -> dict[Task, float]:
    return {task: round(100 * chance, 6) for task, chance in mixture.over(tasks).items()}


def test_pre_training_draws_the_four_kinds() -> None:
    """64 : 16 : 16 : 4, and of generation only from text."""
    assert percent(STAGES["pre-training"][0], LEARNT) == {
        Task.T2V: 64, Task.X2T_VIDEO: 16, Task.T2I: 16, Task.X2T_IMAGE: 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "stage, images, videos",
    [
        (("continual training", 0), (70, 15, 15), (60, 10, 15, 15)),
        (("continual training", 1), (60, 20, 20), (40, 20, 20, 20)),
        (("continual training", 2), (50, 25, 25), (25, 25, 25, 25)),
        (("fine-tuning", 0), (60, 20, 20), (60, 10, 15, 15)),
    ],
)
def test_later_stages_draw_editing_subjects_and_animation(
    stage: tuple[str, int], images: tuple[float, ...], videos: tuple[float, ...]
) -> None:
    found = percent(STAGES[stage[0]][stage[1]], LEARNT)
    drawn = (Task.T2I, Task.IMAGE_EDIT, Task.SUBJECT_IMAGE)
    filmed = (Task.T2V, Task.I2V, Task.VIDEO_EDIT, Task.SUBJECT_VIDEO)
    assert [found[task] for task in drawn] == [round(0.16 * share, 6) for share in images]
    assert [found[task] for task in filmed] == [round(0.64 * share, 6) for share in videos]
    assert (found[Task.X2T_VIDEO], found[Task.X2T_IMAGE]) == (16, 4)


def test_the_share_of_a_task_without_data_stays_in_its_kind() -> None:
    mixture = STAGES["continual training"][0]
    found = percent(mixture, LEARNT - {Task.I2V, Task.VIDEO_EDIT})
    assert found[Task.T2V] == pytest.approx(64 * 60 / 75) and found[Task.T2I] == pytest.approx(16 * 0.7)
    assert mixture.missing(LEARNT - {Task.I2V, Task.VIDEO_EDIT}) == (Task.I2V, Task.VIDEO_EDIT)
    assert mixture.missing(LEARNT) == ()


def test_the_share_of_a_kind_without_data_goes_to_the_others() -> None:
    assert percent(Mixture(), {Task.T2I, Task.X2T_IMAGE}) == {Task.T2I: 80, Task.X2T_IMAGE: 20}


def test_tasks_without_a_share_are_not_drawn() -> None:
    assert Task.I2V not in Mixture().over(set(Task))
    assert percent(replace(Mixture(), chat=100), set(Task))[Task.CHAT] == 50
    with pytest.raises(InputError, match=r"draws none of the tasks that there is data for \(image_edit\)"):
        Mixture().over({Task.IMAGE_EDIT})
    with pytest.raises(InputError, match="0 or more"):
        Mixture(videos=(1, -1, 0, 0))


def test_a_schedule_changes_at_its_steps() -> None:
    schedule = Schedule(((0, "a"), (3, "b"), (5, "c")))
    assert "".join(map(schedule.at, range(7))) == "aaabbcc"
    assert "".join(map(Schedule.evenly("abc", 9).at, range(11))) == "aaabbbccccc"
    assert "".join(map(Schedule.evenly("abc", 2).at, range(3))) == "bcc"
    assert Schedule.constant("a").at(10**6) == "a"
    for steps in ((1, 2), (0, 3, 3), ()):
        with pytest.raises(InputError, match="start at 0 and go up"):
            Schedule(tuple((step, "x") for step in steps))


def test_a_stage_goes_through_its_mixtures() -> None:
    schedule = mixture_of("continual training", 90)
    assert [schedule.at(step) for step in (0, 29, 30, 59, 60, 89)] == [
        mixture for mixture in STAGES["continual training"] for _ in range(2)
    ]
    with pytest.raises(InputError, match="unknown stage 'ct': choose one of pre-training"):
        mixture_of("ct", 1)


def test_media_grow_to_the_checkpoint_s_sizes() -> None:
    sizes = Sizes()
    schedule = growing(sizes, 300)
    assert [(found.image, found.video) for found in schedule.values] == [(256, 192), (512, 360), (768, 480)]
    assert schedule.at(299) == sizes and schedule.at(100).video == 360
    assert {(found.vit_image, found.vit_video, found.frames) for found in schedule.values} == {(672, 448, 50)}
    small = Sizes(image=96, video=96)
    assert growing(small, 300).values == (small,)
