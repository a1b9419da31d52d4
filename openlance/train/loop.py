"""The one training loop, for every stage, on one process or many."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from openlance.config import to_dict
from openlance.errors import InputError
from openlance.model.flops import work_of
from openlance.model.lance import Lance
from openlance.model.names import part_of
from openlance.sequence.pack import PackedBatch
from openlance.sequence.segment import Sample
from openlance.train.checkpoint import Checkpoints
from openlance.train.draw import draw_batch, generator_of
from openlance.train.flops import device_peak_flops, flops_per_step
from openlance.train.losses import Counts, Losses, Objective
from openlance.train.parallel import Ranks, pattern_of, spread, trained_parameters, whole_state
from openlance.train.report import NoTracker, Report, Tracker
from openlance.train.settings import TrainConfig
from openlance.train.update import Average, learning_rate, make_optimizers

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG = "config.json"


class Pack(Protocol):
    """Samples that go through the network together. ids: their names, for messages."""

    @property
    def lane(self) -> int: ...

    @property
    def samples(self) -> list[Sample]: ...

    @property
    def ids(self) -> Sequence[str]: ...


class Feed(Protocol):
    """Where the packs of a step come from: see `openlance.data.lanes`."""

    def packs(self, step: int) -> Iterator[Pack]:
        """The packs of this process, in the order of their lanes."""
        ...

    def state(self) -> dict[str, Any]:
        """Where this process's lanes stand, by lane; plain enough for JSON."""
        ...

    def restore(self, states: Mapping[str, Any]) -> None:
        """Go on from the states of all lanes."""
        ...


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; the run stopped before the weights were touched."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT), and has saved its state."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"saved at step {step}")
        self.signal_number = signal_number


@dataclass(frozen=True, eq=False)
class Validation:
    """What is measured at intervals, on the averaged weights.

    held_out: packs by task. sample: the network and the step to pictures by name; called on the main process
    with the whole network.
    """

    held_out: Mapping[str, Sequence[Pack]] = field(default_factory=dict)
    sample: Callable[[Lance, int], Mapping[str, Image]] | None = None


