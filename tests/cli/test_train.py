"""`openlance train` and `openlance data example`: what they refuse, what their help says, and a run by
words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run, refused

from openlance.train.presets import PRESETS, preset
from openlance.train.settings import TrainConfig


@pytest.fixture
def data(run: Run) -> Path:
    assert run("data", "example", "edits.parquet", "--task", "image_edit", "--rows", 6, model=None).code == 0
    return Path("edits.parquet").absolute()


SMALL = ("--tokens", 400, "--validate-every", 1, "--tracker", "none", "--warmup", 1)


def test_a_run_on_raw_data_is_measured_saved_and_used(run: Run, tiny_checkpoint: Path, data: Path) -> None:
    """Pictures are encoded as they come; what it writes is a checkpoint."""
    ran = run(
        "train", "--preset", "sft", "--init", tiny_checkpoint, "--data", data, "--held-out", data,
        "--run-dir", "tuned", "--steps", 2, *SMALL, "--prompts", "a red circle", "--precision", "float32",
        model=None,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "tuned/model"
    saved = json.loads(Path("tuned/config.json").read_text())
    assert saved["steps"] == 2 and saved["learning_rate"] == preset("sft").learning_rate
    log = [json.loads(line) for line in Path("tuned/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 1, 2, 2]
    assert any(name.startswith("held_out/") and name.endswith("image_edit/mse") for name in log[1])
    assert run("info", model="tuned/model").code == 0
    assert run("generate", "a red circle", "--steps", 1, "--out", "one.png", model="tuned/model").code == 0


def test_an_adapter_is_trained_and_used(run: Run, tiny_checkpoint: Path, data: Path) -> None:
    words = (
        "train", "--preset", "lora", "--init", tiny_checkpoint, "--data", f"image_edit={data}",
        "--run-dir", "adapted", "--lora-rank", 2, *SMALL,
    )  # fmt: skip
    assert run(*words, "--steps", 1, model=None).code == 0
    refused_run = run(*words, "--steps", 2, model=None)
    assert refused_run.code == 2
    assert refused_run.err.splitlines()[-1].endswith("adapted: holds a run already; --resume goes on from it")
    again = run(*words, "--steps", 2, "--resume", model=None)
    assert (again.code, again.out.splitlines()[-1]) == (0, "adapted/adapter")
    assert run("generate", "a red circle", "--adapter", "adapted/adapter", "--steps", 1).code == 0
    refused(run("generate", "a red circle", "--adapter", "nowhere"), "nowhere")


@pytest.mark.parametrize("name", PRESETS)
def test_help_shows_the_presets_and_every_value_of_one(run: Run, name: str) -> None:
    ran = run("train", "--preset", name, "--help", model=None)
    words = ran.out.replace("│", " ").split()
    assert ran.code == 0
    for other in PRESETS:
        assert any(word.strip(",.") == other for word in words), other
    for field in TrainConfig.__dataclass_fields__:
        flag = field.replace("_", "-")
        assert f"--{flag}" in words or f"--no-{flag}" in words, field
    assert f"{preset(name).steps})" in words and f"{preset(name).learning_rate})" in words


@pytest.mark.parametrize(
    "words, said",
    [
        (("--preset", "nothing"), ("unknown preset 'nothing'", "pt, ct, sft, lora")),
        (("--preset", "sft", "--init", "nano"), ("nothing to train on", "--data")),
        (("--preset", "sft", "--data", "nowhere.parquet"), ("nothing to begin from", "--init", "qwen:")),
        (("--preset", "nano-ct"), ("nothing to begin from",)),
        (("--preset", "lora", "--init", "nano", "--data", "nowhere.parquet"), ("nowhere.parquet",)),
        (
            ("--preset", "lora", "--init", "nano", "--data", "x", "--lanes", "0"),
            ("lanes must be at least 1",),
        ),
        (
            ("--preset", "lora", "--init", "nano", "--data", "x", "--trains", "vae"),
            ("trains takes und, gen",),
        ),
    ],
)
def test_what_cannot_be_is_refused(run: Run, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    refused(run("train", *words, model=None), *said)


def test_example_data_is_refused_where_it_cannot_be_made(run: Run) -> None:
    refused(run("data", "example", "shapes.csv", model=None), "shapes.csv", ".parquet")
    refused(run("data", "example", "a.parquet", "--task", "t2x", model=None), "no example data for t2x")
    refused(run("data", "example", "a.parquet", "--rows", 0, model=None), "--rows must be at least 1")


def test_quantised_weights_are_not_trained(run: Run, tiny_checkpoint: Path, data: Path) -> None:
    assert run("quantize", tiny_checkpoint, "--to", "small", "--scheme", "int8", model=None).code == 0
    refused(
        run("train", "--preset", "sft", "--init", "small", "--data", data, "--run-dir", "no", model=None),
        "small", "quantised",
    )  # fmt: skip
