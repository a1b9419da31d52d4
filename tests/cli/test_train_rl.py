"""`openlance train` with the presets of reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run, refused

from openlance.data.save import read_settings

SMALL = (
    "--lanes", 1, "--group", 2, "--rollout-steps", 2, "--window", 1, "--window-within", 1.0, "--warmup", 1,
    "--validate-every", 2, "--tracker", "none", "--run-dir", "rewarded",
)  # fmt: skip


def test_a_run_on_the_world_is_measured_resumed_and_used(run: Run, tiny_checkpoint: Path) -> None:
    words = ("train", "--preset", "nano-rl", "--init", tiny_checkpoint, *SMALL)
    assert run(*words, "--steps", 1, model=None).code == 0
    again = run(*words, "--steps", 2, "--resume", model=None)
    assert (again.code, again.out.splitlines()[-1]) == (0, "rewarded/model"), again.err
    log = [json.loads(line) for line in Path("rewarded/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "reward/composition" in line] == [1, 2]
    assert all(
        {"held_out/composition", "held_out/everything"} <= line.keys()
        for line in log
        if "held_out/reward" in line
    )
    assert json.loads(Path("rewarded/config.json").read_text())["group"] == 2
    assert run("generate", "a red circle", "--steps", 1, "--out", "one.png", model="rewarded/model").code == 0


def test_a_reward_that_fails_ends_the_run_with_its_name(run: Run, tiny_checkpoint: Path) -> None:
    Path("prompts.txt").write_text("a red circle\n")
    words = ("train", "--preset", "rl", "--init", tiny_checkpoint, "--data", "prompts.txt", *SMALL)
    ran = run(*words, "--precision", "float32", "--rewards", "composition", model=None)
    assert ran.code == 2
    said = "error: the reward composition failed: InputError: the prompt 'a red circle' has no 'claims'"
    assert said in ran.err.splitlines()[-1]


def test_answers_are_learnt_from_questions_about_the_world(run: Run, tiny_checkpoint: Path) -> None:
    ran = run(
        "train", "--preset", "nano-rl", "--algorithm", "words", "--trains", "und", "--max-words", 2,
        "--init", tiny_checkpoint, *SMALL, "--steps", 2, model=None,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    log = [json.loads(line) for line in Path("rewarded/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "reward/exact_match" in line] == [1, 2]
    assert "held_out/exact_match" in log[-1]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_distilled_model_takes_few_steps_by_default(
    run: Run, tiny_checkpoint: Path, lora_rank: int
) -> None:
    words = ("--steps", 1, "--rollout-steps", 2, "--teacher-steps", 4, "--lora-rank", lora_rank)
    ran = run("train", "--preset", "nano-distill", "--init", tiny_checkpoint, *SMALL, *words, model=None)
    assert ran.code == 0, ran.err
    assert "held_out/everything" in Path("rewarded/log.jsonl").read_text()
    trained = Path(ran.out.splitlines()[-1])
    model = ("--adapter", trained) if lora_rank else ()
    drawn = run(
        "generate", "a red circle", *model, "--out", "one.png",
        model=str(tiny_checkpoint if lora_rank else trained),
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    sampling = read_settings("one.png")["sampling"]
    assert (sampling["steps"], sampling["guidance"], sampling["shift"]) == (2, 1.0, 3.0)


@pytest.mark.parametrize(
    "words, said",
    [
        (("--preset", "rl"), ("nothing to draw", "--data")),
        (("--preset", "rl", "--data", "x.txt"), ("nothing to learn from", "--rewards")),
        (("--preset", "rl", "--data", "x.txt", "--rewards", "composition"), ("nothing to begin from",)),
        (("--preset", "nano-rl", "--rewards", "beauty"), ("unknown reward 'beauty'",)),
        (("--preset", "nano-rl", "--group", 1), ("group must be at least 2",)),
    ],
)
def test_what_cannot_be_is_refused(run: Run, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    refused(run("train", *words, model=None), *said)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("prompts.txt", "\n", ("prompts.txt: no prompts in it",)),
        ("prompts.jsonl", '{"prompt": "a"}\n{', ("prompts.jsonl:2: not JSON",)),
        ("prompts.jsonl", '{"text": "a"}', ("prompts.jsonl:1", '"prompt"')),
    ],
)
def test_prompts_that_cannot_be_read(
    run: Run, tiny_checkpoint: Path, name: str, text: str, said: tuple[str, ...]
) -> None:
    Path(name).write_text(text)
    words = ("--init", tiny_checkpoint, "--data", name, "--rewards", "composition", *SMALL)
    refused(run("train", "--preset", "rl", *words, model=None), *said)
