"""Reinforcement learning as one more stage of the training loop."""

from __future__ import annotations

import math
import signal
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from openlance.data.frames import Video
from openlance.data.save import contact_sheet
from openlance.errors import InputError
from openlance.model.lance import Lance
from openlance.rl.grpo import Judged, advantages
from openlance.rl.pictures import Decode, Pictures
from openlance.rl.rewards import Rewards
from openlance.rl.rewards.base import Media
from openlance.rl.rollout import Prompt, PromptFeed
from openlance.rl.words import Answers, Vocabulary
from openlance.train.checkpoint import Checkpoints
from openlance.train.draw import generator_of
from openlance.train.loop import NonFiniteLoss, Run, drive, freeze
from openlance.train.parallel import Ranks, spread
from openlance.train.report import Report, Tracker
from openlance.train.settings import RLConfig
from openlance.train.update import Average, learning_rate

SHEETS = "samples"
SHOWN = 16


class Maker(Protocol):
    """How prompts become pictures (`Pictures`) or answers (`Answers`), and what is learnt from them."""

    @property
    def compares(self) -> bool:
        """Whether the members of a group are rewarded, and learnt from by how much better than the others
        they are; else they are made with the weights that the run began with, and all are learnt from."""
        ...

    def make(
        self, prompt: Prompt, generator: torch.Generator, shared: torch.Generator
    ) -> tuple[list[Media], list[Any]]:
        """A group, and the visits (`Visit`, `Spoken`) to learn from, a few of its members in each. The group
        is empty where nothing compares its members.

        generator: of this group; shared: the same for all groups of the step.
        """
        ...

    def look(self, visit: Any) -> Tensor:
        """What the network says there now, differentiable."""
        ...

    def judge(self, visit: Any, found: Tensor, advantage: Tensor) -> Judged:
        """The loss of each of the visit's members, which have these advantages, now that this is found."""
        ...

    def best(self, prompt: Prompt, generator: torch.Generator) -> Media:
        """One picture or answer as the model would give it to a user."""
        ...


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is measured at intervals, on the averaged weights: what they make of these prompts.

    rewards: measured beside those that are learnt from, and never learnt from themselves. What is learnt can
    be gamed; they tell. fps: of clips, for the sheets.
    """

    prompts: Sequence[Prompt] = ()
    rewards: Rewards | None = None
    fps: float = 8.0


@dataclass(frozen=True, eq=False)
class Round:
    """A group that was made: the states to learn from; the reward [group, or none] and advantage [group] of
    each target; whether there is anything to learn: rewards that differ, or none that are asked."""

    prompt: Prompt
    visits: list[Any]
    reward: np.ndarray
    each: dict[str, np.ndarray]
    advantage: Tensor
    spread: bool


def train_rl(
    model: Lance,
    feed: PromptFeed,
    config: RLConfig,
    run_dir: Path,
    *,
    decode: Decode | Vocabulary,
    rewards: Rewards | None,
    held_out: HeldOut | None = None,
    ranks: Ranks | None = None,
    resume: bool = False,
    tracker: Tracker | None = None,
) -> Mapping[str, Tensor]:
    """Learn from rewards, and give the averaged weights of the whole network (on the main process).

    decode: latents into frames; for words, a `Vocabulary`. rewards: distillation asks for none, and has them
    on held-out prompts alone. run_dir, resume: as of `openlance.train.loop.train`, which this shares its
    loop, states and log with; a resumed run needs the weights that it began with, for the divergence from
    them, or to be taught by them. Raises RewardError, NonFiniteLoss, Stopped after a signal, InputError for
    settings or a folder that do not fit.
    """
    ranks = Ranks(device=model.device) if ranks is None else ranks
    checkpoints = Checkpoints(run_dir, config.keep, ranks)
    if checkpoints.steps() and not resume:
        raise InputError(f"{run_dir}: holds a run already; --resume goes on from it")
    if config.context > 1:
        raise InputError("context must be 1: reinforcement learning does not share packs over processes")
    if rewards is None and config.algorithm != "distill":
        raise InputError("no reward: give at least one")
    freeze(model.eval(), config)
    objective = spread(model, config, ranks)
    if isinstance(objective, FSDPModule):
        register_fsdp_forward_method(objective, "velocity")
    run = Run(config, objective, feed, ranks, checkpoints)
    maker: Maker
    if isinstance(decode, Vocabulary):
        maker = Answers(objective, config, ranks, decode)
    else:
        maker = Pictures(objective, config, ranks, decode)
    learner = Learner(run, config, maker, rewards, held_out or HeldOut())
    return drive(run, learner.update, learner.measure, tracker)


@dataclass(eq=False)
class Learner:
    """Makes groups, has them rewarded, and learns from them."""

    run: Run
    config: RLConfig
    maker: Maker
    rewards: Rewards | None
    held_out: HeldOut

    def __post_init__(self) -> None:
        # The weights of now, before any state is read: swapped in where the first policy is asked.
        first = self.config.kl or not self.maker.compares
        self.reference = Average(self.run.trained, 1.0) if first else None

    def update(self, run: Run, report: Report, asked: list[int]) -> int:
        """One rollout and what is learnt from it. Gives the number of the signal to stop, 0 for none."""
        config, ranks, step = self.config, run.ranks, run.step
        rounds = self._rounds(step)
        numbers = _rewarded(rounds)
        kept = ranks.total([float(r.spread) for r in rounds])  # all processes do alike: see `_learn`
        if any(kept):  # else all rewards are equal, and there is nothing to learn
            for number in range(config.updates):
                for name, found in self._learn(rounds, kept).items():
                    if number == 0 or name != "first_ratio_off":
                        numbers[name] += found
            run.average.update(step)
        run.step += 1
        learnt = [v.tokens for r in rounds for v in r.visits] if any(kept) else []
        signals = [float(number in asked) for number in (signal.SIGTERM, signal.SIGINT)]
        tokens, terminate, interrupt = ranks.total([sum(learnt) * config.updates, *signals])
        report.step(run.step, _means(ranks, numbers), tokens, 0.0, 0.0)
        return signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0

    def _prompts(self, step: int) -> list[Prompt]:
        return [prompt for prompt in self.run.feed.packs(step) if isinstance(prompt, Prompt)]

    def _rounds(self, step: int) -> list[Round]:
        """Groups of all prompts."""
        prompts = self._prompts(step)
        if self.reference is None:
            return [self._explore(prompt) for prompt in prompts]
        if not self.maker.compares:
            with self.run.holding(self.reference):
                return [self._explore(prompt) for prompt in prompts]
        rounds = [self._explore(prompt) for prompt in prompts]
        with self.run.holding(self.reference):
            return [replace(r, visits=[self._with_reference(v) for v in r.visits]) for r in rounds]

    def _explore(self, prompt: Prompt) -> Round:
        """Make a group, and have it rewarded where its members are compared."""
        config, step = self.config, self.run.step
        shared = generator_of(config, step, config.lanes)
        media, visits = self.maker.make(prompt, generator_of(config, step, prompt.lane), shared)
        if not self.maker.compares:
            every = torch.ones(config.group, device=self.run.ranks.device)
            return Round(prompt, visits, np.empty(0), {}, every, True)
        assert self.rewards is not None, "asked for by `train_rl`"
        group = len(media)
        reward, each = self.rewards([prompt.words] * group, media, [prompt.metadata] * group)
        advantage, spread_out = advantages(torch.tensor(reward, dtype=torch.float32))
        return Round(prompt, visits, reward, each, advantage.to(self.run.ranks.device), bool(spread_out))

    def _with_reference(self, visit: Any) -> Any:
        with torch.enable_grad():  # else attention takes another way on the CPU, and its rounding is another
            return replace(visit, reference=self.maker.look(visit).detach())

    def _learn(self, rounds: list[Round], kept: list[float]) -> dict[str, list[float]]:
        """One update of the weights from all visits.

        kept: for each of this process's groups, how many processes have a group with spread in its place.
        Where none has, it is passed over; where another has, the pass is run with no weight, since
        processes that share the weights must run the same passes.
        """
        run, numbers = self.run, defaultdict[str, list[float]](list)
        own = sum(len(visit.members) for made in rounds if made.spread for visit in made.visits)
        [count] = run.ranks.total([own])
        run.objective.zero_grad(set_to_none=True)
        total = 0.0
        for made in (r for r, wanted in zip(rounds, kept, strict=True) if wanted):
            for visit in made.visits:
                members = slice(visit.members.start, visit.members.stop)
                judged = self.maker.judge(visit, self.maker.look(visit), made.advantage[members])
                loss = judged.loss.sum() * (made.spread / count)
                (loss * run.ranks.size).backward()  # gradients are averaged over the processes
                total += float(loss.detach())
                if made.spread:
                    for name, values in judged.numbers.items():
                        numbers[name] += values.tolist()
        norm = torch.nn.utils.clip_grad_norm_(list(run.trained.values()), self.config.clip)
        numbers["norm"] = [float(norm.full_tensor() if isinstance(norm, DTensor) else norm)]
        numbers["loss"], numbers["rate"] = run.ranks.total([total]), [learning_rate(run.step, self.config)]
        if not math.isfinite(numbers["loss"][0] + numbers["norm"][0]):
            names = [name for part in run.ranks.gather([r.prompt.ids[0] for r in rounds]) for name in part]
            raise NonFiniteLoss(
                f"the loss at step {run.step} is not a number (loss {numbers['loss'][0]}, gradient norm "
                f"{numbers['norm'][0]}); the weights are as before it. Prompts: {', '.join(names)}"
            )
        run.learn(numbers["rate"][0])
        return numbers

    @torch.no_grad()
    def measure(self, report: Report) -> float | None:
        """Mean rewards of held-out prompts, drawn without noise by the averaged weights; a sheet of them."""
        run, ranks = self.run, self.run.ranks
        if not self.held_out.prompts:
            return None
        numbers, shown = defaultdict[str, list[float]](list), []
        with run.holding(run.average):
            for number in range(ranks.rank, _padded(len(self.held_out.prompts), ranks.size), ranks.size):
                prompt = self.held_out.prompts[number % len(self.held_out.prompts)]
                made = self.maker.best(prompt, generator_of(self.config, 0, number))
                if number < len(self.held_out.prompts):  # the others keep the processes in step
                    reward = self._reward_held_out(prompt, made, numbers)
                    shown.append((prompt.words if reward is None else f"{reward:.2f}: {prompt.words}", made))
        means = _means(ranks, numbers)
        report.say(run.step, means)
        if ranks.main:
            self._show(report, shown[:SHOWN])
        return -means["held_out/reward"] if self.rewards is not None else None

    def _reward_held_out(self, prompt: Prompt, made: Media, numbers: dict[str, list[float]]) -> float | None:
        """The reward that is learnt from, where there is one; it and all others are added to the numbers."""
        found: dict[str, np.ndarray] = {}
        if self.rewards is not None:
            found["reward"], each = self.rewards([prompt.words], [made], [prompt.metadata])
            found |= each
        if self.held_out.rewards is not None:
            found |= self.held_out.rewards([prompt.words], [made], [prompt.metadata])[1]
        for name, value in found.items():
            numbers[f"held_out/{name}"].append(float(value[0]))
        return float(found["reward"][0]) if "reward" in found else None

    def _show(self, report: Report, shown: list[tuple[str, Media]]) -> None:
        """A sheet to the tracker and to RUN_DIR/samples."""
        sheet = contact_sheet([(words, _shown(made, self.held_out.fps)) for words, made in shown])
        folder = self.run.checkpoints.folder / SHEETS
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{self.run.step:08d}.png")
        report.pictures(self.run.step, {"samples": sheet})


def _shown(made: Media, fps: float) -> Image.Image | Video | str:
    """As a sheet takes it."""
    if isinstance(made, str):
        return made
    return Image.fromarray(made[0]) if len(made) == 1 else Video(made, fps)


def _rewarded(rounds: list[Round]) -> dict[str, list[float]]:
    """What to report of the rewards."""
    numbers = defaultdict[str, list[float]](list)
    for made in (r for r in rounds if len(r.reward)):
        numbers["reward"] += made.reward.tolist()
        numbers["reward_spread"].append(float(made.reward.std()))
        numbers["without_spread"].append(float(not made.spread))
        for name, values in made.each.items():
            numbers[f"reward/{name}"] += values.tolist()
    return numbers


def _means(ranks: Ranks, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of each over all processes, which need not know the same names."""
    sums: dict[str, tuple[float, int]] = {}
    for part in ranks.gather({name: (sum(values), len(values)) for name, values in numbers.items()}):
        for name, (total, count) in part.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in sums.items() if count}


def _padded(count: int, size: int) -> int:
    """The next multiple."""
    return math.ceil(count / size) * size
