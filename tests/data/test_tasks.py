"""Examples into rows, and rows into samples: as at inference, before and after the VAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from memory import content
from tiny import config, tokenizer, vae

from openlance.data.example import Example, Turn
from openlance.data.media import Media, Video
from openlance.data.tasks import BATCH_PIXELS, Row, View, encode_rows, to_row, to_sample
from openlance.errors import InputError
from openlance.infer.prepare import Resolutions, view
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Message, Task, compose, system_prompt


def picture(level: int = 0, height: int = 48, width: int = 64) -> Media:
    from PIL import Image

    return Image.fromarray(np.full((height, width, 3), level, np.uint8))


def clip(level: int = 0, frames: int = 5) -> Media:
    return Video(np.full((frames, 48, 64, 3), level, np.uint8), 4.0)


def row(task: Task, prompt: str = "hi", **parts: Any) -> Row:
    return to_row(Example("a:1", task, prompt, **parts), config())


def sample(row: Row) -> Sample:
    return to_sample(row, tokenizer().encode_with_offsets, config())


def kinds(sample: Sample) -> list[tuple[Kind, Role]]:
    return [(segment.kind, segment.role) for segment in sample if segment.visual]


EDIT = {"sources": (picture(10),), "target": picture(20)}


def test_pictures_and_clips_come_to_the_buckets_of_the_task() -> None:
    """48x64 at 64 is a bucket of 48x64; at 48, of 48x48 or near it, which clips and their references take."""
    drawn, filmed = row(Task.T2I, target=picture()), row(Task.T2V, target=clip())
    sizes = config().sizes
    for found, media, video in ((drawn, picture(), False), (filmed, clip(), True)):
        seen = view(media, Resolutions.of(sizes, video=video), config(), vae(), semantic=False)
        assert found.target is not None and seen.latents is not None
        assert found.target.latent_grid == tuple(seen.latents.shape[:3])
        assert found.target.pixels.dtype == np.uint8 and found.target.grid is None
    subject = row(Task.SUBJECT_VIDEO, sources=(picture(),), target=clip())
    assert subject.sources[0].latent_grid[1:] == filmed.target.latent_grid[1:]
    halved = to_row(Example("a:1", Task.T2I, "hi", target=picture()), config(), replace(sizes, image=32))
    assert halved.target.pixels.shape == (1, 32, 48, 3)


def test_what_is_asked_about_has_no_pixels_for_the_vae() -> None:
    asked = row(Task.X2T_VIDEO, answer="yes", sources=(picture(), clip()))
    assert [v.pixels for v in asked.sources] == [None, None]
    assert [v.grid[0] for v in asked.sources] == [1, 3]
    assert kinds(sample(asked)) == [(Kind.VIT, Role.SOURCE)] * 2


def test_a_clip_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="a clip of 4 frames: their number must be 4 k"):
        row(Task.T2V, target=clip(frames=4))


@pytest.mark.parametrize(
    "made",
    [
        row(Task.T2I, target=picture()),
        row(Task.I2V, target=clip(), fixed_frames=(0,)),
        row(Task.IMAGE_EDIT, **EDIT),
        row(Task.SUBJECT_IMAGE, sources=(picture(1), picture(2)), target=picture(3)),
        row(Task.IMAGE_EDIT, **EDIT, history=(Turn("red", picture(30), (picture(40),)),)),
    ],
    ids=["t2i", "i2v", "edit", "subject", "history"],
)
def test_tokens_are_known_before_the_vae_has_run(made: Row) -> None:
    before = sample(made)
    (encoded,) = encode_rows([made], vae())
    after = sample(encoded)
    assert [len(s) for s in before] == [len(s) for s in after]
    assert [s.grid for s in before] == [s.grid for s in after]
    assert all((s.latents is None) for s in before)
    assert all(tuple(s.latents.shape[:3]) == s.grid for s in after if s.generative)
    assert kinds(before) == kinds(after)
    assert before[-2].fixed_frames == made.fixed_frames or not made.fixed_frames
    assert pack([before], config()).tokens == pack([after], config()).tokens


def test_training_sees_an_edit_as_inference_does() -> None:
    (made,) = encode_rows([row(Task.IMAGE_EDIT, "Make it red.", **EDIT)], vae())
    at = Resolutions.of(config().sizes, video=False)
    source, target = (view(picture(level), at, config(), vae()) for level in (10, 20))
    expected = compose(
        [*source.segments(Role.SOURCE), "Make it red."],
        tokenizer().encode_with_offsets,
        system=system_prompt(Task.IMAGE_EDIT, {}),
        ending=Segment(Kind.NOISY, Role.TARGET, grid=target.latent_grid, latents=target.latents),
    )
    for found, known in zip(sample(made), expected, strict=True):
        assert content(replace(found, latents=None)) == content(replace(known, latents=None))
        if found.generative:
            torch.testing.assert_close(found.latents, known.latents, atol=1e-4, rtol=0)  # fp32, other batches


def test_earlier_turns_are_context() -> None:
    """As the pipeline remembers them: what was shown, said and drawn, none of it with a loss."""
    made = row(
        Task.IMAGE_EDIT, "blue", target=picture(20), history=(Turn("red", picture(30), (picture(40),)),)
    )
    (made,) = encode_rows([made], vae())
    (turn,) = made.history
    assert isinstance(turn.reply, View)
    past = (
        Message("user", (*turn.sources[0].segments(Role.SOURCE), "red"), past=True),
        Message("assistant", tuple(turn.reply.segments(Role.SOURCE)), past=True),
    )
    found = sample(made)
    expected = compose(
        ["blue"], tokenizer().encode_with_offsets, system=system_prompt(Task.IMAGE_EDIT, {}),
        ending=found[-2], history=past,
    )  # fmt: skip
    assert content(found) == content(expected)
    talked = row(
        Task.X2T_IMAGE, answer="yes", sources=(picture(),), history=(Turn("who?", "me", (picture(),)),)
    )
    spoken = sample(talked)
    assert kinds(spoken) == [(Kind.VIT, Role.SOURCE)] * 2
    words = [tokenizer().decode(s.ids.tolist()) for s in spoken if s.role is Role.ANSWER]
    assert words == ["yes<|im_end|>"]


def test_encoding_together_is_encoding_alone() -> None:
    rows = [row(Task.IMAGE_EDIT, **EDIT), row(Task.T2I, target=picture(90)), row(Task.T2V, target=clip(70))]
    together, alone = encode_rows(rows, vae()), [encode_rows([one], vae())[0] for one in rows]
    for a, b in zip(together, alone, strict=True):
        for one, other in zip(a.views(), b.views(), strict=True):
            torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=0)  # fp32, other batches
            assert one.pixels is None and one.encoded
    again = encode_rows(together, vae())
    assert content(again) == content(together)


def test_latents_are_the_mean_or_a_draw() -> None:
    def latents(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        (made,) = encode_rows([row(Task.T2I, target=picture())], vae(), generator)
        return made.target.latents  # type: ignore[union-attr, return-value]

    assert torch.equal(latents(1), latents(1)) and not torch.equal(latents(1), latents(2))
    assert torch.equal(latents(None), latents(None)) and not torch.equal(latents(None), latents(1))


def test_gradients_may_be_taken_through_what_reads_the_latents() -> None:
    (made,) = encode_rows([row(Task.T2I, target=picture())], vae())
    weight = torch.ones(48, requires_grad=True)
    (made.target.latents * weight).sum().backward()  # type: ignore[union-attr, operator]
    assert weight.grad is not None


def test_the_vae_takes_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of 48x64 at a time gives what many at a time give."""
    rows = [row(Task.T2I, target=picture(level)) for level in (10, 20, 30)]
    whole = encode_rows(rows, vae())
    monkeypatch.setattr("openlance.data.tasks.BATCH_PIXELS", 48 * 64)
    for a, b in zip(whole, encode_rows(rows, vae()), strict=True):
        torch.testing.assert_close(
            a.target.latents, b.target.latents, atol=1e-4, rtol=0
        )  # fp32, other batches
    assert BATCH_PIXELS > 768**2
