"""A Lance made from Qwen2.5-VL: it computes what transformers computes, until its own parts are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from released import change_json
from safetensors.torch import load_file, save_file
from tiny import config as tiny_config
from tiny import noise, tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from openlance.config import ModelConfig
from openlance.data.buckets import to_vit_patches
from openlance.errors import InputError
from openlance.model.attention import CausalTail
from openlance.model.checkpoint import find_release, load_model, read_config, save_pretrained
from openlance.model.lance import Lance
from openlance.model.names import part_of
from openlance.model.qwen import from_qwen
from openlance.sequence.pack import pack, token_ids
from openlance.sequence.positions import rope_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment

ATOL = 1e-5  # float32, logits of size 4; measured difference 0, but other kernels may add in another order
NORM = "model.layers.1.input_layernorm.weight"
IMAGE_PAD = 2  # a token of the tiny vocabulary that no text here uses
PLAIN = replace(tiny_config(), backbone=replace(tiny_config().backbone, qk_norm=False))


def build_qwen(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    special = tokenizer().special
    text = {
        "vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": special.endoftext, "eos_token_id": special.im_end,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=IMAGE_PAD,
        video_token_id=special.video_pad,
        vision_start_token_id=special.vision_start, vision_end_token_id=special.vision_end,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
        for parameter in model.parameters():  # no part may be left out unseen
            spread = 0.2 if parameter.ndim == 1 else parameter.shape[1] ** -0.5 - 0.02
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@pytest.fixture(scope="module")
def qwen() -> Qwen2_5_VLForConditionalGeneration:
    return build_qwen(tied=False)


@pytest.fixture(scope="module")
def saved(qwen: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(qwen, tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def folder(qwen: nn.Module, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return save(qwen, tmp_path)


def save(model: nn.Module, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer().save(folder)
    return folder


def start(folder: Path, base: ModelConfig = PLAIN, **options) -> Lance:
    return from_qwen(folder, base=base, **options)[0].eval()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


# What it computes


def text(words: str) -> Segment:
    return Segment(Kind.TEXT, Role.USER, ids=torch.tensor(tokenizer().encode(words)))


def picture(frames: int, height: int, width: int) -> Segment:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    patches, (t, h, w) = to_vit_patches(pixels)
    return Segment(Kind.VIT, Role.SOURCE, grid=(t, h // 2, w // 2), patches=patches)


def asked_of_qwen(qwen: nn.Module, sample: Sample, pad: int) -> tuple[Tensor, Tensor]:
    """Logits [L, vocab] and positions [3, L] of transformers for the same sequence."""
    ids = token_ids(sample, PLAIN)
    placeholders = ids == tokenizer().special.video_pad
    ids = torch.where(placeholders, pad, ids)[None]
    inputs: dict[str, Tensor] = {}
    kind = "video" if pad == tokenizer().special.video_pad else "image"
    views = [segment for segment in sample if segment.kind is Kind.VIT]
    if views:
        pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
        inputs[pixels] = torch.cat([view.patches for view in views])
        grids = torch.tensor([view.grid for view in views]) * torch.tensor([1, 2, 2])
        inputs[f"{kind}_grid_thw"] = grids
        inputs["mm_token_type_ids"] = placeholders[None].int() * (2 if kind == "video" else 1)
        known = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
        positions = qwen.model.get_rope_index(ids, **known)[0][:, 0]
    else:
        positions = torch.arange(ids.shape[1]).expand(3, -1)
    return qwen(input_ids=ids, **inputs).logits[0], positions


@pytest.mark.parametrize(
    ("sample", "pad"),
    [
        ([text("A red circle left of a blue square.")], IMAGE_PAD),
        ([text("Look:"), picture(1, 56, 84), text("What colour is it?")], IMAGE_PAD),
        ([picture(1, 28, 28), picture(1, 112, 56), text("Two?")], IMAGE_PAD),
        ([text("Film:"), picture(6, 56, 28), text("?")], tokenizer().special.video_pad),
    ],
    ids=["text", "picture", "two pictures", "clip"],
)
@torch.no_grad()
def test_the_und_expert_is_qwen(qwen: nn.Module, saved: Path, sample: Sample, pad: int) -> None:
    """Without QK norms, with a causal mask (visual tokens too) and Qwen's positions."""
    model = start(saved)
    logits, positions = asked_of_qwen(qwen, sample, pad)
    placed = list(positions.split([len(segment) for segment in sample], dim=1))
    batch = pack([sample], PLAIN, positions=[placed], dense=False)
    ours = model.head(model(batch, pattern=CausalTail()).hidden)
    torch.testing.assert_close(ours, logits, atol=ATOL, rtol=0)
    if pad == IMAGE_PAD:  # clips: transformers' rule for what follows them has changed between versions
        assert torch.equal(torch.cat(rope_positions(sample), dim=1), positions)