@dataclass(eq=False)
class Run:
    """Everything that changes while training: weights, average, optimiser, data, step."""

    config: TrainConfig
    objective: Objective
    feed: Feed
    ranks: Ranks
    checkpoints: Checkpoints
    step: int = 0

    def __post_init__(self) -> None:
        self.model_config = self.objective.model.config
        self.trained = trained_parameters(self.objective)
        self.optimizers = make_optimizers(self.trained, self.config, self.ranks)
        self.average = Average(self.trained, self.config.ema)

    def save(self, score: float | None = None) -> None:
        """Start writing the state of this step."""
        lanes: dict[str, Any] = {}
        for states in self.ranks.gather(self.feed.state()):
            lanes |= states
        self.checkpoints.save(self.step, self._tensors(), {"step": self.step, "lanes": lanes}, score)

    def resume(self) -> None:
        """Go on from the last complete state, where there is one."""
        steps = self.checkpoints.steps()
        if not steps:
            return
        tensors = self._tensors()
        state = self.checkpoints.load(steps[-1], tensors)  # weights and average in place
        set_optimizer_state_dict(
            self.objective, self.optimizers, optim_state_dict=tensors["optimizer"], options=_TRAINED
        )
        self.step = state["step"]
        self.feed.restore(state["lanes"])

    def learn(self, rate: float) -> None:
        """Update the weights by their gradients, at this learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    @contextmanager
    def holding(self, average: Average) -> Iterator[None]:
        """Inside, the network has the weights of an average.

        What was gathered of other weights is let go: FSDP keeps the root's until the next backward pass.
        """
        self._let_go()
        with average.applied():
            yield
            self._let_go()

    def _let_go(self) -> None:
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "average": self.average.values,
            "optimizer": get_optimizer_state_dict(self.objective, self.optimizers, options=_TRAINED),
        }


_TRAINED = StateDictOptions(ignore_frozen_params=True)


def train(
    model: Lance,
    feed: Feed,
    config: TrainConfig,
    run_dir: Path,
    *,
    ranks: Ranks | None = None,
    vocabulary: int | None = None,
    resume: bool = False,
    validation: Validation | None = None,
    tracker: Tracker | None = None,
) -> Mapping[str, Tensor]:
    """Train, and give the averaged weights of the whole network (on the main process; nothing on the others).

    run_dir: states, log and configuration. resume: go on from its last state, where there is one; without it
    a folder that holds a run is refused. vocabulary: ids at or above are never learnt (the table is padded).
    Raises NonFiniteLoss with the ids, Stopped after a signal, InputError for a folder or state that does not
    fit.
    """
    ranks = Ranks(device=model.device) if ranks is None else ranks
    validation = Validation() if validation is None else validation
    checkpoints = Checkpoints(run_dir, config.keep, ranks)
    if checkpoints.steps() and not resume:
        raise InputError(f"{run_dir}: holds a run already; --resume goes on from it")
    freeze(model, config)
    run = Run(config, spread(model, config, ranks, vocabulary), feed, ranks, checkpoints)
    return drive(run, _update, lambda report: validate(run, validation, report), tracker)


def drive(
    run: Run,
    update: Callable[[Run, Report, list[int]], int],
    measure: Callable[[Report], float | None],
    tracker: Tracker | None = None,
) -> Mapping[str, Tensor]:
    """Run a stage to its last step, from its last state where there is one; gives what `train` gives.

    update: one step; it is given the numbers of the signals that came, and gives that of the one to obey, 0
    for none. measure: called at intervals; gives a score, lower is better.
    """
    run.resume()
    config, ranks, checkpoints, run_dir = run.config, run.ranks, run.checkpoints, run.checkpoints.folder
    if ranks.main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG).write_text(json.dumps(to_dict(config), indent=1))
    report = Report(run_dir, run.step, config.steps, config.stage, tracker or NoTracker(), ranks)
    try:
        with _asked_to_stop() as asked:
            while run.step < config.steps:
                stop = update(run, report, asked)
                last = run.step == config.steps
                score = None
                if last or (config.validate_every and run.step % config.validate_every == 0):
                    score = measure(report)
                if last or stop or score is not None or run.step % config.save_every == 0:
                    run.save(score)
                if stop and not last:
                    checkpoints.finish()
                    raise Stopped(run.step, stop)
                if checkpoints.done():
                    checkpoints.finish()
        checkpoints.finish()
    finally:
        report.close()
    with run.holding(run.average):
        return whole_state(run.objective, ranks)


def freeze(model: Lance, config: TrainConfig) -> None:
    """Let only the parts learn that are to; with adapters, only those of these parts."""
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        wanted = adapter if config.lora_rank else not adapter
        parameter.requires_grad_(wanted and part_of(name) in config.trains)


def _update(run: Run, report: Report, asked: list[int]) -> int:
    """One step: gradients of all packs, one update. Gives the number of the signal to stop, 0 for none."""
    config, ranks, step = run.config, run.ranks, run.step
    packs = list(run.feed.packs(step))
    drawn = [_draw(run, given) for given in packs]
    own = Counts.of(*(batch for batch, _ in drawn))
    own_tokens = sum(batch.tokens for batch, _ in drawn)
    places = sum(rows.numel() for batch, _ in drawn for rows in batch.rows) or own_tokens
    work = work_of(sample for given in packs for sample in given.samples)
    own_flops = flops_per_step(run.model_config, work, trains=() if config.lora_rank else config.trains)
    signals = [float(number in asked) for number in (signal.SIGTERM, signal.SIGINT)]
    answers, denoised, tokens, padded, flops, shared, terminate, interrupt = ranks.total(
        [*ranks.once([own.answers, own.denoised, own_tokens, places, own_flops]), own_tokens, *signals]
    )
    if shared != tokens * ranks.context:  # they would wait for each other without end
        raise InputError(
            f"step {step}: processes that share packs read different rows; is the data the same?"
        )
    counts = Counts(answers, denoised)
    torch.manual_seed(hash((config.seed, step, ranks.rank)) % 2**63)  # dropout of adapters
    ce, mse, norm = _gradients(run, packs, drawn, counts)
    rate = learning_rate(step, config)
    run.learn(rate)
    run.average.update(step)
    run.step += 1
    means = {"ce": (ce, answers), "mse": (mse, denoised)}
    values = {name: total / count for name, (total, count) in means.items() if count}
    values |= {"norm": norm, "rate": rate, "padding": 1 - tokens / padded}
    report.step(run.step, values, tokens, flops, _peak(ranks))
    return signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0


def _gradients(
    run: Run, packs: Sequence[Pack], drawn: Sequence[tuple[PackedBatch, Tensor]], counts: Counts
) -> tuple[float, float, float]:
    """Gradients of all packs, clipped: (cross-entropy, velocity error, norm), summed over all processes.

    Raises NonFiniteLoss before anything is updated.
    """
    ranks, step = run.ranks, run.step
    sums = [0.0, 0.0]
    run.objective.zero_grad(set_to_none=True)
    for given, (batch, noise) in zip(packs, drawn, strict=True):
        found = run.objective(batch, noise, counts, pattern_of(batch, ranks))
        # Gradients are averaged over all processes; those that share a pack each have its whole loss.
        (found.total * ranks.data_size).backward()
        own = [float(found.ce.detach().sum()), float(found.mse.detach().sum())]
        if ranks.leads and not all(map(math.isfinite, own)):
            _keep_evidence(run, given, batch, noise)
        sums = [total + value for total, value in zip(sums, own, strict=True)]
    norm = float(_whole(torch.nn.utils.clip_grad_norm_(list(run.trained.values()), run.config.clip)))
    ce, mse = ranks.total(ranks.once(sums))
    if not all(map(math.isfinite, (ce, mse, norm))):
        named = ranks.gather([given.ids for given in packs])
        ids = [name for rank in named[:: ranks.context] for names in rank for name in names]
        raise NonFiniteLoss(
            f"the loss at step {step} is not a number (ce {ce}, mse {mse}, gradient norm {norm}); the "
            f"weights are as before it. What caused it is kept in {run.checkpoints.folder}/"
            f"non-finite-{step}-*.pt. Rows: {', '.join(ids)}"
        )
    return ce, mse, norm


def _peak(ranks: Ranks) -> float:
    """Operations a second that all devices could do, 0 where it is not known."""
    if ranks.device.type != "cuda":
        return 0.0
    return ranks.size * (device_peak_flops(torch.cuda.get_device_name(ranks.device)) or 0.0)


def _whole(tensor: Tensor) -> Tensor:
    """The value of a tensor that may be spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _draw(run: Run, given: Pack) -> tuple[PackedBatch, Tensor]:
    generator = generator_of(run.config, run.step, given.lane)
    return draw_batch(given.samples, run.model_config, run.config, generator, run.ranks.device)


