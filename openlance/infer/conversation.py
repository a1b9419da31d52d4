"""Conversations in words, pictures and clips: each turn is remembered, and what comes after can see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import Unpack

from openlance.data.media import Media, Source
from openlance.data.tasks import Past, Resolutions, Row, View, to_sample
from openlance.errors import InputError
from openlance.infer.generate import Cancelled
from openlance.infer.messages import media_of
from openlance.infer.messages import question as asked
from openlance.infer.orders import AnswerOrder, GenerateOrder, TextOptions
from openlance.infer.prepare import Size, view
from openlance.infer.result import Answer, Generated
from openlance.infer.saved import load_turns, save_turns
from openlance.infer.turn import Turn, as_it_is
from openlance.sequence.segment import Kind, Sample

if TYPE_CHECKING:
    from openlance.infer.pipeline import LancePipeline, Options


class Conversation:
    """A talk with the model: `lance.conversation()`. Iterate for its turns, oldest first.

    Settings are those of the methods of `LancePipeline`. `ask`, `stream` and `edit` see all turns before
    them. What makes something new (`generate`, `generate_video`, `animate`) sees those of words alone: with a
    picture in view, the model learnt to change it. Words and pixels are all that is kept, and the model sees
    them anew each time; so a fork, or a conversation that was saved and loaded, goes on exactly as the
    original would.

    A turn that raises leaves nothing behind. All raise InputError for what cannot be used.
    """

    def __init__(self, lance: LancePipeline, system: str | None = None, turns: Iterable[Turn] = ()):
        """system: replaces the checkpoint's system prompt for answers. turns: said already."""
        self.lance, self.system = lance, system
        self.turns = tuple(turns)

    @classmethod
    def load(cls, path: str | Path, lance: LancePipeline) -> Conversation:
        """A conversation that `save` wrote. Raises InputError where it is not whole."""
        system, turns = load_turns(Path(path))
        return cls(lance, system, turns)

    def save(self, path: str | Path) -> Path:
        """Write it to a folder, or to one file where the name ends in .zip; gives the absolute path.

        It holds conversation.json, and the media as PNG and mp4, without any loss. Either the whole is
        there afterwards or what was there before. Raises InputError for a path that cannot be written.
        """
        return save_turns(Path(path).absolute(), self.system, self.turns)

    def fork(self) -> Conversation:
        """Another conversation with the same turns, which are shared; from here on each goes its own way."""
        return Conversation(self.lance, self.system, self.turns)

    def undo(self, count: int = 1) -> tuple[Turn, ...]:
        """Take back the last turns; gives them. Raises InputError where there are not as many."""
        if not 1 <= count <= len(self.turns):
            raise InputError(f"cannot take back {count} turns: the conversation has {len(self.turns)}")
        kept = len(self.turns) - count
        self.turns, gone = self.turns[:kept], self.turns[kept:]
        return gone

    @property
    def last(self) -> Generated | Answer | None:
        """What came back last; None at the beginning."""
        return self.turns[-1].result if self.turns else None

    def ask(
        self,
        text: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> Answer:
        """Say something, and show something where wanted; words come back."""
        shown = self._load(media)
        [answer] = self.lance.run([self._question(text, shown, options)])
        assert isinstance(answer, Answer)
        self._add(text, shown, answer)
        return answer

    def stream(
        self,
        text: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> Iterator[str]:
        """Like `ask`, in pieces as they come. It becomes a turn, and `last`, with the last of them."""
        shown = self._load(media)
        return self._say(text, shown, self._question(text, shown, options))

    def generate(self, text: str, *, size: Size | int | None = None, **options: Unpack[Options]) -> Generated:
        """A new picture."""
        return self._make(text, (), partial(self.lance.order.generate_image, text, size=size), options)

    def generate_video(
        self,
        text: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """A new clip."""
        order = partial(self.lance.order.generate_video, text, size=size, frames=frames)
        return self._make(text, (), order, options)

    def animate(
        self,
        text: str,
        media: Source | Generated | None = None,
        *,
        last: Source | Generated | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """A clip that begins with a picture: the last of the conversation, or the one that is given.

        last: the picture that it ends with.
        """
        shown = self._load([one for one in (media, last) if one is not None])
        first = self._latest(clips=False) if media is None else shown[0]
        ending = None if last is None else as_it_is(shown[-1])
        order = partial(self.lance.order.animate, as_it_is(first), text, last=ending, frames=frames)
        return self._make(text, shown, order, options)

    def edit(
        self, text: str, media: Source | Generated | None = None, **options: Unpack[Options]
    ) -> Generated:
        """Change a picture or clip: the last of the conversation, or the one that is given."""
        shown = () if media is None else self._load(media)
        source = shown[0] if shown else self._latest(clips=True)
        order = partial(self.lance.order.edit, as_it_is(source), text)
        return self._make(text, shown, order, options, source)

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def __repr__(self) -> str:
        return f"<conversation with {self.lance.config.name}, {len(self)} turns>"

    def _repr_html_(self) -> str:
        return "".join(turn._repr_html_() for turn in self.turns)

    # -- how it is done ------------------------------------------------------------------------------

    def _load(self, media: Source | Generated | Sequence[Source | Generated]) -> tuple[Media, ...]:
        sources = list(media) if isinstance(media, (list, tuple)) else [media]
        return tuple(media_of(source, self.lance.config) for source in sources)

    def _add(self, text: str, shown: tuple[Media, ...], result: Generated | Answer) -> None:
        self.turns = (*self.turns, Turn(text, shown, result))

    def _latest(self, *, clips: bool) -> Media | Generated:
        """The last picture (or clip) that was shown or made."""
        for turn in reversed(self.turns):
            for one in reversed(turn.visuals):
                if clips or as_it_is(one).fps is None:
                    return one
        what = "picture or clip" if clips else "picture"
        raise InputError(f"the conversation has no {what} yet: give one, or generate one first")

    def _question(self, text: str, shown: Sequence[Media], options: TextOptions) -> AnswerOrder:
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            reply = turn.result
            content: Any = reply.text if isinstance(reply, Answer) else [{"type": "media", "media": reply}]
            messages += asked(turn.text, list(map(as_it_is, turn.media)))
            messages.append({"role": "assistant", "content": content})
        messages += asked(text, list(map(as_it_is, shown)))
        return self.lance.order.chat(messages, **options)

    def _say(self, text: str, shown: tuple[Media, ...], order: AnswerOrder) -> Iterator[str]:
        start, said = time.perf_counter(), ""
        stream = self.lance.stream_order(order)
        for piece in stream:
            said += piece
            yield piece
        seconds = {"answer": time.perf_counter() - start}
        self._add(text, shown, Answer(said, stream.tokens, stream.finish, dict(order.record), seconds))

    def _make(
        self,
        text: str,
        shown: tuple[Media, ...],
        make: Callable[..., GenerateOrder],
        options: Options,
        source: Media | Generated | None = None,
    ) -> Generated:
        """A turn that makes something. source: what is edited; it was shown now, or stands in the turns."""
        choices = {name: value for name, value in options.items() if name != "on_step"}
        order = self._after(make(**choices), shown, source)
        [result] = self.lance.run([order], on_step=options.get("on_step"))
        if isinstance(result, Cancelled):
            raise result
        assert isinstance(result, Generated)
        self._add(text, shown, result)
        return result

    def _after(
        self, order: GenerateOrder, shown: tuple[Media, ...], source: Media | Generated | None
    ) -> GenerateOrder:
        """The order with the turns so far in view, by the builder of training samples."""
        order = replace(order, turns=())  # the conversation is its history
        turns = self.turns if source is not None else [turn for turn in self.turns if not turn.visuals]
        if not turns:
            return order
        see = self._eyes(order, source)
        target = order.sample[-1]
        assert target.grid is not None
        row = Row(
            "",
            order.task,
            order.record["prompt"],
            sources=() if source is None else tuple(map(see, shown)),
            target=View(latents=torch.empty(*target.grid, 0)),  # its place, which the real one takes below
            history=tuple(_past(turn, see) for turn in turns),
        )

        def sample(words: str) -> Sample:
            encode = self.lance.tokenizer.encode_with_offsets
            built = to_sample(replace(row, prompt=words), encode, self.lance.config)
            end = next(index for index, segment in enumerate(built) if segment.kind is Kind.NOISY)
            return [*built[:end], target]

        negative = None if order.negative is None else sample(order.record["negative_prompt"])
        return replace(order, sample=sample(row.prompt), negative=negative)

    def _eyes(
        self, order: GenerateOrder, source: Media | Generated | None
    ) -> Callable[[Media | Generated], View]:
        """What a picture or clip of the conversation is to the model, for this order."""
        config = self.lance.config
        resolutions = Resolutions.of(config.sizes, video=order.task.video)

        def see(one: Media | Generated) -> View:
            if one is source:  # the order has seen it already
                vit, clean = (segment for segment in order.sample[:-1] if segment.visual)
                return View(vit.grid, vit.patches, latents=clean.latents)
            posterior = torch.Generator().manual_seed(order.seed) if order.sampling.sample_posterior else None
            return view(as_it_is(one).media, resolutions, config, self.lance.vae, posterior=posterior)

        return see


def _past(turn: Turn, see: Callable[[Media | Generated], View]) -> Past:
    reply = turn.result.text if isinstance(turn.result, Answer) else see(turn.result)
    return Past(turn.text, reply, tuple(map(see, turn.media)))
