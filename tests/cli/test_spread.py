"""One request on several processes, through torchrun, gives what one process gives, and ends as one does."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from ran import Run, pixels, refused

from openlance.data.media import load_video

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
ENDLESS = ["generate", "a circle", "--steps", "1000000", "--size", "32"]
PATIENCE = 200


def command(processes: int, words: list[str], model: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "-m", "openlance", *words, "--model", str(model)]


def spread(processes: int, words: list[str], model: Path) -> str:
    """What is printed."""
    done = subprocess.run(
        command(processes, words, model), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_picture_by_guidance(run: Run, tiny_checkpoint: Path) -> None:
    """The first process draws the seed, saves and prints; pixels are those of one process."""
    words = ["generate", "a red circle", "--size", "64", "--reuse", "0.05", "--steps", "6"]
    said = spread(2, [*words, "--spread", "guidance", "--count", "2"], tiny_checkpoint)
    assert [line.split()[0] for line in said.splitlines()] == ["openlance-0001.png", "openlance-0002.png"]
    run("generate", "--like", "openlance-0002.png")
    one, many = pixels("openlance-0003.png"), pixels("openlance-0002.png")
    assert np.abs(one.astype(int) - many).max() <= 1
    assert len(list(Path().iterdir())) == 3


@pytest.mark.slow
def test_an_edited_clip_by_tokens(run: Run, tiny_checkpoint: Path, clip: Path) -> None:
    """The clip is encoded and decoded in shared tiles."""
    words = ["edit", str(clip), "make it blue", "--seed", "1", "--out"]
    said = spread(3, [*words, "many.mp4", "--spread", "tokens"], tiny_checkpoint)
    assert len(said.splitlines()) == 1
    assert run(*words, "one.mp4").code == 0
    one, many = load_video("one.mp4"), load_video("many.mp4")
    assert np.abs(one.frames.astype(int) - many.frames).max() <= 1


def workers_of(launcher: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if parent == launcher:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads who runs from /proc")
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_what_ends_one_ends_all(run: Run, tiny_checkpoint: Path, how: str) -> None:
    """Ctrl-C, and a process that dies while the others wait for it."""
    ours, theirs = pty.openpty()  # a terminal, which gets a progress bar as wide as it is
    termios.tcsetwinsize(theirs, (24, 80))
    launcher = subprocess.Popen(
        command(2, [*ENDLESS, "--spread", "guidance"], tiny_checkpoint), env=ENVIRONMENT, stderr=theirs
    )
    os.close(theirs)
    workers: list[int] = []
    try:
        assert shown(ours, until=b"/1000000")
        workers = workers_of(launcher.pid)
        assert len(workers) == 2
        if how == "interrupted":
            launcher.send_signal(signal.SIGINT)
        else:
            os.kill(workers[1], signal.SIGKILL)
        begun = time.monotonic()
        shown(ours)
        assert launcher.wait(60) != 0 and time.monotonic() - begun < 60
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
        assert list(Path().iterdir()) == []
    finally:
        for worker in {*workers, *workers_of(launcher.pid)}:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        launcher.kill()
        os.close(ours)


def shown(terminal: int, until: bytes | None = None) -> bool:
    """Read what is shown, to its end or until this is; whether it was."""
    seen, deadline = b"", time.monotonic() + PATIENCE
    while until is None or until not in seen:
        assert time.monotonic() < deadline, seen[-3000:]
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # nobody writes any more
            return False
    return True


@pytest.mark.parametrize(
    ("words", "processes", "reason"),
    [
        (["--spread", "guidance"], None, "start them with torchrun"),
        ([], 2, "2 processes would all make the same file: add --spread guidance or --spread tokens"),
        (["--spread", "tokens", "--reuse", "0.1"], 2, "spread guidance, or set reuse 0"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], processes: int | None, reason: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    refused(run("generate", "a circle", *words), reason)


def test_a_device_for_all_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused(run("generate", "a circle", "--spread", "guidance", "--device", "cuda:1"), "cuda:1", "or cpu")


def test_an_unknown_spread_is_refused(run: Run) -> None:
    assert run("generate", "a circle", "--spread", "layers").code == 2
