"""What one process of several does of a request, and what it exchanges: counted at the released shapes,
without values and without other processes.

    python benchmarks/spread.py

Of the busiest process: its floating point operations against those of one process alone, and the bytes of all
that it gets or gives in exchanges, in bfloat16, for one guided step and for decoding a picture or clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from openlance.config import SamplingConfig, VAEConfig, lance_3b
from openlance.infer.generate import Denoising, Target
from openlance.infer.memory import META, _sample
from openlance.infer.parallel import SPREADS
from openlance.model.lance import Lance
from openlance.model.tiles import Tiles
from openlance.model.vae import VAE
from openlance.sequence.template import Task

SHAPES = {"picture 768²": (1, 48, 48), "clip 480×848, 49 frames": (13, 30, 53)}
GUIDED = SamplingConfig(guidance_interval=(0.0, 1.0))


class Exchanged(TorchDispatchMode):
    """Bytes of the tensors given to collectives, while it is on: what is sent, or the room for what comes."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            first = tree_leaves(args[0])  # of an all-to-all, what arrives
            self.bytes += sum(x.nbytes for x in first if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """(operations, bytes exchanged)."""
    with torch.inference_mode(), Exchanged() as exchanged, FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops(), exchanged.bytes


def busiest(processes: int, make: Callable[[dist.ProcessGroup], Callable[[], Any]]) -> tuple[int, int]:
    """The most of any process, of (operations, bytes)."""
    found = []
    for rank in range(processes):
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        assert dist.group.WORLD is not None
        found.append(counted(make(dist.group.WORLD)))
        dist.destroy_process_group()
    return max(flops for flops, _ in found), max(size for _, size in found)


def decoding(vae: VAE, shape: tuple[int, int, int], tiles: Tiles | None) -> Callable[[], Any]:
    frames, rows, columns = shape
    latents = torch.empty(1, frames, rows, columns, 48, device=META, dtype=torch.bfloat16)

    def run() -> None:
        vae.tiles = tiles
        for _ in vae.stream(latents):
            pass

    return run


def step(model: Lance, shape: tuple[int, int, int], kind: Any) -> Callable[..., Callable[[], Any]]:
    """A guided step, of a target of this shape; kind: of its `Denoising`."""
    *given, last = _sample(Task.T2I, model.config, 1, 16, 0)
    target = Target([*given, replace(last, grid=shape)], torch.empty(*shape, 48, device=META))

    @torch.inference_mode()
    def make(*group: dist.ProcessGroup) -> Callable[[], Any]:
        work = kind(model, [target], GUIDED, *group)
        return lambda: work.velocity(work.start, 1.0)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--work", nargs="*", default=["decode", *SPREADS])
    asked = parser.parse_args()
    with META:
        model = Lance(lance_3b(), {"und", "gen"}).eval().bfloat16()
        vae = VAE(VAEConfig()).eval().bfloat16()
    for work in asked.work:
        for name, shape in SHAPES.items():
            if work == "decode":
                alone = decoding(vae, shape, None)

                def make(group: dist.ProcessGroup, shape: tuple[int, int, int] = shape) -> Callable[[], Any]:
                    return decoding(vae, shape, Tiles(group=group))
            else:
                alone, make = step(model, shape, Denoising)(), step(model, shape, SPREADS[work])
            whole, _ = counted(alone)
            for count in asked.processes:
                flops, size = busiest(count, make)
                print(f"{name:24} {work:9} {count}  {flops / whole:6.1%}  {size / 1e6:9.2f} MB", flush=True)


if __name__ == "__main__":
    main()
