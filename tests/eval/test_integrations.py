"""The adapters, against stand-ins of the classes that they extend (their packages need torchvision)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openlance.data.save import save_video

ROOT = Path(__file__).resolve().parents[2] / "integrations"


def provide(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module of this name, and empty packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.fixture
def clip(tmp_path: Path) -> str:
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    return str(save_video(frames, tmp_path / "clip.mp4", 4))


class BaseLmms:
    """The part of lmms_eval.api.model.lmms that the adapter meets."""

    def __init__(self) -> None:
        self._rank, self.task_dict = 0, {}

    @property
    def rank(self) -> int:
        return self._rank


@pytest.fixture
def lmms_lance(monkeypatch: pytest.MonkeyPatch) -> Any:
    registered: dict[str, type] = {}
    provide(monkeypatch, "lmms_eval.api.instance", Instance=SimpleNamespace)
    provide(monkeypatch, "lmms_eval.api.model", lmms=BaseLmms)
    provide(
        monkeypatch,
        "lmms_eval.api.registry",
        register_model=lambda name: lambda cls: registered.setdefault(name, cls),
    )
    monkeypatch.syspath_prepend(str(ROOT / "lmms_eval"))
    for name in [name for name in sys.modules if name.startswith("openlance_lmms_eval")]:
        monkeypatch.delitem(sys.modules, name)
    # As lmms-eval imports a plugin's models.
    plugin = __import__("openlance_lmms_eval.models", fromlist=["AVAILABLE_MODELS"])
    ((name, cls),) = plugin.AVAILABLE_MODELS.items()
    found = getattr(__import__(f"openlance_lmms_eval.models.{name}", fromlist=[cls]), cls)
    assert registered == {"lance": found}
    return found


def test_lmms_eval_asks(lmms_lance: Any, tiny_checkpoint: Path, picture: Image.Image, clip: str) -> None:
    model = lmms_lance(pretrained=str(tiny_checkpoint), batch_size="2", frames=8)
    model.task_dict = {"mme": {"test": [{"seen": [picture]}, {"seen": [clip]}, {"seen": []}]}}
    settings = {"max_new_tokens": 3, "until": ["\n\n", ""], "do_sample": False, "temperature": 0}
    requests = [
        SimpleNamespace(args=(f"question {index}?", settings, lambda doc: doc["seen"], index, "mme", "test"))
        for index in range(3)
    ]
    answers = model.generate_until(requests)
    pipeline = model.pipeline
    assert answers[0] == pipeline.ask("question 0?", picture, max_tokens=3, stop=("\n\n",)).text
    assert answers[2] == pipeline.ask("question 2?", max_tokens=3).text
    assert len(answers) == 3
    (shown,) = model._media([clip])
    assert len(shown.frames) == 8
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method(requests)
    with pytest.raises(ValueError, match="speed"):
        lmms_lance(pretrained=str(tiny_checkpoint), speed=2)


def test_lmms_evals_settings(lmms_lance: Any) -> None:
    options = sys.modules[lmms_lance.__module__].text_options
    assert options({}) == {"max_tokens": 256, "stop": (), "seed": 0}
    drawn = options({"do_sample": True, "temperature": 0.5, "top_p": None, "until": "###"})
    assert drawn == {"max_tokens": 256, "stop": ("###",), "seed": 0, "temperature": 0.5, "top_p": 1.0}


class BaseVLM:
    """The part of vlmeval.vlm.base.BaseModel that calls the adapter."""

    allowed_types = ("text", "image", "video")

    def generate(self, message: list[dict], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


def test_vlmevalkit_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path, picture: Image.Image, clip: str
) -> None:
    import importlib

    models: dict[str, Any] = {}
    provide(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseVLM)
    provide(monkeypatch, "vlmeval.config", supported_VLM=models)
    monkeypatch.syspath_prepend(str(ROOT / "vlmevalkit"))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    monkeypatch.setenv("OPENLANCE_MODEL", str(tiny_checkpoint))
    importlib.import_module("run").add_lance()
    model = models["Lance"]()
    assert (model.INTERLEAVE, model.VIDEO_LLM) == (True, True)
    picture.save(tmp_path / "a.png")
    message = [
        {"type": "text", "value": "first"},
        {"type": "image", "value": str(tmp_path / "a.png")},
        {"type": "video", "value": clip},
        {"type": "text", "value": "what?"},
    ]
    answer = model.generate(message, dataset="MVBench")
    content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
    assert answer == model.pipeline.chat([{"role": "user", "content": content}], max_tokens=512).text
