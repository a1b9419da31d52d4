"""A judging model for edits: ask, read its numbers, ask again, keep what it said."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from PIL import Image

from openlance.config import to_dict
from openlance.data.media import load_image
from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.eval.endpoint import NoAnswerError, ask
from openlance.eval.harness import Run, Sample, read_back
from openlance.eval.settings import Endpoint
from openlance.model.release import read_json

AREA = 512 * 512  # pixels of what the judge is shown, as GEdit-Bench shows it
ASKED = 3  # times, for one answer that can be read
GIVE_UP = 10  # requests in a row that the service leaves without an answer
HIGHEST = 10.0
# The names of VIEScore's parts, in the order in which it joins them.
SC_PARTS = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC")
PQ_PARTS = ("_context_no_delimit", "_prompts_0shot_rule_PQ")


@dataclass(frozen=True)
class Wording:
    """What the judge is asked. sc: about source and edit, <instruction> in it; pq: about the edit alone."""

    sc: str
    pq: str
    name: str


OURS = Wording(
    sc=(
        "The first picture is a source, the second one is what an editing program made of it. It was told:\n"
        "<instruction>\n"
        "Give two whole numbers from 0 to 10. First: how well the second picture does what was told (0 not "
        "at all, 10 fully). Second: how well it keeps everything that was not spoken of (0 another picture, "
        '10 nothing else changed). Answer with JSON alone: {"score": [first, second], "reasoning": "one '
        'sentence"}'
    ),
    pq=(
        "Judge how well this picture is made, whatever it shows. Give two whole numbers from 0 to 10. First: "
        "how natural it looks, in light, shadow, distance and scale (0 not at all, 10 like a photograph or a "
        "careful drawing). Second: how free it is of faults such as smears, seams, broken bodies and "
        'unreadable marks (0 full of them, 10 none). Answer with JSON alone: {"score": [first, second], '
        '"reasoning": "one sentence"}'
    ),
    name="our own wording: not comparable with published numbers",
)


def read_wording(path: Path | None) -> Wording:
    """VIEScore's own wording from its file `vie_prompts.py`, which is read and not run; without one, ours."""
    if path is None:
        return OURS
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as VIEScore's vie_prompts.py ({error})") from error
    texts: dict[str, str] = {}
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            texts |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    missing = [name for name in dict.fromkeys(SC_PARTS + PQ_PARTS) if name not in texts]
    if missing:
        raise InputError(f"{path}: has no text {', '.join(missing)}: give VIEScore's vie_prompts.py")
    sc, pq = ("\n".join(texts[name] for name in parts) for parts in (SC_PARTS, PQ_PARTS))
    return Wording(sc, pq, "VIEScore's own")


def judge_edits(run: Run, pairs: Sequence[tuple[Sample, Path, Path]]) -> dict[str, dict[str, Any]]:
    """Rows of VIEScore's files by sample path, for each (source, edit) that got readable answers.

    Each sample's answers are kept in `judged/answers/`, and not asked for again. Raises InputError where the
    service cannot be used, or gives no answer to several requests in a row.
    """
    service, wording = run.config.judge, read_wording(run.config.prompts)
    assert service is not None
    run.judged.mkdir(parents=True, exist_ok=True)
    told = read_back(to_dict(service)) | {"wording": wording.name, "stand_in": False}
    file = run.judged / "scorer.json"
    if file.is_file() and {**read_json(file), "url": ""} != {**told, "url": ""}:
        raise InputError(f"{file}: another judge began here: remove {run.judged} to begin anew")
    save_json(told, file)
    found: dict[str, dict[str, Any]] = {}
    silent = 0
    with ThreadPoolExecutor(service.parallel) as pool, run.bar(None, "judge", total=len(pairs)) as bar:
        asked = {
            pool.submit(_judge, run.judged / "answers", sample, source, edit, service, wording): sample
            for sample, source, edit in pairs
        }
        try:
            for done in as_completed(asked):
                bar.update()
                try:
                    row = done.result()
                except NoAnswerError as error:
                    silent += 1
                    if silent >= GIVE_UP:
                        raise InputError(
                            f"{error}; this was request {silent} in a row: --stages score goes on"
                        ) from error
                    continue
                silent = 0
                if row is not None:
                    found[asked[done].path] = row
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return found


def _judge(
    folder: Path, sample: Sample, source: Path, edit: Path, service: Endpoint, wording: Wording
) -> dict[str, Any] | None:
    """The row of one edit; None where no answer could be read."""
    file = folder / f"{sample.path.removesuffix('.png')}.json"
    stat = edit.stat()
    state = [stat.st_size, stat.st_mtime_ns]
    kept = read_json(file) if file.is_file() else {}
    if kept.get("state") != state:
        pictures = [_at_area(load_image(path)) for path in (source, edit)]
        sc = _numbers(service, wording.sc.replace("<instruction>", sample.prompt), pictures)
        pq = _numbers(service, wording.pq, pictures[1:])
        if sc is None or pq is None:
            return None
        kept = {"state": state, "sc": sc, "pq": pq}
        save_json(kept, file)
    return {
        "source_image": str(source),
        "edited_image": str(edit),
        "instruction": sample.prompt,
        "sementics_score": min(kept["sc"]),
        "quality_score": min(kept["pq"]),
    }


def _numbers(service: Endpoint, words: str, pictures: list[Image.Image]) -> list[float] | None:
    """Two numbers, asked for several times where they cannot be read; the later times not at temperature 0,
    at which the same answer would come."""
    for time in range(ASKED):
        numbers = read_score(ask(service, words, pictures, temperature=0.5 if time else 0.0))
        if numbers is not None:
            return numbers
    return None


def read_score(answer: str) -> list[float] | None:
    """The two numbers of a judge's answer, {"score": [a, b], …} with anything around it; None where it has
    no such thing, another count of numbers, or one outside 0 to 10."""
    for match in re.finditer(r'"?score"?\s*[:=]\s*(\[[^\]]*\])', answer):
        try:
            numbers = json.loads(match[1])
        except ValueError:
            continue
        plain = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        if plain and len(numbers) == 2 and all(0 <= number <= HIGHEST for number in numbers):
            return [float(number) for number in numbers]
    return None


def _at_area(picture: Image.Image) -> Image.Image:
    """The picture at the judge's size, its shape kept."""
    scale = sqrt(AREA / (picture.width * picture.height))
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
