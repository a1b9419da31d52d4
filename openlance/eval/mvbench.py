"""MVBench (arXiv 2311.17005): questions with options about clips. 20 tasks, 200 questions each, 16 frames.

An answer is read strictly: it counts only where it names one option and no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import numpy as np

from openlance.data.media import Video, load_image, load_video
from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.eval.geneval import read_lines
from openlance.eval.harness import ANSWERS, Benchmark, Making, Run, Sample
from openlance.eval.results import Scored, Scores, compare, mean_by
from openlance.eval.scoring import written
from openlance.infer.orders import Order
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated
from openlance.model.release import read_json

FRAMES = 16
EACH = 200
FOLDER_FPS = 3.0  # of clips that are given as folders of frames
MAX_TOKENS = 32
TASKS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""Each task's clips, below `video/` of the data."""


@dataclass(frozen=True)
class Question:
    """One question. clip: its file or folder; span: (start, end) in seconds, where only a part is meant."""

    task: str
    number: int
    clip: Path
    words: str
    options: tuple[str, ...]
    right: int
    span: tuple[float, float] | None


class MVBench(Benchmark):
    """data: a folder with `json/TASK.json` and `video/`, as published. leave_out: tasks that are not
    asked."""

    name = "mvbench"
    tasks = ("x2t_video",)
    published = len(TASKS) * EACH
    default = ANSWERS

    def __init__(
        self,
        making: Making,
        limit: int | None = None,
        data: Path | None = None,
        leave_out: Sequence[str] = (),
    ):
        super().__init__(making, limit)
        if data is None:
            raise InputError("mvbench: where are its clips? See `openlance eval setup mvbench`")
        unknown = sorted(set(leave_out) - set(TASKS))
        if unknown:
            raise InputError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
        self.data, self.asked = data, [task for task in TASKS if task not in leave_out]
        if not self.asked:
            raise InputError("mvbench: every task is left out")

    def entries(self) -> Sequence[Question]:
        return [question for task in self.asked for question in self._questions(task)]

    def _questions(self, task: str) -> list[Question]:
        file = self.data / "json" / f"{task}.json"
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}: cannot be read ({error}); --leave-out {task} goes on without it"
            ) from error
        found = []
        for number, row in enumerate(rows):
            try:
                options, right = tuple(map(str, row["candidates"])), row["candidates"].index(row["answer"])
                span = (float(row["start"]), float(row["end"])) if "start" in row and "end" in row else None
                clip = self.data / "video" / TASKS[task] / row["video"]
                found.append(Question(task, number, clip, str(row["question"]), options, right, span))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file}: question {number} is not whole ({error!r})") from error
        return found

    def samples_of(self, entry: Question) -> list[Sample]:
        path = f"{entry.task}/{entry.number:04d}.json"
        return [Sample(path, spoken(entry), self.making.seeds(1), {"question": entry})]

    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        clip = frames_of(sample.facts["question"])
        # An earlier result is shown as it is; of any other clip the model would choose frames by its length.
        shown = Generated(clip.frames, clip.fps, {})
        return [lance.order.ask(words, shown, max_tokens=MAX_TOKENS, seed=seed) for seed in sample.seeds]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        question = sample.facts["question"]
        asked = {"task": question.task, "video": str(question.clip), "question": sample.prompt}
        save_json({**asked, "answer": results[0].text, "openlance": results[0].settings}, path)

    def check(self, sample: Sample, path: Path) -> None:
        if not isinstance(read_json(path).get("answer"), str):
            raise InputError(f"{path}: holds no answer")

    def score(self, run: Run) -> None:
        """The answers, read."""
        lines = []
        for sample in self.samples():
            question, answer = sample.facts["question"], read_json(run.samples / sample.path)["answer"]
            chosen = choice(answer, question.options)
            lines.append({"name": sample.path, "answer": answer, "chosen": chosen, "right": question.right})
        run.judged.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (run.judged / "answers.jsonl").write_text(text, encoding="utf-8")

    def aggregate(self, run: Run) -> Scored:
        tasks = {sample.path: sample.facts["question"].task for sample in self.samples()}
        rows = [
            row
            for file in written(run, "answers.jsonl")
            for row in read_lines(file, ("name", "chosen", "right"))
        ]
        failures = compare("answer", tasks, [row["name"] for row in rows])
        found = mean_by((tasks[row["name"]], 100.0 * (row["chosen"] == row["right"])) for row in rows)
        unread = 100 * fmean(row["chosen"] is None for row in rows)
        marks = {row["name"]: "right" if row["chosen"] == row["right"] else "wrong" for row in rows}
        scores: Scores = {"overall": overall(found), "names_no_option": unread, "tasks": found}
        return Scored(scores, len(rows), tuple(failures), marks)


def overall(tasks: dict[str, float]) -> float:
    """The mean of the tasks, which are equally large."""
    return fmean(tasks.values())


def spoken(question: Question) -> str:
    """The question as the model reads it."""
    options = (
        f"({letter}) {option}" for letter, option in zip(ascii_uppercase, question.options, strict=False)
    )
    return "\n".join((question.words, *options, "Answer with the letter of the right option alone."))


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, or None where it names none, or several.

    It names one by its letter, standing alone or marked as a letter ("B", "(b)", "B. red", "Answer: B"), or
    by its whole words. A letter that may be a word is none: "A man" does not name option A.
    """
    said = answer.strip()
    letters = ascii_uppercase[: len(options)]
    plain = [_plain(option) for option in options]
    if said and plain.count(_plain(said)) == 1:
        return plain.index(_plain(said))
    leading = re.match(rf"\(?([{letters}])(?:[.):]|\s*$)", said)
    if leading and _plain(said[leading.end() :]) == plain[letters.index(leading[1])]:
        return letters.index(leading[1])
    opening = re.match(
        rf"(?i:(?:the )?(?:best |right |correct )?(?:answer|option)(?: is)?)\s*:?\s*([{letters}])(?![\w'])",
        said,
    )
    named = {match[1] for match in (leading, opening) if match}
    named |= {letter.upper() for letter in re.findall(rf"\(([{letters}{letters.lower()}])\)", said)}
    named |= set(re.findall(rf"(?<![\w'])[{letters[1:]}](?![\w'])", said)) if named else set()
    return letters.index(named.pop()) if len(named) == 1 else None


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def frames_of(question: Question) -> Video:
    """Sixteen frames: the middle of as many equal parts of the clip, or of its span."""

    def select(count: int, fps: float) -> list[int]:
        start, end = question.span or (0.0, count / fps)
        first, last = round(start * fps), min(count, max(round(end * fps), round(start * fps) + 1))
        if first >= count:
            raise InputError(f"{question.clip}: ends before second {start:g}, where the question begins")
        middles = first + (np.arange(FRAMES) + 0.5) * (last - first) / FRAMES
        return [min(count - 1, int(place)) for place in middles]

    if not question.clip.is_dir():
        return load_video(question.clip, select)
    pictures = sorted(question.clip.glob("*.jpg")) or sorted(question.clip.glob("*.png"))
    if not pictures:
        raise InputError(f"{question.clip}: a folder without frames")
    chosen = [np.asarray(load_image(pictures[index])) for index in select(len(pictures), FOLDER_FPS)]
    return Video(np.stack(chosen), FOLDER_FPS)
