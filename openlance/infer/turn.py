"""One turn of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from openlance.data.media import Media, Video, as_frames
from openlance.infer.result import Answer, Generated, as_html, words_as_html


@dataclass(frozen=True, eq=False)
class Turn:
    """What the user said ("" for nothing) and showed, as it was loaded, and what came back."""

    text: str
    media: tuple[Media, ...]
    result: Generated | Answer

    @property
    def visuals(self) -> tuple[Media | Generated, ...]:
        """Every picture and clip of the turn, in order."""
        made = (self.result,) if isinstance(self.result, Generated) else ()
        return (*self.media, *made)

    def _repr_html_(self) -> str:
        result = self.result
        reply = words_as_html(result.text) if isinstance(result, Answer) else as_html(result.media)
        said = "".join(map(as_html, self.media)) + words_as_html(self.text)
        return f'<div style="margin: 1em 0"><div style="opacity: 0.7">{said}</div>{reply}</div>'


def as_it_is(media: Media | Generated) -> Generated:
    """What has been loaded, to be taken with all its frames and not chosen from again."""
    if isinstance(media, Generated):
        return media
    return Generated(as_frames(media), media.fps if isinstance(media, Video) else None, {})
