"""The command that trains, for the presets of reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from openlance.cli.options import Maybe, option
from openlance.config import to_dict
from openlance.errors import InputError
from openlance.train import presets
from openlance.train.settings import RLConfig

if TYPE_CHECKING:
    from torch import Tensor

    from openlance.config import ModelConfig
    from openlance.data.frames import Frames
    from openlance.infer.orders import Orders
    from openlance.model.vae import VAE
    from openlance.rl.learn import Decode, HeldOut
    from openlance.rl.prompts import Prompts
    from openlance.rl.words import Vocabulary
    from openlance.sequence.segment import Sample
    from openlance.tokenizer import Tokenizer
    from openlance.train.parallel import Ranks

NANO = "nano-"
DISTILL = "distill"
JUDGED, EXACT = ("composition", "everything"), ("exact_match",)
HELD_OUT = 16


@dataclass(frozen=True)
class RLOptions:
    """Run."""

    data: tuple[str, ...] = ()
    """Files of prompts: a line each, or .jsonl with "prompt" and what the rewards need to know. The presets
    of nano draw prompts from its world, or ask about it."""
    held_out: tuple[str, ...] = ()
    """Such files to measure on. The presets of nano have their own."""
    rewards: tuple[str, ...] = ()
    """What is learnt from, each NAME or NAME=WEIGHT: composition, everything, edited, motion (the judge of
    the world), exact_match, ocr, clip:MODEL, http://… Default of nano-rl: composition and everything; of
    words, exact_match. Distillation needs none."""
    second_rewards: tuple[str, ...] = ()
    """What is only measured, on the held-out prompts. Default of nano-distill: composition and everything."""
    init: Maybe[str] = None
    """Weights to begin from: a folder in the released layout or a Hugging Face id. Default of the presets of
    nano: the bundled model."""
    vae: Maybe[str] = None
    """A release with the VAE, where --init has none."""
    variant: Maybe[str] = None
    """Lance_3B or Lance_3B_Video, of --init."""
    resume: bool = False
    """Go on from the last state in --run-dir, where there is one."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves and pictures go, beside RUN_DIR/log.jsonl."""
    device: Maybe[Literal["cpu", "cuda"]] = None
    """Default: what there is."""
    threads: int = 1
    """CPU threads of each process."""


class RLValues(RLConfig):
    """One run of reinforcement learning, on any number of processes."""

    def __post_init__(self) -> None:
        """Checked when it becomes an RLConfig, so that what is wrong is said as for every other option."""


def rl_command(name: str) -> Callable[..., None]:
    """`openlance train` with the values of a preset of reinforcement learning as its defaults."""
    defaults, folder = RLValues(**vars(presets.preset(name))), Path("runs") / name

    def train(
        *,
        preset: Annotated[str, option(f"Where the defaults come from: {', '.join(presets.PRESETS)}.")] = name,
        run_dir: Annotated[Path, option("For states, log and the trained model, RUN_DIR/model.")] = folder,
        config: RLValues = defaults,
        options: RLOptions,
    ) -> None:
        """Train a model by what it draws itself: by rewards, it draws each prompt several times and learns
        what was better; by distillation, it learns to draw in few steps what it draws in many.

        Presets: rl is the fourth stage of the paper, and distill makes a few-step model; nano-rl and
        nano-distill do so with the bundled model on CPU. Values that speak of words or of dropped conditions
        have no effect here. Ctrl-C and SIGTERM save the run and end it; --resume goes on.

        For example:
          openlance train --preset nano-rl
          openlance train --preset rl --init weights --data prompts.txt --rewards ocr --lora-rank 32
          openlance train --preset distill --init weights --data prompts.txt --lora-rank 64
        """
        _run(preset, run_dir, RLConfig(**vars(config)), options)

    return train