@torch.no_grad()
def validate(run: Run, validation: Validation, report: Report) -> float | None:
    """Mean losses of each task, and their weighted sum, on the averaged weights; pictures to the tracker."""
    means: dict[str, float] = {}
    with run.holding(run.average):
        for task, packs in validation.held_out.items():
            ce, mse, counts = 0.0, 0.0, [0.0, 0.0]
            for number, held in enumerate(packs):
                generator = generator_of(run.config, 0, number)
                whole = replace(run.config, drop_text=0.0, drop_all=0.0)
                batch, noise = draw_batch(held.samples, run.model_config, whole, generator, run.ranks.device)
                pattern = pattern_of(batch, run.ranks)
                found: Losses = run.objective(batch, noise, Counts(1, 1), pattern)
                ce, mse = ce + float(found.ce.sum()), mse + float(found.mse.sum())
                counts = [counts[0] + len(found.ce), counts[1] + len(found.mse)]
            for name, total, count in (("ce", ce, counts[0]), ("mse", mse, counts[1])):
                if count:
                    means[f"held_out/{task}/{name}"] = total / count
        if means:
            report.say(run.step, means)
        if validation.sample is not None:
            _sample(run, validation.sample, report)
    if not means:
        return None
    weights = {"ce": run.config.ce_weight, "mse": run.config.mse_weight}
    return sum(weights[name.rpartition("/")[2]] * value for name, value in means.items())


def _sample(run: Run, sample: Callable[[Lance, int], Mapping[str, Image]], report: Report) -> None:
    """Pictures by the whole network, on the main process."""
    model = run.objective.model
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        state = whole_state(run.objective, run.ranks)
        if run.ranks.main:
            with torch.device("meta"):
                model = Lance(run.model_config, model.parts)
            model.load_state_dict(state, assign=True)
    if run.ranks.main:
        training = model.training
        report.pictures(run.step, sample(model.eval(), run.step))
        model.train(training)
    run.ranks.total([0.0])


def _keep_evidence(run: Run, pack: Pack, batch: PackedBatch, noise: Tensor) -> None:
    """What went through the network when the loss was not a number, to be looked at later."""
    run.checkpoints.folder.mkdir(parents=True, exist_ok=True)
    file = run.checkpoints.folder / f"non-finite-{run.step}-{pack.lane}.pt"
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    torch.save({"step": run.step, "ids": list(pack.ids), "noise": noise.cpu(), "batch": tensors}, file)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT is obeyed at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if signal.SIGINT in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: whoever runs us there decides
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
