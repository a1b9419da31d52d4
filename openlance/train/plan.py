"""Whether a training job fits its devices, how it is best laid on them, and how long it takes.

Reckoned from shapes (`footprint`, `flops`); nothing is loaded and nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from openlance.config import ModelConfig
from openlance.errors import InputError
from openlance.model.checkpoint import count_parameters
from openlance.model.flops import Work, vae_encode_flops, vision_flops
from openlance.train.flops import flops_per_step
from openlance.train.footprint import Job, Layout, Memory, memory

CONTEXTS = (1, 2, 4, 8)
MOST_DEVICES = 1024
LORA_RANK = 16  # of the remedy
BUDGET_STEP = 1024


@dataclass(frozen=True)
class StageFacts:
    """A stage of the paper (arXiv 2605.18678): tokens seen, tokens a rank and step, longest sample."""

    tokens_seen: float
    tokens_per_rank: int
    longest: int


STAGES = {
    "pt": StageFacts(1.5e12, 50_000, 40_000),
    "ct": StageFacts(300e9, 80_000, 70_000),
    "sft": StageFacts(72e9, 80_000, 70_000),
    "rl": StageFacts(0.5e9, 80_000, 70_000),
}


@dataclass(frozen=True)
class Machine:
    """The devices.

    memory: bytes of one; usable: the share of it that tensors can have, after the driver, what is exchanged
    between devices, and fragments. peak: operations a second of one, of which products reach the share `mfu`.
    """

    devices: int
    devices_per_node: int
    memory: int
    peak: float
    mfu: float = 0.4
    usable: float = 0.9

    def __post_init__(self) -> None:
        if min(self.devices, self.devices_per_node) < 1 or self.memory <= 0 or self.peak <= 0:
            raise InputError("a machine needs at least one device, with memory and a peak above 0")
        if self.devices > self.devices_per_node and self.devices % self.devices_per_node:
            raise InputError(f"{self.devices} devices do not fill nodes of {self.devices_per_node}")
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu is a share of the peak, above 0 and at most 1, not {self.mfu}")

    @property
    def room(self) -> int:
        """Bytes of a device that a plan may fill."""
        return int(self.memory * self.usable)


@dataclass(frozen=True)
class Option:
    """One layout, what it needs on a device, and whether that is there."""

    name: str
    layout: Layout
    tokens: int
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Speed:
    """tokens: a second, of all devices. flops: executed for one token. mfu: in PaLM's sense, the share of the
    peak without recomputation and frozen encoders. days: by stage."""

    tokens: float
    flops: float
    mfu: float
    days: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """options: cheapest first. chosen, speed: None where nothing fits; remedies: then, what would help."""

    job: Job
    machine: Machine
    options: list[Option]
    chosen: Option | None
    speed: Speed | None
    remedies: list[str] = field(default_factory=list)


def job_of(config: ModelConfig, stage: str, **changes: Any) -> Job:
    """A stage's job; `changes`: other values for fields of `Job`. Raises InputError for what cannot be.

    A usual sample is by default as long as the latents of one clip of the model's default size.
    """
    if stage not in STAGES:
        raise InputError(f"unknown stage {stage!r}: choose one of {', '.join(STAGES)}")
    facts = STAGES[stage]
    longest = changes.get("longest", facts.longest)
    fields = {
        "tokens": facts.tokens_per_rank,
        "longest": longest,
        "sample": min(math.prod(_clip_grid(config)), longest),
    }
    return Job(config, count_parameters(config), **{**fields, **changes})


def _clip_grid(config: ModelConfig) -> tuple[int, int, int]:
    side = config.sizes.video // config.vae.spatial_stride
    return (config.sizes.frames - 1) // config.vae.temporal_stride + 1, side, side


def make_plan(job: Job, machine: Machine) -> Plan:
    """Every layout of the job, the first that fits, and its speed, or what would help."""
    options = [_option(job, machine, name, layout) for name, layout in layouts(job, machine)]
    chosen = next((option for option in options if option.fits), None)
    if chosen is None:
        return Plan(job, machine, options, None, None, remedies(job, machine, options))
    return Plan(job, machine, options, chosen, speed(job, machine, chosen.layout.recompute))


def layouts(job: Job, machine: Machine) -> Iterator[tuple[str, Layout]]:
    """All layouts, cheapest first: what splits samples costs most, then running layers twice, then sharding.

    Samples are split over 2, 4 or 8 devices only where one sample is longer than the budget.
    """
    for context in CONTEXTS:
        longer = context == 1 or -(-job.longest // (context // 2)) > job.tokens
        if not longer or machine.devices % context:
            continue
        for recompute in (False, True):
            for name, shards in _shardings(machine):
                yield name, Layout(shards, machine.devices // shards, context, recompute)


def _shardings(machine: Machine) -> list[tuple[str, int]]:
    if machine.devices == 1:
        return [("single device", 1)]
    found = [("replicated", 1)]
    if machine.devices > machine.devices_per_node > 1:
        found.append(("hybrid shard", machine.devices_per_node))
    return [*found, ("full shard", machine.devices)]


def _option(job: Job, machine: Machine, name: str, layout: Layout) -> Option:
    need = memory(job, layout)
    return Option(name, layout, layout.tokens(job), need, need.total <= machine.room)


def speed(job: Job, machine: Machine, recompute: bool) -> Speed:
    """Products run at `mfu` of the peak, those that are run twice and those of the frozen encoders too."""
    executed, model = _flops_per_token(job, recompute)
    reached = machine.devices * machine.peak * machine.mfu
    days = {}
    for name, facts in STAGES.items():
        usual = replace(job, sample=min(job.sample, facts.longest))
        days[name] = facts.tokens_seen * _flops_per_token(usual, recompute)[0] / reached / 86_400
    return Speed(reached / executed, executed, machine.mfu * model / executed, days)


def _flops_per_token(job: Job, recompute: bool) -> tuple[float, float]:
    """(executed, of the model in PaLM's sense) for one token of a usual sample.

    Its und tokens see each other, its gen tokens see all. Adapters' own products are left out (about one in a
    hundred), and what lies below them takes no gradient for its weights.
    """
    gen = round(job.sample * job.gen_share)
    und = job.sample - gen
    answers = min(und, round(job.answers * job.sample / job.tokens))
    work = Work(und, gen, und * und + gen * job.sample, answers)
    trains = () if job.lora_rank else job.trains
    model = flops_per_step(job.config, work, trains=trains)
    executed = flops_per_step(job.config, work, trains=trains, recompute=recompute)
    if not job.encoded:
        executed += round(gen * _vae_rate(job.config) + (und - answers) * _vision_rate(job.config))
    return executed / job.sample, model / job.sample


def _vae_rate(config: ModelConfig) -> float:
    """Operations of the VAE's encoder for one latent token of a clip of the default size."""
    return vae_encode_flops(config.vae, *_clip_grid(config)) / math.prod(_clip_grid(config))


