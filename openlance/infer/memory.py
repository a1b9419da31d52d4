"""How much memory a task needs, known before anything is loaded.

The network and the VAE run on the meta device, where tensors have shapes but no values, and the tensors alive
at once are added up. What a device takes for itself (CUDA's context, the work space of a convolution,
fragments of freed blocks) is not in it: leave a fifth on top.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openlance.config import ModelConfig, SamplingConfig, TextConfig
from openlance.data.buckets import VIT_DIVISOR, Buckets
from openlance.infer.context import encode
from openlance.infer.generate import Denoising, Target
from openlance.infer.orders import PARTS_OF
from openlance.model.checkpoint import count_parameters
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Task, compose, system_prompt

META = torch.device("meta")
MEASURED = torch.float32  # what runs on meta; other dtypes are reckoned from it
PROMPT = "word " * 64
CHUNKS = 2  # latent frames that the VAE is run on: its later ones need what the second one does


@dataclass(frozen=True)
class Need:
    """What one request of a task takes, in bytes, at the checkpoint's default sizes.

    weights: of the parts that the task loads. working: the most that lives on top of them, at `phase`.
    tokens: length of the sequence.
    """

    task: Task
    tokens: int
    weights: int
    working: int
    phase: str

    @property
    def total(self) -> int:
        return self.weights + self.working


class Estimator:
    """What the tasks of a model need. Nothing is loaded, and what tasks have in common is run once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.counts = count_parameters(config)
        with META:
            self._vae = VAE(config.vae).eval()
            self._networks = [
                Lance(
                    replace(config, backbone=replace(config.backbone, layers=layers)), {"und", "gen"}
                ).eval()
                for layers in (1, 2)
            ]
        self._encode = cache(self._run_encode)
        self._decode = cache(self._run_decode)

    def need(self, task: Task, dtype: torch.dtype) -> Need:
        """Of one request: one picture or clip looked at where the task has one, guidance on."""
        config, sizes = self.config, self.config.sizes
        weights = sum(self.counts[part] for part in PARTS_OF[task]) * dtype.itemsize
        frames = _fitting(sizes.frames, config) if task.video else 1
        side = sizes.video if task.video else sizes.image
        vit_side = sizes.vit_video if task.video else sizes.vit_image
        encoded, looks = _shown(task, config)
        sample = _sample(task, config, frames, side, vit_side)
        phases = {"denoise" if task.generates else "answer": self._network(sample)}
        if looks:
            phases["look"] = _look(config, frames, vit_side)
        if encoded:
            phases["encode"] = self._encode(encoded, side)
        if task.generates:
            phases["decode"] = self._decode(frames, side)
        phase = max(phases, key=phases.__getitem__)
        working = phases[phase] * dtype.itemsize // MEASURED.itemsize
        return Need(task, sum(map(len, sample)), weights, working, phase)

    def _network(self, sample: Sample) -> int:
        """The network: context, caches of both guidance branches, and one denoising step or room for words.

        Layers differ only in the keys and values that they leave behind, so two of them tell of all.
        """
        one, two = (_measure(partial(_use, model, sample)) for model in self._networks)
        return one + (two - one) * (self.config.backbone.layers - 1)

    def _run_encode(self, frames: int, side: int) -> int:
        """The VAE's encoder; of frames beyond `CHUNKS` latent ones, the pixels (twice: they are cut up)."""
        vae = self.config.vae
        side = side // vae.spatial_stride * vae.spatial_stride
        run = min(frames, (CHUNKS - 1) * vae.temporal_stride + 1)
        pixels = 2 * (frames - run) * 3 * side * side * MEASURED.itemsize
        return pixels + _measure(lambda: self._vae.encode(torch.empty(1, 3, run, side, side, device=META)))

    def _run_decode(self, frames: int, side: int) -> int:
        """The VAE's decoder: work on a chunk beside all pixels so far, or all pixels joined and unfolded."""
        vae = self.config.vae
        cells, count = side // vae.spatial_stride, _latent_frames(frames, self.config)
        run = min(count, CHUNKS)
        pixels = frames * 3 * (cells * vae.spatial_stride) ** 2 * MEASURED.itemsize
        latents = torch.empty(1, run, cells, cells, vae.channels, device=META)
        return max(pixels * (count - run) // count + _measure(lambda: self._vae.decode(latents)), 3 * pixels)


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on: `live` now, `most` at once."""

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device, self.live, self.most = device, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._watch(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._watch(tensor, new=True)
        return out

    def _watch(self, tensor: Any, new: bool) -> None:
        """Know a tensor's memory by its storage: views share one. What was there before is not counted."""
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _measure(run: Callable[[], Any]) -> int:
    """The most bytes alive at once on the meta device during `run`."""
    with torch.inference_mode(), Peak() as peak:
        result = run()
        del result
    return peak.most


def _fitting(frames: int, config: ModelConfig) -> int:
    stride = config.vae.temporal_stride
    return (frames - 1) // stride * stride + 1


def _shown(task: Task, config: ModelConfig) -> tuple[int, bool]:
    """(frames that the VAE encodes, whether the vision tower looks) of what the user shows."""
    if task in (Task.T2I, Task.T2V, Task.CHAT):
        return 0, False
    if task in (Task.X2T_IMAGE, Task.X2T_VIDEO):
        return 0, True
    if task is Task.I2V:
        return 1, False
    return (_fitting(config.sizes.frames, config) if task is Task.VIDEO_EDIT else 1), True


def _sample(task: Task, config: ModelConfig, frames: int, side: int, vit_side: int) -> Sample:
    """A request of this task, with features of the vision tower that take no memory."""
    vae, vision = config.vae, config.vision
    cells = side // vae.spatial_stride
    encoded, looks = _shown(task, config)
    subject = task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO)
    role = Role.REFERENCE if subject else Role.SOURCE
    parts: list[str | Segment] = []
    if looks:
        seen = 1 if subject else frames
        rows = _vit_side(vit_side) // (vision.patch * vision.merge)
        grid = (math.ceil(seen / vision.temporal_patch), rows, rows)
        features = torch.empty(math.prod(grid), config.backbone.hidden, device=META)
        parts.append(Segment(Kind.VIT, role, grid=grid, features=features))
        if encoded:
            latents = torch.zeros(_latent_frames(encoded, config), cells, cells, vae.channels)
            parts.append(Segment(Kind.CLEAN, role, grid=tuple(latents.shape[:3]), latents=latents))  # type: ignore[arg-type]
    ending = None
    if task.generates:
        ending = Segment(Kind.NOISY, Role.TARGET, grid=(_latent_frames(frames, config), cells, cells))
    made = compose(
        [*parts, PROMPT], four_letters, system=system_prompt(task, config.system_prompts), ending=ending
    )
    return made if ending is None else made[: made.index(ending) + 1]


