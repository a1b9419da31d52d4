"""How much memory a task needs, known before anything is loaded.

The network and the VAE run on the meta device, where tensors have shapes but no values, and the tensors alive
at once are added up. What a device takes for itself (CUDA's context, the work space of a convolution,
fragments of freed blocks) is not in it: leave a fifth on top.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openlance.config import ModelConfig, SamplingConfig, TextConfig
from openlance.data.buckets import VIT_DIVISOR, Buckets
from openlance.infer.context import Context, encode
from openlance.infer.generate import Denoising, Target
from openlance.infer.orders import PARTS_OF
from openlance.infer.step_cache import Key, StepCache
from openlance.model.cache import Workspace
from openlance.model.checkpoint import parameter_shapes
from openlance.model.lance import Lance
from openlance.model.tiles import Tiles
from openlance.model.vae import VAE
from openlance.model.vision import PATCHES_AT_ONCE
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Task, compose, system_prompt

META = torch.device("meta")
MEASURED = torch.float32  # what runs on meta; other dtypes are reckoned from it
DEPTHS = (2, 3)  # layers of the networks that are run
PROMPT = "word " * 64
MANY_WORDS = 10_000  # tokens of a vocabulary that has a token for four letters, in the mean
TIMES = (1.0, 0.75, 0.5)  # of steps: the first keeps states, the second their slopes, the third has both
CHUNKS = 3  # latent frames that the VAE is run on: its later ones need what the third one does


@dataclass(frozen=True)
class Need:
    """What one request of a task takes, in bytes, at the checkpoint's default sizes.

    weights: of the parts that the task loads. phases: the most that lives on top of them in each: encode
    (the VAE), look (the vision tower), context, denoise or answer, decode (the VAE). tokens: length of the
    sequence.
    """

    task: Task
    tokens: int
    weights: int
    phases: dict[str, int]

    @property
    def phase(self) -> str:
        """Where it needs most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def working(self) -> int:
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        return self.weights + self.working