def _run(preset: str, run_dir: Path, config: RLConfig, options: RLOptions) -> None:
    import torch

    from openlance.cli.train import Job, begin, save, stopping
    from openlance.data.save import check_folder
    from openlance.infer.orders import Orders
    from openlance.rl.learn import train_rl
    from openlance.rl.rewards import parse_rewards
    from openlance.train.parallel import join
    from openlance.train.report import NoTracker, make_tracker

    nano, distilled = preset.startswith(NANO) and not options.data, config.algorithm == DISTILL
    if not (options.data or nano):
        raise InputError("nothing to draw: give --data, a file of prompts")
    if not (options.rewards or nano or distilled):
        raise InputError("nothing to learn from: give --rewards, for example ocr")
    if options.init is None and not nano:
        raise InputError("nothing to begin from: give --init, a checkpoint")
    default = EXACT if config.algorithm == "words" else JUDGED
    rewards = parse_rewards(options.rewards or default) if options.rewards or not distilled else None
    check_folder(run_dir / "log.jsonl")
    torch.set_num_threads(options.threads)
    ranks = join(options.device)
    with stopping(run_dir, ranks):
        model, model_config, tokenizer, vae = begin(replace(options, init=options.init or "nano"), ranks)
        decode: Decode | Vocabulary
        if config.algorithm == "words":
            decode = _vocabulary(tokenizer, model_config)
        elif vae is not None:
            decode = _decoder(vae)
        else:
            raise InputError("no VAE to see what is drawn: give --vae, a release that has one")
        if config.lora_rank:
            from openlance.model.adapters import add_lora

            add_lora(model, config.trains, config.lora_rank, config.lora_alpha)
        feed, held_out = _prompts(options, config, Orders(model, tokenizer, vae), ranks)
        tracker = make_tracker(options.tracker, run_dir, to_dict(config)) if ranks.main else NoTracker()
        weights = train_rl(
            model, feed, config, run_dir,
            decode=decode, rewards=rewards, held_out=held_out, ranks=ranks, resume=options.resume,
            tracker=tracker,
        )  # fmt: skip
        if ranks.main:
            sampling = _few_steps(config) if distilled else None
            job = Job(model, model_config, tokenizer, vae, feed, {})
            print(save(run_dir, job, config, weights, sampling))


def _prompts(options: RLOptions, config: RLConfig, orders: Orders, ranks: Ranks) -> tuple[Prompts, HeldOut]:
    """What is drawn or asked, and what is measured: of files, or of the world where none is given."""
    from PIL import Image

    from openlance.rl.learn import HeldOut
    from openlance.rl.prompts import Prompts, of_pictures, of_questions, of_tasks, one_of, read_prompts
    from openlance.rl.rewards import parse_rewards
    from openlance.rl.rollout import Prompt
    from openlance.sequence.template import Task

    words = config.algorithm == "words"

    def make(prompt: str, metadata: Mapping[str, Any]) -> Sample:
        shown = [Image.fromarray(metadata["picture"])] if "picture" in metadata else []
        if words:
            return orders.ask(prompt, shown, seed=0).sample
        match metadata.get("task"):
            case Task.IMAGE_EDIT:
                return orders.edit(shown[0], prompt, seed=0).sample
            case Task.SUBJECT_IMAGE:
                return orders.subject(shown[0], prompt, seed=0).sample
            case Task.I2V:
                return orders.animate(shown[0], prompt, seed=0).sample
            case Task.T2V:
                return orders.generate_video(prompt, seed=0).sample
            case _:
                return orders.generate_image(prompt, seed=0).sample

    second = options.second_rewards
    if options.data:
        given = [row for file in options.data for row in read_prompts(file)]
        feed = Prompts(one_of(given), make, config.lanes, ranks, config.seed)
        rows = [row for file in options.held_out for row in read_prompts(file)]
        prompts = [Prompt(prompt, make(prompt, metadata), metadata) for prompt, metadata in rows]
    else:
        side = orders.config.sizes.image
        shown = of_questions(side) if words else of_pictures
        learnt = of_tasks(side) if config.algorithm == DISTILL else shown
        feed = Prompts(learnt, make, config.lanes, ranks, config.seed, apart=shown is of_pictures)
        prompts = Prompts(shown, make, config.lanes, apart=feed.apart).held_out(HELD_OUT)
        second = second or (JUDGED if config.algorithm == DISTILL and not options.rewards else ())
    return feed, HeldOut(prompts, parse_rewards(second) if second else None)


def _few_steps(config: RLConfig) -> dict[str, Any]:
    """How a distilled model samples."""
    unguided = {"guidance": 1.0, "visual_guidance": None, "solver": "euler"}
    return {"steps": config.rollout_steps, "shift": config.time_shift} | unguided


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> Vocabulary:
    from openlance.rl.words import Vocabulary

    ends = frozenset({config.tokens.im_end, config.tokens.endoftext})
    return Vocabulary(tokenizer.size, ends, tokenizer.decode)


def _decoder(vae: VAE) -> Decode:
    """Latents to frames."""
    import torch

    from openlance.data.media import from_vae_pixels

    @torch.inference_mode()
    def decode(latents: Tensor) -> Frames:
        return from_vae_pixels(vae.decode(latents[None].to(vae.device, vae.dtype))[0])

    return decode
