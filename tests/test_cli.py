"""The command line: what each command does, and what it says of bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from openlance.cli import main
from openlance.data.media import load_video
from openlance.data.save import save_video

MODEL = "Lance_3B/model.safetensors"
NORM = "language_model.model.norm.weight"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command line in an empty folder, on the tiny checkpoint unless it names another."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args: object, model: object = tiny_checkpoint, stdin: str = "") -> Ran:
        words = [str(arg) for arg in args]
        if model is not None:
            words += ["--model", str(model)]
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def spoiled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for a test to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "spoiled"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), dtype=np.uint8)
    return save_video(frames, tmp_path / "clip.mp4", 8)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def seed_of(ran: Ran) -> str:
    found = re.search(r"seed (\d+)", ran.out)
    assert found, ran.out
    return found[1]


# -- what commands do ----------------------------------------------------------------------------------


def test_generate_writes_a_picture_and_says_seed_and_seconds(run: Run) -> None:
    ran = run("generate", "a red circle")
    assert ran.code == 0
    assert re.fullmatch(r"openlance-0001\.png  seed \d+  \d+\.\d s\n", ran.out)
    assert ran.err == ""  # no progress bar where stderr is no terminal
    assert pixels("openlance-0001.png").shape == (64, 64, 3)


def test_the_same_seed_gives_the_same_pixels(run: Run) -> None:
    first = run("generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2)
    run(
        "generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2, "--seed", seed_of(first)
    )
    run("generate", "--like", "openlance-0001.png")
    run("generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2)
    one, seeded, like, other = (pixels(f"openlance-000{n}.png") for n in range(1, 5))
    assert one.shape == (32, 48, 3)
    assert np.array_equal(one, seeded)
    assert np.array_equal(one, like)
    assert not np.array_equal(one, other)


def test_options_go_over_those_of_like(run: Run) -> None:
    run("generate", "a red circle", "--size", 32, "--negative", "blue")
    run("generate", "--like", "openlance-0001.png", "--seed", 5, "--steps", 1)
    old, new = (json.loads(run("show", f"openlance-000{n}.png", model=None).out) for n in (1, 2))
    assert (new["prompt"], new["negative_prompt"], new["size"]) == ("a red circle", "blue", [32, 32])
    assert (new["seed"], new["sampling"]["steps"]) == (5, 1)
    assert new["sampling"] == {**old["sampling"], "steps": 1}


def test_several_seeds_and_names_that_are_free(run: Run) -> None:
    Path("openlance-0007.mp4").touch()
    ran = run("generate", "a circle", "--count", 2, "--seed", 3, "--steps", 1)
    assert [line.split("  ")[:2] for line in ran.out.splitlines()] == [
        ["openlance-0008.png", "seed 3"], ["openlance-0009.png", "seed 4"],
    ]  # fmt: skip
    run("generate", "a circle", "--count", 2, "--seed", 3, "--steps", 1, "--out", "new/stars.jpg")
    assert sorted(path.name for path in Path("new").iterdir()) == ["stars-1.jpg", "stars-2.jpg"]
    run("generate", "a circle", "--seed", 3, "--steps", 1, "--out", "new")
    assert Path("new/openlance-0001.png").is_file()


def test_a_clip_from_words_and_the_same_again(run: Run) -> None:
    assert run("video", "it moves", "--frames", 9, "--seed", 1, "--out", "one.gif").code == 0
    assert run("video", "--like", "one.gif", "--out", "two.gif").code == 0
    one, two = load_video("one.gif"), load_video("two.gif")
    assert one.frames.shape == (9, 48, 48, 3)
    assert np.array_equal(one.frames, two.frames)


def test_animate(run: Run, photo: Path) -> None:
    ran = run("animate", photo, "it moves", "--last", photo, "--frames", 9)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("openlance-0001.mp4")
    assert len(load_video("openlance-0001.mp4")) == 9


def test_edit_takes_pictures_and_clips(run: Run, photo: Path, clip: Path) -> None:
    assert run("edit", photo, "make it blue", "--visual-guidance", 1.5).code == 0
    height, width, _ = pixels("openlance-0001.png").shape
    assert height < width  # the shape of what was edited
    assert run("edit", clip, "make it blue", "--out", "edited.mp4").code == 0
    assert load_video("edited.mp4").fps == pytest.approx(8)
    assert json.loads(run("show", "edited.mp4", model=None).out)["task"] == "video_edit"


def test_subject_draws_and_films(run: Run, photo: Path) -> None:
    assert run("subject", photo, photo, "--prompt", "it on black", "--size", 32).code == 0
    assert run("subject", photo, "--prompt", "it on black", "--video", "--frames", 5).code == 0
    assert json.loads(run("show", "openlance-0001.png", model=None).out)["task"] == "subject_image"
    assert len(load_video("openlance-0002.mp4")) == 5


def test_ask_reads_files_and_words_in_their_order(
    run: Run, photo: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openlance.infer.pipeline import LancePipeline

    heard: list = []
    stream = LancePipeline.chat_stream
    monkeypatch.setattr(
        LancePipeline,
        "chat_stream",
        lambda self, messages, **options: heard.append(messages) or stream(self, messages, **options),
    )
    assert run("ask", "is", photo, "like", clip, "--max-tokens", 3).code == 0
    (message,) = heard[0]
    assert [part.get("text", part.get("media")) for part in message["content"]] == [
        "is", str(photo), "like", str(clip),
    ]  # fmt: skip


def test_ask_writes_the_answer_with_its_settings(run: Run, photo: Path) -> None:
    ran = run(
        "ask", photo, "--max-tokens", 4, "--temperature", 1, "--seed", 2, "--stop", "zz", "--out", "a.json"
    )
    again = run("ask", photo, "--max-tokens", 4, "--temperature", 1, "--seed", 2, "--quiet")
    assert ran.code == again.code == 0
    assert ran.out == again.out
    assert "tokens" in ran.err
    assert again.err == ""
    saved = json.loads(Path("a.json").read_text())
    assert saved["answer"] + "\n" == ran.out
    shown = json.loads(run("show", "a.json", model=None).out)
    assert shown == saved["openlance"]
    assert (shown["seed"], shown["text"]["temperature"], shown["text"]["stop"]) == (2, 1.0, ["zz"])


def test_chat_reads_piped_lines(run: Run, photo: Path, clip: Path) -> None:
    lines = f"/image {photo}\nwhat is this?\n\nand that?\n/video {clip}\nmore\n/reset\nhello\n/quit\nnever\n"
    ran = run("chat", "--max-tokens", 3, "--system", "be brief", stdin=lines)
    assert ran.code == 0, ran.err
    assert ran.err.count("tokens") == 4


def test_info_says_shapes_and_memory_without_weights(run: Run, tiny_checkpoint: Path, spoiled: Path) -> None:
    (spoiled / MODEL).unlink()
    ran = run("info", "--task", "t2i", model=spoiled)
    assert ran.code == 0, ran.err
    assert "2 layers, hidden 32" in ran.out
    assert len([line for line in ran.out.splitlines() if line.startswith("t2i")]) == 1


def test_train_hands_the_recipe_over(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import openlance.train.nano as nano

    called: dict = {}
    monkeypatch.setattr(
        nano, "train_nano", lambda run_dir, recipe, threads: called.update(recipe=recipe, run_dir=run_dir)
    )
    ran = run(
        "train", "nano", "--run-dir", tmp_path, "--steps", 7, "--batch", 3, "--vae-minutes", 0.5, model=None
    )
    recipe = called["recipe"]
    assert ran.code == 0
    assert (recipe.train.steps, recipe.train.batch, recipe.vae_minutes) == (7, 3, 0.5)
    assert recipe.vision_minutes == nano.NanoRecipe().vision_minutes
    assert called["run_dir"] == tmp_path


def test_nano_bench_prints_a_table(run: Run) -> None:
    ran = run(
        "eval", "nano-bench", "--count", 1, "--parts", "one", "questions", "--steps", 1, "--out", "scores"
    )
    assert ran.code == 0, ran.err
    assert "| one |" in ran.out
    assert Path("scores/scores.json").is_file()


# -- bad input -----------------------------------------------------------------------------------------


def refused(ran: Ran, *words: str) -> None:
    """Exit code 2 and one line that holds the words."""
    assert ran.code == 2
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("openlance: error: ")
    for word in words:
        assert word in lines[0]


def test_wrong_layout(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("generate", "a circle", model=tmp_path / "empty"), "not a Lance release")
    refused(run("generate", "a circle", model=tmp_path / "nowhere"), "no such folder")
    refused(run("generate", "a circle", "--variant", "Lance_4B"), "no variant Lance_4B")


def test_truncated_weights(run: Run, spoiled: Path) -> None:
    data = (spoiled / MODEL).read_bytes()
    (spoiled / MODEL).write_bytes(data[: len(data) // 2])
    refused(run("generate", "a circle", model=spoiled), "model.safetensors", "complete")


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.ones(31), ("misshapen", NORM)), (torch.full((32,), float("nan")), ("NaN", NORM))],
    ids=["misshapen", "NaN"],
)
def test_bad_parameters(run: Run, spoiled: Path, value: torch.Tensor, words: tuple[str, ...]) -> None:
    tensors = load_file(spoiled / MODEL)
    assert NORM in tensors
    save_file({**tensors, NORM: value}, spoiled / MODEL)
    refused(run("generate", "a circle", model=spoiled), *words)


def test_unknown_words_of_the_command_line(run: Run) -> None:
    assert run("paint", "a circle", model=None).code == 2
    assert run("generate", "a circle", "--colour", "red").code == 2
    assert run("generate", "a circle", "--dtype", "int8").code == 2
    refused(run("info", "--task", "t2x"), "unknown task", "t2i")
    refused(run("info", model="lance_4b"), "no such folder")


@pytest.mark.parametrize("words", [["generate"], ["generate", " "], ["video", ""], ["ask"], ["ask", ""]])
def test_empty_prompt(run: Run, words: list[str]) -> None:
    refused(run(*words), "empty" if words[0] != "ask" else "nothing is asked")


@pytest.mark.parametrize("command", ["edit", "animate", "ask", "subject"])
def test_media_that_cannot_be_read(run: Run, tmp_path: Path, command: str) -> None:
    def tried(name: str) -> Ran:
        path = tmp_path / name
        words = ["--prompt", "make it blue"] if command == "subject" else ["make it blue"]
        return run(command, path, *words, model="never loaded")

    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    Image.new("1", (50_000, 4)).save(tmp_path / "wide.png")
    refused(tried("empty.png"), "empty.png", "empty")
    refused(tried("broken.mp4"), "broken.mp4")
    refused(tried("wide.png"), "wide.png", "50000x4", "too large")
    refused(tried("missing.png"), "missing.png", "no such file")


def test_a_clip_of_one_frame_works(run: Run, tmp_path: Path) -> None:
    one = save_video(np.full((1, 48, 48, 3), 200, dtype=np.uint8), tmp_path / "one.mp4", 8)
    assert run("ask", one, "--max-tokens", 2).code == 0
    assert run("edit", one, "make it blue", "--out", "blue.mp4").code == 0
    assert len(load_video("blue.mp4")) == 1


def test_sizes(run: Run) -> None:
    ran = run("generate", "a circle", "--size", "40x30")
    assert ran.code == 0
    assert pixels("openlance-0001.png").shape[:2] in {(32, 32), (48, 32)}
    assert re.fullmatch(r"openlance: note: size 40x30 is not a multiple of 16: made .*\n", ran.err)
    refused(run("generate", "a circle", "--size", "large"), "--size must be")
    refused(run("generate", "a circle", "--size", 4096), "128 pixels")
    refused(run("generate", "a circle", "--resolution", 8), "16")


def test_frames_over_the_limit(run: Run) -> None:
    refused(run("video", "a circle", "--frames", 18), "18 frames", "17")
    refused(run("video", "a circle", "--frames", 0), "0 frames")


def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "file" / "a.png", tmp_path / "a.bmp", tmp_path / "clip.mp4"):
        refused(run("generate", "a circle", "--out", out, model="never loaded"), str(out))
    refused(
        run("ask", "hello", "--out", tmp_path / "file" / "a.json", model="never loaded"), "cannot be written"
    )
    refused(run("demo", "--out", tmp_path / "file"), "file")


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--shift", "-1"],
        ["--guidance-interval", "1", "0"],
        ["--seed", "-1"],
        ["--count", "0"],
    ],
)
def test_settings_that_cannot_be(run: Run, options: list[str]) -> None:
    refused(
        run("generate", "a circle", *options, model="never loaded"), options[0].strip("-").replace("-", "_")
    )


def test_text_settings_that_cannot_be(run: Run) -> None:
    refused(run("ask", "hello", "--top-p", 2, model="never loaded"), "top_p")
    refused(run("chat", "--max-tokens", 0, model="never loaded"), "max_tokens")


def test_like_of_something_else(run: Run, photo: Path) -> None:
    refused(run("generate", "--like", photo), "holds no settings")
    run("generate", "a circle", "--steps", 1)
    refused(run("video", "--like", "openlance-0001.png"), "t2i")


def test_a_device_that_is_not_there(run: Run) -> None:
    refused(run("generate", "a circle", "--device", "toaster"), "toaster")
    if not torch.cuda.is_available():
        refused(run("generate", "a circle", "--device", "cuda"), "cuda")


def test_chat_ends_at_a_mistake_where_lines_are_piped(run: Run) -> None:
    refused(run("chat", stdin="/image nowhere.png\nhello\n"), "nowhere.png")
    refused(run("chat", stdin="/paint\n"), "/paint")


def test_a_stop_from_the_keyboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from openlance.infer.pipeline import LancePipeline

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LancePipeline, "generate_image", stop)
    ran = run("generate", "a circle")
    assert (ran.code, ran.err.strip()) == (130, "openlance: stopped")


# -- the real process ----------------------------------------------------------------------------------


def test_help_is_light_and_python_m_works() -> None:
    """Help of every command, in a process that never imports torch."""
    code = (
        "import sys; from openlance.cli import main\n"
        "for words in ([], ['generate'], ['ask'], ['train', 'nano'], ['eval', 'nano-bench']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "import openlance; assert openlance.__version__\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("generate", "--guidance-interval", "For example", "openlance ask photo.jpg", "--run-dir"):
        assert word in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "openlance", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("openlance ")


def test_a_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "openlance", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_no_torchvision() -> None:
    """It breaks beside the CPU build of torch, so neither our code nor our requirements name it."""
    root = Path(__file__).resolve().parents[1]
    named = re.compile(r"^\s*(import|from) torchvision|^\s*\"torchvision", re.M)
    files = [*root.glob("openlance/**/*.py"), *root.glob("benchmarks/*.py"), root / "pyproject.toml"]
    assert [path.name for path in files if named.search(path.read_text())] == []


def test_the_version_is_said_once() -> None:
    import tomllib

    import openlance

    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == openlance.__version__


# -- the golden checkpoint -----------------------------------------------------------------------------

GOLDEN = ("--resolution", 64, "--vit-resolution", 80)


@pytest.fixture
def golden_checkpoint(golden_file: Callable[[str], Path]) -> Path:
    return golden_file("checkpoint")


@pytest.fixture
def real_media(golden: Path) -> Path:
    folder = golden.resolve().parent / "media"
    if not (folder / "photo.jpg").is_file():
        pytest.skip(f"no real media in {folder}")
    return folder


@pytest.mark.parametrize("name", ["photo.jpg", "car.mp4"])
def test_golden_checkpoint_asks_and_edits(
    run: Run, golden_checkpoint: Path, real_media: Path, name: str
) -> None:
    asked = run("ask", *GOLDEN, real_media / name, "--max-tokens", 4, model=golden_checkpoint)
    assert asked.code == 0, asked.err
    edited = run("edit", real_media / name, "make it blue", *GOLDEN, "--steps", 1, model=golden_checkpoint)
    assert edited.code == 0, edited.err
