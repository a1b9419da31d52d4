"""`openlance plan`: whether a training job fits, how to lay it out, and how long it takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from openlance.cli.options import Maybe, given, option
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.train.footprint import Job
    from openlance.train.plan import Machine, Option, Plan

GIB = 2**30
COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "ema",
    "gathered",
    "activations",
    "logits",
    "encoder",
    "encoding",
)


@dataclass(frozen=True)
class JobOptions:
    """Job. Defaults are the stage's, as published."""

    tokens: Maybe[int] = None
    """Tokens of one rank and step."""
    longest: Maybe[int] = None
    """Tokens of the longest sample."""
    sample: Maybe[int] = None
    """Tokens of a usual sample: the cost of attention grows with it. Default: a clip of the model's sizes."""
    gen_share: Maybe[float] = None
    """Share of tokens that are latents. Default: 0.8."""
    answers: Maybe[int] = None
    """Tokens of a rank and step that carry cross-entropy. Default: 1024."""
    trains: str = "und,gen"
    """Experts that learn: und, gen or both. Vision tower and VAE stay frozen."""
    lora_rank: Maybe[int] = None
    """Train low-rank adapters of these experts instead."""
    no_ema: bool = False
    """Keep no average of the weights."""
    encoded: bool = False
    """Latents and ViT features are computed beforehand."""

    def changes(self) -> dict[str, Any]:
        """What differs from the stage's job."""
        changes = given(self) | {"ema": not self.no_ema}
        changes["trains"] = tuple(part.strip() for part in self.trains.split(",") if part.strip())
        del changes["no_ema"]
        return changes


@dataclass(frozen=True)
class MachineOptions:
    """Machine."""

    gpus: int = 8
    """Devices in all."""
    gpus_per_node: int = 8
    """Devices of one machine."""
    gpu_memory: float = 80.0
    """GiB of one device."""
    gpu: str = "H100"
    """Its name, for the speed: A100, H100, H100 PCIe, H200, B200, L40S, L4, RTX 4090, …"""
    peak_tflops: Maybe[float] = None
    """Dense bfloat16 TFLOPs a second of one device. Default: what is known of --gpu."""
    mfu: float = 0.4
    """Share of that which matrix products reach, waiting for data and other devices included."""

    def machine(self) -> Machine:
        """Raises InputError for a GPU that is not known."""
        from openlance.train.flops import device_peak_flops
        from openlance.train.plan import Machine

        peak = device_peak_flops(self.gpu) if self.peak_tflops is None else self.peak_tflops * 1e12
        if peak is None:
            raise InputError(f"--gpu {self.gpu!r} is not known: give --peak-tflops, dense bfloat16")
        return Machine(self.gpus, self.gpus_per_node, int(self.gpu_memory * GIB), peak, self.mfu)


def plan(
    *,
    preset: Annotated[str, option("Model: lance_3b or nano.")] = "lance_3b",
    stage: Annotated[str, option("pt, ct, sft or rl.")] = "sft",
    job: JobOptions,
    machine: MachineOptions,
    json: Annotated[bool, option("The same as JSON, in bytes.")] = False,
) -> None:
    """Say whether a training job fits the GPUs, how to lay it on them, and how many days it takes.

    Reckoned from shapes: no weights and no GPU are needed. Ends with 1 where nothing fits; says what would.

    For example:
      openlance plan --stage sft --gpus 8 --gpu-memory 80
      openlance plan --stage pt --gpus 128 --gpu H200 --gpu-memory 140 --mfu 0.35
      openlance plan --trains gen --lora-rank 16 --tokens 8192 --longest 8192 --gpus 1
    """
    from openlance.config import preset as model_preset
    from openlance.train.plan import job_of, make_plan

    found = make_plan(job_of(model_preset(preset), stage, **job.changes()), machine.machine())
    print(as_json(found, stage) if json else table(found, stage))
    if found.chosen is None:
        raise SystemExit(1)


def as_json(plan: Plan, stage: str) -> str:
    """Everything of a plan: bytes, operations, days."""
    names = (field.name for field in fields(plan.job) if field.name != "config")
    return json.dumps(
        {
            "model": plan.job.config.name,
            "stage": stage,
            "job": {name: getattr(plan.job, name) for name in names},
            "learns": plan.job.learns,
            "machine": asdict(plan.machine) | {"room": plan.machine.room},
            "options": [_option_json(option) for option in plan.options],
            "chosen": None if plan.chosen is None else _option_json(plan.chosen),
            "speed": None if plan.speed is None else asdict(plan.speed),
            "remedies": plan.remedies,
            "assumptions": assumptions(plan),
        },
        indent=1,
        ensure_ascii=False,
    )


