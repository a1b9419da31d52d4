"""The ComfyUI nodes: found as ComfyUI finds them, and run on nano as it runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from openlance import LancePipeline
from openlance.errors import InputError

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def package() -> ModuleType:
    """Imported by its folder, as ComfyUI imports what is in custom_nodes."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_openlance", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lance(package: ModuleType) -> LancePipeline:
    return run(package, "OpenlanceLoad", model="nano")[0]


def run(package: ModuleType, name: str, **inputs: Any) -> tuple:
    """A node as ComfyUI runs it: inputs by name, defaults filled in from INPUT_TYPES."""
    node = package.NODE_CLASS_MAPPINGS[name]
    types = node.INPUT_TYPES()
    known = types["required"] | types.get("optional", {})
    assert set(inputs) <= set(known), f"{name} has no input {set(inputs) - set(known)}"
    for field, (kind, *options) in known.items():
        if options and "default" in options[0]:
            inputs.setdefault(field, options[0]["default"])
        elif isinstance(kind, list):
            inputs.setdefault(field, kind[0])
    assert set(types["required"]) <= set(inputs)
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert len(outputs) == len(node.RETURN_TYPES)
    for kind, output in zip(node.RETURN_TYPES, outputs, strict=True):
        if kind == "IMAGE":
            assert output.dtype == torch.float32 and output.dim() == 4 and output.shape[-1] == 3
            assert output.min() >= 0 and output.max() <= 1
    return outputs


def test_every_node_is_complete(package: ModuleType) -> None:
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for node in package.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY == "openlance"


def test_generate_is_the_pipeline(package: ModuleType, lance: LancePipeline) -> None:
    (drawn,) = run(package, "OpenlanceGenerate", lance=lance, prompt="a red circle on white", seed=3, **STEPS)
    alone = lance.generate_image("a red circle on white", seed=3, steps=2)
    assert torch.equal((drawn * 255).round().to(torch.uint8), torch.from_numpy(alone.frames))


def test_the_tasks_follow_one_another(package: ModuleType, lance: LancePipeline) -> None:
    given = {"lance": lance, "seed": 1} | STEPS
    drawn = run(package, "OpenlanceGenerate", prompt="a red circle on white", width=96, height=96, **given)[0]
    both = torch.cat([drawn, 1 - drawn])
    edited = run(package, "OpenlanceEdit", image=both, prompt="make it blue", **given)[0]
    assert edited.shape == both.shape
    frames, fps = run(package, "OpenlanceAnimate", image=drawn, prompt="it moves right", frames=5, **given)
    assert frames.shape[0] == 5 and fps > 0
    filmed = run(package, "OpenlanceVideo", prompt="a blue star on black", frames=5, **given)[0]
    changed = run(package, "OpenlanceEdit", image=filmed, prompt="make it red", fps=fps, **given)[0]
    assert changed.shape == filmed.shape
    subject = run(package, "OpenlanceSubject", references=drawn, prompt="it on black", **given)[0]
    assert subject.shape == drawn.shape
    asked = {"lance": lance, "question": "what color is the circle?", "seed": 1}
    (answer,) = run(package, "OpenlanceAsk", image=drawn, **asked)
    assert (
        answer == lance.ask(asked["question"], (drawn[0] * 255).round().to(torch.uint8).numpy(), seed=1).text
    )
    (told,) = run(package, "OpenlanceAsk", image=filmed, fps=fps, **asked)
    assert isinstance(told, str)


def test_a_mistake_names_what_is_wrong(package: ModuleType, lance: LancePipeline) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        run(package, "OpenlanceGenerate", lance=lance, prompt=" ", seed=1)
    with pytest.raises(InputError, match="nowhere"):
        run(package, "OpenlanceLoad", model="./nowhere")
