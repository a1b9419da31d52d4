"""A judge and a rewriter behind a service: what they are asked, and what becomes of bad answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from service import Service

from openlance.errors import InputError
from openlance.eval import endpoint, viescore
from openlance.eval.endpoint import NoAnswerError, ask
from openlance.eval.gedit import GEdit
from openlance.eval.harness import IMAGES, Run
from openlance.eval.prepare import unpack_gedit
from openlance.eval.results import finish
from openlance.eval.rewrite import Rewriter, by_service
from openlance.eval.settings import Endpoint, EvalConfig, read_config
from openlance.eval.viescore import read_score, read_wording


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.001)


@pytest.mark.parametrize(
    "answer, numbers",
    [
        ('{"score": [7, 9], "reasoning": "well"}', [7, 9]),
        ('Here:\n```json\n{"reasoning": "x", "score": [0, 10.0]}\n```', [0, 10]),
        ("score = [3, 4]", [3, 4]),
        ('{"score": [7]}', None),
        ('{"score": [7, 11]}', None),
        ('{"score": ["7", "8"]}', None),
        ("I would give 7 and 8", None),
        ("", None),
    ],
)
def test_only_two_numbers_from_0_to_10_are_a_score(answer: str, numbers: list | None) -> None:
    assert read_score(answer) == numbers


def words_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"][-1]["text"])


@pytest.fixture
def run(tmp_path: Path, service: Service) -> Run:
    """Three edits of red pictures, made by hand."""
    rows = []
    for key in ("k1", "k2", "k3"):
        rows.append(json.dumps({"key": key, "group": "ps_human", "instruction": f"do {key}"}))
        for name in (f"data/images/{key}.png", f"samples/openlance/fullset/ps_human/en/{key}.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    (tmp_path / "data" / "instructions.jsonl").write_text("\n".join(rows))
    judge = Endpoint(service.url, "judge", timeout=0.5, tries=2, parallel=1)
    return Run(GEdit(IMAGES, data=tmp_path / "data"), tmp_path, EvalConfig(judge=judge), quiet=True)


def test_the_least_of_each_judgement_counts(run: Run, service: Service) -> None:
    service.answer = lambda body: (
        '{"score": [9, 4]}' if len(body["messages"][-1]["content"]) == 3 else '{"score": [9, 10]}'
    )
    run.benchmark.score(run)
    assert len(service.bodies) == 6
    sc, pq = service.bodies[:2]
    assert "do k1" in words_of(sc)
    assert "<instruction>" not in words_of(sc)
    assert "do k1" not in words_of(pq)
    assert (sc["path"], sc["model"], sc["temperature"], sc["key"]) == (
        "/v1/chat/completions",
        "judge",
        0.0,
        None,
    )
    rows = list(csv.DictReader((run.judged / "viescore" / "openlance_ps_human_en_vie_score.csv").open()))
    assert [(row["sementics_score"], row["quality_score"]) for row in rows] == [("4.0", "9.0")] * 3
    assert finish(run).scores["overall"] == 6.0
    run.benchmark.score(run)
    assert len(service.bodies) == 6  # what is judged is not asked again


def test_an_unreadable_answer_is_asked_for_again_then_reported(run: Run, service: Service) -> None:
    said: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> str:
        words = words_of(body)
        said[words] = said.get(words, 0) + 1
        stubborn, slow = "do k2" in words, "do k3" in words and said[words] == 1
        return "it is nice" if stubborn or slow else '{"score": [4, 9]}'

    service.answer = answer
    run.benchmark.score(run)
    counts = {key: sum(n for words, n in said.items() if key in words) for key in ("do k1", "do k2", "do k3")}
    assert counts == {"do k1": 1, "do k2": viescore.ASKED, "do k3": 2}
    again = [body["temperature"] for body in service.bodies if "do k2" in words_of(body)]
    assert again == [0.0, 0.5, 0.5]
    with pytest.raises(InputError, match=r"1 without a score.*k2: no score"):
        finish(run)
    service.answer = lambda body: '{"score": [1, 9]}'
    run.benchmark.score(run)
    assert finish(run).scores["overall"] == pytest.approx((4 + 1 + 4) / 3, abs=1.5)


def test_a_judge_that_is_too_slow_is_reported_by_name(run: Run, service: Service) -> None:
    service.answer = lambda body: 1.0 if "do k1" in words_of(body) else '{"score": [4, 4]}'
    run.benchmark.score(run)
    scored = finish(run, allow_failures=True)
    assert scored.failures == ("k1: no score",)
    assert scored.scores["overall"] == 4.0


def test_a_judge_that_is_not_there_stops_the_run(
    run: Run, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viescore, "GIVE_UP", 2)
    service.answer = lambda body: 503
    with pytest.raises(InputError, match="no answer after 2 tries"):
        run.benchmark.score(run)


def test_another_judge_does_not_go_on_with_ones_answers(run: Run, service: Service) -> None:
    service.answer = lambda body: '{"score": [4, 4]}'
    run.benchmark.score(run)
    other = Run(run.benchmark, run.folder, EvalConfig(judge=Endpoint(service.url, "other")), quiet=True)
    with pytest.raises(InputError, match="another judge began here"):
        other.benchmark.score(other)


def test_the_services_refusals(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Endpoint(service.url, "m", key="A_KEY", tries=3)
    with pytest.raises(InputError, match="environment variable A_KEY"):
        ask(at, "hello")
    monkeypatch.setenv("A_KEY", "secret")
    answers: list[str | int] = [429, 500, "well"]
    service.answer = lambda body: answers.pop(0)
    assert ask(at, "hello", system="be brief") == "well"
    assert service.bodies[-1]["key"] == "Bearer secret"
    assert [message["role"] for message in service.bodies[-1]["messages"]] == ["system", "user"]
    service.answer = lambda body: 404
    with pytest.raises(InputError, match="refused with 404"):
        ask(at, "hello")
    service.answer = lambda body: 500
    with pytest.raises(NoAnswerError):
        ask(at, "hello")
    with pytest.raises(InputError, match="nothing answers there"):
        ask(Endpoint("http://127.0.0.1:9/v1", "m"), "hello")


def test_vies_wording_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "vie_prompts.py"
    names = dict.fromkeys((*viescore.SC_PARTS, *viescore.PQ_PARTS))
    file.write_text("raise SystemExit\n" + "".join(f'{name} = """{name}!"""\n' for name in names))
    wording = read_wording(file)
    assert wording.sc == "\n".join(f"{name}!" for name in viescore.SC_PARTS)
    assert wording.pq == "\n".join(f"{name}!" for name in viescore.PQ_PARTS)
    file.write_text("_context_no_delimit = 3\n")
    with pytest.raises(InputError, match="has no text _context_no_delimit"):
        read_wording(file)
    assert "not comparable" in read_wording(None).name


def test_prompts_are_rewritten_once(tmp_path: Path, service: Service) -> None:
    service.answer = lambda body: f"  a long\nstory of {body['messages'][-1]['content']} "
    write = Rewriter(by_service(Endpoint(service.url, "writer")), "writer", "picture", tmp_path)
    assert [write("a cat"), write("a dog"), write("a cat")] == [
        "a long story of a cat", "a long story of a dog", "a long story of a cat",
    ]  # fmt: skip
    assert len(service.bodies) == 2
    assert len(list(tmp_path.iterdir())) == 2
    service.answer = lambda body: "  "
    with pytest.raises(InputError, match="into nothing: 'a bird'"):
        write("a bird")


def test_gedits_parquet_is_unpacked(tmp_path: Path) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), "blue").save(buffer, "PNG")
    rows = [
        {"key": key, "task_type": "ps_human", "instruction": f"do {key}", "instruction_language": language,
         "input_image_raw": {"bytes": buffer.getvalue(), "path": None}}
        for key, language in (("k1", "en"), ("k2", "cn"), ("k3", "en"))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert unpack_gedit(tmp_path, tmp_path / "gedit") == 2
    bench = GEdit(IMAGES, data=tmp_path / "gedit")
    assert [sample.prompt for sample in bench.samples()] == ["do k1", "do k3"]
    assert Image.open(bench.source(bench.samples()[1])).size == (12, 8)


@pytest.mark.parametrize(
    "text, words",
    [
        ("data = ", "cannot be read as TOML"),
        ("speed = 3", "unknown speed"),
        ("[judge]\nurl = 'x'", "[judge] is not whole"),
        ("[judge]\nurl = 'ftp://x'\nmodel = 'm'", "http://"),
        ("[scorer]\ncommand = []", "not empty"),
        ("[scorer]\nshell = 'x'", "[scorer] has unknown shell"),
        ("judge = 3", "[judge]"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(InputError) as wrong:
        read_config(tmp_path / "config.toml")
    assert words in str(wrong.value)
