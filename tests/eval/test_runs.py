"""Each benchmark from beginning to end, on the tiny checkpoint, with the stand-in for its scorer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made import DPG_ROWS, configured, dpg_data, info, lines, mvbench_data
from PIL import Image
from safetensors.torch import load_file, save_file

from openlance.cli import main
from openlance.data.media import load_video
from openlance.data.save import read_settings, save_video
from openlance.eval import mvbench, vbench
from openlance.model.hub import find_release

SMALL = ("--size", "32", "--steps", "1", "--quiet")


@pytest.fixture
def evaluate(here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    """`openlance eval BENCH …` on the tiny checkpoint; gives the exit code and what it said."""

    def run(name: str, *words: object) -> tuple[int, str]:
        code = main(["eval", name, "--out", "run", "--model", str(tiny_checkpoint), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def scores() -> dict:
    return json.loads(Path("run/scores.json").read_text())


def stamps(pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("run").rglob(pattern)}


@pytest.fixture
def three_prompts(here: Path) -> Path:
    rows = [
        {"tag": "single_object", "prompt": "a <b>circle</b>"},
        {"tag": "counting", "prompt": "two squares"},
        {"tag": "counting", "prompt": "three stars"},
    ]
    return configured("geneval", here / "config", lines(here / "prompts.jsonl", rows))


def test_geneval_in_its_official_layout(evaluate, three_prompts: Path) -> None:
    code, said = evaluate("geneval", *SMALL, "--config", three_prompts, "--seed", 5)
    assert code == 0, said
    assert "stand-in: these numbers mean nothing" in said
    names = sorted(str(path.relative_to("run/samples")) for path in Path("run/samples").rglob("*.*"))
    assert names == [
        name
        for number in range(3)
        for name in (f"{number:05d}/metadata.jsonl", *(f"{number:05d}/samples/000{i}.png" for i in range(4)))
    ]
    assert json.loads(Path("run/samples/00001/metadata.jsonl").read_text())["prompt"] == "two squares"
    made = read_settings("run/samples/00001/samples/0002.png")
    assert (made["seed"], made["prompt"], made["sampling"]["shift"]) == (7, "two squares", 3.5)
    found = scores()
    assert found["counts"]["judged"] == 12
    assert found["scorer"]["stand_in"] is True
    assert found["version"]
    assert 0 <= found["scores"]["overall"] <= 1
    page = Path("run/report.html").read_text()
    assert "a &lt;b&gt;circle&lt;/b&gt;" in page
    assert "<b>" not in page
    assert page.count("data:image/jpeg;base64,") == 12


def test_what_is_there_is_not_made_again(evaluate, three_prompts: Path) -> None:
    words = (*SMALL, "--config", three_prompts)
    assert evaluate("geneval", *words)[0] == 0
    before, judged, result = stamps("*.png"), stamps("results.jsonl"), scores()
    damaged = Path("run/samples/00001/samples/0003.png")
    damaged.write_bytes(damaged.read_bytes()[:200])
    code, said = evaluate("geneval", *words, "--stages", "score")
    assert (code, "1 of 12 samples" in said, str(damaged) in said) == (2, True, True)
    assert evaluate("geneval", *words)[0] == 0
    after = stamps("*.png")
    assert {name for name in before if after[name] != before[name]} == {str(damaged)}
    assert stamps("results.jsonl") != judged  # another file was judged, so its part was judged again
    again = stamps("results.jsonl")
    assert evaluate("geneval", *words, "--stages", "score", "aggregate")[0] == 0
    assert stamps("results.jsonl") == again
    assert scores()["scores"] == result["scores"]


def test_other_settings_need_another_folder(evaluate, three_prompts: Path) -> None:
    words = ("--config", three_prompts, "--quiet", "--stages", "sample", "--size", 32)
    assert evaluate("geneval", *words, "--steps", 1, "--limit", 1)[0] == 0
    code, said = evaluate("geneval", *words, "--steps", 2)
    assert (code, "other settings (making)" in said) == (2, True)
    assert evaluate("geneval", *words, "--steps", 1)[0] == 0
    assert len(stamps("*.png")) == 12


def test_other_weights_in_the_same_place_need_another_folder(
    evaluate, three_prompts: Path, tiny_checkpoint: Path
) -> None:
    copied = shutil.copytree(tiny_checkpoint, "copied")
    words = ("--config", three_prompts, *SMALL, "--stages", "sample", "--limit", 1, "--model", copied)
    assert evaluate("geneval", *words)[0] == 0
    assert evaluate("geneval", *words)[0] == 0
    release = find_release(copied)
    for file in (*release.weights, release.vae):
        before = file.read_bytes()
        save_file({name: 1.01 * value for name, value in load_file(file).items()}, file)
        code, said = evaluate("geneval", *words)
        assert (code, "other settings (weights)" in said) == (2, True)
        file.write_bytes(before)
        assert evaluate("geneval", *words)[0] == 0
    code, said = evaluate("geneval", *words, "--adapter", "nano-fast")
    assert (code, "other settings (adapter, weights)" in said) == (2, True)


def test_files_of_no_sample_are_named(evaluate, three_prompts: Path) -> None:
    words = (*SMALL, "--config", three_prompts)
    assert evaluate("geneval", *words, "--stages", "sample")[0] == 0
    extra = Path("run/samples/00000/samples/0004.png")
    Image.new("RGB", (32, 32)).save(extra)
    code, said = evaluate("geneval", *words, "--stages", "score")
    assert (code, "00000/samples/0004.png" in said) == (2, True)
    extra.unlink()
    Path("run/samples/00002/samples/0001.png").unlink()
    code, said = evaluate("geneval", *words, "--stages", "score")
    assert (code, "00002/samples/0001.png: missing" in said) == (2, True)


def test_a_scorer_that_crashes_goes_on_where_it_was(evaluate, three_prompts: Path) -> None:
    """It judges two parts, then fails on the third; the second call judges that one alone."""
    Path("crash.py").write_text(
        "import pathlib, runpy, sys\n"
        "calls = pathlib.Path('calls.txt')\n"
        "count = len(calls.read_text().split()) if calls.exists() else 0\n"
        "calls.write_text('call ' * (count + 1))\n"
        "pathlib.Path(sys.argv[3], 'half').write_text('written')\n"
        "if count == 2: sys.exit('no memory left on the device')\n"
        "runpy.run_module('openlance.eval.stand_in', run_name='__main__')\n"
    )
    command = [sys.executable, "crash.py", "geneval", "{samples}", "{output}"]
    text = three_prompts.read_text().partition("[scorer]")[0]
    three_prompts.write_text(
        f'{text}[scorer]\nfolder = ".."\ntogether = 4\ncommand = {json.dumps(command)}\n'
    )
    words = (*SMALL, "--config", three_prompts)
    code, said = evaluate("geneval", *words)
    assert code == 2
    for part in ("part-00008", "no memory left on the device", "--stages score"):
        assert part in said
    assert len(stamps("results.jsonl")) == 2
    code, said = evaluate("geneval", *words, "--stages", "aggregate")
    assert (code, "00002/samples/0000.png: no score" in said) == (2, True)
    assert evaluate("geneval", *words, "--stages", "score", "aggregate")[0] == 0
    assert Path("calls.txt").read_text().split() == ["call"] * 4
    assert scores()["counts"]["judged"] == 12


def test_dpg_grids(evaluate, here: Path) -> None:
    config = configured("dpg", here / "config", dpg_data(here / "data", DPG_ROWS))
    code, said = evaluate("dpg", *SMALL, "--config", config)
    assert code == 0, said
    assert {path.name for path in Path("run/samples").iterdir()} == {"a.png", "b.png"}
    grid = np.asarray(Image.open("run/samples/a.png"))
    assert grid.shape == (64, 64, 3)
    tiles = [grid[:32, :32], grid[:32, 32:], grid[32:, :32], grid[32:, 32:]]
    assert len({tile.tobytes() for tile in tiles}) == 4  # four seeds
    assert read_settings("run/samples/a.png")["seeds"] == [42, 43, 44, 45]
    assert scores()["counts"] == {"published": 1065, "entries": 2, "judged": 2, "failures": 0}
    code, said = evaluate("dpg", *SMALL, "--config", config, "--as-published", "--stages", "aggregate")
    assert code == 2  # judged with every question: that is another file of answers
    assert "judged twice: b" in said or "the scorer asked" in said or "answers to" in said


def test_vbench_names_clips_by_the_prompt(evaluate, here: Path) -> None:
    own = [name for name in vbench.DIMENSIONS if name != vbench.FLICKERING]
    data = info(here, [("a dog runs", own)])
    service_free = configured("vbench", here / "config", data)
    words = (*SMALL, "--frames", 5, "--config", service_free, "--rewrite")
    code, said = evaluate("vbench", *words, "--stages", "sample", "score")
    assert code == 0, said
    assert sorted(path.name for path in Path("run/samples").iterdir()) == [
        f"a dog runs-{index}.mp4" for index in range(5)
    ]
    clip = load_video("run/samples/a dog runs-0.mp4")
    assert (clip.frames.shape, clip.fps) == ((5, 32, 32, 3), 4.0)
    rewritten = [json.loads(path.read_text()) for path in Path("run/rewritten").iterdir()]
    assert [row["prompt"] for row in rewritten] == ["a dog runs"]
    assert (
        read_settings("run/samples/a dog runs-0.mp4")["prompt"] == rewritten[0]["rewritten"] != "a dog runs"
    )
    code, said = evaluate("vbench", *words, "--stages", "aggregate")
    assert (code, "missing temporal_flickering" in said) == (2, True)
    with Path("run/judged/by_hand_eval_results.json").open("w") as file:
        json.dump({vbench.FLICKERING: [0.9, []]}, file)
    assert evaluate("vbench", *words, "--stages", "aggregate")[0] == 0
    assert scores()["scores"]["total"] == pytest.approx(
        (4 * scores()["scores"]["quality"] + scores()["scores"]["semantic"]) / 5
    )


def test_a_clip_cut_short_is_made_again(evaluate, here: Path) -> None:
    config = configured("vbench", here / "config", info(here, [("a dog", ["color"])]))
    words = (*SMALL, "--frames", 5, "--config", config, "--stages")
    assert evaluate("vbench", *words, "sample")[0] == 0
    cut, shorter = (Path(f"run/samples/a dog-{index}.mp4") for index in (1, 3))
    cut.write_bytes(cut.read_bytes()[:-1000])
    save_video(load_video(shorter).frames[:4], shorter, 4)
    code, said = evaluate("vbench", *words, "score")
    assert (code, "a dog-1.mp4" in said, "a dog-3.mp4: 4 frames, not 5" in said) == (2, True, True)
    assert evaluate("vbench", *words, "sample")[0] == 0
    assert len(load_video(cut)) == len(load_video(shorter)) == 5


@pytest.fixture
def edit_data(here: Path) -> Path:
    (here / "data" / "images").mkdir(parents=True)
    for index, key in enumerate(("k1", "k2")):
        Image.new("RGB", (60, 40), (200, 80 * index, 0)).save(here / "data" / "images" / f"{key}.png")
    rows = [("k1", "ps_human"), ("k2", "style_change")]
    lines(
        here / "data" / "instructions.jsonl",
        [{"key": key, "group": group, "instruction": f"do {key}"} for key, group in rows],
    )
    return here / "data"


def test_gedit_puts_the_source_beside_the_edit(evaluate, here: Path, edit_data: Path) -> None:
    config = configured("gedit", here / "config", edit_data)
    code, said = evaluate("gedit", "--steps", 1, "--quiet", "--config", config)
    assert code == 0, said
    names = sorted(str(path.relative_to("run/samples")) for path in Path("run/samples").rglob("*.png"))
    assert names == [
        f"openlance/fullset/{group}/en/{key}{end}.png"
        for group, key in (("ps_human", "k1"), ("style_change", "k2"))
        for end in ("", "_SRCIMG")
    ]
    assert set(scores()["scores"]["groups"]) == {"ps_human", "style_change"}
    (edit_data / "images" / "k2.png").write_bytes(b"no picture")
    (Path("run/samples") / names[2]).unlink()
    code, said = evaluate("gedit", "--steps", 1, "--quiet", "--config", config, "--stages", "sample")
    assert (code, "style_change/en/k2.png" in said) == (2, True)


def test_mvbench_asks_about_sixteen_frames(evaluate, here: Path) -> None:
    data = mvbench_data(here / "data", {"action_count": 2})
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    clip = data / "video" / mvbench.TASKS["action_count"] / "clip.mp4"
    save_video(frames, clip, 8)
    (here / "config.toml").write_text('data = "data"\n')
    others = [task for task in mvbench.TASKS if task != "action_count"]
    code, said = evaluate("mvbench", "--config", "config.toml", "--quiet", "--leave-out", *others)
    assert code == 0, said
    saved = json.loads(Path("run/samples/action_count/0001.json").read_text())
    assert saved["question"].splitlines()[:3] == ["what?", "(A) red", "(B) blue"]
    assert scores()["counts"] == {"published": 4000, "entries": 2, "judged": 2, "failures": 0}
    bench = mvbench.MVBench(mvbench.ANSWERS, data=data, leave_out=others)
    assert len(mvbench.frames_of(bench.entries()[0])) == 16


def test_mvbench_takes_the_span_that_is_meant(here: Path) -> None:
    frames = np.repeat(np.arange(60, dtype=np.uint8), 16 * 16 * 3).reshape(60, 16, 16, 3)
    np.savez(here / "clip.npz", frames=frames)
    (here / "clip.json").write_text('{"fps": 10}')

    def seen(span: tuple[float, float] | None) -> list[int]:
        asked = mvbench.Question("action_count", 0, here / "clip.npz", "?", ("a", "b"), 0, span)
        return [int(frame[0, 0, 0]) for frame in mvbench.frames_of(asked).frames]

    assert seen(None)[:3] == [1, 5, 9]
    assert seen((1.0, 2.6)) == list(range(10, 26))
    assert seen((5.9, 9.0)) == [59] * 16
    with pytest.raises(Exception, match="ends before second 7"):
        seen((7.0, 9.0))


def test_processes_share_the_samples(
    evaluate, here: Path, three_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them: each makes its own half, and none waits for the others."""
    words = (*SMALL, "--config", three_prompts, "--limit", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (
        ("1", ["0001.png", "0003.png"]),
        ("0", ["0000.png", "0001.png", "0002.png", "0003.png"]),
    ):
        monkeypatch.setenv("RANK", rank)
        assert evaluate("geneval", *words, "--stages", "sample")[0] == 0
        assert sorted(path.name for path in Path("run").rglob("*.png")) == made
    code, said = evaluate("geneval", *words)
    assert (code, "without torchrun" in said) == (2, True)


@pytest.mark.slow
def test_torchrun(here: Path, tiny_checkpoint: Path, three_prompts: Path) -> None:
    words = ["eval", "geneval", *SMALL, "--config", three_prompts, "--out", "run", "--stages", "sample"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "openlance", *map(str, words), "--model", str(tiny_checkpoint)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(stamps("*.png")) == 12


@pytest.mark.parametrize("name", ["geneval", "dpg", "vbench", "gedit", "mvbench"])
def test_setup_writes_and_says(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from openlance.eval.settings import read_config

    assert main(["eval", "setup", name]) == 0
    assert f"eval/{name}/config.toml" in capsys.readouterr().out
    config = read_config(here / "eval" / name / "config.toml")
    assert (config.scorer is not None) == (name in ("geneval", "dpg", "vbench"))
    assert (config.judge is not None) == (name == "gedit")
    assert main(["eval", "setup", "poems"]) == 2
