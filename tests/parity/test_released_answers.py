"""Understanding cases, from the source media: equal sequences, numbers within 1e-4, the same words."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, assert_near, groups, in_order, mask_in_order, unpack_bits

from openlance.config import TextConfig
from openlance.infer.context import encode
from openlance.infer.speak import speak
from openlance.infer.stream import TextStream
from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import pack, token_ids
from openlance.sequence.segment import Kind, Role, Segment

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_tokens_of_prompt_and_answer(answer_case: Case) -> None:
    expected, config = answer_case.sequence, answer_case.pipeline.config
    prompt, whole = answer_case.conversation
    n = answer_case.facts["num_prompt_tokens"]
    assert torch.equal(token_ids(prompt, config), expected["packed_text_ids"][:n])
    assert torch.equal(token_ids(whole, config), expected["packed_text_ids"])
    batch = pack([whole], config)
    und = batch.place[: batch.und]
    assert batch.und == batch.tokens
    assert torch.equal(und[batch.text_index], expected["packed_text_indexes"])
    assert torch.equal(und[batch.vit_index], expected["packed_vit_token_indexes"])
    assert torch.equal(batch.place[batch.answer_index], expected["ce_loss_indexes"])
    assert torch.equal(batch.answer_labels, expected["packed_label_ids"])
    vision = torch.cat([torch.full((len(s),), s.kind is Kind.VIT) for s in whole])
    assert torch.equal(groups(whole)[vision], expected["sample_modality"][vision])


def test_positions_and_mask_of_the_prompt(answer_case: Case) -> None:
    """The ViT tokens are not moved, and the words to come count on from the last position."""
    expected, config = answer_case.sequence, answer_case.pipeline.config
    prompt, _ = answer_case.conversation
    batch = pack([prompt], config)
    positions = in_order(batch, batch.positions)
    coming = expected["position_ids"].shape[1] - batch.tokens
    assert coming == answer_case.asked["max_new_tokens"]
    following = torch.arange(1, coming + 1).expand(3, -1) + positions[:, -1:]
    assert torch.equal(torch.cat([positions, following], dim=1), expected["position_ids"])
    mask = mask_in_order(batch, dense_mask(batch.visibility))
    assert torch.equal(mask, unpack_bits(expected["mask_prefill_packbits"], batch.tokens))


def test_prefill(answer_case: Case) -> None:
    numbers, model = answer_case.numbers, answer_case.pipeline.model
    prompt, _ = answer_case.conversation
    batch = pack([prompt], model.config)
    assert_near(model.see(batch), numbers["vit_embed"])
    allowed = answer_case.asked["effective_vocab_size"]
    for hidden in (model(batch).hidden[-1], encode(model, prompt).last_hidden):
        assert_near(hidden, numbers["prefill_hidden_last"])
        logits, expected = model.head(hidden), numbers["prefill_logits"]
        assert_near(logits[:allowed], expected[:allowed])
        # Ids that are never drawn are stored either masked or as computed.
        masked = expected[allowed:] < -1e29
        assert masked.all() or not masked.any()
        assert_near(logits[allowed:].masked_fill(masked, 0), expected[allowed:].masked_fill(masked, 0))


def test_logits_of_the_first_words(answer_case: Case) -> None:
    """One uncached forward over the prompt and what was said."""
    expected, model = answer_case.numbers["logits_first4"], answer_case.pipeline.model
    prompt, _ = answer_case.conversation
    said = torch.tensor(answer_case.facts["generated_ids"][: len(expected) - 1])
    batch = pack([[*prompt, Segment(Kind.TEXT, Role.ANSWER, said)]], model.config)
    logits = model.head(model(batch).hidden[-len(expected) :])
    allowed = answer_case.asked["effective_vocab_size"]
    assert_near(logits[:, :allowed], expected[:, :allowed])


def test_greedy_words(answer_case: Case) -> None:
    asked, model = answer_case.asked, answer_case.pipeline.model
    prompt, _ = answer_case.conversation
    config, allowed = TextConfig(max_tokens=asked["max_new_tokens"]), asked["effective_vocab_size"]
    stop = {asked["eos_token_id"]}
    expected = answer_case.facts["generated_ids"]
    spoken = list(speak(model, prompt, config, allowed=allowed, stop=stop))
    assert spoken == expected
    ended = expected[-1] in stop
    assert ended or len(expected) == asked["max_new_tokens"]
    stream = TextStream(spoken, answer_case.pipeline.tokenizer, frozenset(stop))
    text = "".join(stream)
    words = expected[:-1] if ended else expected
    assert text == answer_case.pipeline.tokenizer.decode(words, skip_special=True)
    assert (stream.finish, stream.tokens) == ("stop" if ended else "length", len(words))
