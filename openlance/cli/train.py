"""The command that trains."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from openlance.cli.options import Maybe, option
from openlance.cli.train_rl import RLOptions, rl_command
from openlance.config import to_dict
from openlance.errors import InputError
from openlance.train import presets
from openlance.train.settings import RLConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from openlance.config import ModelConfig
    from openlance.data.lanes import Dataset
    from openlance.model.lance import Lance
    from openlance.model.release import Release
    from openlance.model.vae import VAE
    from openlance.sequence.template import Task
    from openlance.tokenizer import Tokenizer
    from openlance.train.loop import Feed, Pack, Validation
    from openlance.train.nano import NanoParts
    from openlance.train.parallel import Ranks

QWEN = "qwen:"
NANO = "nano-"
NANO_PROMPTS = (
    "a large red circle at the top left on white",
    "a small blue star in the center on black",
    "a green square left of a yellow triangle",
    "a large purple ring at the bottom on gray",
)
HELD_OUT_PACKS = 4


@dataclass(frozen=True)
class RunOptions:
    """Run."""

    data: tuple[str, ...] = ()
    """Datasets, each ADDRESS or TASK=ADDRESS (t2i, i2v, …): see `openlance data check`. The nano presets
    bring their own world."""
    held_out: tuple[str, ...] = ()
    """Datasets to measure on, given alike."""
    init: Maybe[str] = None
    """Weights to begin from: a folder in the released layout or a Hugging Face id; "qwen:" and such an
    address for a Qwen2.5-VL. nano-pt begins from nothing."""
    vae: Maybe[str] = None
    """A release with the VAE, where --init has none."""
    variant: Maybe[str] = None
    """Lance_3B or Lance_3B_Video, of --init."""
    resume: bool = False
    """Go on from the last state in --run-dir, where there is one."""
    grow: bool = False
    """Small pictures and clips first, full size last (192p, 360p, 480p)."""
    prompts: tuple[str, ...] = ()
    """Drawn whenever the run is measured, for the tracker."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves and pictures go, beside RUN_DIR/log.jsonl."""
    workers: int = 0
    """Processes that read data ahead; 0 reads in the training one."""
    device: Maybe[Literal["cpu", "cuda"]] = None
    """Default: what there is."""
    threads: int = 1
    """CPU threads of each process."""
    parts: Path = Path("runs/nano-parts")
    """The frozen parts and the encoded world of the nano presets, made when they are not there; with --init,
    the parts are those of that model."""


class Values(TrainConfig):
    """One run of the training loop, on any number of processes."""

    def __post_init__(self) -> None:
        """Checked when it becomes a TrainConfig, so that what is wrong is said as for every other option."""


def train_command(name: str) -> Callable[..., None]:
    """`openlance train` with the values of a preset as its defaults. Raises InputError for an unknown
    preset."""
    chosen = presets.preset(name)
    if isinstance(chosen, RLConfig):
        return rl_command(name)
    defaults, folder = Values(**vars(chosen)), Path("runs") / name

    def train(
        *,
        preset: Annotated[str, option(f"Where the defaults come from: {', '.join(presets.PRESETS)}.")] = name,
        run_dir: Annotated[Path, option("For states, log and the trained model, RUN_DIR/model.")] = folder,
        config: Values = defaults,
        options: RunOptions,
    ) -> None:
        """Train a model, or go on training one: on a laptop, or on many machines through torchrun.

        Presets: pt, ct and sft are the stages of the paper; lora adapts the generation expert on one GPU;
        nano-pt, nano-ct and nano-sft make the bundled model on CPU; rl and nano-rl learn from rewards,
        distill and nano-distill to draw in few steps, with a help of their own. Every value can be changed.
        Ctrl-C and SIGTERM save the run and end it; --resume goes on, also with another number of processes.

        For example:
          openlance train --preset nano-pt
          openlance train --preset lora --init weights --data shapes.parquet --run-dir runs/shapes
          torchrun --nproc-per-node 8 -m openlance train --preset sft --lanes 8 --init weights --data pictures
        """
        _run(preset, run_dir, TrainConfig(**vars(config)), options)

    return train


@dataclass(frozen=True, eq=False)
class Job:
    """What a run needs beside its settings."""

    model: Lance
    config: ModelConfig
    tokenizer: Tokenizer
    vae: VAE | None
    feed: Feed
    held_out: Mapping[str, list[Pack]]


