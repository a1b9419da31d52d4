"""Finding a release: in a local folder, on the Hugging Face hub, or in the package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from openlance.errors import InputError
from openlance.model.names import PARTS, VISION
from openlance.model.release import (
    LLM_CONFIG,
    OWN_CONFIG,
    VAE_CONFIG,
    VAE_FILES,
    VIT_FOLDER,
    VIT_WEIGHTS,
    Release,
    choose_variant,
    read_layout,
)

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED = {"nano": ASSETS / "nano"}
BUNDLED_ADAPTERS = {"nano-fast": ASSETS / "nano-fast"}


def find_release(
    source: str | Path, variant: str | None = None, parts: Iterable[str] = PARTS, *, weights: bool = True
) -> Release:
    """The files of a release.

    source: a folder in the released layout (or one variant's folder), a Hugging Face id `owner/name`, or
        the name of a bundled model ("nano"; write ./nano for a folder of that name).
    variant: its name; None takes the only one, or Lance_3B.
    parts: what the task needs of "und", "gen" (which includes the VAE) and "vision". From the hub only that
        is downloaded, to the usual cache; an interrupted download goes on where it stopped.
    weights: False for the configuration and the tokenizer alone.
    Raises InputError saying what was looked for and what to do.
    """
    parts = frozenset(parts)
    bundled = BUNDLED.get(str(source))
    path = bundled or Path(source).expanduser()
    if path.is_dir():
        return read_layout(path, variant, weights=weights)
    if bundled:
        raise InputError(f"the bundled model {source} is not in this installation ({path})")
    if path.exists():
        raise InputError(f"{path}: a file; give the folder of a release")
    if isinstance(source, str) and REPOSITORY.fullmatch(source):
        return _download(source, variant, parts, weights)
    raise InputError(
        f"{source}: no such folder. Give the folder of a release, a Hugging Face id such as "
        f"bytedance-research/Lance, or {', '.join(BUNDLED)}"
    )


def find_folder(source: str | Path, patterns: list[str]) -> Path:
    """A local folder, or that of the files of a Hugging Face id that match. Raises InputError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if isinstance(source, str) and not path.exists() and REPOSITORY.fullmatch(source):
        return _fetch(source, patterns)
    raise InputError(f"{source}: no such folder. Give the folder of a checkpoint, or its Hugging Face id")


def _download(repository: str, variant: str | None, parts: frozenset[str], weights: bool) -> Release:
    """Configuration first, then the chosen variant, then what its files turn out to lack."""
    vit_config = f"{VIT_FOLDER}/config.json"
    root = _fetch(repository, [f"*/{LLM_CONFIG}", vit_config, VAE_CONFIG, OWN_CONFIG])
    variant = choose_variant(root, variant)
    wanted = [f"{variant}/*.{ending}" for ending in ("json", "txt", "safetensors")]
    if not weights:
        return read_layout(_fetch(repository, wanted[:2]), variant, weights=False)
    safe_vae, pickled_vae = VAE_FILES
    root = _fetch(repository, wanted + [safe_vae] * ("gen" in parts))
    release = read_layout(root, variant)
    rest = []
    if "gen" in parts and release.vae is None:
        rest.append(pickled_vae)
    if "vision" in parts and not holds_vision(release):
        rest.append(f"{VIT_FOLDER}/{VIT_WEIGHTS}")
    return read_layout(_fetch(repository, rest), variant) if rest else release


def holds_vision(release: Release) -> bool:
    """Whether the variant's own weights contain the ViT; else it is in vit.safetensors."""
    from safetensors import SafetensorError, safe_open

    for path in release.weights:
        try:
            with safe_open(path, framework="numpy") as file:
                if any(name.startswith(VISION) for name in file.keys()):  # noqa: SIM118 (not a dict)
                    return True
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error})") from error
    return False


def _fetch(repository: str, patterns: list[str]) -> Path:
    """Downloads the files that match, shows progress, and gives the folder of the snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport: type[BaseException] = HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP library, which differs between hub versions
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, transport, OSError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{repository}: no such folder here, and it cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the name, the "
            "connection, HF_TOKEN for a private repository and HF_HUB_OFFLINE; or download it elsewhere and "
            "give its folder"
        ) from error
