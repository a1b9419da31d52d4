"""Commands about models and outputs: what they are, what they need, how they are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from openlance.cli.options import LoadOptions, SamplingOptions, Settings, check_seed, option
from openlance.errors import InputError

if TYPE_CHECKING:
    import torch

    from openlance.config import ModelConfig
    from openlance.infer.memory import Need
    from openlance.sequence.template import Task

DTYPES = ("float32", "bfloat16")
GIB = 2**30


def info(
    *,
    model: Annotated[
        str,
        option("As for other commands; also a preset (lance_3b, nano), which needs no weights."),
    ] = "nano",
    variant: Annotated[str | None, option("Lance_3B or Lance_3B_Video.")] = None,
    task: Annotated[
        str | None, option("One task only: t2i, t2v, i2v, image_edit, x2t_image, … Default: all.")
    ] = None,
    dtype: Annotated[str | None, option("One dtype only. Default: float32 and bfloat16.")] = None,
    max_memory: Annotated[
        str | None, option("Say instead how each task would work in so much memory, as 8GB, in bfloat16.")
    ] = None,
    quantize: Annotated[str | None, option("With --max-memory: as --quantize of other commands.")] = None,
) -> None:
    """Say a model's shapes, its parameters, and the memory that each task needs. No weights are read.

    Memory is for one request at the model's default sizes: the weights of the parts that the task loads, and
    the most that lives beside them. CUDA and its libraries take some more. With --max-memory, it exits with 1
    where no task fits.

    For example:
      openlance info
      openlance info --model lance_3b --task t2v --dtype bfloat16
      openlance info --model lance_3b --max-memory 8GB
    """
    import torch

    from openlance.infer.memory import Estimator
    from openlance.sequence.template import Task, parse_task

    tasks = list(Task) if task is None else [parse_task(task)]
    dtypes = DTYPES if dtype is None else (dtype,)
    known = (*DTYPES, "float16")
    if dtype is not None and dtype not in known:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(known)}")
    if quantize is not None and max_memory is None:
        raise InputError("--quantize says what fits in a budget: give --max-memory, for example 8GB")
    config = _find_config(model, variant)
    if max_memory is not None:
        _show_plans(config, tasks, getattr(torch, dtype or "bfloat16"), max_memory, quantize)
        return
    print("\n".join(_shapes(config)), end="\n\n", flush=True)
    print(
        f"{'memory in GiB':16}" + "".join(f"{name:>10} = weights + working" for name in dtypes) + "    tokens"
    )
    estimator = Estimator(config)
    for wanted in tasks:
        needs = [estimator.need(wanted, getattr(torch, name)) for name in dtypes]
        print(f"{wanted:16}" + "".join(map(_cell, needs)) + f"{needs[0].tokens:10,}", flush=True)


def _show_plans(
    config: ModelConfig, tasks: Sequence[Task], dtype: torch.dtype, max_memory: str, quantize: str | None
) -> None:
    """How each task would work; exits with 1 where none can."""
    from openlance.infer.memory import Estimator
    from openlance.infer.plan import make_plan, parse_memory
    from openlance.model.quantize import choose_schemes

    budget, schemes = parse_memory(max_memory), choose_schemes(quantize, "cpu")
    print("\n".join(_shapes(config)), end="\n\n", flush=True)
    estimator, fitting = Estimator(config), 0
    for task in tasks:
        try:
            told = str(make_plan(estimator, [task], dtype, budget, schemes))
            fitting += 1
        except InputError as error:
            told = f"no: {error}"
        print(f"{task:16}{told}", flush=True)
    if not fitting:
        raise SystemExit(1)


def show(
    file: Annotated[Positional[Path], option("A picture or clip, or the JSON file of an answer.")],
) -> None:
    """Print the settings that an output was made with.

    For example:
      openlance show openlance-0001.png
    """
    print(json.dumps(settings_in(file), indent=1, ensure_ascii=False))


def demo(
    *,
    out: Annotated[Path, option("Folder for pictures, clips, answers and the contact sheet.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, option("Of everything that is drawn.")] = 1,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Run every task that the model can do, on inputs made here, and lay it all out on one sheet.

    For example:
      openlance demo --out demo_output
    """
    from openlance.demo import run
    from openlance.sequence.template import Task

    check_seed(seed)
    run(load.pipeline(Task), out, seed=seed, **sampling.settings({}))


def settings_in(file: Path) -> Settings:
    """The settings of an output, from the file itself. Raises InputError where it holds none."""
    from openlance.data.save import read_settings
    from openlance.model.release import read_json

    if file.suffix.lower() != ".json":
        return read_settings(file)
    found = read_json(file).get("openlance")
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no settings of openlance")
    return found


def _find_config(model: str, variant: str | None) -> ModelConfig:
    """The configuration of a checkpoint, or else of a preset of this name."""
    from openlance.config import PRESETS, preset
    from openlance.model.checkpoint import find_release, read_config
    from openlance.model.hub import BUNDLED

    bundled = BUNDLED.get(model)
    if model in PRESETS and not (bundled and bundled.is_dir()):
        return preset(model)
    return read_config(find_release(model, variant, weights=False))


def _shapes(config: ModelConfig) -> list[str]:
    from openlance.model.checkpoint import count_parameters

    body, eye, vae, sizes = config.backbone, config.vision, config.vae, config.sizes
    counts = count_parameters(config)
    described = {
        "und": f"{body.layers} layers, hidden {body.hidden}, {body.heads} heads over {body.kv_heads}, "
        f"mlp {body.mlp}, vocabulary {body.vocab}",
        "gen": "as und: the second expert of every layer, latents in and out",
        "vision": f"{eye.depth} layers, hidden {eye.hidden}, patch {eye.patch}",
        "vae": f"{vae.channels} channels, space {vae.spatial_stride}x smaller, time {vae.temporal_stride}x",
    }
    lines = [config.name, *(f"{part:8}{counts[part]:15,}  {text}" for part, text in described.items())]
    side = config.max_latent_side * vae.spatial_stride
    return [
        *lines,
        f"{'all':8}{sum(counts.values()):15,}",
        f"pictures {sizes.image}², clips {sizes.video}² and {sizes.frames} frames at {sizes.fps:g} a second; "
        f"at most {side}x{side} and {config.max_frames} frames",
    ]


def _cell(need: Need) -> str:
    return f"{need.total / GIB:10.2f} = {need.weights / GIB:7.2f} + {need.working / GIB:7.2f}"