@torch.no_grad()
def test_the_vision_tower_is_qwens(qwen: nn.Module, saved: Path) -> None:
    segment = picture(3, 84, 140)
    grid = torch.tensor([[2, 6, 10]])
    expected = qwen.model.visual(segment.patches, grid).pooler_output
    torch.testing.assert_close(start(saved).vision(segment.patches, grid), expected, atol=ATOL, rtol=0)


# What is copied, and what is new


def test_gen_starts_as_und(saved: Path) -> None:
    model = start(saved, tiny_config())
    state = model.state_dict()
    copies = [name for name in state if ".gen." in name]
    assert len(copies) == 2 * (5 + 5 + 4) + 1  # norms, weights and biases of two layers; the final norm
    for name in copies:
        twin = state[name.replace(".gen.", ".und.")]
        assert torch.equal(state[name], twin) and state[name].data_ptr() != twin.data_ptr()


@torch.no_grad()
def test_new_parts_start_as_said(saved: Path) -> None:
    model = start(saved, tiny_config(), seed=3)
    norms = [p for name, p in model.named_parameters() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 8 and all((norm == 1).all() for norm in norms)
    assert not any(p.any() for p in (*model.latent_out.parameters(), model.latent_in.bias))
    limit = (6 / (48 + 32)) ** 0.5
    largest = float(model.latent_in.weight.abs().max())
    assert 0.95 * limit < largest <= limit
    # 8192 draws: the standard error of their spread is 0.8 %
    assert float(model.time_embed[0].weight.std()) == pytest.approx(0.02, rel=0.04)
    noisy = Segment(Kind.NOISY, Role.TARGET, grid=(1, 2, 2), latents=noise(1, 2, 2, 48))
    assert not model(pack([[text("A circle."), noisy]], tiny_config())).velocity.any()


def test_the_seed_decides_what_is_drawn(saved: Path) -> None:
    first, again, other = (start(saved, seed=seed, dtype=torch.bfloat16) for seed in (1, 1, 2))
    assert first.dtype == torch.bfloat16
    drawn = {"latent_in.weight", "time_embed.0.weight", "time_embed.2.weight"}
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name]) == (name not in drawn)


def test_only_the_parts_wanted_are_built(saved: Path) -> None:
    assert {part_of(name) for name in start(saved, parts={"und"}).state_dict()} == {"und"}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_untied(tied: bool, tmp_path: Path) -> None:
    qwen = build_qwen(tied)
    model = start(save(qwen, tmp_path))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert torch.equal(model.head.weight, qwen.lm_head.weight)
    assert torch.equal(model.head.weight, model.embed.weight) is tied
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_the_configuration_is_read(saved: Path) -> None:
    _, config, read = from_qwen(saved, base=tiny_config())
    backbone = replace(tiny_config().backbone, norm_eps=1e-5, rope_base=1e4)
    assert config == replace(tiny_config(), backbone=backbone, tokens=read.special)
    assert read.encode("A red circle.") == tokenizer().encode("A red circle.")


