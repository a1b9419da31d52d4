"""What running requests together gains: several pictures, and several answers, against one by one.

    python benchmarks/batch.py --threads 1                            # nano, on what there is
    python benchmarks/batch.py --model ./Lance --device cuda --count 8

Both ways run in turns in one process, after a first run that does not count; times are medians, and what
counts is their ratio. Of pictures it is the time of denoising: the VAE decodes one by one in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from machine import about, describe, options, read, write

from openlance import LancePipeline
from openlance.infer.orders import Order

PROMPTS = ("a large red circle on white", "a small blue square at the left on black")
QUESTION = "Tell me about circles and squares."


def seconds(lance: LancePipeline, groups: Sequence[Sequence[Order]], phase: str) -> float:
    """Of a phase, over groups of orders that are run one after the other."""
    return sum(result.seconds[phase] for group in groups for result in lance.run(group))  # type: ignore[union-attr]


def compare(lance: LancePipeline, orders: Sequence[Order], phase: str, repeats: int) -> dict[str, float]:
    """Median seconds of both ways, and how many times faster together is."""
    apart = [[order] for order in orders]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for found, groups in zip(times, (apart, [orders]), strict=True):
            taken = seconds(lance, groups, phase)
            if number:
                found.append(taken)
    alone, together = (statistics.median(found) for found in times)
    return {"one by one": alone, "together": together, "ratio": alone / together}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    args = read(parser)
    lance = LancePipeline.from_pretrained(args.model, device=args.device)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(args.count)]
    make = lance.order
    pictures = [make.generate_image(p, seed=seed, steps=args.steps) for seed, p in enumerate(prompts)]
    answers = [make.ask(QUESTION, seed=seed, temperature=1.0, max_tokens=32) for seed in range(args.count)]
    results = {
        "pictures": compare(lance, pictures, "denoise", args.repeats),
        "answers": compare(lance, answers, "answer", args.repeats),
    }
    machine = about(lance.model.device)
    setting = f"{lance.config.name}, {args.count} at once, {args.steps} steps"
    print(f"{setting}; {describe(machine)}\n")
    print("| what | one by one (s) | together (s) | ratio |\n|---|---|---|---|")
    for what, found in results.items():
        print(f"| {what} | " + " | ".join(f"{value:.3g}" for value in found.values()) + " |")
    write(args.out, {"setting": setting, "machine": machine, "results": results})


if __name__ == "__main__":
    main()
