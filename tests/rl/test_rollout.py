"""Groups in one pass, against each target alone over a cached context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CHANNELS, build_network, network
from tiny_rl import prompt, rl_config
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.infer.generate import denoise
from openlance.model.lance import Lance
from openlance.rl.grpo import GRPO
from openlance.rl.rollout import Targets, as_learnt
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks
from openlance.train.settings import TrainConfig

ATOL = 1e-5  # float32, another order of operations, as tests/infer/test_denoise.py
NAMES = ("t2i", "i2v", "image_edit", "subject")
GUIDED = SamplingConfig(steps=4, shift=2.0, guidance=3.0, guidance_interval=(0.4, 1.0))


def targets(
    name: str, members: range, sampling: SamplingConfig = GUIDED, model: Lance | None = None
) -> Targets:
    objective = Objective(model or network(), TrainConfig(steps=1))
    return Targets(objective, prompt(name).sample, members, sampling, Ranks())


def states(group: Targets, seed: int = 0) -> Tensor:
    return group.draw(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_its_members_alone(name: str) -> None:
    """What the ODE makes of them, guided in some of its steps, is what the cached sampler makes of each."""
    group = targets(name, range(3))
    algorithm = GRPO(rl_config(rollout_steps=4, time_shift=2.0))
    end, visits = algorithm.explore(group, range(0), torch.Generator().manual_seed(0))
    assert visits == []
    for start, found in zip(states(group), group.latents(end), strict=True):
        noise = torch.zeros(*group.target.grid, CHANNELS)
        noise.view(-1, CHANNELS)[~group.target.fixed_tokens()] = start
        alone = denoise(network(), prompt(name).sample, GUIDED, noise)
        torch.testing.assert_close(found, alone, atol=ATOL, rtol=0)


def test_what_is_given_of_a_clip_stays() -> None:
    group = targets("i2v", range(2))
    given = prompt("i2v").sample[-1].latents
    for whole in group.latents(states(group)):
        assert torch.equal(whole[0], given[0])
        assert not torch.equal(whole[1], given[1])


def test_visual_guidance_has_a_third_branch() -> None:
    group = targets("image_edit", range(2), replace(GUIDED, visual_guidance=1.0))
    plain = targets("image_edit", range(2))
    state = states(group)
    torch.testing.assert_close(group.velocity(state, 0.8), plain.velocity(state, 0.8), atol=ATOL, rtol=0)
    assert group.tokens > plain.tokens


def test_gradients_of_a_group_are_those_of_its_members() -> None:
    """Through the shared context too: clean latents are the generation expert's."""
    found = []
    for split in ([range(3)], [range(1), range(1, 2), range(2, 3)]):
        model = build_network(1)
        whole = states(targets("image_edit", range(3)))
        for members in split:
            own = whole[members.start : members.stop]
            targets("image_edit", members, model=model).velocity(own, 0.8).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".gen.k." in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_what_is_kept_of_the_policy_is_what_an_update_computes() -> None:
    """To the bit, although the one runs where no gradient is wanted."""
    group = targets("t2i", range(4), model=build_network(0))
    state = states(group)
    with torch.no_grad():
        kept = as_learnt(group, state, 0.7)
    assert not kept.requires_grad
    assert torch.equal(kept, group.velocity(state, 0.7))


def test_stochastic_steps_are_kept_and_change_the_rest() -> None:
    group = targets("t2i", range(2))
    algorithm = GRPO(rl_config(rollout_steps=4, time_shift=2.0, window=2))
    made = [algorithm.explore(group, w, torch.Generator().manual_seed(0)) for w in (range(0), range(1, 3))]
    (plain, _), (noisy, visits) = made
    assert [visit.step.stochastic for visit in visits] == [True, True]
    assert torch.equal(visits[0].goal, visits[1].state)
    assert not torch.equal(plain, noisy)


def test_the_released_sampler_is_not_learnt_from() -> None:
    with pytest.raises(InputError, match="released_cached_sampler is for comparison"):
        targets("t2i", range(2), replace(GUIDED, released_cached_sampler=True))