# Forms of a checkpoint


def as_modules(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named after transformers' modules, as other tools write them."""
    prefixes = {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."}
    tops = {key: key.split(".")[0] + "." for key in tensors}
    return {prefixes[top] + key.removeprefix(top): tensors[key] for key, top in tops.items()}


def test_shards_and_module_names_load_the_same(qwen: nn.Module, saved: Path, tmp_path: Path) -> None:
    expected = start(saved).state_dict()
    sharded = save(qwen, tmp_path / "shards", max_shard_size="20KB")
    renamed = save(qwen, tmp_path / "modules")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    edit(renamed, as_modules)
    assert set(load_file(renamed / "model.safetensors")) == set(qwen.state_dict())
    for folder in (sharded, renamed):
        found = start(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_flat_configuration_of_the_hub_is_read(saved: Path, folder: Path) -> None:
    def flatten(data: dict) -> None:
        text = data.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        data |= text | {"model_type": "qwen2_5_vl", "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        data["vision_config"]["model_type"] = "qwen2_5_vl"

    change_json(folder / "config.json", flatten)
    assert "text_config" not in json.loads((folder / "config.json").read_text())
    assert from_qwen(folder, base=PLAIN)[1] == from_qwen(saved, base=PLAIN)[1]


@pytest.mark.parametrize("base", [PLAIN, tiny_config()], ids=["plain", "with QK norms"])
def test_it_can_be_saved_as_a_release(saved: Path, tmp_path: Path, base: ModelConfig) -> None:
    model, config, read = from_qwen(saved, base=base)
    save_pretrained(tmp_path / "new", model=model, vae=None, tokenizer=read, config=config)
    release = find_release(tmp_path / "new")
    assert read_config(release) == config
    loaded = load_model(release, config).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


# What is wrong with a checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != NORM}, rf"1 missing \({NORM}\)"),
        (lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, r"1 surplus \(.*q_norm"),
        (lambda t: t | {"model.layers.5.mlp.up_proj.weight": torch.ones(8)}, r"1 surplus \(model\.layers\.5"),
        (lambda t: t | {"score.weight": torch.ones(8)}, r"1 surplus \(score\.weight\)"),
        (lambda t: t | {NORM: torch.ones(3)}, rf"1 misshapen \({NORM} \[3\], not \[32\]\)"),
        (lambda t: t | {NORM: torch.full((32,), torch.nan)}, f"{NORM} holds NaN"),
        (
            lambda t: as_modules({k: v for k, v in t.items() if k != NORM}),
            r"1 missing \(model\.language_model\.layers\.1\.input_layernorm\.weight\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change, message: str) -> None:
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        start(folder)


def test_tied_embeddings_that_are_missing_are_named_once(tmp_path: Path) -> None:
    save(build_qwen(tied=True), tmp_path)
    edit(tmp_path, lambda t: {k: v for k, v in t.items() if k != "model.embed_tokens.weight"})
    with pytest.raises(InputError, match=r"1 missing \(model\.embed_tokens\.weight\)"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type must be qwen2_5_vl, not 'llama'"),
        (lambda c: c["text_config"].update(hidden_size="wide"), "not settings of Qwen2.5-VL .*hidden_size"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act must be silu, not 'gelu'"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window must be False"),
        (lambda c: c["text_config"]["rope_parameters"].pop("mrope_section"), "mrope_section must be three"),
        (lambda c: c["text_config"].update(vocab_size=99), "more than the vocab_size 99"),
        (lambda c: c["vision_config"].update(out_hidden_size=64), "64 is not the hidden_size 32"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(folder: Path, change, message: str) -> None:
    change_json(folder / "config.json", change)
    with pytest.raises(InputError, match=message):
        start(folder)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        from_qwen(tmp_path / "nothing")
