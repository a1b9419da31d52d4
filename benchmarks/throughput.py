"""Speed and memory of any preset with random weights: words, denoising, training, the VAE.

    python benchmarks/throughput.py                                   # nano, on what there is
    python benchmarks/throughput.py --preset lance_3b --device cuda --dtype bfloat16
    python benchmarks/throughput.py --preset lance_3b --layers 2      # cut down, to run anywhere

"share" is of the device's own peak: operations counted by torch in one run over its time, divided by what a
large matrix product reaches in the same dtype on the same device. Times are medians.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from machine import about, describe, options, read, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openlance.config import ModelConfig, SamplingConfig, SpecialTokens, TextConfig, preset
from openlance.infer.bench import measure_ceilings, now, random_weights
from openlance.infer.generate import Step, denoise
from openlance.infer.speak import speak
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.train.losses import losses
from openlance.train.settings import TrainConfig

PROMPT_TOKENS, NEW_TOKENS = 128, 64
Result = dict[str, Any]


class Bench:
    """A model with random weights, and one method for each thing that is measured."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, repeats: int):
        self.config, self.device, self.dtype, self.repeats = config, device, dtype, repeats
        self.model = random_weights(Lance, config, device, dtype, parts={"und", "gen"})
        self.vae = random_weights(VAE, config.vae, device, dtype)
        self.peak = measure_ceilings(device, dtype).operations if device.type == "cuda" else None

    def words(self) -> Result:
        """One answer: the prompt in one pass, then token by token."""
        sample = [text(PROMPT_TOKENS)]
        config = TextConfig(max_tokens=NEW_TOKENS)
        firsts, rests = [], []
        for _ in range(self.repeats):
            clock = [self._now()]
            for _token in speak(self.model, sample, config, allowed=self.config.backbone.vocab, stop=()):
                clock.append(self._now())
            firsts.append(clock[1] - clock[0])
            rests.append((clock[-1] - clock[1]) / (len(clock) - 2))
        prompt, token = statistics.median(firsts), statistics.median(rests)
        return {
            "prompt tokens/s": PROMPT_TOKENS / prompt,
            "new tokens/s": 1 / token,
            "ms/token": token * 1e3,
        }

    def denoising(self, frames: int, side: int) -> Result:
        """Text to image or video: one step with guidance, and one without."""
        target = self._target(frames, side)
        sample = [text(PROMPT_TOKENS, Role.TEMPLATE), text(PROMPT_TOKENS, Role.USER), target]
        noise = torch.randn(*target.grid, self.config.vae.channels)  # type: ignore[misc]
        result: Result = {"latent tokens": target.inner}
        for name, guidance in (("guided", 4.0), ("plain", 1.0)):
            sampling = SamplingConfig(steps=self.repeats + 1, guidance=guidance, guidance_interval=(0.0, 1.0))
            clock: list[float] = []

            def tick(step: Step, clock: list[float] = clock) -> None:
                clock.append(self._now())

            denoise(self.model, sample, sampling, noise, on_step=tick)
            seconds = statistics.median(b - a for a, b in pairwise(clock))
            result[f"ms/{name} step"] = seconds * 1e3
            if self.peak is not None:
                one, two = (self._operations(sample, replace(sampling, steps=n), noise) for n in (1, 2))
                result[f"{name} share"] = (two - one) / seconds / self.peak
        return result

    def decoding(self, frames: int, side: int) -> Result:
        """The VAE: pixels from latents."""
        target = self._target(frames, side)
        latents = torch.randn(1, *target.grid, self.config.vae.channels)  # type: ignore[misc]
        latents = latents.to(self.device, self.dtype)

        @torch.inference_mode()
        def run() -> Tensor:
            return self.vae.decode(latents)

        seconds = self._time(run)
        pixels = frames * (side // self.config.vae.spatial_stride * self.config.vae.spatial_stride) ** 2
        return {"s": seconds, "megapixels/s": pixels / seconds / 1e6}

    def training(self, batch: int, side: int) -> Result:
        """Forward and backward of text-to-image samples."""
        target = self._target(1, side)
        latents = torch.randn(*target.grid, self.config.vae.channels)  # type: ignore[misc]
        sample = [text(24, Role.USER), replace(target, latents=latents)]
        packed = pack([sample] * batch, self.config).to(self.device, self.dtype)
        noise = torch.randn(packed.latents.shape).to(packed.latents)
        config = TrainConfig(steps=1)

        def run() -> None:
            losses(self.model, packed, config, noise).total.backward()
            self.model.zero_grad(set_to_none=True)

        seconds = self._time(run)
        result = {"s/batch": seconds, "samples/s": batch / seconds, "tokens/s": packed.tokens / seconds}
        if self.peak is not None:
            with FlopCounterMode(display=False) as counter:
                run()
            result["share"] = counter.get_total_flops() / seconds / self.peak
        return result

    def memory(self) -> Result:
        """The most that was in use at once: on the device, or of the whole process on the CPU."""
        if self.device.type == "cuda":
            return {"GiB": torch.cuda.max_memory_allocated(self.device) / 2**30}
        return {"GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

    def _target(self, frames: int, side: int) -> Segment:
        vae = self.config.vae
        cells = side // vae.spatial_stride
        return Segment(Kind.NOISY, Role.TARGET, grid=((frames - 1) // vae.temporal_stride + 1, cells, cells))

    def _now(self) -> float:
        return now(self.device)

    def _time(self, run: Callable[[], Any]) -> float:
        run()  # warm
        times = []
        for _ in range(self.repeats):
            start = self._now()
            run()
            times.append(self._now() - start)
        return statistics.median(times)

    def _operations(self, sample: Sample, sampling: SamplingConfig, noise: Tensor) -> int:
        """Multiplications and additions of a whole generation; two of them differ by one step."""
        with FlopCounterMode(display=False) as counter:
            denoise(self.model, sample, sampling, noise)
        return counter.get_total_flops()


def text(tokens: int, role: Role = Role.TEMPLATE) -> Segment:
    return Segment(Kind.TEXT, role, torch.randint(0, 256, (tokens,)))


def table(results: dict[str, Result]) -> str:
    """One line for each thing that was measured."""
    lines = []
    for part, values in results.items():
        cells = ", ".join(f"{name} {value:,.4g}" for name, value in values.items())
        lines.append(f"| {part} | {cells} |")
    return "\n".join(["| what | measured |", "|---|---|", *lines])


def main() -> None:
    parser = options(__doc__, model=False)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--layers", type=int, help="cut the backbone down to this many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="samples of a training batch")
    parser.add_argument("--no-video", action="store_true")
    args = read(parser)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = preset(args.preset)
    if config.backbone.vocab <= config.tokens.im_start:  # a preset whose tokenizer is trained: any ids do
        config = replace(config, tokens=SpecialTokens(*range(6)))
    if args.layers:
        config = replace(config, backbone=replace(config.backbone, layers=args.layers))
    sizes = config.sizes
    frames = (sizes.frames - 1) // 4 * 4 + 1
    bench = Bench(config, device, dtype, args.repeats)
    results = {"words": bench.words(), "picture": bench.denoising(1, sizes.image)}
    results["picture decoded"] = bench.decoding(1, sizes.image)
    if not args.no_video:
        results["clip"] = bench.denoising(frames, sizes.video)
        results["clip decoded"] = bench.decoding(frames, sizes.video)
    results["training"] = bench.training(args.batch, sizes.image)
    results["peak memory"] = bench.memory()
    machine = about(device)
    setting = f"{args.preset}, {config.backbone.layers} layers, {str(dtype).removeprefix('torch.')}"
    print(f"{setting}; {describe(machine)}\n\n{table(results)}")
    write(args.out, {"setting": setting, "machine": machine, "results": results})


if __name__ == "__main__":
    main()
