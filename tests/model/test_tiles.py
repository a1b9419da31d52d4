"""The VAE frame by frame and in tiles against the whole: the same numbers, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openlance.config import VAEConfig
from openlance.errors import InputError
from openlance.infer.memory import META, Peak
from openlance.model.tiles import Tiles, decoder_reach, encoder_reach, grid_of
from openlance.model.vae import VAE

ATOL = 2e-5  # float32, convolutions over other shapes; measured worst case 3e-6
ONE_BLOCK, TWO_BLOCKS = (
    VAEConfig(base=2, decoder_base=4, residual_blocks=1),
    VAEConfig(base=2, decoder_base=4),
)
IN_FRAMES, IN_TILES = Tiles(), Tiles(side=6)


def make(config: VAEConfig) -> VAE:
    """Random weights, norms included."""
    torch.manual_seed(0)
    made = VAE(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def both(vae: VAE, tiles: Tiles, pixels: Tensor, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(whole, tiled) of encoding and of decoding."""
    found = []
    for chosen in (None, tiles):
        vae.tiles = chosen
        found.append((*vae.posterior(pixels), vae.decode(latents, clamp=False)))
    vae.tiles = None
    return list(zip(*found, strict=True))


def given(frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Pixels and latents of so many latent frames and cells."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 4 * frames - 3, 16 * rows, 16 * columns, generator=generator) * 2 - 1
    return pixels, torch.randn(1, frames, rows, columns, 48, generator=generator)


@pytest.mark.parametrize(
    "config, tiles, frames, rows, columns",
    [
        (ONE_BLOCK, IN_FRAMES, 3, 2, 1),
        (ONE_BLOCK, IN_TILES, 2, 1, 11),
        (ONE_BLOCK, IN_TILES, 1, 11, 7),
        (TWO_BLOCKS, IN_TILES, 1, 1, 15),
    ],
)
def test_pieces_give_what_the_whole_gives(
    config: VAEConfig, tiles: Tiles, frames: int, rows: int, columns: int
) -> None:
    pixels, latents = given(frames, rows, columns)
    for whole, tiled in both(make(config), tiles, pixels, latents):
        torch.testing.assert_close(tiled, whole, atol=ATOL, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_tiles_and_each_gets_the_whole(tmp_path: Path, processes: int) -> None:
    """Bit for bit what one process makes of the same tiles, for little more than its share of the work."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).parent / "tiles_run.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 5 and all(case["same"] for case in found.values())
        assert all(case["share"] < 0.6 for name, case in found.items() if name != "too small to cut")


def test_a_picture_is_cut_on_only_where_that_is_less_work_for_each() -> None:
    def most(side: int, processes: int) -> tuple[int, int]:
        """Tiles of a square, and cells of the largest with its margins."""
        grid = grid_of((side, side), None, 6, processes)
        return len(grid), max((r.high - r.low) * (c.high - c.low) for r, c in grid)

    assert [most(48, processes) for processes in (1, 2, 8)] == [(1, 48 * 48), (2, 48 * 30), (8, 24 * 30)]
    assert most(6, 8) == (1, 36)
    assert len(grid_of((48, 48), 16, 6, processes=8)) == 9  # enough of them already


def test_a_narrow_margin_leaves_seams_near_the_border_only() -> None:
    vae, (pixels, latents) = make(ONE_BLOCK), given(1, 1, 16)
    *_, (whole, tiled) = both(vae, Tiles(side=8, margin=1), pixels, latents)
    apart = (whole - tiled).abs().amax(dim=(0, 1, 2, 3))
    reach = 16 * decoder_reach(vae.config)
    assert apart[128 - 16 : 128 + 16].max() > 10 * ATOL
    assert apart[: 128 - reach].max() < ATOL
    assert apart[128 + reach :].max() < ATOL


def test_a_clip_of_many_frames_takes_no_more_than_a_short_one() -> None:
    vae = make(ONE_BLOCK)
    most = []
    for frames in (3, 6):
        _, latents = given(frames, 1, 1)
        with torch.inference_mode(), Peak(torch.device("cpu")) as peak:
            for _ in vae.stream(latents):
                pass
        most.append(peak.most)
    assert most[1] - most[0] < latents.nbytes * 4  # the latents themselves, and copies of them


@pytest.fixture(scope="module")
def released() -> VAE:
    """Of the released shapes, without values."""
    with META:
        return VAE(VAEConfig()).eval().bfloat16()


def test_a_clip_of_480_by_848_decodes_in_less_than_6_gb(released: VAE) -> None:
    weights = sum(parameter.nbytes for parameter in released.parameters())
    latents = torch.empty(
        1, 3, 30, 53, 48, device=META, dtype=torch.bfloat16
    )  # later frames are as the third
    most = {}
    for tiles in (None, IN_FRAMES):
        released.tiles = tiles
        with torch.inference_mode(), Peak() as peak:
            for _ in released.stream(latents):
                pass
        most[tiles] = peak.most
    assert weights + most[None] < 6e9
    assert most[IN_FRAMES] < 0.7 * most[None]


def test_tiles_cover_an_axis_once() -> None:
    for cells, side in ((30, 16), (5, 1), (7, None), (64, 64)):
        found = [row for row, _ in grid_of((cells, 1), side, 3)]
        assert [cell for cut in found for cell in range(cut.start, cut.end)] == list(range(cells))
        assert all(cut.end - cut.start <= (side or cells) for cut in found)
        assert all(cut.low == max(0, cut.start - 3) and cut.high == min(cells, cut.end + 3) for cut in found)


def test_the_released_stages_reach_six_cells() -> None:
    assert (decoder_reach(VAEConfig()), encoder_reach(VAEConfig())) == (6, 6)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="side"):
        Tiles(side=0)
    with pytest.raises(InputError, match="margin"):
        Tiles(side=8, margin=-1)
