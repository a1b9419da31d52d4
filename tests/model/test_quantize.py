"""Weights in fewer bits: which, how exactly, how much smaller, and that files and adapters go with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_network, config, network, noise, samples, tokenizer, vae
from torch import Tensor, nn

from openlance.cli import main
from openlance.config import lance_3b
from openlance.errors import InputError
from openlance.infer.load import load as load_planned
from openlance.infer.memory import Peak
from openlance.infer.pipeline import LancePipeline
from openlance.model.adapters import add_lora, load_adapter, merge_adapters, save_adapter, unload_adapters
from openlance.model.checkpoint import count_parameters, find_release, load_model, save_pretrained
from openlance.model.lance import Lance
from openlance.model.quantize import (
    SCHEMES,
    choose_schemes,
    pieces,
    quantize_weight,
    scheme_of,
    schemes_in,
    schemes_of,
    stored_bytes,
    weight_bytes,
)
from openlance.sequence.pack import pack
from openlance.sequence.template import Task

pytest.importorskip("torchao")
ATOL = 2e-5  # float32, products in another order than those of the widened weights; measured 3e-6
ALL = "und=int8,gen=fp8,vision=int8"
LINEAR = re.compile(r"(layers\.\d\.(und|gen)\.(q|k|v|o|gate|up|down)|vision\.tower\.blocks\..*)\.weight")


def load(folder: Path, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> Lance:
    schemes = choose_schemes(quantize, "cpu")
    return load_model(find_release(folder), config(), dtype=dtype, quantize=schemes)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """All numbers that the model consists of, those of quantised weights each by its own name."""
    found = {}
    for name, tensor in model.state_dict().items():
        own = {f"{name}/{piece}": part for piece, part in pieces(tensor).items()}
        found |= own if scheme_of(tensor) else {name: tensor}
    return found


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    one, two = bits(first), bits(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def widened(model: Lance) -> Lance:
    """The same network with plain weights of the values that the quantised ones stand for."""
    plain = build_network(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            kept = model.get_parameter(name)
            parameter.copy_(kept.dequantize() if scheme_of(kept) else kept)
    return plain


@torch.inference_mode()
def run(model: Lance) -> Tensor:
    """Hidden states and velocities of an edit, [tokens, …], flat."""
    batch = pack([samples()["image_edit"]], config()).to("cpu", model.dtype)
    out = model(batch)
    return torch.cat([out.hidden.flatten(), out.velocity.flatten()]).float()


# Which weights, and how exactly


def test_the_layers_of_the_named_parts_are_quantised_and_nothing_else(tiny_checkpoint: Path) -> None:
    model, plain = load(tiny_checkpoint, ALL), network().state_dict()
    state = model.state_dict()
    quantised = {name for name, tensor in state.items() if scheme_of(tensor)}
    matrices = {n for n, p in network().named_parameters() if LINEAR.fullmatch(n) and p.ndim == 2}
    assert quantised == matrices and len(matrices) > 2 * 2 * 7
    assert all(torch.equal(state[name], plain[name]) for name in state.keys() - quantised)
    assert schemes_of(model) == {"und": "int8", "gen": "fp8", "vision": "int8"}
    assert schemes_of(load(tiny_checkpoint, "int8")) == {"und": "int8", "gen": "int8"}
    assert schemes_of(network()) == {}


def test_int8_is_within_half_a_level() -> None:
    weight = noise(24, 40) * torch.logspace(-3, 3, 24)[:, None]
    error = (quantize_weight(weight, SCHEMES["int8"], torch.float32).dequantize() - weight).abs()
    level = weight.abs().amax(1, keepdim=True) / 127.5
    assert (error <= 0.501 * level).all() and error.max() > 0


def test_fp8_is_within_half_of_its_last_bit() -> None:
    weight = noise(24, 40) * torch.logspace(-3, 3, 24)[:, None]
    error = (quantize_weight(weight, SCHEMES["fp8"], torch.float32).dequantize() - weight).abs()
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-10  # half of the smallest number
    assert (error <= torch.maximum(weight.abs() / 16, smallest) * 1.001).all() and error.max() > 0


def test_int4_levels_fit_the_weights() -> None:
    weight = noise(32, 256)
    small = quantize_weight(weight, SCHEMES["int4"], torch.float32)
    x = noise(5, 256, seed=1)
    found, exact = torch.nn.functional.linear(x, small), x @ weight.T
    # 15 steps over about ±2.7 standard deviations: a step of 0.36, whose rounding is 0.36 / √12 = 0.10
    assert 0.05 < (found - exact).norm() / exact.norm() < 0.15
    assert stored_bytes(small) == 32 * (256 // 2 + 2 * 2 * 4)  # two groups, scale and zero in float32


@pytest.mark.parametrize("quantize", ["int8", "fp8", ALL])
def test_the_network_computes_what_its_numbers_say(tiny_checkpoint: Path, quantize: str) -> None:
    model = load(tiny_checkpoint, quantize)
    torch.testing.assert_close(run(model), run(widened(model)), atol=ATOL, rtol=0)
    assert not torch.equal(run(model), run(network()))


def test_the_dtype_of_computation_changes_no_quantised_number(tiny_checkpoint: Path) -> None:
    wide, narrow = (bits(load(tiny_checkpoint, ALL, dtype)) for dtype in (torch.float32, torch.bfloat16))
    shared = [name for name in wide if "/" in name]
    assert shared and all(torch.equal(wide[name], narrow[name]) for name in shared)
    assert run(load(tiny_checkpoint, ALL, torch.bfloat16)).isfinite().all()


# How much smaller


@pytest.mark.parametrize("scheme", ["int8", "fp8", None])
def test_the_bytes_of_a_part_are_known_beforehand(tiny_checkpoint: Path, scheme: str | None) -> None:
    quantize = scheme and f"und={scheme},gen={scheme},vision={scheme}"
    model = load(tiny_checkpoint, quantize)
    known = sum(weight_bytes(config(), part, scheme, torch.float32) for part in ("und", "gen", "vision"))
    assert sum(map(stored_bytes, model.parameters())) == known
    assert weight_bytes(config(), "vae", scheme, torch.float32) == 4 * count_parameters(config())["vae"]


def test_bytes_of_the_released_shapes() -> None:
    two = replace(lance_3b(), backbone=replace(lance_3b().backbone, layers=2))
    matrices = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 11008)  # of one expert
    rows = 2 * (2 * 2048 + 2 * 256 + 2 * 11008 + 2048)
    rest = count_parameters(two)["gen"] - matrices
    assert weight_bytes(two, "gen", None) == 2 * (matrices + rest)
    assert weight_bytes(two, "gen", "int8") == matrices + 5 * rows + 2 * rest
    padded = matrices + 2 * 2048 * (11264 - 11008)  # CUDA's kernel takes rows of whole 1024
    assert weight_bytes(two, "gen", "int4") == padded // 2 + padded // 128 * 4 + 2 * rest


def test_weights_are_quantised_one_by_one_as_they_are_read(tmp_path: Path) -> None:
    deep = replace(config(), backbone=replace(config().backbone, layers=12))
    whole = Lance(deep, {"und", "gen"})
    save_pretrained(tmp_path / "m", model=whole, vae=None, tokenizer=tokenizer(), config=deep)
    release = find_release(tmp_path / "m", weights=True)
    options = {"parts": {"und", "gen"}, "quantize": choose_schemes("int8", "cpu")}
    quantize_weight(noise(4, 4), SCHEMES["int8"], torch.float32)  # imports, once
    with Peak(torch.device("cpu")) as peak:
        model = load_model(release, deep, **options)
    largest = max(tensor.nbytes for tensor in whole.parameters())
    # Beside what is kept: one tensor as it is read and in float32, and its levels before they are rounded.
    assert sum(map(stored_bytes, model.parameters())) <= peak.live
    assert peak.most <= peak.live + 6 * largest < 0.75 * sum(tensor.nbytes for tensor in whole.parameters())


# Files


def test_what_is_saved_quantised_loads_as_if_quantised_now(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint, ALL)
    save_pretrained(
        tmp_path / "small", model=model, vae=vae(), tokenizer=tokenizer(), config=config(), shard_bytes=20_000
    )
    assert len(list((tmp_path / "small/Lance_3B").glob("model-*.safetensors"))) > 2
    release = find_release(tmp_path / "small")
    assert release.vit is not None
    assert schemes_in([*release.weights, *release.vit.glob("*.safetensors")]) == choose_schemes(ALL, "cpu")
    assert_same_bits(load(tmp_path / "small"), model)
    assert_same_bits(load(tmp_path / "small", ALL), model)  # the same scheme once more changes nothing
    assert_same_bits(
        load(tmp_path / "small", None, torch.bfloat16), load(tiny_checkpoint, ALL, torch.bfloat16)
    )
    with pytest.raises(InputError, match=r"model-.*: the weights are quantised already, as int8"):
        load(tmp_path / "small", "und=fp8")


def test_what_is_stored_quantised_is_planned_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_pretrained(
        tmp_path / "small", model=load(tiny_checkpoint, ALL), vae=None, tokenizer=tokenizer(), config=config()
    )
    plain, small = (
        load_planned(folder, None, "cpu", torch.float32, [Task.CHAT], None, None, "1GB", None).plan
        for folder in (tiny_checkpoint, tmp_path / "small")
    )
    assert plain is not None and small is not None
    assert small.weights.layer["und"] < 0.7 * plain.weights.layer["und"]


def test_the_command_writes_a_model_that_is_used_like_any_other(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "small")
    words = ["quantize", str(tiny_checkpoint), "--to", folder, "--device", "cpu"]
    assert main([*words, "--scheme", "und=int8,gen=fp8"]) == 0
    assert re.search(r"small: \S+ GB of network weights; \S+ GB before", capsys.readouterr().out)

    def drawn(lance: LancePipeline) -> np.ndarray:
        return lance.generate_image("A red circle.", seed=1, steps=2).frames

    kept = LancePipeline.from_pretrained(folder, device="cpu")
    now = LancePipeline.from_pretrained(tiny_checkpoint, device="cpu", quantize={"und": "int8", "gen": "fp8"})
    assert_same_bits(kept.model, now.model)
    assert np.array_equal(drawn(kept), drawn(now))
    out = str(tmp_path / "one.png")
    assert main(["generate", "A red circle.", "--model", folder, "--device", "cpu", "--out", out]) == 0
    assert main([*words[:3], str(tiny_checkpoint), *words[4:]]) == 2
    assert "the model's own folder" in capsys.readouterr().err


def test_a_damaged_scale_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint, "int8")
    model.get_parameter("layers.1.gen.o.weight").scale[3] = float("nan")
    save_pretrained(tmp_path / "bad", model=model, vae=None, tokenizer=tokenizer(), config=config())
    with pytest.raises(InputError, match=r"layers\.1.*o_proj_moe_gen\.weight holds NaN"):
        load(tmp_path / "bad")


# Adapters


def test_an_adapter_acts_on_quantised_weights_but_is_not_merged(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trained = build_network(0)
    add_lora(trained, ["und", "gen"], rank=2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(trained, tmp_path)
    model = load(tiny_checkpoint, ALL)
    before, plain = run(model), widened(model)
    for one in (model, plain):
        load_adapter(one, tmp_path)
    torch.testing.assert_close(run(model), run(plain), atol=10 * ATOL, rtol=0)  # values 10 times as large
    assert not torch.allclose(run(model), before, atol=1e-2)
    with pytest.raises(InputError, match="cannot be merged into quantised weights: leave them active"):
        merge_adapters(model)
    unload_adapters(model)
    assert torch.equal(run(model), before)


# What cannot be


@pytest.mark.parametrize(
    ("quantize", "device", "said"),
    [
        ("int7", "cpu", "no scheme 'int7'; choose one of int8, fp8, int4"),
        ("und=int8,vae=int8", "cpu", "no part 'vae'; name some of und, gen, vision"),
        ("und=int8,und=fp8", "cpu", "names a part twice"),
        ("fp8", "mps", "fp8 does not exist on mps; int8 does"),
        ("gen=int4", "mps", "int4 has no kernel on mps"),
    ],
)
def test_a_wrong_choice_is_named(quantize: str, device: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        choose_schemes(quantize, device)


def test_int4_is_refused_where_nothing_would_fit(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="int4 needs rows of a multiple of 128"):
        load(tiny_checkpoint, "int4")


def test_int4_of_the_cpu_is_not_saved(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    state["layers.0.und.q.weight"] = quantize_weight(noise(32, 128), SCHEMES["int4"], torch.float32)
    with pytest.raises(InputError, match="only CUDA's packing can be saved"):
        save_pretrained(tmp_path / "m", model=state, vae=None, tokenizer=tokenizer(), config=config())


def test_int4_of_a_gpu_is_refused_elsewhere(tmp_path: Path) -> None:
    from torchao.quantization import Int4TilePackedTo4dTensor

    codes, scales = torch.zeros(4, 8, 32, 4, dtype=torch.int32), torch.ones(8, 32, 2, dtype=torch.bfloat16)
    state = dict(network().state_dict())
    state["layers.0.und.q.weight"] = Int4TilePackedTo4dTensor(codes, scales, [1, 128], torch.Size([32, 32]))
    save_pretrained(tmp_path / "m", model=state, vae=None, tokenizer=tokenizer(), config=config())
    assert schemes_in(find_release(tmp_path / "m").weights) == {"und": SCHEMES["int4"]}
    with pytest.raises(InputError, match="computes on no other device"):
        load(tmp_path / "m")


def test_without_torchao_the_extra_is_named(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install 'openlance\[quantize\]'"):
        load(tiny_checkpoint, "int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the packing of int4 that can be saved needs CUDA")
def test_int4_of_a_gpu_is_saved_and_loaded(tmp_path: Path) -> None:
    schemes = choose_schemes("int4", "cuda")
    small = LancePipeline.from_pretrained("nano", device="cuda", quantize="int4")
    assert schemes_of(small.model) == {part: scheme.name for part, scheme in schemes.items()}
    save_pretrained(
        tmp_path / "m", model=small.model, vae=small.vae, tokenizer=small.tokenizer, config=small.config
    )
    again = LancePipeline.from_pretrained(tmp_path / "m", device="cuda")
    assert_same_bits(again.model, small.model)
    pictures = [one.generate_image("a red circle", seed=1, steps=4).frames for one in (small, again)]
    assert np.array_equal(*pictures)