def four_letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A tokenizer's place is taken by one token for four characters."""
    cuts = [(start, min(start + 4, len(text))) for start in range(0, len(text), 4)]
    return [0] * len(cuts), cuts


def _latent_frames(frames: int, config: ModelConfig) -> int:
    return (frames - 1) // config.vae.temporal_stride + 1


def _vit_side(side: int) -> int:
    return Buckets(side).out_size(1, 1, VIT_DIVISOR)[0]


def _use(model: Lance, sample: Sample) -> Any:
    """One denoising step of both branches, or an answer about to begin; gives all that is then alive."""
    if sample[-1].kind is not Kind.NOISY:
        context = encode(model, sample)
        assert context.last_hidden is not None
        return context.cache.frozen(room=TextConfig().max_tokens), model.head(context.last_hidden)
    grid = sample[-1].grid
    assert grid is not None
    noise = torch.empty(*grid, model.config.vae.channels, device=META)
    work = Denoising(model, [Target(sample, noise)], SamplingConfig(guidance_interval=(0.0, 1.0)))
    return work, work.velocity(work.start, 1.0)


def _look(config: ModelConfig, frames: int, side: int) -> int:
    """The vision tower on one clip or picture, by formula (it mixes devices, so cannot run on meta): patches,
    residual and normed states, and the widest part of a layer, q, k, v and their turned copies or the MLP."""
    vision = config.vision
    patches = math.ceil(frames / vision.temporal_patch) * (_vit_side(side) // vision.patch) ** 2
    values = 3 * vision.temporal_patch * vision.patch**2
    wide = values + 2 * vision.hidden + max(6 * vision.hidden, 3 * vision.mlp)
    return patches * wide * MEASURED.itemsize