class Estimator:
    """What the tasks of a model need. Nothing is loaded, and what tasks have in common is run once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.shapes = parameter_shapes(config)
        self.counts = {part: sum(map(math.prod, named.values())) for part, named in self.shapes.items()}
        with META:
            self._networks = [
                Lance(
                    replace(config, backbone=replace(config.backbone, layers=layers)), {"und", "gen"}
                ).eval()
                for layers in DEPTHS
            ]
        self._known: dict[Hashable, tuple[Like, ...] | None] = {}
        self._vae = cache(self._make_vae)
        self._encode = cache(self._run_encode)
        self._decode = cache(self._run_decode)
        self._network = cache(self._run_network)

    def need(self, task: Task, dtype: torch.dtype, tiles: Tiles | None = None) -> Need:
        """Of one request: one picture or clip looked at where the task has one, guidance on, and reuse
        between steps where the configuration's sampling has it.

        tiles: how the VAE runs.
        """
        config, sizes = self.config, self.config.sizes
        weights = sum(self.counts[part] for part in PARTS_OF[task]) * dtype.itemsize
        frames = _fitting(sizes.frames, config) if task.video else 1
        side = sizes.video if task.video else sizes.image
        vit_side = sizes.vit_video if task.video else sizes.vit_image
        encoded, looks = _shown(task, config)
        tokens, network = self._network(task)
        phases = dict(network)
        if looks:
            seen = 1 if task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO) else frames
            phases["look"] = _look(config, seen, vit_side)
        phases = {name: size * dtype.itemsize // MEASURED.itemsize for name, size in phases.items()}
        if encoded:
            phases["encode"] = self._encode(encoded, side, dtype, tiles)
        if task.generates:
            phases["decode"] = self._decode(frames, side, dtype, tiles)
        return Need(task, tokens, weights, phases)

    def _run_network(self, task: Task) -> tuple[int, dict[str, int]]:
        """Tokens; and what the network takes: context and caches of both guidance branches, then one
        denoising step, or room for words.

        From the second on, layers differ only in the keys and values that they leave behind, so that three
        tell of all.
        """
        config, sizes = self.config, self.config.sizes
        frames = _fitting(sizes.frames, config) if task.video else 1
        side = sizes.video if task.video else sizes.image
        sample = _sample(task, config, frames, side, sizes.vit_video if task.video else sizes.vit_image)
        stages = _denoise if task.generates else _answer
        measured = (
            _measure([partial(stage, model, sample) for stage in stages], self._known)
            for model in self._networks
        )
        names = ("context", "denoise" if task.generates else "answer")
        phases = {}
        for name, two, three in zip(names, *measured, strict=True):
            ends = zip(two, three, strict=True)  # work decides, or what is left: one grows faster with depth
            phases[name] = max(a + (b - a) * (config.backbone.layers - DEPTHS[0]) for a, b in ends)
        return sum(map(len, sample)), phases

    def _make_vae(self, dtype: torch.dtype) -> VAE:
        with META:
            return VAE(self.config.vae).eval().to(dtype)

    def _run_encode(self, frames: int, side: int, dtype: torch.dtype, tiles: Tiles | None) -> int:
        """The VAE's encoder; of the pixels, which wait on the host, one chunk is on the device."""
        stride = self.config.vae.spatial_stride
        side = side // stride * stride
        run = min(frames, (CHUNKS - 1) * self.config.vae.temporal_stride + 1)
        pixels = torch.empty(1, 3, run, side, side, device=META, dtype=dtype)
        return self._run_vae(dtype, tiles, lambda vae: vae.encode(pixels))

    def _run_decode(self, frames: int, side: int, dtype: torch.dtype, tiles: Tiles | None) -> int:
        """The VAE's decoder; frames leave the device as they come."""
        cells = side // self.config.vae.spatial_stride
        run = min(_latent_frames(frames, self.config), CHUNKS)
        latents = torch.empty(1, run, cells, cells, self.config.vae.channels, device=META, dtype=dtype)
        return self._run_vae(dtype, tiles, lambda vae: [None for _ in vae.stream(latents)])

    def _run_vae(self, dtype: torch.dtype, tiles: Tiles | None, run: Callable[[VAE], Any]) -> int:
        vae = self._vae(dtype)
        vae.tiles = tiles
        [(most, _)] = _measure([lambda _: run(vae)], self._known)
        return most


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
        out = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            self._watch(tensor, new=True)
        return out

    def _run(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)

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


class Shapes(Peak):
    """The same on the meta device, where what comes out depends on shapes alone: each operation is run once
    for the shapes that it is given. (Most are Python there, and slow.)

    known: what new tensors came out, by operation and arguments; None where they were none, but views.
    """

    def __init__(self, known: dict[Hashable, tuple[Like, ...] | None]) -> None:
        super().__init__(META)
        self.known = known

    def _run(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if any(tensor.device != META for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)):
            return func(*args, **kwargs)
        key = func, _shape(args), _shape(tuple(kwargs.items()))
        like = self.known.get(key)
        if like is not None:
            made = tuple(map(_empty, like))
            return made if len(made) > 1 else made[0]
        out = func(*args, **kwargs)
        if key not in self.known:
            self.known[key] = _new(out, args, kwargs)
        return out


Like = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, stride and dtype."""


def _empty(like: Like) -> Tensor:
    shape, stride, dtype = like
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)


def _shape(value: Any) -> Hashable:
    """An argument, or several, with tensors by their shapes."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    return type(value), value


def _new(out: Any, args: tuple, kwargs: dict) -> tuple[Like, ...] | None:
    """What tensors came out, where they are that and nothing else, each with memory of its own."""
    outs = out if type(out) is tuple else (out,)
    if not outs or not all(isinstance(one, Tensor) and one.device == META for one in outs):
        return None
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    stores = {one.untyped_storage()._cdata for one in (*given, *outs)}
    like = tuple((one.shape, one.stride(), one.dtype) for one in outs)
    alone = len(stores) == len({one.untyped_storage()._cdata for one in given}) + len(outs)
    whole = all(
        _empty(each).untyped_storage().nbytes() == one.untyped_storage().nbytes()
        for each, one in zip(like, outs, strict=True)
    )
    return like if alone and whole else None