def _run(preset: str, run_dir: Path, config: TrainConfig, options: RunOptions) -> None:
    import torch

    from openlance.data.save import check_folder
    from openlance.train.loop import train
    from openlance.train.parallel import join
    from openlance.train.report import NoTracker, make_tracker

    nano = preset.startswith(NANO) and not options.data
    if options.data == () and not nano:
        raise InputError("nothing to train on: give --data (see `openlance data check --help`)")
    if options.init is None and not (nano and preset == "nano-pt"):
        raise InputError('nothing to begin from: give --init, a checkpoint or "qwen:" and a Qwen2.5-VL')
    check_folder(run_dir / "log.jsonl")
    torch.set_num_threads(options.threads)
    ranks = join(options.device, config.context)
    with stopping(run_dir, ranks):
        job = _nano_job(config, options, ranks) if nano else _job(config, options, ranks)
        if config.lora_rank:
            from openlance.model.adapters import add_lora

            add_lora(job.model, config.trains, config.lora_rank, config.lora_alpha, config.lora_dropout)
        prompts = options.prompts or (NANO_PROMPTS if nano else ())
        tracker = make_tracker(options.tracker, run_dir, to_dict(config)) if ranks.main else NoTracker()
        weights = train(
            job.model, job.feed, config, run_dir,
            ranks=ranks, vocabulary=job.tokenizer.size, resume=options.resume, tracker=tracker,
            validation=_validation(job, prompts),
        )  # fmt: skip
        if ranks.main:
            print(save(run_dir, job, config, weights))


