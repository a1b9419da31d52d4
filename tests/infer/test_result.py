"""What results say of themselves, and how a notebook shows them."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openlance.data.media import load_video
from openlance.errors import InputError
from openlance.infer.result import Answer, Generated

ANSWER = Answer("<b>Red</b> & round.\nTwo lines.", 7, "stop", {"seed": 3}, {"answer": 0.5})


@pytest.fixture
def picture_result(picture: Any) -> Generated:
    return Generated(picture[None], None, {"seed": 5})


@pytest.fixture
def clip_result(clip: Any) -> Generated:
    return Generated(clip, 8.0, {"seed": 6})


def test_results_say_in_one_line_what_they_are(picture_result: Generated, clip_result: Generated) -> None:
    assert repr(picture_result) == "<picture, 48x64, seed 5>"
    assert repr(clip_result) == "<clip of 8 frames, 48x64, seed 6>"


def test_a_notebook_shows_the_picture(picture_result: Generated, picture: Any) -> None:
    assert picture_result._repr_html_() is None
    assert np.array_equal(np.asarray(Image.open(BytesIO(picture_result._repr_png_()))), picture)


def test_a_notebook_plays_the_clip(clip_result: Generated) -> None:
    found = re.fullmatch(
        r'<video [^>]*src="data:video/mp4;base64,([^"]+)"></video>', clip_result._repr_html_() or ""
    )
    assert found is not None
    played = load_video(base64.b64decode(found[1]))
    assert played.frames.shape == clip_result.frames.shape and played.fps == 8.0


def test_words_are_shown_as_they_stand() -> None:
    shown = ANSWER._repr_html_()
    assert "&lt;b&gt;Red&lt;/b&gt; &amp; round.\nTwo lines." in shown and "<b>" not in shown


def test_an_answer_is_saved_with_its_settings(tmp_path: Path) -> None:
    path = ANSWER.save(tmp_path / "new" / "answer.json")
    assert json.loads(path.read_text()) == {
        "answer": ANSWER.text, "tokens": 7, "finish": "stop", "openlance": {"seed": 3},
        "seconds": {"answer": 0.5},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"answer\.txt: the name must end in \.json"):
        ANSWER.save(tmp_path / "answer.txt")
