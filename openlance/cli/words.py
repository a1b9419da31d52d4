"""Commands that answer in words."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from openlance.cli.options import LoadOptions, TextOptions, check_media, option
from openlance.config import to_dict
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.infer.pipeline import LancePipeline
    from openlance.infer.stream import TextStream

MEDIA_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2",
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".npz",
)  # fmt: skip
SEES = ("chat", "x2t_image", "x2t_video")
HELP = "/image PATH or /video PATH shows one with what you say next; /reset starts anew; /quit ends"
Part = dict[str, Any]


def ask(
    parts: Annotated[
        Positional[tuple[str, ...]],
        option("Files and words, in the order in which the model shall read them."),
    ],
    *,
    out: Annotated[Path | None, option("Also write the answer and its settings to this JSON file.")] = None,
    text: TextOptions,
    load: LoadOptions,
) -> None:
    """Ask about pictures and clips, or about nothing but the words.

    A part that is a file, or ends like the name of a picture or clip, is shown; anything else is said.
    Without words the model describes what it is shown. The answer goes to stdout, the rest to stderr.

    For example:
      openlance ask photo.jpg "What is this?"
      openlance ask before.png after.png "What changed?"
      openlance ask clip.mp4
      openlance ask "how many shapes are there?" shapes.png --out answer.json
    """
    from openlance.data.save import save_json

    content = [part for part in map(_part, parts) if part["type"] == "media" or part["text"].strip()]
    if not content:
        raise InputError("nothing is asked: give a question, or something to look at")
    media = [part["media"] for part in content if part["type"] == "media"]
    check_media(*media)
    settings, target = text.settings(), _json_target(out)
    pipeline = load.pipeline(SEES if media else SEES[:1])
    start = time.perf_counter()
    stream = pipeline.chat_stream([{"role": "user", "content": content}], **settings)
    answer = "".join(_aloud(stream))
    seconds = time.perf_counter() - start
    if not load.quiet:
        _note(stream, seconds, settings)
    if target is not None:
        asked = [str(part.get("media", part.get("text"))) for part in content]
        record = {
            "task": "ask", "parts": asked, "model": pipeline.config.name, "seed": settings["seed"],
            "text": to_dict(text.config()),
        }  # fmt: skip
        save_json({"answer": answer, "openlance": record}, target)


def chat(
    *,
    system: Annotated[str | None, option("Replaces the checkpoint's system prompt.")] = None,
    text: TextOptions,
    load: LoadOptions,
) -> None:
    """Talk with the model, line by line.

    /image PATH and /video PATH show something with what is said next, /reset starts anew, /quit (or the end
    of the input) ends. Lines can be piped in.

    For example:
      openlance chat
      printf '/image photo.jpg\\nWhat is this?\\n' | openlance chat --quiet
    """
    settings = text.settings()
    Conversation(load.pipeline(SEES), settings, system, load.quiet).run(_lines())


@dataclass
class Conversation:
    """The messages so far, and what is shown with the next one."""

    pipeline: LancePipeline
    settings: dict[str, Any]
    system: str | None = None
    quiet: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[Part] = field(default_factory=list)

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line. At a terminal a mistake is only said, else it ends the run."""
        self._reset()
        for line in lines:
            try:
                if not self._turn(line.strip()):
                    return
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"openlance: {error}", file=sys.stderr)

    def _turn(self, line: str) -> bool:
        """One line; False ends the conversation."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self._reset()
        elif command in ("/image", "/video"):
            self._show(rest.strip())
        elif command.startswith("/"):
            raise InputError(f"unknown command {command}: {HELP}")
        elif line:
            self._answer(line)
        return True

    def _reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.shown = []

    def _show(self, path: str) -> None:
        """Load it now, so that a later change of the file does not change what was said about it."""
        from openlance.infer.prepare import load

        if not path:
            raise InputError("give a path behind the command")
        media = load(os.path.expanduser(path), self.pipeline.config.sizes)
        self.shown.append({"type": "media", "media": media})

    def _answer(self, line: str) -> None:
        said = {"role": "user", "content": [*self.shown, {"type": "text", "text": line}]}
        start = time.perf_counter()
        stream = self.pipeline.chat_stream([*self.messages, said], **self.settings)
        try:
            answer = "".join(_aloud(stream))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" (stopped, and forgotten)")
            return
        if answer.strip():  # else nothing was said that could be gone on from
            self.messages += [said, {"role": "assistant", "content": answer}]
            self.shown = []
        if not self.quiet:
            _note(stream, time.perf_counter() - start, self.settings)


def _part(text: str) -> Part:
    """A file, or a name that ends like one's, is media; the rest is words."""
    path = os.path.expanduser(text)
    named = Path(text).suffix.lower() in MEDIA_SUFFIXES and not any(map(str.isspace, text))
    if named or os.path.isfile(path):
        return {"type": "media", "media": path}
    return {"type": "text", "text": text}


def _aloud(stream: Iterable[str]) -> Iterator[str]:
    """The pieces, each printed as it comes; then the end of the line."""
    for piece in stream:
        print(piece, end="", flush=True)
        yield piece
    print(flush=True)


def _note(stream: TextStream, seconds: float, settings: dict[str, Any]) -> None:
    seed = f", seed {settings['seed']}" if settings.get("temperature") else ""
    cut = ", cut at the limit" if stream.finish == "length" else ""
    print(f"({stream.tokens} tokens, {seconds:.1f} s{seed}{cut})", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of stdin, with a prompt and editing at a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (gives `input` its editing and history)
    print(HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _json_target(path: Path | None) -> Path | None:
    """The path, after a look whether JSON could be written there."""
    from openlance.data.save import check_folder

    if path is not None:
        if path.suffix.lower() != ".json":
            raise InputError(f"{path}: the name must end in .json")
        check_folder(path)
    return path
