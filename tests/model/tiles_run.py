"""The VAE's tiles shared by processes, compared with one: a script that a test starts through torchrun.

    torchrun --nproc-per-node 2 tests/model/tiles_run.py FOLDER

Process n writes FOLDER/n.json: whether each case is the same, bit for bit, and its share of the operations.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from test_tiles import ONE_BLOCK, given, make
from torch.utils.flop_counter import FlopCounterMode

from openlance.model.tiles import Tiles, decoder_reach, encoder_reach, grid_of

CASES = {
    "tiles": (Tiles(side=6), 1, 11, 7),
    "a clip in tiles": (Tiles(side=6), 3, 1, 14),
    "cut as processes are many": (Tiles(), 1, 16, 5),
    "a clip cut so": (Tiles(), 2, 3, 15),
    "too small to cut": (Tiles(), 2, 2, 2),
}


def alike(tiles: Tiles, processes: int, cells: tuple[int, int]) -> Tiles:
    """What makes one process cut as several do."""
    margin = decoder_reach(ONE_BLOCK)
    wanted = grid_of(cells, tiles.side, margin, processes)
    return next(Tiles(side) for side in range(max(cells), 0, -1) if grid_of(cells, side, margin) == wanted)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None and encoder_reach(ONE_BLOCK) == decoder_reach(ONE_BLOCK)
    vae, record = make(ONE_BLOCK), {}
    for name, (tiles, frames, rows, columns) in CASES.items():
        pixels, latents = given(frames, rows, columns)
        found, operations = [], []
        for chosen in (alike(tiles, group.size(), (rows, columns)), replace(tiles, group=group)):
            vae.tiles = chosen
            with torch.inference_mode(), FlopCounterMode(display=False) as count:
                found.append([*vae.posterior(pixels), vae.decode(latents, clamp=False)])
            operations.append(count.get_total_flops())
        same = all(torch.equal(one, many) for one, many in zip(*found, strict=True))
        record[name] = {"same": same, "share": operations[1] / operations[0]}
    (folder / f"{group.rank()}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