@contextmanager
def stopping(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, a run that was asked to stop says so and ends, with the group of its processes."""
    from openlance.train.loop import Stopped
    from openlance.train.parallel import leave

    try:
        yield
    except Stopped as stopped:
        if ranks.main:
            print(f"{stopped} in {run_dir}; --resume goes on")
        if stopped.signal_number == signal.SIGINT:
            raise KeyboardInterrupt from None
    finally:
        leave()


def _nano_job(config: TrainConfig, options: RunOptions, ranks: Ranks) -> Job:
    """The bundled model on the world of shapes."""
    from openlance.model.checkpoint import find_release
    from openlance.train.nano import make_parts

    release = None if options.init is None else find_release(options.init, options.variant)
    parts: NanoParts | None = None
    if ranks.main:
        parts = make_parts(options.parts, threads=options.threads, release=release)
    ranks.total([0.0])  # the others wait until all is there
    parts = parts or make_parts(options.parts)
    model = parts.new_model(config.seed) if release is None else _trainable(release, parts.config, "cpu")
    held_out: Mapping[str, Any] = parts.held_out(config) if config.validate_every else {}
    return Job(model, parts.config, parts.tokenizer, parts.vae, parts.feed(config, ranks), held_out)


def _job(config: TrainConfig, options: RunOptions, ranks: Ranks) -> Job:
    """A checkpoint, on the user's data."""
    from openlance.data.feed import Feed
    from openlance.data.lanes import Plan
    from openlance.data.mixture import Schedule, growing, mixture_of

    model, model_config, tokenizer, vae = begin(options, ranks)
    plan = Plan(
        _datasets(options.data),
        mixture_of(config.stage, config.steps),
        model_config,
        tokenizer,
        lanes=config.lanes,
        budget=config.tokens,
        longest=config.longest or config.tokens,
        sizes=growing(model_config.sizes, config.steps) if options.grow else None,
        seed=config.seed,
    )
    feed = Feed(plan, rank=ranks.data_rank, world=ranks.data_size, workers=options.workers, vae=vae)
    held_out: dict[str, list[Any]] = {}
    for data in _datasets(options.held_out):
        for task in data.tasks:
            alone = replace(data, tasks=(task,))
            even = replace(plan, datasets=(alone,), mixture=Schedule.constant(_everything()), lanes=1, seed=0)
            packs = Feed(even, vae=vae)
            held_out[f"{data.name}/{task}"] = [pack for n in range(HELD_OUT_PACKS) for pack in packs.packs(n)]
    return Job(model, model_config, tokenizer, vae, feed, held_out)


def _everything() -> Any:
    """A mixture that draws every task that there is data for."""
    from openlance.data.mixture import Mixture

    return Mixture(chat=1, images=(1, 1, 1), videos=(1, 1, 1, 1))


def begin(options: RunOptions | RLOptions, ranks: Ranks) -> tuple[Lance, ModelConfig, Tokenizer, VAE | None]:
    """Weights to begin from in float32, frozen parts included."""
    from openlance.model.checkpoint import find_release, load_vae, read_config
    from openlance.tokenizer import Tokenizer

    assert options.init is not None
    if options.init.startswith(QWEN):
        from openlance.model.qwen import from_qwen

        model, config, tokenizer = from_qwen(options.init.removeprefix(QWEN), device=ranks.device)
        release = None
    else:
        release = find_release(options.init, options.variant)
        tokenizer = Tokenizer.load(release.folder)
        config = read_config(release, tokenizer)
        model = _trainable(release, config, ranks.device)
    if options.vae is not None:
        release = find_release(options.vae)
    vae = None
    if release is not None and release.vae is not None:
        vae = load_vae(release, config, device=ranks.device).eval().requires_grad_(False)
    return model, config, tokenizer, vae


def _trainable(release: Release, config: ModelConfig, device: torch.device | str) -> Lance:
    """The weights of a release in float32. Raises InputError for quantised ones."""
    from openlance.model.checkpoint import load_model
    from openlance.model.quantize import schemes_of

    model = load_model(release, config, device=device)
    if schemes_of(model):
        raise InputError(f"{release.folder}: its weights are quantised: begin from those they were made of")
    return model


def _datasets(specs: tuple[str, ...]) -> tuple[Dataset, ...]:
    """Datasets of the command line. Raises InputError for one that cannot be read or whose task is not
    known."""
    from openlance.data.lanes import Dataset
    from openlance.data.sources import open_source
    from openlance.sequence.template import Task

    found = []
    for spec in specs:
        name, equals, address = spec.partition("=")
        tasks = name.split(",") if equals else []
        if not all(task in set(Task) for task in tasks):
            tasks, address = [], spec  # an address that has a "=" of its own
        source = open_source(address if tasks else spec)
        known = tuple(Task(task) for task in tasks) or (_task_of(spec, source),)
        found.append(Dataset(spec, source, known))
    return tuple(found)


def _task_of(address: str, source: Any) -> Task:
    """What the columns of the first row tell."""
    from openlance.data.encode import is_encoded, to_encoded_row
    from openlance.data.schemas import BadRow, recognise

    first = next(record for shard in range(len(source.shards)) for record in source.read(shard))
    try:
        return to_encoded_row(first).task if is_encoded(first) else recognise(first)
    except BadRow as bad:
        raise InputError(f"{bad}: say the task, --data t2i={address}") from bad


def _validation(job: Job, prompts: tuple[str, ...]) -> Validation:
    """Held-out losses, and the prompts drawn as one sheet."""
    from openlance.train.loop import Validation

    def sample(model: Lance, step: int) -> Mapping[str, Image]:
        from openlance.data.save import contact_sheet
        from openlance.infer.pipeline import LancePipeline

        lance = LancePipeline(model, job.tokenizer, job.vae)
        shown = [(prompt, lance.generate_image(prompt, seed=1).image) for prompt in prompts]
        return {"samples": contact_sheet(shown)}

    return Validation(job.held_out, sample if prompts and job.vae is not None else None)


def save(
    run_dir: Path,
    job: Job,
    config: TrainConfig,
    weights: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> Path:
    """The averaged weights in the released layout, or the adapter alone; gives the folder.

    sampling: fields of `SamplingConfig` that the trained model wants, over what it began with.
    """
    import torch

    from openlance.model.checkpoint import save_pretrained

    if config.lora_rank:
        from openlance.model.adapters import save_adapter

        save_adapter(job.model, run_dir / "adapter", weights=weights, sampling=sampling)
        return run_dir / "adapter"
    chosen = replace(job.config, sampling=replace(job.config.sampling, **(sampling or {})))
    save_pretrained(
        run_dir / "model", model=weights, vae=job.vae, tokenizer=job.tokenizer, config=chosen,
        dtype=torch.bfloat16,
    )  # fmt: skip
    return run_dir / "model"