def _measure(
    stages: Sequence[Callable[[Any], Any]], known: dict[Hashable, tuple[Like, ...] | None]
) -> list[tuple[int, int]]:
    """Bytes alive on the meta device at most during each stage, and at its end; a stage is given what the one
    before made, the first one nothing. known: see `Shapes`."""
    found, made = [], None
    with torch.inference_mode(), Shapes(known) as peak:
        for stage in stages:
            peak.most = peak.live
            made = stage(made)
            found.append((peak.most, peak.live))
        del made
    return found


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
    encode = four_letters if config.backbone.vocab >= MANY_WORDS else _each_letter
    made = compose([*parts, PROMPT], encode, system=system_prompt(task, config.system_prompts), ending=ending)
    return made if ending is None else made[: made.index(ending) + 1]


def four_letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A tokenizer's place is taken by one token for four characters."""
    cuts = [(start, min(start + 4, len(text))) for start in range(0, len(text), 4)]
    return [0] * len(cuts), cuts


def _each_letter(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The same of a small vocabulary, which has few whole words."""
    return [0] * len(text), [(place, place + 1) for place in range(len(text))]


def _latent_frames(frames: int, config: ModelConfig) -> int:
    return (frames - 1) // config.vae.temporal_stride + 1


def _vit_side(side: int) -> int:
    return Buckets(side).out_size(1, 1, VIT_DIVISOR)[0]


def _begin(model: Lance, sample: Sample, _: None) -> Denoising:
    """The contexts of both guidance branches, and room for the target behind them."""
    grid = sample[-1].grid
    assert grid is not None
    noise = torch.empty(*grid, model.config.vae.channels, device=META)
    own = model.config.sampling
    settings = SamplingConfig(guidance_interval=(0.0, 1.0), reuse=own.reuse, reuse_order=own.reuse_order)
    work = Denoising(model, [Target(sample, noise)], settings)
    if work.reuse is not None:
        work.reuse = Whole(own.reuse, own.reuse_order)
    return work


def _step(model: Lance, sample: Sample, work: Denoising) -> Any:
    """A step; where there is reuse, as many as it takes until all is kept that will be, and one more."""
    for t in TIMES[: 1 if work.reuse is None else None]:
        velocity = work.velocity(work.start, t)
    return work, velocity


class Whole(StepCache):
    """Reuse that runs every branch whole: it keeps what reuse keeps, and reads nothing from the device."""

    def _fresh(self, added: dict[Key, Tensor]) -> set[int]:
        return {number for number, _ in added}


def _listen(model: Lance, sample: Sample, _: None) -> tuple[Context, Workspace]:
    """The context, and room for words behind it."""
    context = encode(model, sample)
    return context, context.cache.frozen(room=TextConfig().max_tokens)


def _speak(model: Lance, sample: Sample, heard: tuple[Context, Workspace]) -> Any:
    """An answer about to begin."""
    hidden = heard[0].last_hidden
    assert hidden is not None
    return heard, model.head(hidden)


_denoise = (_begin, _step)
_answer = (_listen, _speak)


def _look(config: ModelConfig, frames: int, side: int) -> int:
    """The vision tower on one clip or picture, by formula (it mixes devices, so cannot run on meta).

    All patches and features; and of the patches that are run at once their residual and normed states, and
    the widest part of a layer: q, k, v and their turned copies or the MLP.
    """
    vision = config.vision
    values = 3 * vision.temporal_patch * vision.patch**2
    frame = (_vit_side(side) // vision.patch) ** 2
    patches = math.ceil(frames / vision.temporal_patch) * frame
    once = min(patches, max(frame, PATCHES_AT_ONCE))
    wide = 2 * values + 2 * vision.hidden + max(6 * vision.hidden, 3 * vision.mlp)
    features = 2 * patches // vision.merge**2 * vision.out_hidden
    return (patches * values + features + once * wide) * MEASURED.itemsize