def _vision_rate(config: ModelConfig) -> float:
    """Operations of the vision tower for one of its tokens, of a frame of the default size."""
    merge = config.vision.merge
    side = config.sizes.vit_video // config.vision.patch // merge * merge
    return vision_flops(config.vision, 1, side, side) / (side // merge) ** 2


def remedies(job: Job, machine: Machine, options: list[Option]) -> list[str]:
    """The nearest changes that make the job fit, each alone; those that do not help are not named."""
    more = (count for count in _more_devices(machine) if _fits(job, replace(machine, devices=count)))
    found = [f"--gpus {count}" for count in islice(more, 1)]
    found += _smaller_budgets(job, machine)
    if not job.lora_rank and _fits(replace(job, lora_rank=LORA_RANK), machine):
        found.append(f"--lora-rank {LORA_RANK}")
    if job.ema and _fits(replace(job, ema=False), machine):
        found.append("--no-ema")
    if not job.encoded and _fits(replace(job, encoded=True), machine):
        found.append("--encoded (data encoded beforehand, see `openlance data encode`)")
    least = min(option.memory.total for option in options)
    return [*found, f"devices of {least / machine.usable / 2**30:.0f} GiB"]


def _fits(job: Job, machine: Machine) -> bool:
    return any(_option(job, machine, name, layout).fits for name, layout in layouts(job, machine))


def _more_devices(machine: Machine) -> Iterator[int]:
    """Twice as many, four times, and so on, in whole nodes."""
    count = 2 * machine.devices
    while count <= MOST_DEVICES:
        node = machine.devices_per_node
        yield count if count <= node else -(-count // node) * node
        count *= 2


def _smaller_budgets(job: Job, machine: Machine) -> Iterator[str]:
    """The most tokens that fit: alone, with longer samples left out; and with samples split over devices."""
    for context in CONTEXTS:
        if machine.devices % context:
            continue
        budget = _largest_budget(job, machine, Layout(machine.devices, 1, context, recompute=True))
        if budget is None:
            return
        if budget * context >= job.longest:
            split = f", with `openlance train --context {context}`: samples split over {context} devices"
            yield f"--tokens {budget}" + (split if context > 1 else "")
            return
        if context == 1:
            yield f"--tokens {budget} --longest {budget}, longer samples left out"


def _largest_budget(job: Job, machine: Machine, layout: Layout) -> int | None:
    """By bisection, in multiples of `BUDGET_STEP`; None where not even one fits."""
    low, high = 0, job.tokens // BUDGET_STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        smaller = replace(job, tokens=middle * BUDGET_STEP, longest=1)
        if memory(smaller, layout).total <= machine.room:
            low = middle
        else:
            high = middle
    return low * BUDGET_STEP or None
