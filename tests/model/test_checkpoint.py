from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released import MODEL, NORM, VIT, Tiny, assert_same, change, contents, load
from safetensors.torch import load_file, save_file

from openlance.config import BackboneConfig
from openlance.errors import InputError
from openlance.model import checkpoint, hub
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config
from openlance.model.lance import PARTS, Lance
from openlance.model.names import PARTS as NAMED_PARTS
from openlance.model.names import part_of, to_ours, to_released
from openlance.model.vae import released_names as vae_names
from openlance.tokenizer import Tokenizer

# Names


def test_names_go_both_ways(tiny: Tiny) -> None:
    names = list(tiny.model.state_dict())
    released = [to_released(name) for name in names]
    assert None not in released and len(set(released)) == len(names)
    assert [to_ours(name) for name in released] == names
    assert {part_of(name) for name in names} == PARTS == NAMED_PARTS


@pytest.mark.parametrize("name", ["", "embed", "layers.0.und.z.weight", "layers.0.vit.q.weight", NORM])
def test_other_names_are_not_ours(name: str) -> None:
    assert to_released(name) is None


# Save and load


def test_a_saved_release_loads_bit_for_bit(tiny: Tiny, saved: Path) -> None:
    release = find_release(saved)
    assert read_config(release) == tiny.config
    assert_same(load_model(release, tiny.config), tiny.model)
    assert_same(load_vae(release, tiny.config), tiny.vae)
    assert Tokenizer.load(release.folder).encode("a red fox") == tiny.tokenizer.encode("a red fox")


def test_bfloat16_and_shards_load_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path / "r", dtype=torch.bfloat16, shard_bytes=10_000, variant="Lance_3B_Video")
    release = find_release(tmp_path / "r")
    assert release.variant == "Lance_3B_Video" and len(release.weights) > 2
    assert json.loads((release.folder / "llm_config.json").read_text())["torch_dtype"] == "bfloat16"
    index = json.loads((release.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in release.weights for tensor in load_file(path).values()
    )
    wanted = Lance(tiny.config)
    wanted.load_state_dict(tiny.model.state_dict())
    loaded = load_model(release, tiny.config, dtype=torch.bfloat16)
    assert_same(loaded, wanted.to(torch.bfloat16))
    assert_same(load_model(release, tiny.config, dtype=torch.float32), wanted.float())


def test_computed_buffers_are_right_after_loading(tiny: Tiny, saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in tiny.model.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)


def test_what_is_loaded_does_not_hang_on_the_file(tiny: Tiny, folder: Path) -> None:
    loaded = load(folder)
    for path in (folder / MODEL, folder / VIT):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same(loaded, tiny.model)


def test_the_backward_pass_reaches_loaded_weights(saved: Path) -> None:
    loaded = load(saved, parts={"und"})
    loaded.head(loaded.embed(torch.tensor([1, 2]))).sum().backward()
    assert loaded.head.weight.grad is not None and loaded.embed.weight.grad is not None


def test_vision_may_stand_in_the_model_file(tiny: Tiny, folder: Path) -> None:
    vision = {f"vit_model.{name}": tensor for name, tensor in load_file(folder / VIT).items()}
    change(folder / MODEL, lambda tensors: tensors.update(vision))
    shutil.rmtree(folder / "Qwen2.5-VL-ViT")
    assert hub.holds_vision(find_release(folder))
    release = find_release(folder)
    assert read_config(release) == tiny.config  # vision_config of llm_config.json
    assert_same(load(folder), tiny.model)


def test_vision_of_the_model_file_comes_first(folder: Path) -> None:
    bias = {"vit_model.blocks.0.attn.qkv.bias": torch.full((96,), 7.0)}
    change(folder / MODEL, lambda tensors: tensors.update(bias))
    assert (load(folder).vision.tower.blocks[0].attn.qkv.bias == 7).all()


def test_the_position_table_is_dropped_whatever_its_size(tiny: Tiny, folder: Path) -> None:
    change(folder / MODEL, lambda t: t.update({"latent_pos_embed.pos_embed": torch.full((5, 3), torch.nan)}))
    assert_same(load(folder), tiny.model)


def test_pickled_vae_loads_the_same(tiny: Tiny, folder: Path) -> None:
    (folder / "Wan2.2_VAE.safetensors").unlink()
    state = tiny.vae.state_dict()
    named = {name: state[ours] for name, ours in vae_names(tiny.config.vae).items()}
    for zipped in (True, False):
        torch.save(named, folder / "Wan2.2_VAE.pth", _use_new_zipfile_serialization=zipped)
        assert_same(load_vae(find_release(folder), tiny.config), tiny.vae)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loading_to_a_gpu(tiny: Tiny, saved: Path) -> None:
    loaded = load(saved, device="cuda")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert_same(loaded.cpu(), tiny.model)


def test_parts_that_are_not_needed_are_not_read(tiny: Tiny, folder: Path) -> None:
    (folder / VIT).write_bytes(b"broken")
    change(folder / MODEL, lambda t: t.update({NORM: torch.full((32,), torch.nan)}))
    part = load(folder, parts={"und"})
    assert {part_of(name) for name in part.state_dict()} == {"und"}


# What is wrong with the weights


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), rf"1 missing \({NORM}\)"),
        (lambda t: [t.pop(name) for name in list(t)[:20]], r"20 missing \(.*and 12 more\)"),
        (lambda t: t.update(surprise=torch.ones(2)), r"1 surplus \(surprise\)"),
        (lambda t: t.update({NORM.replace("1", "7"): torch.ones(2)}), r"1 surplus \(.*layers\.7\."),
        (lambda t: t.update({NORM: torch.ones(3)}), rf"1 misshapen \({NORM} \[3\], not \[32\]\)"),
        (lambda t: t.update({NORM: torch.full((32,), torch.nan)}), f"{NORM} holds NaN"),
        (lambda t: t[NORM].__setitem__(3, -torch.inf), f"{NORM} holds NaN or infinite"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)}), f"{NORM} holds torch.int64"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, edit, message: str) -> None:
    change(folder / MODEL, edit)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_all_that_does_not_fit_is_one_error(folder: Path) -> None:
    change(folder / MODEL, lambda t: (t.pop(NORM), t.update(surprise=torch.ones(2))))
    with pytest.raises(InputError, match=r"1 missing .*; 1 surplus"):
        load(folder)


