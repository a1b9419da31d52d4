"""Dense attention on CPU, forward and backward: two products and a softmax, against SDPA.

    python benchmarks/attention.py

`openlance.model.attention` takes the first where gradients are wanted on a CPU. Both run in turns in one
process, on batches of nano's text-to-image and editing samples; what counts is their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import about, describe, options, read, write
from torch import Tensor

from openlance.config import nano
from openlance.model.attention import Rows, attention
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Sample, Segment

Attend = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]


def with_sdpa(q: Tensor, k: Tensor, v: Tensor, pattern: Rows) -> Tensor:
    """The same attention by torch's fused kernel: q [N, heads, d]; k, v [N, kv_heads, d]."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for rows, mask in zip(pattern.rows, pattern.masks, strict=True):
        place = rows.clamp(max=len(q) - 1)
        query = q[place].transpose(1, 2)
        key, value = (x[place].transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k, v))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        real = rows < len(q)
        out = out.index_copy(0, rows[real], found.transpose(1, 2)[real])
    return out


def samples(kind: str, count: int) -> list[Sample]:
    """Nano's shapes: a caption of 16 to 24 words, 36 latent tokens; an edit also shows its source twice."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        words = int(torch.randint(16, 25, (), generator=generator))
        sample = [Segment(Kind.TEXT, Role.USER, torch.zeros(words, dtype=torch.long))]
        if kind == "edit":
            features = torch.zeros(16, nano().backbone.hidden)
            sample.append(Segment(Kind.VIT, Role.SOURCE, grid=(1, 4, 4), features=features))
            sample.append(Segment(Kind.CLEAN, Role.SOURCE, grid=(1, 6, 6), latents=torch.zeros(1, 6, 6, 48)))
        made.append([*sample, Segment(Kind.NOISY, Role.TARGET, grid=(1, 6, 6))])
    return made


def measure(kind: str, count: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns, and how much faster the products are."""
    shape = nano().backbone
    batch = pack(samples(kind, count), nano())
    pattern = Rows(batch.rows, batch.masks)
    q = torch.randn(batch.tokens, shape.heads, shape.head_dim, requires_grad=True)
    k, v = (torch.randn(batch.tokens, shape.kv_heads, shape.head_dim, requires_grad=True) for _ in range(2))
    weight = torch.randn_like(q)
    ways: dict[str, Attend] = {"products": attention, "SDPA": with_sdpa}
    results = {name: attend(q, k, v, pattern) for name, attend in ways.items()}
    torch.testing.assert_close(results["products"], results["SDPA"], atol=1e-5, rtol=0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, attend in ways.items():
            start = time.perf_counter()
            (attend(q, k, v, pattern) * weight).sum().backward()
            times[name].append(time.perf_counter() - start)
    medians = {f"{name} ms": statistics.median(values) * 1e3 for name, values in times.items()}
    return {"tokens": batch.tokens, **medians, "ratio": medians["SDPA ms"] / medians["products ms"]}


def main() -> None:
    parser = options(__doc__, model=False, threads=1)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=50)
    args = read(parser)
    torch.manual_seed(0)
    machine = about(torch.device("cpu"))
    results = {kind: measure(kind, args.batch, args.repeats) for kind in ("text to image", "edit")}
    print(f"batch of {args.batch}; {describe(machine)}\n\n| samples | measured |\n|---|---|")
    for kind, values in results.items():
        print(f"| {kind} | {', '.join(f'{name} {value:,.4g}' for name, value in values.items())} |")
    write(args.out, {"batch": args.batch, "machine": machine, "results": results})


if __name__ == "__main__":
    main()
