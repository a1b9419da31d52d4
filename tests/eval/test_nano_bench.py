"""nano-bench counts what it says it counts, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from openlance.errors import InputError
from openlance.eval.nano_bench import PARTS, WIDE_PARTS, Tally, run, table
from openlance.infer.pipeline import LancePipeline


@pytest.fixture(scope="module")
def nano() -> LancePipeline:
    return LancePipeline.from_pretrained("nano")


def test_tally_leaves_out_what_was_not_asked() -> None:
    tally = Tally()
    for right in (True, False, None, True):
        tally.mark("color", right)
    tally.mark("motion", None)
    assert tally.scores() == {"color": 2 / 3}


def test_every_part_scores_and_is_written(nano: LancePipeline, tmp_path: Path) -> None:
    results = run(nano, count=2, clips=1, steps=2, out=tmp_path)
    assert tuple(results) == PARTS == ("one", "two", "held_out", "questions", "edits", "motion")
    for scores in results.values():
        assert all(0 <= value <= 1 for name, value in scores.items() if name != "seconds")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scores"] == results
    assert Image.open(tmp_path / "sheet.png").width > 200
    assert table(results).count("\n") == 1 + len(PARTS)


def test_the_same_seed_gives_the_same_scores(nano: LancePipeline) -> None:
    first, again = (run(nano, count=3, steps=3, parts=("one", "questions")) for _ in range(2))
    for part in first:
        assert {k: v for k, v in first[part].items() if k != "seconds"} == {
            k: v for k, v in again[part].items() if k != "seconds"
        }


def test_the_wide_parts_score_what_they_name(nano: LancePipeline) -> None:
    results = run(nano, count=4, steps=1, parts=WIDE_PARTS)
    names = {part: set(scores) - {"seconds"} for part, scores in results.items()}
    assert names == {
        "boxes": {"all"},
        "words": {"drawn", "read", "write", "rewrite", "erase"},
        "several": {"all", "which", "same", "most", "total"},
        "turns": {"question", "second edit"},
    }
    assert all(0 <= results[part][name] <= 1 for part in names for name in names[part])


def test_an_unknown_part_is_named(nano: LancePipeline) -> None:
    with pytest.raises(InputError, match="poems"):
        run(nano, count=1, parts=("one", "poems"))


@pytest.mark.slow
def test_nano_draws_and_names_what_it_is_asked(nano: LancePipeline) -> None:
    """The promise of the README, with room for chance: half of what docs/nano.md measures."""
    results = run(nano, count=24, parts=("one", "questions"))
    assert results["one"]["color"] > 0.5  # chance: 1 in 8
    assert results["one"]["place"] > 0.5  # chance: 1 in 9
    assert results["questions"]["color"] > 0.4
