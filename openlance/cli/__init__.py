"""The command `openlance`: the only place that parses arguments.

What needs torch is imported inside the commands, so that help and mistyped options answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tyro
from tyro.extras import SubcommandApp

from openlance import __version__
from openlance.cli import about, bench, create, data, data_encode, data_example, plan, quantize, serve, words
from openlance.cli.eval import commands as evaluate
from openlance.cli.train import train_command
from openlance.errors import InputError

DESCRIPTION = """Run and train Lance: one model that understands, generates and edits images and videos.

For example:
  openlance generate "a large red circle on white" --seed 1
  openlance edit openlance-0001.png "make the circle blue"
  openlance ask photo.jpg "What is this?"
  openlance demo

`openlance COMMAND --help` says more about each command. The default model is nano: it is bundled, and draws
only coloured shapes. `--model` takes a folder with the released weights, or a Hugging Face id.
"""
CONFIG = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
PRESET = "lora"
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the number of the signal, as shells count


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); gives its exit code, 2 for a mistake of the user."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        try:
            _run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone away can be dealt with
    except InputError as error:
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("out of memory: try --dtype bfloat16 or a smaller size (see `openlance info`)", 1)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it exits
        return BROKEN_PIPE
    return 0


def _run(args: Sequence[str]) -> None:
    if args == ["--version"]:
        print(f"openlance {__version__}")
        return
    brief = not args or args[0].startswith("-")
    with _notes():
        app(brief, _preset(args)).cli(prog="openlance", description=DESCRIPTION, args=args, config=CONFIG)


def app(brief: bool = False, preset: str = PRESET) -> SubcommandApp:
    """All commands; those with a second word are an app of their own. brief: for a list of them all.

    preset: whose values are the defaults of `train`.
    """
    looks, commands = SubcommandApp(), SubcommandApp()
    for look in (data.check, data_encode.encode, data_example.example):
        looks.command(look)
    made = (create.generate, create.video, create.animate, create.edit, create.subject)
    said = (words.ask, words.chat)
    train = train_command(preset)
    kept = (serve.serve, train, plan.plan, quantize.quantize, bench.bench, about.info, about.show, about.demo)
    for command in (*made, *said, *kept):
        first_line = str(command.__doc__).partition("\n")[0]
        commands.command(help=first_line if brief else None)(command)
    commands.command(evaluate(), name="eval", help="Measure a model.")
    commands.command(looks, name="data", help="Check and encode training data.")
    return commands


def _preset(args: Sequence[str]) -> str:
    """The preset that a command line names, before the rest of it is read."""
    if args[:1] != ["train"]:
        return PRESET
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word == "--preset" and following:
            return following
        if word.startswith("--preset="):
            return word.partition("=")[2]
    return PRESET


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, a device's (an error class of torch), or torch's on the CPU."""
    cpu = "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or cpu


def _fail(message: str, code: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"openlance: error: {line}" if code != INTERRUPTED else f"\nopenlance: {line}", file=sys.stderr)
    return code


@contextmanager
def _notes() -> Iterator[None]:
    """What the package logs (a size that was rounded, say) goes to stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("openlance: note: %(message)s"))
    log = logging.getLogger("openlance")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
