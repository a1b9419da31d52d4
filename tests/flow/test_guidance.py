"""Guidance and renormalisation against the formulas written out, and when it acts."""

from __future__ import annotations

import pytest
import torch

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.flow.guidance import guide, guided_now

COND, UNCOND, NEITHER = (torch.randn(5, 3, generator=torch.Generator().manual_seed(s)) for s in range(3))


def rescaled(velocity: list[float], to: list[float], least: float) -> list[float]:
    """A velocity scaled down to the length of another, by the factor's bounds."""
    length, wanted = (sum(x * x for x in v) ** 0.5 for v in (velocity, to))
    factor = min(1.0, max(least, wanted / length))
    return [x * factor for x in velocity]


@pytest.mark.parametrize("least", [0.0, 0.9])
@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("renorm", ["none", "global", "channel"])
def test_formulas(renorm: str, scale: float, least: float) -> None:
    config = SamplingConfig(guidance=scale, renorm=renorm, renorm_min=least)
    rows = [[u + scale * (c - u) for c, u in zip(cs, us, strict=True)]
            for cs, us in zip(COND.tolist(), UNCOND.tolist(), strict=True)]  # fmt: skip
    if renorm == "channel":
        rows = [rescaled(row, cond, least) for row, cond in zip(rows, COND.tolist(), strict=True)]
    if renorm == "global":
        flat = rescaled([x for row in rows for x in row], COND.flatten().tolist(), least)
        rows = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    torch.testing.assert_close(guide(COND, UNCOND, config), torch.tensor(rows))


def test_scale_one_is_the_conditional_velocity() -> None:
    config = SamplingConfig(guidance=1.0)
    torch.testing.assert_close(guide(COND, UNCOND, config), COND)


def test_visual_guidance() -> None:
    config = SamplingConfig(guidance=3.0, visual_guidance=1.5, renorm="none")
    expected = NEITHER + 1.5 * (UNCOND - NEITHER) + 3.0 * (COND - UNCOND)
    torch.testing.assert_close(guide(COND, UNCOND, config, NEITHER), expected)


@pytest.mark.parametrize("renorm", ["none", "global", "channel"])
def test_visual_guidance_of_one_is_plain_guidance(renorm: str) -> None:
    plain = SamplingConfig(renorm=renorm)
    visual = SamplingConfig(renorm=renorm, visual_guidance=1.0)
    assert torch.equal(guide(COND, UNCOND, visual, NEITHER), guide(COND, UNCOND, plain))


def test_the_interval_is_open_below_and_closed_above() -> None:
    config = SamplingConfig(guidance_interval=(0.25, 0.75))
    acts = {t: guided_now(config, t) for t in (0.2, 0.25, 0.26, 0.75, 0.76, 1.0)}
    assert acts == {0.2: False, 0.25: False, 0.26: True, 0.75: True, 0.76: False, 1.0: False}
    assert guided_now(SamplingConfig(guidance_interval=(0.0, 1.0)), 1.0)


def test_no_scale_no_guidance() -> None:
    assert not guided_now(SamplingConfig(guidance=1.0), 0.9)
    assert guided_now(SamplingConfig(guidance=1.0, visual_guidance=2.0), 0.9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"shift": 0.0}, {"shift": float("nan")}, {"guidance": float("inf")}, {"renorm": "some"},
        {"guidance_interval": (0.5, 0.4)}, {"guidance_interval": (-0.1, 1.0)}, {"renorm_min": 1.5},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
