"""Adapters in the pipeline: loaded by name, switched, merged, gone again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_network

from openlance.errors import InputError
from openlance.infer.pipeline import LancePipeline
from openlance.model.adapters import add_lora, disabled, save_adapter
from openlance.world import Claims, ThingClaim, check


@pytest.fixture
def adapted(tiny_checkpoint: Path, tmp_path: Path) -> tuple[LancePipeline, list[Path]]:
    """A pipeline of its own, and two adapters that change much."""
    folders = []
    for seed in (1, 2):
        model = build_network(0)
        add_lora(model, ["gen"], rank=2, seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(seed))
        folders.append(tmp_path / f"adapter{seed}")
        save_adapter(model, folders[-1])
    return LancePipeline.from_pretrained(tiny_checkpoint, device="cpu"), folders


def draw(lance: LancePipeline) -> np.ndarray:
    return lance.generate_image("a red circle", seed=1, steps=2).frames


def test_adapters_are_switched_and_leave_nothing_behind(adapted: tuple[LancePipeline, list[Path]]) -> None:
    lance, (first, second) = adapted
    plain = draw(lance)
    lance.load_adapter(first, "first")
    one = draw(lance)
    lance.load_adapter(second, "second")
    two = draw(lance)
    assert not np.array_equal(plain, one) and not np.array_equal(one, two)
    lance.set_adapters("first")
    assert np.array_equal(draw(lance), one)
    lance.set_adapters("first", "second")
    assert not np.array_equal(draw(lance), one)
    lance.unload_adapters()
    assert np.array_equal(draw(lance), plain)
    with pytest.raises(InputError, match="first"):
        lance.set_adapters("first")


def test_a_merged_adapter_draws_the_same(adapted: tuple[LancePipeline, list[Path]]) -> None:
    lance, (first, _) = adapted
    lance.load_adapter(first)
    active = draw(lance).astype(int)
    lance.merge_adapters()
    assert not any("lora" in name for name, _ in lance.model.named_parameters())
    assert np.abs(draw(lance) - active).max() <= 1


def test_an_adapter_samples_in_its_own_way(adapted: tuple[LancePipeline, list[Path]]) -> None:
    """As long as it is active; what a call asks for comes first."""
    lance, (first, second) = adapted
    own = lance.config.sampling
    (first / "sampling.json").write_text('{"steps": 3, "guidance": 1.0}')
    lance.load_adapter(first, "few")
    few = replace(own, steps=3, guidance=1.0)
    assert lance.config.sampling == few
    made = lance.generate_image("a red circle", seed=1)
    assert made.settings["sampling"]["steps"] == 3
    assert lance.generate_image("a red circle", seed=1, steps=1).settings["sampling"]["steps"] == 1
    lance.load_adapter(second, "plain")
    assert lance.config.sampling == own
    lance.set_adapters("plain", "few")
    assert lance.config.sampling == few
    with disabled(lance.model):
        assert lance.config.sampling == own
    assert lance.config.sampling == few
    lance.unload_adapters()
    assert lance.config.sampling == own
    lance.load_adapter(first)
    lance.merge_adapters()
    assert lance.config.sampling == few


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"stops": 3}', r": unknown field\(s\) stops"),
        ('{"steps": 0}', ": steps must be at least 1"),
        ('{"steps": "few"}', ".steps must be int"),
        ('{"steps": 3', ""),
    ],
)
def test_sampling_of_an_adapter_that_cannot_be_is_refused(
    adapted: tuple[LancePipeline, list[Path]], text: str, said: str
) -> None:
    lance, (first, _) = adapted
    (first / "sampling.json").write_text(text)
    with pytest.raises(InputError, match=f"sampling.json{said}"):
        lance.load_adapter(first)
    assert not any("lora" in name for name, _ in lance.model.named_parameters())


def test_the_bundled_adapter_draws_in_five_steps() -> None:
    """What is asked, with a fifth of the evaluations or fewer."""
    lance = LancePipeline.from_pretrained("nano", device="cpu")
    lance.load_adapter("nano-fast")
    assert (lance.config.sampling.steps, lance.config.sampling.guidance) == (5, 1.0)
    words = "a large red circle in the center on white"
    claims = Claims((ThingClaim("circle", "red", "large", "center"),), 1, ground="white")
    right = [check(claims, lance.generate_image(words, seed=seed).frames[0]).all for seed in range(3)]
    assert sum(right) >= 2
