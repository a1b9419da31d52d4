"""The command as a process: help, stops, pipes; and on the golden checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Run


def test_a_stop_from_the_keyboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from openlance.infer.pipeline import LancePipeline

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LancePipeline, "run_each", stop)
    ran = run("generate", "a circle")
    assert (ran.code, ran.err.strip()) == (130, "openlance: stopped")


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
    root = Path(__file__).resolve().parents[2]
    named = re.compile(r"^\s*(import|from) torchvision|^\s*\"torchvision", re.M)
    files = [*root.glob("openlance/**/*.py"), *root.glob("benchmarks/*.py"), root / "pyproject.toml"]
    assert [path.name for path in files if named.search(path.read_text())] == []


def test_the_version_is_said_once() -> None:
    import tomllib

    import openlance

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == openlance.__version__


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
