from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from released import MODEL, VIT, Tiny, assert_same, change, change_json, contents
from safetensors.torch import load_file

from openlance.config import BackboneConfig, ModelConfig, VAEConfig, VisionConfig
from openlance.errors import InputError
from openlance.model import hub
from openlance.model import release as layout
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config

# Configuration


def test_released_values_hold_where_nothing_is_said(folder: Path) -> None:
    (folder / "openlance.json").unlink()
    (folder / "Wan2.2_VAE.config.json").unlink()
    config, released = read_config(find_release(folder)), ModelConfig()
    assert config.vae == released.vae
    assert config == replace(released, backbone=config.backbone, vision=config.vision, tokens=config.tokens)


def test_every_field_has_a_place_in_the_files() -> None:
    def fields(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    strides = {"spatial_stride", "temporal_stride"}  # follow from the shapes
    assert set(layout.BACKBONE_KEYS.values()) | {"rope_sections", "qk_norm"} == fields(BackboneConfig)
    assert set(layout.VISION_KEYS.values()) == fields(VisionConfig)
    assert set(layout.VAE_KEYS.values()) | set(layout.OWN_VAE_FIELDS) | strides == fields(VAEConfig)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("openlance.json", lambda d: d.update(colour=1), r"openlance.json: unknown field\(s\) colour"),
        ("openlance.json", lambda d: d["mape"].update(x=1), r"mape: unknown field\(s\) x"),
        ("openlance.json", lambda d: d["vae"].update(dim=1), r"vae: unknown field\(s\) dim"),
        ("openlance.json", lambda d: d.update(vae=3), "vae must be an object"),
        ("openlance.json", lambda d: d.update(mape=3), "mape must be an object"),
        ("openlance.json", lambda d: d.update(max_frames="9"), "max_frames must be int, not '9'"),
        ("openlance.json", lambda d: d.update(max_frames=True), "max_frames must be int"),
        ("openlance.json", lambda d: d.update(system_prompts={"a": 1}), "system_prompts must be dict"),
        ("openlance.json", lambda d: d["sampling"].update(steps=0), "sampling: steps must be at least 1"),
        ("openlance.json", lambda d: d["sampling"].update(guidance_interval=[1]), "sampling: "),
        ("openlance.json", lambda d: d["sampling"].update(guidance_interval=1), "must be a list"),
        ("openlance.json", lambda d: d["sampling"].update(visual_guidance="x"), "must be a number"),
        ("openlance.json", lambda d: d["vae"].update(mean=[0.0]), r"vae\.mean needs 4 values"),
        ("Wan2.2_VAE.config.json", lambda d: d.update(dim_mult="x"), "dim_mult must be a list"),
        ("Qwen2.5-VL-ViT/config.json", lambda d: d.pop("depth"), "config.json: lacks depth"),
        ("Qwen2.5-VL-ViT/config.json", lambda d: d.update(out_hidden_size=9), "out_hidden_size 9 is not"),
        ("Lance_3B/llm_config.json", lambda d: d.pop("vocab_size"), "llm_config.json: lacks vocab_size"),
        ("Lance_3B/llm_config.json", lambda d: d.update(vocab_size=9), "has 278 tokens, more than"),
        ("Lance_3B/llm_config.json", lambda d: d.update(hidden_size=2.5), "hidden_size must be int"),
        ("Lance_3B/llm_config.json", lambda d: d.update(hidden_size=31), "llm_config.json: hidden 31"),
        ("Lance_3B/llm_config.json", lambda d: d.update(rope_scaling=None), "mrope_section must be three"),
    ],
)
def test_bad_configuration_is_named(folder: Path, file: str, edit, message: str) -> None:
    change_json(folder / file, edit)
    with pytest.raises(InputError, match=message):
        read_config(find_release(folder))


@pytest.mark.parametrize(
    "file",
    ["openlance.json", "Wan2.2_VAE.config.json", "Qwen2.5-VL-ViT/config.json", "Lance_3B/llm_config.json"],
)
@pytest.mark.parametrize("text", [b"", b'{"a": ', b"[1]", b"\xff\xfe"])
def test_bad_json_names_the_file(folder: Path, file: str, text: bytes) -> None:
    (folder / file).write_bytes(text)
    with pytest.raises(InputError, match=rf"{Path(file).name}: (cannot be read as JSON|must hold a JSON)"):
        read_config(find_release(folder))