def _option_json(option: Option) -> dict[str, Any]:
    return asdict(option) | {"total": option.memory.total}


def table(plan: Plan, stage: str) -> str:
    """The same for people."""
    job, machine = plan.job, plan.machine
    lines = [
        f"{job.config.name}, {stage}: {machine.devices} device{'s' * (machine.devices > 1)} "
        f"of {machine.memory / GIB:.1f} GiB, {machine.room / GIB:.1f} of them to use",
        f"{job.tokens:,} tokens a rank and step, longest sample {job.longest:,}, usual sample {job.sample:,}",
        "",
        *_parameters(job),
        "",
        "GiB on one device",
        f"{'sharding':15}{'context':>8}{'recompute':>10}{'tokens':>8}"
        + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS)
        + "   total",
        *(_row(option) for option in plan.options),
        "",
        *_verdict(plan),
        "",
        "assumed:",
        *(f"  {line}" for line in assumptions(plan)),
    ]
    return "\n".join(lines)


def _parameters(job: Job) -> list[str]:
    learns = job.learns
    adapters = f", adapters of rank {job.lora_rank}" if job.lora_rank else ""
    rows = [
        f"{part:8}{size:15,}  {f'{learns[part]:,} learn{adapters}' if part in learns else 'frozen'}"
        for part, size in job.on_device.items()
    ]
    return ["parameters", *rows]


def _row(option: Option) -> str:
    layout = option.layout
    cells = "".join(f"{getattr(option.memory, name) / GIB:{len(name) + 2}.1f}" for name in COLUMNS)
    return (
        f"{option.name:15}{layout.context:8}{'yes' if layout.recompute else 'no':>10}{option.tokens:8}"
        f"{cells}{option.memory.total / GIB:8.1f}  {'fits' if option.fits else 'too much'}"
    )


def _verdict(plan: Plan) -> list[str]:
    if plan.chosen is None or plan.speed is None:
        return ["nothing fits. What would, each alone:", *(f"  {remedy}" for remedy in plan.remedies)]
    option, layout, speed = plan.chosen, plan.chosen.layout, plan.speed
    copies = f", {layout.replicas} copies of {layout.shards} devices" if layout.replicas > 1 else ""
    split = f", each sample over {layout.context} devices" if layout.context > 1 else ""
    whole = option.tokens * layout.context
    note = [f"train with --context {layout.context} --tokens {whole}: a pack is of the whole group"]
    days = "   ".join(f"{stage} {_days(value)}" for stage, value in speed.days.items())
    return [
        f"chosen: {option.name}{copies}{split}, {'with' if layout.recompute else 'without'} activation "
        f"checkpointing: {option.memory.total / GIB:.1f} GiB",
        f"speed: {speed.tokens:,.0f} tokens a second in all, {speed.flops / 1e9:.3g} GFLOP a token "
        f"(MFU {speed.mfu:.2f} without recomputation and encoders)",
        f"days: {days}",
        *(note if layout.context > 1 else []),
    ]


def _days(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, in words."""
    job, machine = plan.job, plan.machine
    encoders = (
        "data encoded beforehand: no ViT and no VAE on the device"
        if job.encoded
        else "ViT and VAE encode on the device, in bfloat16; all und tokens but answers are the ViT's"
    )
    return [
        "weights, gradients, average and both AdamW moments in float32, computation in bfloat16 (FSDP2)",
        "attention keeps no scores (FlexAttention); checkpointing keeps each layer's input",
        f"{job.gen_share:.0%} of the tokens are latents; {job.answers:,} a rank and step carry cross-entropy",
        encoders,
        f"{machine.usable:.0%} of a device's memory is for tensors",
        f"products run at {machine.mfu:.0%} of {machine.peak / 1e12:,.1f} TFLOPs a second, those done twice "
        "too; traffic between devices hides behind them",
        "days are for the paper's tokens (pt 1.5T, ct 300B, sft 72B, rl 0.5B), rollouts of rl not counted",
    ]
