"""Totals by hand: sub-scores that were published with their totals, and score files made for the purpose."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from made import DPG_ROWS, dpg_data, info, lines, mvbench_data

from openlance.errors import InputError
from openlance.eval import dpg, gedit, geneval, mvbench, vbench
from openlance.eval.harness import ANSWERS, CLIPS, IMAGES, Run
from openlance.eval.results import Scored, finish
from openlance.eval.settings import EvalConfig


def run_of(benchmark: object, folder: Path, **own: bool) -> Run:
    (folder / "judged").mkdir(exist_ok=True)
    return Run(benchmark, folder, EvalConfig(), quiet=True, **own)  # type: ignore[arg-type]


# -- published sub-scores give the published totals (ByteDance's numbers) --------------------------------


def test_published_geneval() -> None:
    tags = dict(zip(geneval.TAGS, (1.00, 0.94, 0.84, 0.97, 0.87, 0.81), strict=True))
    assert geneval.overall(tags) == pytest.approx(0.905, abs=1e-12)  # published as 0.90


def test_published_gedit() -> None:
    values = (7.73, 7.74, 7.28, 7.83, 7.50, 7.03, 7.64, 7.85, 7.71, 4.46, 7.57)
    assert round(gedit.overall(dict(zip(gedit.GROUPS, values, strict=True))), 2) == 7.30


def test_published_vbench() -> None:
    assert round(vbench.total(85.14, 84.96), 2) == 85.10  # published as 85.11, from unrounded parts


# -- GenEval ---------------------------------------------------------------------------------------------


def test_the_bundled_prompts_are_genevals() -> None:
    entries = geneval.GenEval(IMAGES).entries()
    assert len(entries) == 553
    assert Counter(asked["tag"] for _, asked in entries) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
        "color_attr": 100,
    }  # fmt: skip
    known = {0: "a bench", 1: "a cow", 457: "a pink oven and a green motorcycle",
             530: "a purple suitcase and an orange pizza"}  # fmt: skip
    assert {number: entries[number][1]["prompt"] for number in known} == {
        number: f"a photo of {words}" for number, words in known.items()
    }
    assert (geneval.PROMPTS.parent / "LICENSE").read_text().count("MIT License") == 1


@pytest.fixture
def two_tags(tmp_path: Path) -> Run:
    asked = [{"tag": "colors", "prompt": "p"}, {"tag": "counting", "prompt": "q"}]
    data = lines(tmp_path / "prompts.jsonl", asked)
    return run_of(geneval.GenEval(IMAGES, data=data), tmp_path)


def test_a_limit_is_spread_over_the_list() -> None:
    samples = geneval.GenEval(IMAGES, limit=6).samples()
    assert [sample.facts["asked"]["tag"] for sample in samples[::4]] == list(geneval.TAGS)
    assert [sample.seeds for sample in samples[:5]] == [(42,), (43,), (44,), (45,), (42,)]


def judged(run: Run, right: dict[str, bool]) -> None:
    rows = [{"filename": f"/elsewhere/{name}", "correct": correct} for name, correct in right.items()]
    lines(run.judged / "part" / "results.jsonl", rows)


def test_geneval_means_pictures_within_tags_then_tags(two_tags: Run) -> None:
    names = [sample.path for sample in two_tags.benchmark.samples()]
    assert names[:2] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    judged(two_tags, dict(zip(names, (True, True, True, False, False, False, True, False), strict=True)))
    scored = finish(two_tags)
    assert scored.scores == {"overall": 0.5, "tags": {"counting": 0.25, "colors": 0.75}}
    saved = json.loads((two_tags.folder / "scores.json").read_text())
    assert saved["counts"] == {"published": 553, "entries": 2, "judged": 8, "failures": 0}
    assert (saved["complete"], saved["whole_benchmark"]) == (True, False)


def test_geneval_names_what_was_not_judged(two_tags: Run) -> None:
    names = [sample.path for sample in two_tags.benchmark.samples()]
    judged(two_tags, dict.fromkeys(names[1:], True))
    with pytest.raises(InputError, match=r"1 without a score.*00000/samples/0000\.png"):
        finish(two_tags)
    assert not (two_tags.folder / "scores.json").exists()
    assert finish(two_tags, allow_failures=True).scores["overall"] == 1.0
    saved = json.loads((two_tags.folder / "scores.json").read_text())
    assert (saved["complete"], saved["failures"]) == (False, [f"{names[0]}: no score"])


def test_geneval_refuses_doubles_strangers_and_lost_tags(two_tags: Run) -> None:
    names = [sample.path for sample in two_tags.benchmark.samples()]
    judged(two_tags, dict.fromkeys(names, True))
    extra = lines(two_tags.judged / "more.jsonl", [{"filename": names[3], "correct": True}])
    with pytest.raises(InputError, match=r"judged twice: 00000/samples/0003\.png"):
        finish(two_tags)
    lines(extra, [{"filename": "00007/samples/0000.png", "correct": True}])
    with pytest.raises(InputError, match=r"no sample of this run: 00007/samples/0000\.png"):
        finish(two_tags)
    extra.write_text('{"filename": "00001/samp')
    with pytest.raises(InputError, match=r"more\.jsonl:1: cut short"):
        finish(two_tags)
    extra.unlink()
    judged(two_tags, dict.fromkeys(names[:4], True))
    with pytest.raises(InputError, match="nothing of counting has a score"):
        finish(two_tags, allow_failures=True)


# -- DPG-Bench -------------------------------------------------------------------------------------------


TILES = [(0, 0), (8, 0), (0, 8), (8, 8)]
DPG_SAID = {
    "a": ["yes yes yes", "no yes yes", "yes no yes", "yes yes maybe"],
    "b": ["yes yes", "yes no", "no no", "yes yes"],
}


def dpg_answers(folder: Path, skip: tuple = ()) -> None:
    text = ""
    for name, said in DPG_SAID.items():
        for (left, top), answers in zip(TILES, said, strict=True):
            for row, answer in zip([row for row in DPG_ROWS if row[0] == name], answers.split(), strict=True):
                if row not in skip:
                    text += f"/x, y/{name}.png, ({left}, {top}, {left + 8}, {top + 8}), {row[4]}, {answer}\n"
    (folder / "judged").mkdir(exist_ok=True)
    (folder / "judged" / "dpg_detail.txt").write_text(text)


def test_dpg_passes_a_parents_no_on(tmp_path: Path) -> None:
    data = dpg_data(tmp_path / "data", DPG_ROWS)
    dpg_answers(tmp_path)
    scored = finish(run_of(dpg.DPG(IMAGES, data=data), tmp_path))
    # a: 1; the first no makes all no: 0; 1/3 (the third has a no above it); 2/3. b: 1, 1/2, 0, 1.
    a, b = (1 + 0 + 1 / 3 + 2 / 3) / 4, (1 + 0.5 + 0 + 1) / 4
    assert scored.scores["overall"] == pytest.approx(100 * (a + b) / 2)
    # Categories take the answers as they were given, of all tiles.
    assert scored.scores["categories"] == pytest.approx(
        {"entity": 100 * (3 + 3 + 2) / 12, "attribute": 75.0, "relation": 75.0}
    )
    assert scored.scores["fine_categories"]["entity - whole"] == 75.0  # type: ignore[index]


def test_dpg_as_published(tmp_path: Path) -> None:
    """The first row is not asked, so prompt a, whose questions depend on it, falls out; categories have the
    last tile alone."""
    data = dpg_data(tmp_path / "data", DPG_ROWS)
    dpg_answers(tmp_path, skip=(DPG_ROWS[0],))
    scored = finish(run_of(dpg.DPG(IMAGES, data=data), tmp_path, as_published=True))
    assert scored.scores["overall"] == pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)
    assert scored.scores["categories"] == {"entity": 100.0}
    with pytest.raises(InputError, match="a: the scorer asked 'Is it red"):
        finish(run_of(dpg.DPG(IMAGES, data=data), tmp_path))


def test_dpg_names_what_stopped_half_way(tmp_path: Path) -> None:
    data = dpg_data(tmp_path / "data", DPG_ROWS)
    dpg_answers(tmp_path)
    file = tmp_path / "judged" / "dpg_detail.txt"
    whole = file.read_text().splitlines()
    run = run_of(dpg.DPG(IMAGES, data=data), tmp_path)
    file.write_text("\n".join(whole[:-1]))
    with pytest.raises(InputError, match="b: 1 questions have no answer"):
        finish(run)
    file.write_text("\n".join(whole[:-2]))
    with pytest.raises(InputError, match="b: 3 tiles are judged, not 4"):
        finish(run)
    file.write_text("\n".join([*whole, whole[-1]]))
    with pytest.raises(InputError, match="judged twice: b has 3 answers to 2 questions"):
        finish(run)


def test_dpg_refuses_questions_without_their_parent(tmp_path: Path) -> None:
    rows = [DPG_ROWS[0], ("a", 2, "7", "entity - whole (x)", "Is there an x?")]
    with pytest.raises(InputError, match="a: a question depends on one that is not there"):
        dpg.read_questions(dpg_data(tmp_path / "data", rows) / "dpg_bench.csv")


# -- VBench ----------------------------------------------------------------------------------------------


def test_vbench_by_hand() -> None:
    raw = dict.fromkeys(vbench.DIMENSIONS, 0.5)
    normal = vbench.normalise(raw)
    assert normal["subject_consistency"] == pytest.approx((0.5 - 0.1462) / 0.8538)
    assert normal["motion_smoothness"] == pytest.approx((0.5 - 0.706) / 0.2915)
    assert normal["appearance_style"] == pytest.approx(0.4991 / 0.2846)
    assert normal["dynamic_degree"] == normal["color"] == 0.5
    best = {name: high for name, (_, high) in vbench.RANGES.items()}
    normal = vbench.normalise(
        dict.fromkeys(vbench.DIMENSIONS, 1.0) | best | {"dynamic_degree": 0.0, "color": 0.1}
    )
    assert vbench.quality(normal) == pytest.approx(6 / 6.5)
    assert vbench.semantic(normal) == pytest.approx(8.1 / 9)
    assert vbench.total(6 / 6.5, 0.9) == pytest.approx((4 * 6 / 6.5 + 0.9) / 5)


def results(run: Run, dimension: str, value: object, name: str = "x") -> None:
    run.judged.mkdir(exist_ok=True)
    (run.judged / f"{dimension}{name}_eval_results.json").write_text(json.dumps({dimension: value}))


def test_vbench_needs_every_dimension(tmp_path: Path) -> None:
    run = run_of(vbench.VBench(CLIPS, data=info(tmp_path, [("a dog", list(vbench.DIMENSIONS))])), tmp_path)
    for dimension in vbench.DIMENSIONS[:-1]:
        results(run, dimension, [0.5, []])
    with pytest.raises(InputError, match="missing overall_consistency"):
        finish(run, allow_failures=True)
    results(run, "overall_consistency", [0.2, []])
    normal = vbench.normalise(dict.fromkeys(vbench.DIMENSIONS, 0.5) | {"overall_consistency": 0.2})
    expected = 100 * (4 * vbench.quality(normal) + vbench.semantic(normal)) / 5
    assert finish(run).scores["total"] == pytest.approx(expected)
    results(run, "scene", [0.5, []], "again")
    with pytest.raises(InputError, match="judged twice: scene"):
        finish(run)
    results(run, "scene", [63.2, []], "again")
    (run.judged / "scenex_eval_results.json").unlink()
    with pytest.raises(InputError, match=r"scene is 63\.2, not a number from 0 to 1"):
        finish(run)


def test_vbench_names_clips_that_a_mean_lacks(tmp_path: Path) -> None:
    entries = [("a dog", list(vbench.DIMENSIONS)), ("a cat", ["color"]), ("a dog", ["color"])]
    bench = vbench.VBench(CLIPS, data=info(tmp_path, entries))
    run = run_of(bench, tmp_path)
    paths = [sample.path for sample in bench.samples()]
    assert len(paths) == 25 + 5  # the prompt that stands there twice has its clips once
    assert (paths[0], paths[24], paths[25]) == ("a dog-0.mp4", "a dog-24.mp4", "a cat-0.mp4")
    assert bench.counted() == 3
    for dimension in vbench.DIMENSIONS:
        rows = [{"video_path": f"/v/{path}", "video_results": 0.5} for path in paths]
        if dimension == "color":
            rows = rows[:-1]
        if dimension == vbench.FLICKERING:
            rows = rows[:4]
        results(run, dimension, [0.3, rows])
    scored = finish(run, allow_failures=True)
    assert set(scored.failures) == {
        "temporal_flickering: 4 clips of 'a dog' are judged, not 5 (the others move too much)",
        "color: a cat-4.mp4 is not judged",
    }


@pytest.mark.parametrize("prompt", ["up/down", "x" * 250])
def test_vbench_prompts_must_be_names(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a file"):
        vbench.VBench(CLIPS, data=info(tmp_path, [(prompt, ["color"])])).samples()


# -- GEdit-Bench -----------------------------------------------------------------------------------------


@pytest.fixture
def edits(tmp_path: Path) -> Run:
    rows = [("k1", "ps_human"), ("k2", "ps_human"), ("k3", "style_change")]
    lines(
        tmp_path / "data" / "instructions.jsonl",
        [{"key": key, "group": group, "instruction": f"do {key}"} for key, group in rows],
    )
    return run_of(gedit.GEdit(IMAGES, data=tmp_path / "data"), tmp_path)


def write_scores(run: Run, group: str, rows: list[tuple]) -> None:
    with (run.judged / f"openlance_{group}_en_vie_score.csv").open("w", newline="") as file:
        header = ("edited_image", "sementics_score", "quality_score", "instruction_language")
        csv.writer(file).writerows([header, *rows])


def test_gedit_by_hand(edits: Run) -> None:
    write_scores(
        edits, "ps_human", [("/e/k1.png", 9, 4, "en"), ("/e/k2.png", 0, 8, "en"), ("/e/k9.png", 1, 1, "cn")]
    )
    write_scores(edits, "style_change", [("/e/k3.png", 8, 8, "en")])
    scored = finish(edits)
    assert scored.scores["groups"] == {"ps_human": 3.0, "style_change": 8.0}  # (√36 + 0) / 2
    assert scored.scores["overall"] == 5.5
    assert scored.scores["semantic_consistency"] == (4.5 + 8) / 2


def test_gedit_bad_files(edits: Run) -> None:
    write_scores(edits, "ps_human", [("/e/k1.png", 9, 4, "en")])
    write_scores(edits, "style_change", [("/e/k3.png", 8, 8, "en")])
    with pytest.raises(InputError, match="k2: no score"):
        finish(edits)
    write_scores(edits, "style_change", [("/e/k3.png", 8, 12, "en")])
    with pytest.raises(InputError, match="k3: scores lie from 0 to 10"):
        finish(edits)
    write_scores(edits, "style_change", [("/e/k3.png", "n/a", 2, "en")])
    with pytest.raises(InputError, match=r"style_change_en_vie_score\.csv:2"):
        finish(edits)


# -- MVBench ---------------------------------------------------------------------------------------------

OPTIONS = ("a man", "red", "blue", "green C")


@pytest.mark.parametrize(
    "answer, chosen",
    [
        ("A", 0), ("(a)", 0), ("B", 1), ("B.", 1), ("(B) red", 1), ("B: red", 1), ("Answer: B", 1),
        ("The best option is (C).", 2), ("Option C", 2), ("red", 1), ("Red.", 1), ("D. green C", 3),
        ("A man", 0),
        ("", None), (" ", None), ("a", None), ("A woman walks", None), ("I see a dog", None), ("E", None),
        ("A or B", None), ("(A) or (B)", None), ("B. C.", None), ("Because it moves", None), ("redder", None),
    ],
)  # fmt: skip
def test_options_are_read_strictly(answer: str, chosen: int | None) -> None:
    assert mvbench.choice(answer, OPTIONS) == chosen


def test_mvbench_by_hand(tmp_path: Path) -> None:
    data = mvbench_data(tmp_path / "data", {"action_count": 2, "state_change": 1})
    others = [task for task in mvbench.TASKS if task not in ("action_count", "state_change")]
    bench = mvbench.MVBench(ANSWERS, data=data, leave_out=others)
    assert [sample.path for sample in bench.samples()][:2] == [
        "action_count/0000.json",
        "action_count/0001.json",
    ]
    run = run_of(bench, tmp_path)
    rows = [
        (name, chosen, 1)
        for name, chosen in zip([s.path for s in bench.samples()], (1, None, 1), strict=True)
    ]
    lines(
        run.judged / "answers.jsonl",
        [dict(zip(("name", "chosen", "right"), row, strict=True)) for row in rows],
    )
    scored: Scored = finish(run)
    assert scored.scores["tasks"] == {"action_count": 50.0, "state_change": 100.0}
    assert scored.scores["overall"] == 75.0
    assert scored.scores["names_no_option"] == pytest.approx(100 / 3)


def test_mvbench_names_a_task_that_is_not_there(tmp_path: Path) -> None:
    data = mvbench_data(tmp_path / "data", {"action_sequence": 1})
    with pytest.raises(InputError, match=r"action_prediction\.json.*--leave-out action_prediction"):
        mvbench.MVBench(ANSWERS, data=data).entries()
