"""The released parameters, every name and shape at real size, against ours and the table between them."""

from __future__ import annotations

import json

import torch

from openlance.config import lance_3b
from openlance.model.checkpoint import (
    count_parameters,
    find_release,
    load_model,
    load_vae,
    parameter_shapes,
    read_config,
)
from openlance.model.lance import Lance
from openlance.model.names import POSITION_TABLE, part_of, to_ours, to_released
from openlance.model.release import LLM_CONFIG, VAE_CONFIG
from openlance.model.vision import Vision
from openlance.tokenizer import Tokenizer


def test_names_and_shapes_are_the_released_ones(golden_json) -> None:
    released = {name: tuple(shape) for name, shape in golden_json("lance_3b_parameters.json").items()}
    del released[POSITION_TABLE]
    shapes = parameter_shapes(lance_3b())
    ours = {**shapes["und"], **shapes["gen"], **shapes["vision"]}
    assert {to_released(name): shape for name, shape in ours.items()} == released
    assert {to_ours(name): shape for name, shape in released.items()} == ours


def test_counts_are_the_released_ones() -> None:
    counts = count_parameters(lance_3b())
    latent_and_time = 2048 * 48 + 48 + 48 * 2048 + 2048 + 256 * 2048 + 2048 + 2048 * 2048 + 2048
    assert counts["und"] + counts["gen"] == 6_176_817_200
    assert counts["gen"] == 2_774_782_976 + latent_and_time
    assert counts["vision"] == 668_684_288


def test_the_golden_checkpoint_loads(golden_checkpoint) -> None:
    """With the shapes that its own files give."""
    release = find_release(golden_checkpoint)
    config = read_config(release)
    llm, vit, vae = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (release.folder / LLM_CONFIG, release.vit / "config.json", release.root / VAE_CONFIG)
    )
    assert (config.backbone.hidden, config.backbone.vocab) == (llm["hidden_size"], llm["vocab_size"])
    assert list(config.backbone.rope_sections) == llm["rope_scaling"]["mrope_section"]
    assert list(config.vision.full_attention_layers) == vit["fullatt_block_indexes"]
    assert (config.vae.base, config.vae.decoder_base) == (vae["dim"], vae["dec_dim"])
    tokens = config.tokens
    assert (
        Tokenizer.load(release.folder).decode([tokens.im_end, tokens.video_pad]) == "<|im_end|><|video_pad|>"
    )
    model = load_model(release, config)
    fresh = Vision(config.vision)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.vision.get_buffer(name), buffer)
    assert load_vae(release, config).config == config.vae


def test_parts_are_read_alone(golden_checkpoint) -> None:
    release = find_release(golden_checkpoint)
    config = read_config(release)
    whole = load_model(release, config).state_dict()
    for parts in ({"und"}, {"und", "gen"}, {"und", "vision"}):
        part = load_model(release, config, parts=parts).state_dict()
        assert set(part) == {name for name in whole if part_of(name) in parts}
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


def test_both_forms_of_the_vae_are_equal(golden_checkpoint, tmp_path) -> None:
    release = find_release(golden_checkpoint)
    config = read_config(release)
    for path in (*golden_checkpoint.glob("Lance_3B"), *golden_checkpoint.glob("Wan2.2_VAE.[cp]*")):
        (tmp_path / path.name).symlink_to(path)
    pickled = find_release(tmp_path)
    assert pickled.vae is not None and pickled.vae.suffix == ".pth"
    first, second = (load_vae(r, config).state_dict() for r in (release, pickled))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lance_builds_on_meta_at_real_size() -> None:
    with torch.device("meta"):
        model = Lance(lance_3b())
    assert all(parameter.is_meta for parameter in model.parameters())