def test_values_too_large_for_the_dtype_are_named(folder: Path) -> None:
    change(folder / MODEL, lambda t: t.update({NORM: torch.full((32,), 1e6)}))
    load(folder)
    with pytest.raises(InputError, match=r"infinite values as torch\.float16"):
        load(folder, dtype=torch.float16)


@pytest.mark.parametrize("name", [MODEL, VIT])
@pytest.mark.parametrize("size", [0, 4, 200, -100])
def test_truncated_weights_name_the_file(folder: Path, name: str, size: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:size])
    with pytest.raises(InputError, match=rf"{Path(name).name}: cannot be read"):
        load(folder)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_truncated_vae_names_the_file(tiny: Tiny, folder: Path, size: int) -> None:
    release = find_release(folder)
    data = release.vae.read_bytes()
    release.vae.write_bytes(data[:size])
    with pytest.raises(InputError, match=r"Wan2.2_VAE.safetensors: cannot be read"):
        load_vae(release, tiny.config)
    release.vae.unlink()
    pickled = folder / "Wan2.2_VAE.pth"
    torch.save({"a": torch.ones(9)}, pickled)
    pickled.write_bytes(pickled.read_bytes()[:size])
    with pytest.raises(InputError, match=r"Wan2.2_VAE.pth: cannot be read"):
        load_vae(find_release(folder), tiny.config)


