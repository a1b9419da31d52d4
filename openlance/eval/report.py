"""One page about a run, in one file that needs no other: numbers, and a gallery."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openlance.data.media import Video, load_media
from openlance.errors import InputError
from openlance.eval.harness import Run, Sample, spread
from openlance.eval.results import Scored, warnings
from openlance.model.release import read_json

SHOWN = 48  # samples in the gallery
SIDE = 240  # pixels of a thumbnail
FRAMES = 4  # of a clip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1120px; padding: 0 1rem; }
table { border-collapse: collapse; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
.warning { background: #fff3cd; padding: .5rem .8rem; margin: .3rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(run: Run, scored: Scored) -> Path:
    """Write `report.html` beside `scores.json`, which must be there; gives its path."""
    record = read_json(run.folder / "scores.json")
    samples = run.benchmark.samples()
    shown = spread([sample for sample in samples if (run.samples / sample.path).is_file()], SHOWN)
    body = [
        f"<h1>{escape(run.benchmark.name)}</h1>",
        *(f'<p class="warning">{escape(said)}</p>' for said in warnings(run)),
        _numbers(record["scores"]),
        _list("Without a score", record["failures"]),
        '<h2>Samples</h2><div class="gallery">' if shown else "",
        *(_figure(run, sample, scored.marks.get(sample.path, "")) for sample in shown),
        "</div>" if shown else "",
        f"<h2>Made with</h2><pre>{escape(_told(record))}</pre>",
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(run.benchmark.name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _numbers(scores: Mapping[str, Any]) -> str:
    rows = []
    for name, value in scores.items():
        if isinstance(value, Mapping):
            cells = ", ".join(f"{part} {number:.4g}" for part, number in value.items())
        else:
            cells = f"<strong>{value:.4g}</strong>"
        rows.append(
            f"<tr><th>{escape(name)}</th><td>{cells if '<strong>' in cells else escape(cells)}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _list(title: str, items: list[str]) -> str:
    if not items:
        return ""
    return f"<h2>{escape(title)}</h2><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _told(record: Mapping[str, Any]) -> str:
    kept = {name: record[name] for name in ("version", "commit", "counts", "scorer", "settings")}
    return json.dumps(kept, indent=1, ensure_ascii=False)


def _figure(run: Run, sample: Sample, mark: str) -> str:
    words = " · ".join(filter(None, (mark, sample.prompt)))
    try:
        shown = _picture(run.samples / sample.path)
    except InputError as error:
        shown = f"<p>{escape(str(error))}</p>"
    caption = f"{escape(words)}<br><small>{escape(sample.path)}</small>"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _picture(path: Path) -> str:
    """An `img` that holds its own data; of an answer, its words."""
    if path.suffix == ".json":
        return f"<blockquote>{escape(str(read_json(path).get('answer')))}</blockquote>"
    media = load_media(path)
    picture = _strip(media) if isinstance(media, Video) else media
    picture.thumbnail((SIDE * (FRAMES if isinstance(media, Video) else 1), SIDE))
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _strip(clip: Video) -> Image.Image:
    """Frames from first to last, side by side."""
    chosen = np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)
    return Image.fromarray(np.concatenate([clip.frames[index] for index in chosen], axis=1))
