"""Commands that measure a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional
from tyro.extras import SubcommandApp

from openlance.cli.options import LoadOptions, Maybe, SamplingOptions, check_seed, option, parse_size
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.eval.harness import Benchmark, Making, Run
    from openlance.infer.pipeline import LancePipeline

Stage = Literal["sample", "score", "aggregate"]
STAGES: tuple[Stage, ...] = ("sample", "score", "aggregate")
MakeBenchmark = Callable[["Making", Path | None], "Benchmark"]


@dataclass(frozen=True)
class RunOptions:
    """Run."""

    out: Maybe[Path] = None
    """Folder of the run: samples/, judged/, scores.json, report.html. Default: runs/eval/BENCH."""
    config: Maybe[Path] = None
    """Where data, scorer and judge are: the file that `openlance eval setup BENCH` writes."""
    stages: tuple[Stage, ...] = STAGES
    """What to do of sample, score and aggregate. Each does what is not done yet. Under torchrun, which
    spreads the samples over its processes, only sample."""
    limit: Maybe[int] = None
    """Only so many entries, spread evenly over the benchmark."""
    seed: int = 42
    """Of the first sample of each prompt; the others count up."""
    allow_failures: bool = False
    """Average over what has a score where not all has; scores.json then names the rest."""


Size = Annotated[
    str | None, option("Height x width in pixels, or one number. Default: as published.", "HxW|N")
]
Rewrite = Annotated[
    bool,
    option("Have prompts rewritten in more words, by the service in --config or else by the model itself."),
]


def commands() -> SubcommandApp:
    """`openlance eval`."""
    app = SubcommandApp()
    for command in (geneval, dpg, vbench, gedit, mvbench, setup):
        app.command(command)
    app.command(name="nano-bench")(nano_bench)
    return app


def geneval(
    *,
    size: Size = None,
    rewrite: Rewrite = False,
    run: RunOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """GenEval: 553 prompts, four pictures each, judged by an object detector.

    Published for Lance (ByteDance's number): 0.90.

    For example:
      openlance eval setup geneval
      openlance eval geneval --model weights --config eval/geneval/config.toml
      openlance eval geneval --size 96 --steps 2 --limit 6 --stages sample
    """
    from openlance.eval.geneval import GenEval

    own = _making(GenEval, run, sampling, size=size)
    _run(
        lambda making, data: GenEval(making, run.limit, data),
        own,
        run,
        load,
        rewrite="picture" if rewrite else None,
    )


def dpg(
    *,
    size: Size = None,
    rewrite: Rewrite = False,
    as_published: Annotated[
        bool, option("Repeat two slips of the official script (see docs/evaluation.md).")
    ] = False,
    run: RunOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """DPG-Bench: 1065 long prompts, four pictures each in one grid, judged by questions.

    Published for Lance (ByteDance's number): 84.67.

    For example:
      openlance eval setup dpg
      openlance eval dpg --model weights --config eval/dpg/config.toml
    """
    from openlance.eval.dpg import DPG

    own = _making(DPG, run, sampling, size=size)
    _run(
        lambda making, data: DPG(making, run.limit, data), own, run, load,
        rewrite="picture" if rewrite else None, as_published=as_published,
    )  # fmt: skip


def vbench(
    *,
    size: Size = None,
    frames: Annotated[int | None, option("Length of each clip, 4 k + 1. Default: as published, 49.")] = None,
    rewrite: Rewrite = False,
    run: RunOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """VBench: 946 entries, five clips each (25 for flickering), judged in sixteen dimensions.

    Published for Lance (ByteDance's number): 85.11, with rewritten prompts.

    For example:
      openlance eval setup vbench --folder vbench
      openlance eval vbench --model weights --variant Lance_3B_Video --config vbench/config.toml --rewrite
      torchrun --nproc-per-node 8 -m openlance eval vbench --model weights --stages sample
    """
    from openlance.eval.vbench import VBench

    own = _making(VBench, run, sampling, size=size, frames=frames)
    _run(
        lambda making, data: VBench(making, run.limit, data),
        own,
        run,
        load,
        rewrite="clip" if rewrite else None,
    )


def gedit(*, run: RunOptions, sampling: SamplingOptions, load: LoadOptions) -> None:
    """GEdit-Bench: 606 English instructions for pictures, judged by a model behind a service.

    Published for Lance (ByteDance's number): 7.30. Results have the shape of their source, at --resolution.

    For example:
      openlance eval setup gedit --data GEdit-Bench
      openlance eval gedit --model weights --config eval/gedit/config.toml
    """
    from openlance.eval.gedit import GEdit

    own = replace(_making(GEdit, run, sampling), size=None)
    _run(lambda making, data: GEdit(making, run.limit, data), own, run, load)


def mvbench(
    *,
    leave_out: Annotated[tuple[str, ...], option("Tasks that are not asked.")] = (),
    run: RunOptions,
    load: LoadOptions,
) -> None:
    """MVBench: 20 tasks of 200 questions about clips, with options.

    Published for Lance (ByteDance's number): 62.0, over 19 tasks.

    For example:
      openlance eval setup mvbench
      openlance eval mvbench --model weights --variant Lance_3B_Video --config eval/mvbench/config.toml
    """
    from openlance.eval.mvbench import MVBench

    own = replace(MVBench.default, seed=_seed(run))
    _run(lambda making, data: MVBench(making, run.limit, data, leave_out), own, run, load)


def setup(
    benchmark: Annotated[Positional[str], option("geneval, dpg, vbench, gedit or mvbench.")],
    *,
    folder: Annotated[Path | None, option("Where its configuration goes. Default: eval/BENCH.")] = None,
    data: Annotated[Path | None, option("Of gedit: the published parquet files, to be unpacked.")] = None,
    stand_in: Annotated[
        bool, option("Name a stand-in for the scorer, to try a run without it; its scores mean nothing.")
    ] = False,
) -> None:
    """Write a benchmark's configuration, and say what data and programs it needs and how to get them.

    For example:
      openlance eval setup geneval
      openlance eval setup vbench --folder eval/vbench --stand-in
    """
    from openlance.eval.prepare import prepare

    print(prepare(benchmark, folder or Path("eval") / benchmark, data=data, stand_in=stand_in))


def nano_bench(
    *,
    count: Annotated[int, option("Pictures, questions and edits of each part.")] = 100,
    clips: Annotated[int, option("Clips of the motion part.")] = 10,
    seed: Annotated[int, option("Of the scenes and of the noise.")] = 1,
    out: Annotated[
        Path | None, option("Folder for scores.json, report.html and all that is made; it is not made again.")
    ] = None,
    parts: Annotated[
        tuple[str, ...],
        option(
            "Of one, two, held_out, questions, edits, motion and tags (the default); and of boxes, words, "
            "several and turns, which the bundled model has not learnt."
        ),
    ] = (),
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Score what the model draws, answers and edits in the world of shapes, by an exact judge.

    For example:
      openlance eval nano-bench --count 100 --out scores
    """
    from openlance.data.save import check_folder
    from openlance.eval.nano_bench import run, table
    from openlance.sequence.template import Task

    if out is not None:
        check_folder(out / "scores.json")
    if min(count, clips) < 1:
        raise InputError("--count and --clips must be at least 1")
    check_seed(seed)
    chosen: dict[str, Any] = {"parts": parts} if parts else {}
    pipeline = load.pipeline(Task)
    settings = sampling.settings({})
    print(
        table(
            run(
                pipeline, count=count, clips=clips, seed=seed, out=out, quiet=load.quiet, **chosen, **settings
            )
        )
    )


def _making(
    benchmark: type[Benchmark], run: RunOptions, sampling: SamplingOptions, *,
    size: str | None = None, frames: int | None = None,
) -> Making:  # fmt: skip
    """How the benchmark's samples are made: as published, and over that what was given."""
    base = benchmark.default
    return replace(
        base,
        size=parse_size(size) or base.size,
        frames=frames or base.frames,
        options=sampling.settings({"sampling": base.options}),
        seed=_seed(run),
    )


def _seed(run: RunOptions) -> int:
    check_seed(run.seed)
    return run.seed


def _run(
    make_benchmark: MakeBenchmark, making: Making, options: RunOptions, load: LoadOptions, *,
    rewrite: str | None = None, as_published: bool = False,
) -> None:  # fmt: skip
    """The stages, in their order."""
    from openlance.data.save import check_folder
    from openlance.eval.harness import Run, check_samples
    from openlance.eval.report import write_report
    from openlance.eval.results import finish, table, warnings
    from openlance.eval.settings import read_config

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and set(options.stages) != {"sample"}:
        raise InputError(
            "several processes share the samples alone: --stages sample, then the rest without torchrun"
        )
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, not {options.limit}")
    config = read_config(options.config)
    bench = make_benchmark(making, config.data)
    folder = options.out or Path("runs") / "eval" / bench.name
    check_folder(folder / "scores.json")
    run = Run(bench, folder, config, load.quiet, as_published)
    bench.samples()  # data that cannot be used is refused before weights are loaded
    if "sample" in options.stages:
        _sample(run, options, load, rewrite)
    if "score" in options.stages:
        check_samples(run)
        bench.score(run)
    if "aggregate" in options.stages:
        scored = finish(run, allow_failures=options.allow_failures)
        print(table(scored.scores))
        print("\n".join([*warnings(run), str(write_report(run, scored))]))


def _sample(run: Run, options: RunOptions, load: LoadOptions, rewrite: str | None) -> None:
    from openlance.eval.harness import keep_settings, make

    rank, size = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size > 1 and load.device is None:
        load = replace(load, device=_own_device())
    tasks = (*run.benchmark.tasks, *(("chat",) if rewrite else ()))
    keep_settings(run, _settings(run, load, rewrite, tasks))
    lance = load.pipeline(tasks)
    reword = None if rewrite is None else _rewriter(run, lance, rewrite)
    failures = make(run, lance, share=(rank, size), reword=reword)
    if failures:
        name, why = next(iter(failures.items()))
        raise InputError(f"{len(failures)} samples could not be made; the first is {name}: {why}")


def _settings(run: Run, load: LoadOptions, rewrite: str | None, tasks: Sequence[str]) -> Mapping[str, Any]:
    """What decides the samples, beside how they are made."""
    from openlance.infer.load import fingerprint
    from openlance.sequence.template import Task

    writer = run.config.rewriter
    named = ("model", "variant", "adapter", "dtype", "quantize", "resolution", "vit_resolution")
    return {name: getattr(load, name) for name in named} | {
        "weights": fingerprint(load.model, load.variant, [Task(task) for task in tasks], load.adapter),
        "rewritten_by": None if rewrite is None else writer.model if writer else "the model itself",
    }


def _rewriter(run: Run, lance: LancePipeline, kind: str) -> Callable[[str], str]:
    from openlance.eval.rewrite import Rewriter, by_model, by_service

    service = run.config.rewriter
    writer, name = (
        (by_model(lance), lance.config.name) if service is None else (by_service(service), service.model)
    )
    return Rewriter(writer, name, kind, run.folder / "rewritten")


def _own_device() -> str | None:
    """Of this process of several: its own GPU where there are any."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None
