"""LoRA adapters: they change what they should, and leave no trace when they go."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from released import change, change_json
from safetensors.torch import load_file
from tiny import build_network, config, samples, tokenizer
from torch import Tensor

from openlance.errors import InputError
from openlance.model.adapters import (
    adapter_names,
    add_lora,
    disabled,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_adapter,
    unload_adapters,
)
from openlance.model.checkpoint import find_release, load_model, save_pretrained
from openlance.model.lance import Lance
from openlance.model.names import part_of
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Segment

ATOL = 1e-5  # float32, W x + B A x against (W + B A) x; measured worst case 2e-6 on outputs of size 4
PARTS = ("und", "gen", "vision")
LINEARS = {"und": 2 * 7, "gen": 2 * 7, "vision": 2 * 5}  # two layers each
FIRST = "layers.0.gen.q.lora_A.weight"


def run(model: Lance) -> Tensor:
    """What the whole model makes of an edit whose picture goes through the vision tower."""
    patches = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    seen = Segment(Kind.VIT, Role.SOURCE, grid=(1, 2, 3), patches=patches)
    rest = [segment for segment in samples()["image_edit"] if segment.kind is not Kind.VIT]
    with torch.no_grad():
        out = model(pack([[seen, *rest]], config(), times=[0.5]))
        return torch.cat([out.hidden.flatten(), model.head(out.hidden).flatten(), out.velocity.flatten()])


def adapted(
    seed: int, parts: tuple[str, ...] = PARTS, model: Lance | None = None, name: str = "default"
) -> Lance:
    """A model with an adapter that has learnt something."""
    model = model or build_network(0)
    add_lora(model, parts, rank=2, alpha=4.0, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.normal_(std=0.1, generator=generator)
    return model


def assert_same_state(first: Lance, second: Lance) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def assert_differ(first: Tensor, second: Tensor) -> None:
    assert float((first - second).abs().max()) > 100 * ATOL


# Adding


@pytest.mark.parametrize("parts", [("und",), ("gen",), ("vision",), PARTS], ids="+".join)
def test_a_fresh_adapter_changes_nothing_and_alone_learns(parts: tuple[str, ...]) -> None:
    model = build_network(0)
    expected = run(model)
    add_lora(model, parts, rank=2, alpha=4.0)
    assert type(model) is Lance and adapter_names(model) == ["default"]
    assert torch.equal(run(model), expected)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == [name for name, _ in model.named_parameters() if "lora_" in name]
    assert {part_of(name) for name in learning} == set(parts)
    assert len(learning) == 2 * sum(LINEARS[part] for part in parts)
    assert_differ(run(adapted(1, parts)), expected)


def test_gradients_reach_every_layer_of_an_adapter() -> None:
    model = adapted(1, ("und", "gen"))
    out = model(pack([samples()["image_edit"]], config(), times=[0.5]))
    (out.velocity.square().sum() + model.head(out.hidden).square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


def test_the_seed_decides_and_the_rest_of_chance_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = adapted(1), adapted(1), adapted(2)
    assert torch.equal(torch.rand(3), expected)
    assert_same_state(first, again)
    key = "layers.1.und.down.lora_A.default.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    model = build_network(0)
    add_lora(model, PARTS, rank=2, dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert torch.equal(run(model), run(model))
    save_adapter(model, tmp_path)
    loaded = build_network(0)
    load_adapter(loaded, tmp_path)
    assert torch.equal(run(loaded), run(model))
    for learning in (model.train(), loaded.train()):
        assert_differ(run(learning), run(learning))


# Merging and removing


def test_merged_is_active(tmp_path: Path) -> None:
    model = adapted(1)
    expected = run(model)
    merge_adapters(model)
    torch.testing.assert_close(run(model), expected, atol=ATOL, rtol=0)
    assert set(model.state_dict()) == set(build_network(0).state_dict())
    save_pretrained(tmp_path / "m", model=model, vae=None, tokenizer=tokenizer(), config=config())
    assert_same_state(load_model(find_release(tmp_path / "m"), config()), model)


def test_unloading_leaves_no_trace() -> None:
    model, plain = adapted(1), build_network(0)
    adapted(2, ("gen",), model, "second")
    unload_adapters(model)
    assert_same_state(model, plain)
    assert [(name, type(m)) for name, m in model.named_modules()] == [
        (name, type(m)) for name, m in plain.named_modules()
    ]
    assert vars(model).keys() == vars(plain).keys() and adapter_names(model) == []
    assert torch.equal(run(model), run(plain))
    unload_adapters(model)  # nothing to remove is fine
    add_lora(model, ["und"])  # and it can begin again


def test_disabled_is_the_model_below() -> None:
    model = adapted(1)
    below, active = run(build_network(0)), run(model)
    set_adapter(model, "default")
    frozen = model.get_parameter("layers.0.gen.q.lora_A.default.weight").requires_grad_(False)
    with disabled(model):
        assert torch.equal(run(model), below)
        with disabled(model):
            pass
        assert torch.equal(run(model), below)
    assert torch.equal(run(model), active)
    assert not frozen.requires_grad
    assert model.get_parameter("layers.0.gen.q.lora_B.default.weight").requires_grad
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(run(model), active)


# Several, saved and loaded


def test_adapters_switch_and_add_up() -> None:
    one, two = run(adapted(1, ("und",))), run(adapted(2, ("gen", "vision")))
    model = adapted(2, ("gen", "vision"), adapted(1, ("und",), name="one"), "gen")  # named as a module is
    assert adapter_names(model) == ["one", "gen"]
    assert torch.equal(run(model), two)
    set_adapter(model, "one")
    assert torch.equal(run(model), one)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if ".one." in name}
    set_adapter(model, ["one", "gen"])
    both = run(model)
    assert_differ(both, one)
    assert_differ(both, two)
    merge_adapters(model)
    torch.testing.assert_close(run(model), both, atol=ATOL, rtol=0)


def test_saved_loads_bit_for_bit(tmp_path: Path) -> None:
    model = adapted(2, ("gen",), adapted(1, name="one"), "gen")
    save_adapter(model, tmp_path / "one", name="one")
    save_adapter(model, tmp_path / "gen", name="gen")
    loaded = build_network(0)
    load_adapter(loaded, tmp_path / "one", "one")
    load_adapter(loaded, tmp_path / "gen", "gen")
    assert_same_state(loaded, model)
    assert torch.equal(run(loaded), run(model))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in loaded.parameters()] == flags
    renamed = build_network(0)
    load_adapter(renamed, tmp_path / "one", "other")
    set_adapter(model, "one")
    assert torch.equal(run(renamed), run(model))


def test_other_weights_can_be_saved(tmp_path: Path) -> None:
    """An average of the weights, say."""
    model = adapted(1)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path, weights=doubled)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(file[f"base_model.model.{FIRST}"], doubled["layers.0.gen.q.lora_A.default.weight"])


def test_peft_reads_what_is_saved(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(1)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    wrapped = PeftModel.from_pretrained(build_network(0), str(tmp_path))
    assert torch.equal(run(wrapped.base_model.model), run(model))


def test_an_adapter_is_of_the_models_dtype(tmp_path: Path) -> None:
    save_adapter(adapted(1), tmp_path)
    model = build_network(0).to(torch.bfloat16)
    load_adapter(model, tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# What is wrong with one


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    save_adapter(adapted(1), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def refused(folder: Path, message: str, model: Lance | None = None) -> None:
    """Loading raises, and leaves the model as it was."""
    model = model or build_network(0)
    before = list(model.state_dict())
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder, "new")
    assert list(model.state_dict()) == before and adapter_names(model) == []


KEY = f"base_model.model.{FIRST}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({KEY: torch.ones(2, 7)}), rf"1 misshapen \({KEY} \[2, 7\], not \[2, 32\]\)"),
        (lambda t: t.pop(KEY), rf"1 missing \({KEY}\)"),
        (lambda t: t.update({KEY.replace("0", "9"): torch.ones(2, 32)}), r"1 surplus \(.*layers\.9\.gen"),
        (lambda t: t.update({KEY: torch.full((2, 32), torch.inf)}), f"{KEY} holds NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, edit: Callable, message: str) -> None:
    change(folder / "adapter_model.safetensors", edit)
    refused(folder, message)


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    refused(saved, r"48 surplus", Lance(config(), {"und"}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(peft_type="LOHA"), "peft_type must be LORA, not 'LOHA'"),
        (lambda c: c.update(bias="all"), "bias must be none, not 'all'"),
        (lambda c: c.update(modules_to_save=["head"]), "modules_to_save must be None"),
        (lambda c: c.update(init_lora_weights="pissa"), "init_lora_weights must be True, not 'pissa'"),
        (lambda c: c.update(r=4), r"76 misshapen"),
        (lambda c: c.update(r=0), "adapter_config.json: "),
        (lambda c: c.update(target_modules=["to_q"]), "does not fit the model .*to_q"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder: Path, edit: Callable, message: str) -> None:
    change_json(folder / "adapter_config.json", edit)
    refused(folder, message)


def test_files_that_are_not_there_are_named(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors: cannot be read")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json: cannot be read")


def test_wrong_names_and_parts_are_said(saved: Path) -> None:
    model = adapted(1)
    for action, message in (
        (lambda: add_lora(model, ["und"]), "has an adapter 'default' already"),
        (lambda: load_adapter(model, saved), "has an adapter 'default' already"),
        (lambda: add_lora(model, ["und"], name="a.b"), r"'a\.b' cannot name an adapter"),
        (lambda: add_lora(model, ["vae"], name="new"), "no part vae .*: this model has gen, und, vision"),
        (lambda: add_lora(model, [], name="new"), "no part given"),
        (lambda: add_lora(model, ["und"], rank=0, name="new"), "rank >= 1 and dropout in"),
        (lambda: set_adapter(model, "new"), "no adapter new; the model has default"),
        (lambda: set_adapter(model, []), "no adapter given"),
        (lambda: save_adapter(model, saved, name="new"), "no adapter new"),
        (lambda: set_adapter(build_network(0), "new"), "the model has none"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            action()
    assert adapter_names(model) == ["default"]


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'openlance\[train\]'"):
        add_lora(build_network(0), ["und"])
