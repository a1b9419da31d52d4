"""A golden case: what was asked, built from its source media by our own path, beside its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.infer.pipeline import LancePipeline
from openlance.infer.prepare import Resolutions, load, view
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Task, compose, system_prompt
from openlance.tokenizer import Tokenizer

ATOL = 1e-4  # float32, other order of operations, as MEANING.md advises; measured worst case 2e-5

TASKS = {"idip_image": Task.SUBJECT_IMAGE, "idip_video": Task.SUBJECT_VIDEO}
VARIANT_OF = "t2i"  # the guidance variants have this case's sequence

# What a token belongs to, as `sample_modality` numbers it.
TEMPLATE, WORDS, NOISY, SOURCE, REFERENCE, VIT = -1, 0, 1, 2, 3, 4


def load_golden(checkpoint: Path, extra: dict[str, Any]) -> LancePipeline:
    """The golden checkpoint. extra: model.json, with what the released layout keeps in code."""
    fixed = {"layer": "two experts", "qk_norm": True, "tie_word_embeddings": False}
    other = {key: extra[key] for key, value in fixed.items() if extra[key] != value}
    assert not other, f"not the architecture of Lance: {other}"
    assert extra["latent_patch_size"] == [1, 1, 1]
    release = find_release(checkpoint)
    tokenizer = Tokenizer.load(release.folder)
    assert tokenizer.size == extra["tokenizer_length"]
    config = read_config(release, tokenizer)
    config = replace(
        config,
        max_latent_side=extra["max_latent_size"],
        max_frames=extra["max_num_frames"],
        sampling=replace(config.sampling, shift=extra["timestep_shift"]),
    )
    return LancePipeline(load_model(release, config), tokenizer, load_vae(release, config))


@dataclass(eq=False)
class Case:
    """One folder of the golden data, read when needed."""

    name: str
    find: Callable[[str], Path]
    pipeline: LancePipeline
    of: str = field(default="")  # the case whose sequence this one shares

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.find(name))

    def _json(self, name: str) -> Any:
        return json.loads(self.find(name).read_text(encoding="utf-8"))

    @cached_property
    def asked(self) -> dict[str, Any]:
        return self._json(f"{self.name}/input.json")

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self._json(f"{self.name}/sequence.json")

    @cached_property
    def sequence(self) -> dict[str, Tensor]:
        return self._tensors(f"{self.of or self.name}/sequence.safetensors")

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        return self._tensors(f"{self.name}/tensors.safetensors")

    @cached_property
    def cached_numbers(self) -> dict[str, Tensor]:
        return self._tensors(f"{self.name}/kv.safetensors")

    @property
    def task(self) -> Task:
        return TASKS.get(self.asked["task"]) or Task(self.asked["task"])

    @property
    def sampling(self) -> SamplingConfig:
        opts = self.asked["opts"]
        return SamplingConfig(
            steps=opts["steps"],
            shift=opts["shift"],
            guidance=opts["cfg"],
            guidance_interval=tuple(opts["interval"]),
            renorm=opts["renorm"] or "none",
            renorm_min=opts["renorm_min"],
        )

    @property
    def elements(self) -> list[tuple[str, Any]]:
        """(kind, value) of what the case is made of: "text", "image" or "video"."""
        (item,) = self.asked["items"].values()
        if isinstance(item, str):
            return [("text", item)]
        return list(zip(item["element_dtype_array"], item["interleave_array"], strict=True))

    def view(self, name: str, *, semantic: bool, pixels: bool) -> Any:
        """A source file as the model sees it."""
        resolutions = Resolutions(self.asked["resolution_vae"], self.asked["resolution_vit"])
        media = load(self.find(name), self.pipeline.config.sizes)
        vae = self.pipeline.vae if pixels else None
        return view(media, resolutions, self.pipeline.config, vae, semantic=semantic)

    @cached_property
    def sample(self) -> Sample:
        """The whole sequence of a generation case, from its source media."""
        media = [name for kind, name in self.elements if kind != "text"]
        parts: list[str | Segment] = []
        first = None
        if self.task is Task.I2V:
            first = self.view(media[0], semantic=False, pixels=True).latents
        else:
            subject = self.task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO)
            for name in media:
                seen = self.view(name, semantic=True, pixels=True)
                parts += seen.segments(Role.REFERENCE if subject else Role.SOURCE)
        target = self._target(parts, first)
        prompt, config = self.asked["prompt"], self.pipeline.config
        system = system_prompt(self.task, config.system_prompts)
        encode = self.pipeline.tokenizer.encode_with_offsets
        return compose([*parts, prompt], encode, system=system, ending=target)

    def _target(self, parts: list[Any], first: Tensor | None) -> Segment:
        """An edit has the size of its source, an animated picture that of the picture, others as asked."""
        grid = (
            (self.asked["num_frames"] - 1) // 4 + 1,
            self.asked["height"] // 16,
            self.asked["width"] // 16,
        )
        if self.task in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
            grid = next(part.grid for part in reversed(parts) if part.kind is Kind.CLEAN)
        if first is None:
            return Segment(Kind.NOISY, Role.TARGET, grid=grid)
        grid = (grid[0], *first.shape[1:3])
        latents = torch.zeros(*grid, first.shape[-1])
        latents[0] = first[0]
        return Segment(Kind.NOISY, Role.TARGET, grid=grid, latents=latents, fixed_frames=(0,))

    @cached_property
    def batch(self) -> PackedBatch:
        return pack([self.sample], self.pipeline.config)

    @cached_property
    def conversation(self) -> tuple[Sample, Sample]:
        """Of an understanding case: the sequence up to the answer, and with it."""
        parts: list[str | Segment] = []
        for kind, value in self.elements:
            if kind == "text":
                system, question, answer = value
                parts += [question] if question else []
            else:
                parts += self.view(value, semantic=True, pixels=False).segments(Role.SOURCE)
        encode = self.pipeline.tokenizer.encode_with_offsets
        return (
            compose(parts, encode, system=system),
            compose(parts, encode, system=system, ending=answer),
        )


def in_order(batch: PackedBatch, values: Tensor) -> Tensor:
    """Values [..., N] of the sorted tokens as [..., N] in the order of the sequence."""
    out = torch.empty_like(values)
    out[..., batch.place] = values
    return out


def mask_in_order(batch: PackedBatch, mask: Tensor) -> Tensor:
    return in_order(batch, in_order(batch, mask).T).T


def unpack_bits(packed: Tensor | np.ndarray, length: int) -> Tensor:
    """[rows, length] bool from rows of packed bits."""
    bits = np.unpackbits(np.asarray(packed), axis=1)[:, :length]
    return torch.from_numpy(bits).bool()


def groups(sample: Sample) -> Tensor:
    """[L] what each token belongs to, as the golden data numbers it."""

    def group(segment: Segment) -> int:
        if segment.kind is Kind.TEXT:
            return WORDS if segment.role is Role.USER else TEMPLATE
        if segment.kind is Kind.CLEAN:
            return REFERENCE if segment.role is Role.REFERENCE else SOURCE
        return NOISY if segment.kind is Kind.NOISY else VIT

    return torch.cat([torch.full((len(segment),), group(segment)) for segment in sample])


def whole_hidden(model: Lance, batch: PackedBatch, **given: Any) -> Tensor:
    """[L, hidden] of every token after the final norms, in the order of the sequence."""
    found: list[Tensor] = []
    hook = model.norm["gen"].register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        out = model(batch, **given)
    finally:
        hook.remove()
    return in_order(batch, torch.cat([out.hidden, *found]).T).T


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=ATOL, rtol=0)
