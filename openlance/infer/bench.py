"""What a model takes on a device, beside what the device could do it in at best: time over the floor.

The floor of a phase is what its operations take at the rate of a large matrix product, or what its weights
take to be read once a pass, whichever is longer. Both rates are measured first, on the same device, in the
same dtype. Operations come from shapes alone (`openlance.model.flops`): they are known without a run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openlance.config import ModelConfig, TextConfig, VAEConfig
from openlance.data.buckets import VIT_DIVISOR, Buckets
from openlance.errors import InputError
from openlance.flow.guidance import guided_now
from openlance.flow.path import time_grid
from openlance.infer.generate import Denoising, Target
from openlance.infer.memory import PROMPT, four_letters
from openlance.infer.speak import speak
from openlance.model.flops import Work, forward_flops, layer_weights, vae_encode_flops, vision_flops, work_of
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.segment import Kind, Role, Sample, Segment, without
from openlance.sequence.template import Task, compose, system_prompt

WORDS = 64
ASPECT = 16 / 9  # of clips
META = torch.device("meta")


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: operations of a matrix product and bytes to and from memory, each a second."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """operations: of a phase. read: bytes of weights that must be read for it."""

    operations: int
    read: int = 0

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return max(self.operations / ceilings.operations, self.read / ceilings.bytes)


@dataclass(frozen=True)
class Job:
    """One request: size is (height, width) in pixels."""

    name: str
    task: Task
    size: tuple[int, int] = (0, 0)
    frames: int = 1


@dataclass(frozen=True)
class Phase:
    """What a phase of a job took, in seconds."""

    job: Job
    name: str
    seconds: float
    cost: Cost


def jobs_of(config: ModelConfig, quick: bool = False) -> list[Job]:
    """The work that is measured: pictures and clips of the default size and the largest, an edit, and words.

    quick: without the largest.
    """
    sizes, vae = config.sizes, config.vae
    stride, most = vae.spatial_stride, config.max_latent_side * vae.spatial_stride
    usual = (sizes.frames - 1) // vae.temporal_stride * vae.temporal_stride + 1
    picture, clip = (sizes.image,) * 2, (sizes.video, int(sizes.video * ASPECT) // stride * stride)
    large = [] if quick or sizes.image >= most else [Job(f"picture {most}²", Task.T2I, (most, most))]
    long = [] if quick or usual >= config.max_frames else [config.max_frames]
    return [
        Job(f"picture {sizes.image}²", Task.T2I, picture),
        *large,
        Job(f"edit {sizes.image}²", Task.IMAGE_EDIT, picture),
        *(
            Job(f"clip {clip[0]}x{clip[1]}, {count} frames", Task.T2V, clip, count)
            for count in (usual, *long)
        ),
        Job(f"{WORDS} words", Task.CHAT),
    ]


def sample_of(config: ModelConfig, job: Job) -> Sample:
    """A request as long as a usual one; what is shown is empty, its features not known yet."""
    parts: list[str | Segment] = []
    if job.task is Task.IMAGE_EDIT:
        grid = _latent_grid(config, job)
        latents = torch.zeros(*grid, config.vae.channels)
        parts.append(Segment(Kind.VIT, Role.SOURCE, grid=_seen_grid(config)))
        parts.append(Segment(Kind.CLEAN, Role.SOURCE, grid=grid, latents=latents))
    ending = Segment(Kind.NOISY, Role.TARGET, grid=_latent_grid(config, job)) if job.task.generates else None
    system = system_prompt(job.task, config.system_prompts)
    made = compose([*parts, PROMPT], four_letters, system=system, ending=ending)
    return made if ending is None else made[: made.index(ending) + 1]


def costs(config: ModelConfig, job: Job, itemsize: int = 2) -> dict[str, Cost]:
    """Of each phase of a job, from shapes alone. itemsize: bytes of a weight."""
    sample = sample_of(config, job)
    expert = layer_weights(config.backbone) * config.backbone.layers * itemsize
    if not job.task.generates:
        behind = sum(map(len, sample))
        pairs = sum(behind + said for said in range(1, WORDS + 1))
        head = config.backbone.hidden * config.backbone.vocab * itemsize
        words = forward_flops(config, Work(und=WORDS, pairs=pairs, answers=WORDS))
        prompt = forward_flops(config, work_of([sample]))
        return {"context": Cost(prompt, expert), "words": Cost(words, WORDS * (expert + head))}
    frames, rows, columns = _latent_grid(config, job)
    found = {}
    if job.task is Task.IMAGE_EDIT:
        _, *seen = _seen_grid(config)
        patches = [side * config.vision.merge for side in seen]
        found["look"] = Cost(vision_flops(config.vision, 1, *patches))
        found["encode"] = Cost(vae_encode_flops(config.vae, frames, rows, columns))
    both = expert * 2
    guided, plain = evaluations(config)
    contexts = [sample[:-1], without(sample[:-1], Role.USER)]
    shared = next(place for place, segment in enumerate(sample) if segment.role is Role.USER)
    context, again, twice = (forward_flops(config, work_of([s])) for s in (*contexts, sample[:shared]))
    one, other = (_step_flops(config, context, sample[-1]) for context in contexts)
    found["context"] = Cost(context + (again - twice if guided else 0), both if len(found) else expert)
    found["denoise"] = Cost(guided * (one + other) + plain * one, (guided + plain) * both)
    found["decode"] = Cost(vae_decode_flops(config.vae, frames, rows, columns))
    return found


def evaluations(config: ModelConfig) -> tuple[int, int]:
    """How many steps have guidance, and how many have none."""
    sampling = config.sampling
    times = time_grid(sampling.steps, sampling.shift)[:-1].tolist()
    guided = sum(guided_now(sampling, t) for t in times) if sampling.guidance != 1.0 else 0
    return guided, len(times) - guided


def _step_flops(config: ModelConfig, context: Sample, target: Segment) -> int:
    """Of one evaluation of a branch, its context being in the cache."""
    length = len(target)
    pairs = length * (length + sum(map(len, context)))
    return forward_flops(config, Work(length - target.inner, target.inner, pairs))


@cache
def vae_decode_flops(config: VAEConfig, frames: int, rows: int, columns: int) -> int:
    """The VAE's decoder for latents of this shape, counted on tensors without values.

    From the third latent frame on, each takes the same.
    """
    if frames > 3:
        two, three = (vae_decode_flops(config, count, rows, columns) for count in (2, 3))
        return three + (frames - 3) * (three - two)
    with META:
        vae = VAE(config).eval()
        latents = torch.empty(1, frames, rows, columns, config.channels)
    with torch.inference_mode(), FlopCounterMode(display=False) as found, sdpa_kernel(SDPBackend.MATH):
        vae.decode(latents)
    return found.get_total_flops()


def _latent_grid(config: ModelConfig, job: Job) -> tuple[int, int, int]:
    vae = config.vae
    rows, columns = (side // vae.spatial_stride for side in job.size)
    return (job.frames - 1) // vae.temporal_stride + 1, rows, columns


def _seen_grid(config: ModelConfig) -> tuple[int, int, int]:
    """Merged patches of a picture as the vision tower sees it."""
    side = Buckets(config.sizes.vit_image).out_size(1, 1, VIT_DIVISOR)[0]
    cells = side // (config.vision.patch * config.vision.merge)
    return 1, cells, cells


class Bench:
    """A model and what its jobs take. repeats: of what is timed, of which the median counts."""

    def __init__(self, model: Lance, vae: VAE, repeats: int = 3):
        self.model, self.vae, self.repeats = model, vae, repeats

    def run(self, job: Job) -> Iterator[Phase]:
        """Each phase, as it is done."""
        run = self._generate if job.task.generates else self._answer
        known = costs(self.model.config, job, self.model.dtype.itemsize)
        for name, seconds in run(job):
            yield Phase(job, name, seconds, known[name])

    @torch.inference_mode()
    def _generate(self, job: Job) -> Iterator[tuple[str, float]]:
        config, device = self.model.config, self.model.device
        sample, seen = sample_of(config, job), _seen_grid(config)
        if job.task is Task.IMAGE_EDIT:
            patches, grid = self._patches(seen)
            yield "look", self._time(lambda: self.model.vision(patches, grid))
            pixels = torch.zeros(1, 3, job.frames, *job.size).to(device, self.vae.dtype)
            yield "encode", self._time(lambda: self.vae.encode(pixels))
            features = torch.zeros(math.prod(seen), config.backbone.hidden)
            sample = [replace(s, features=features) if s.kind is Kind.VIT else s for s in sample]
        noise = torch.randn(*_latent_grid(config, job), config.vae.channels)
        target = Target(sample, noise)
        work = Denoising(self.model, [target], config.sampling)
        yield "context", self._time(lambda: Denoising(self.model, [target], config.sampling))
        times = time_grid(config.sampling.steps, config.sampling.shift)[:-1].tolist()
        yield "denoise", sum(self._steps(work, times))
        latents = noise[None].to(device, self.vae.dtype)
        yield "decode", self._time(lambda: self.vae.decode(latents))

    def _steps(self, work: Denoising, times: Sequence[float]) -> Iterator[float]:
        """Seconds of the steps with guidance, and of those without: one of each is timed, for all."""
        for guided in (True, False):
            some = [t for t in times if guided_now(work.config, t) == guided]
            if some:
                yield len(some) * self._time(partial(work.velocity, work.start, some[0]))

    def _answer(self, job: Job) -> Iterator[tuple[str, float]]:
        sample = sample_of(self.model.config, job)
        vocabulary = self.model.config.backbone.vocab
        firsts, rests = [], []
        for _ in range(self.repeats):
            clock = [self._now()]
            config = TextConfig(max_tokens=WORDS + 1)
            for _word in speak(self.model, sample, config, allowed=vocabulary, stop=()):
                clock.append(self._now())
            firsts.append(clock[1] - clock[0])
            rests.append(clock[-1] - clock[1])
        yield "context", statistics.median(firsts)
        yield "words", statistics.median(rests)

    def _patches(self, seen: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """What the vision tower takes of a grid of merged patches."""
        vision = self.model.config.vision
        grid = torch.tensor([[seen[0], seen[1] * vision.merge, seen[2] * vision.merge]])
        values = 3 * vision.temporal_patch * vision.patch**2
        patches = torch.zeros(int(grid.prod()), values)
        return patches.to(self.model.device, self.model.dtype), grid.to(self.model.device)

    def _time(self, run: Callable[[], Any]) -> float:
        run()  # warm
        times = []
        for _ in range(self.repeats):
            start = self._now()
            run()
            times.append(self._now() - start)
        return statistics.median(times)

    def _now(self) -> float:
        return now(self.model.device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several large matrix products, and of several copies."""
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    one, other = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in range(2))
    operations = 2 * side**3 / _best(device, lambda: torch.mm(a, b, out=product))
    return Ceilings(operations, 2 * size / _best(device, lambda: other.copy_(one)))


def _best(device: torch.device, run: Callable[[], Any], repeats: int = 8) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = now(device)
        run()
        times.append(now(device) - start)
    return min(times)


def now(device: torch.device) -> float:
    """Seconds, after what the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def random_weights(kind: Any, config: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """A module whose weights are drawn in place, in their dtype on their device."""
    with META:
        module = kind(config, **options)
    module = module.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return module


def random_bench(config: ModelConfig, device: torch.device, dtype: torch.dtype, repeats: int) -> Bench:
    """A bench of a preset's shapes. Raises InputError where the device has no room for its weights."""
    from openlance.model.checkpoint import count_parameters

    wanted, free = sum(count_parameters(config).values()) * dtype.itemsize, _free_memory(device)
    if free is not None and wanted * 1.2 > free:
        raise InputError(
            f"{config.name}: its weights take {wanted / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"and a fifth on top for the work; {device} has {free / 1e9:.1f} GB free. "
            "Choose another device or dtype, or nano"
        )
    model = random_weights(Lance, config, device, dtype)
    return Bench(model, random_weights(VAE, config.vae, device, dtype), repeats)


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":") for line in lines)
    except FileNotFoundError:  # not Linux
        return None
    return int(sizes["MemAvailable"].split()[0]) * 1024