# Finding a release


def test_variants(folder: Path) -> None:
    assert find_release(folder / "Lance_3B") == find_release(folder)
    assert find_release(str(folder), "Lance_3B").variant == "Lance_3B"
    with pytest.raises(InputError, match="no variant Lance_3B_Video; choose one of Lance_3B"):
        find_release(folder, "Lance_3B_Video")
    with pytest.raises(InputError, match="folder of variant Lance_3B, not of other"):
        find_release(folder / "Lance_3B", "other")
    shutil.copytree(folder / "Lance_3B", folder / "Lance_3B_Video")
    assert find_release(folder).variant == "Lance_3B"
    assert find_release(folder, "Lance_3B_Video").folder.name == "Lance_3B_Video"
    (folder / "Lance_3B").rename(folder / "mine")
    with pytest.raises(InputError, match="no variant Lance_3B; choose one of Lance_3B_Video, mine"):
        find_release(folder)


def test_wrong_layouts_say_what_was_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: not a Lance release\. Looked for .*; found nothing"):
        find_release(tmp_path / "empty")
    with pytest.raises(InputError, match=r"Looked for .*llm_config\.json.*; found config\.json, vit"):
        find_release(folder / "Qwen2.5-VL-ViT")
    with pytest.raises(InputError, match="a file; give the folder"):
        find_release(folder / MODEL)
    with pytest.raises(InputError, match="no such folder"):
        find_release(tmp_path / "nothing" / "here")
    (folder / MODEL).unlink()
    with pytest.raises(
        InputError, match=r"no weights\. Looked for model\.safetensors or .*; found llm_config"
    ):
        find_release(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must map"),
        ({"weight_map": {"a": 3}}, "weight_map must map"),
        ({"weight_map": {"a": "model-1.safetensors"}}, r"names model-1\.safetensors, not there"),
        ({"weight_map": {"a": "../Lance_3B/llm_config.json"}}, "not there"),
    ],
)
def test_a_bad_index_is_named(folder: Path, index: dict, message: str) -> None:
    (folder / MODEL).unlink()
    (folder / "Lance_3B" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        find_release(folder)


def test_the_bundled_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.BUNDLED, "nano", folder)
    assert find_release("nano") == find_release(folder)
    monkeypatch.setitem(hub.BUNDLED, "nano", folder / "gone")
    with pytest.raises(InputError, match="nano is not in this installation"):
        find_release("nano")


@pytest.fixture
def fake_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """The hub holds `folder`; gives a function that says what was downloaded."""
    import huggingface_hub

    cache = tmp_path / "cache"

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "someone/lance"
        for path in (path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return lambda: set(contents(cache))


def test_the_hub_gives_all_of_one_variant(tiny: Tiny, folder: Path, fake_hub) -> None:
    wanted = set(contents(folder))
    shutil.copytree(folder / "Lance_3B", folder / "Lance_3B_Video")
    (folder / "README.md").touch()
    (folder / "Wan2.2_VAE.pth").touch()
    release = find_release("someone/lance")
    assert fake_hub() == wanted | {"Lance_3B_Video/llm_config.json"}
    assert_same(load_model(release, read_config(release)), tiny.model)
    assert_same(load_vae(release, read_config(release)), tiny.vae)


def test_the_hub_gives_what_the_task_needs(folder: Path, fake_hub) -> None:
    find_release("someone/lance", parts={"und"})
    assert fake_hub() == set(contents(folder)) - {VIT, "Wan2.2_VAE.safetensors"}
    (folder / "Wan2.2_VAE.safetensors").rename(folder / "Wan2.2_VAE.pth")
    release = find_release("someone/lance", parts={"und", "gen"})
    assert release.vae is not None and release.vae.suffix == ".pth"
    assert fake_hub() == set(contents(folder)) - {VIT}
    vision = {f"vit_model.{name}": tensor for name, tensor in load_file(folder / VIT).items()}
    change(folder / MODEL, lambda tensors: tensors.update(vision))
    find_release("someone/lance", parts={"und", "vision"})
    assert VIT not in fake_hub()


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    code = """
        from openlance.errors import InputError
        from openlance.model.hub import find_release
        try:
            find_release("someone/lance")
        except InputError as error:
            print(error)
    """
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | settings, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "someone/lance: no such folder here" in done.stdout and "HF_HUB_OFFLINE" in done.stdout
