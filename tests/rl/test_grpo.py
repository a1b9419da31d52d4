"""Advantages, the clipped loss and the loss of DiffusionNFT, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_rl import rl_config

from openlance.flow.path import time_grid
from openlance.flow.solver import Transition, transitions
from openlance.rl.grpo import GRPO, advantages, clipped
from openlance.rl.nft import NFT, merit
from openlance.rl.rollout import Visit


def test_advantages_compare_within_a_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.2, 0.2, 0.2, 0.2], [0.9, 1.0, 0.9, 1.0]])
    found, spread = advantages(rewards)
    one = 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(found[0], torch.tensor([-one, one, -one, one]))
    assert spread.tolist() == [True, False, True]
    assert found[1].tolist() == [0, 0, 0, 0]
    small = 0.05 / (0.05 + 1e-4)
    torch.testing.assert_close(found[2], torch.tensor([-small, small, -small, small]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("group", [3, 7, 24])
def test_equal_rewards_have_no_spread_whatever_their_mean_rounds_to(level: float, group: int) -> None:
    found, spread = advantages(torch.full((group,), level))
    assert not spread and not found.any()


def test_an_advantage_is_at_most_five() -> None:
    rewards = torch.zeros(100)
    rewards[0] = 1.0
    assert advantages(rewards)[0][0] == 5


@pytest.mark.parametrize(
    "ratio, advantage, loss",
    [
        (1.0, 2.0, -2.0),
        (1.05, 2.0, -2.1),
        (1.5, 2.0, -2.2),  # no more to gain above the range
        (0.5, 2.0, -1.0),
        (0.5, -2.0, 1.8),
        (1.5, -2.0, 3.0),
    ],
)
def test_the_ratio_is_clipped_where_it_would_gain(ratio: float, advantage: float, loss: float) -> None:
    found = clipped(torch.tensor(ratio), torch.tensor(advantage), 0.1)
    assert float(found) == pytest.approx(loss)


def visit(step: Transition, *, reference: bool = False) -> Visit:
    torch.manual_seed(0)
    state, velocity, other, goal = (torch.randn(3, 4, 2) for _ in range(4))
    if step.stochastic:
        goal = step.mean(state, velocity) + step.std * goal
    return Visit(None, step, state, velocity, goal, other if reference else None)  # type: ignore[arg-type]


def test_the_first_gradient_of_grpo_is_that_of_the_densities() -> None:
    """At ratio 1 the loss is −A, and its gradient −A times that of the log-density."""
    made = visit(transitions(time_grid(4, 1.0), range(1, 2))[1])
    advantage = torch.tensor([1.0, -0.5, 0.0])
    velocity = made.velocity.clone().requires_grad_()
    judged = GRPO(rl_config()).judge(made, velocity, advantage)
    assert judged.numbers["ratio"].tolist() == [1, 1, 1]
    assert judged.numbers["first_ratio_off"].tolist() == judged.numbers["clipped"].tolist() == [0, 0, 0]
    torch.testing.assert_close(judged.loss, -advantage)
    judged.loss.sum().backward()
    other = made.velocity.clone().requires_grad_()
    (-advantage * made.step.log_probability(made.state, other, made.goal)).sum().backward()
    torch.testing.assert_close(velocity.grad, other.grad)


def test_the_divergence_is_added_with_its_weight() -> None:
    made = visit(transitions(time_grid(4, 1.0), range(1, 2))[1], reference=True)
    found = GRPO(rl_config(kl=0.5)).judge(made, made.velocity, torch.zeros(3))
    torch.testing.assert_close(found.loss, 0.5 * made.step.divergence(made.velocity, made.reference))
    assert (found.numbers["kl"] > 0).all()


def test_merits() -> None:
    assert merit(torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0])).tolist() == [0, 0.25, 0.5, 1, 1]


def test_nft_draws_to_what_is_better_and_from_what_is_worse() -> None:
    """At the policy that drew, the gradient is 2 β (2 r − 1) (v_old − v) / n: nothing for a mean reward."""
    made = visit(Transition(0.5, 0.5))
    velocity = made.velocity.clone().requires_grad_()
    judged = NFT(rl_config(algorithm="nft", guidance=1.0, strength=0.3)).judge(
        made, velocity, torch.tensor([1.0, 0.0, -1.0])
    )
    judged.loss.sum().backward()
    merits = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    torch.testing.assert_close(velocity.grad, 2 * 0.3 * merits * (made.velocity - made.goal) / 8)


def test_windows_lie_in_their_share_and_are_drawn_anew() -> None:
    algorithm = GRPO(rl_config(rollout_steps=10, window=3, window_within=0.5))
    found = [algorithm.window(torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert {(w.start, w.stop) for w in found} == {(0, 3), (1, 4), (2, 5)}