@pytest.mark.parametrize(
    ("data", "message"),
    [([1, 2], "dictionary of tensors"), ({"a": 1}, "dictionary of tensors"), (os.path, "cannot be read")],
)
def test_a_pickle_of_something_else_is_refused(tiny: Tiny, folder: Path, data, message: str) -> None:
    (folder / "Wan2.2_VAE.safetensors").unlink()
    torch.save({"f": os.path.join} if data is os.path else data, folder / "Wan2.2_VAE.pth")
    with pytest.raises(InputError, match=message):
        load_vae(find_release(folder), tiny.config)


def test_a_missing_vae_is_said(tiny: Tiny, folder: Path) -> None:
    (folder / "Wan2.2_VAE.safetensors").unlink()
    with pytest.raises(InputError, match=r"no VAE\. Looked for Wan2\.2_VAE\.safetensors or"):
        load_vae(find_release(folder), tiny.config)


# Saving over what is there


def test_saving_again_replaces_and_keeps_other_files(tiny: Tiny, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    tiny.save(folder, shard_bytes=10_000)
    assert len(find_release(folder).weights) > 2
    (folder / "Wan2.2_VAE.safetensors").rename(folder / "Wan2.2_VAE.pth")
    before = set(contents(folder))
    tiny.save(folder, vae=None, model=load(folder, parts={"und"}), dtype=torch.float16)
    assert "Wan2.2_VAE.pth" in before & set(contents(folder)) and VIT in contents(folder)
    tiny.save(folder, model=tiny.model.state_dict())
    assert_same(load(folder), tiny.model)
    assert (folder / "README.md").read_text() == "mine"
    assert not list(folder.glob("Lance_3B/model-*")) and not (folder / "Wan2.2_VAE.pth").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_failed_write_leaves_the_old_files(
    tiny: Tiny, folder: Path, survives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, left = contents(folder), iter(range(survives))

    def full_disk(tensors, path, metadata) -> None:
        if next(left, None) is None:
            raise OSError("no space left")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny.save(folder, dtype=torch.bfloat16)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("fails_at", range(0, 12, 3))
def test_a_failed_rename_puts_the_old_files_back(
    tiny: Tiny, folder: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, count = contents(folder), Path.rename, iter(range(100))

    def failing(self: Path, target: Path) -> Path:
        if next(count) == fails_at:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no rename"):
        tiny.save(folder, dtype=torch.bfloat16)
    assert contents(folder) == before


def test_saving_is_refused_where_it_would_mix_things_up(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds Lance_3B; save Lance_3B_Video to a folder of its own"):
        tiny.save(folder, variant="Lance_3B_Video")
    with pytest.raises(InputError, match="no released name for adapter"):
        tiny.save(tmp_path / "x", model={"adapter.weight": torch.ones(1)})
    with pytest.raises(InputError, match="a file is in the way"):
        tiny.save(folder / "openlance.json")
    assert not (tmp_path / "x").exists()


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_loading_holds_the_model_once(tiny: Tiny, tmp_path: Path) -> None:
    """Host memory of its own grows by the model in bfloat16 and a few tensors, not by a float32 copy."""
    shape = BackboneConfig(hidden=512, layers=6, heads=4, kv_heads=2, mlp=2048, vocab=8192)
    config = replace(
        tiny.config,
        backbone=replace(shape, rope_sections=(16, 24, 24)),
        vision=replace(tiny.config.vision, out_hidden=512),
    )
    model = Lance(config)
    values = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    tiny.save(tmp_path / "big", model=model, vae=None, config=config)
    code = """
        import sys, threading, torch
        from openlance.model.checkpoint import find_release, load_model, read_config

        def own() -> int:  # memory that is not a mapped file
            line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
            return int(line.split()[1]) * 1024

        release = find_release(sys.argv[1])
        config = read_config(release)
        before = peak = own()
        done = threading.Event()

        def watch() -> None:
            global peak
            while not done.wait(0.0005):
                peak = max(peak, own())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = load_model(release, config, dtype=torch.bfloat16)
        done.set()
        watcher.join()
        print(peak - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "big")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, slack = int(done.stdout), 16 * 2**20
    assert values * 4 > 190 * 2**20
    assert values * 2 <= peak < values * 2 + 2 * largest * 4 + slack
