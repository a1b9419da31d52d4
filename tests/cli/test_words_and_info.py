"""Commands that answer, and those about models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run, refused

MODEL = "Lance_3B/model.safetensors"


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


def test_info_says_what_fits_a_budget(run: Run) -> None:
    ran = run("info", "--task", "t2i", "--max-memory", "1GB", model="nano")
    assert (ran.code, "all weights on the device" in ran.out) == (0, True)
    ran = run("info", "--task", "t2i", "--max-memory", "1MB", model="nano")
    assert (ran.code, "too little for t2i" in ran.out) == (1, True)
    refused(run("info", "--max-memory", "much", model="nano"), "max_memory must be a size")
    refused(run("info", "--quantize", "int8", model="nano"), "give --max-memory")


def test_info_fetches_no_weights_from_the_hub(
    run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openlance.model.hub as hub

    asked: list[str] = []
    monkeypatch.setattr(hub, "_fetch", lambda repository, patterns: asked.extend(patterns) or tiny_checkpoint)
    assert run("info", "--task", "chat", "--dtype", "float16", model="somebody/lance").code == 0
    assert asked
    assert not [pattern for pattern in asked if pattern.endswith(("safetensors", "pth"))]


def test_nano_bench_prints_a_table(run: Run) -> None:
    ran = run(
        "eval", "nano-bench", "--count", 1, "--parts", "one", "questions", "--steps", 1, "--out", "scores"
    )
    assert ran.code == 0, ran.err
    assert "| one |" in ran.out
    assert Path("scores/scores.json").is_file()
