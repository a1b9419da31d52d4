"""What it costs to run the VAE in pieces: time, memory, and how far from the whole.

    python benchmarks/vae_tiles.py MEDIA --threads 1

A picture or the first frames of a clip go through nano's VAE whole, frame by frame, and in tiles with margins
from none to as wide as the stages reach. PSNR is against the whole, on pixels in [-1, 1]; memory counts
tensors.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from machine import about, describe, options, read, write
from torch import Tensor

from openlance.data.media import as_frames, load_media, resize_to_bucket, to_vae_pixels
from openlance.infer.memory import Peak
from openlance.model.checkpoint import find_release, load_vae, read_config
from openlance.model.tiles import Tiles, decoder_reach
from openlance.model.vae import VAE
from openlance.tokenizer import Tokenizer

CPU = torch.device("cpu")


def run(vae: VAE, pixels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Latents, decoded frames, and seconds and bytes of both ways."""
    taken: dict[str, float] = {}
    start = time.perf_counter()
    encoded = vae.encode(pixels)
    middle = time.perf_counter()
    decoded = vae.decode(latents)
    taken["encode s"], taken["decode s"] = middle - start, time.perf_counter() - middle
    for name, again in (("encode", lambda: vae.encode(pixels)), ("decode", lambda: vae.decode(latents))):
        with Peak(CPU) as peak:
            again()
        taken[f"{name} MB"] = peak.most / 1e6
    return encoded, decoded, taken


def psnr(found: Tensor, whole: Tensor) -> float:
    """In dB, of values in [-1, 1]."""
    return float(10 * torch.log10(4 / (found - whole).square().mean().clamp(min=1e-20)))


def main() -> None:
    parser = options(__doc__, model=False)
    parser.add_argument("media", type=Path)
    parser.add_argument("--resolution", type=int, default=320, help="side of the square of equal area")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--side", type=int, default=12, help="of a tile, in latent cells")
    args = read(parser)
    release = find_release("nano")
    vae = load_vae(release, read_config(release, Tokenizer.load(release.folder))).eval()
    frames = as_frames(load_media(args.media))[: args.frames]
    pixels = to_vae_pixels(resize_to_bucket(frames, args.resolution, 16))[None]
    reach = decoder_reach(vae.config)
    ways: dict[str, Tiles | None] = {"whole": None, "frame by frame": Tiles()}
    ways |= {f"tiles of {args.side}, margin {n}": Tiles(args.side, n) for n in (0, 1, 2, reach)}
    setting = f"nano's VAE, {args.media.name}, {list(pixels.shape[2:])} (frames, rows, columns)"
    print(f"{setting}; {describe(about(CPU))}\n")
    names = ("encode s", "decode s", "encode MB", "decode MB")
    print(f"| way | {' | '.join(names)} | latents dB | pixels dB | largest pixel error |")
    print("|---" * (len(names) + 4) + "|")
    rows, whole = {}, None
    with torch.inference_mode():
        latents = vae.encode(pixels)
        for name, tiles in ways.items():
            vae.tiles = tiles
            encoded, decoded, taken = run(vae, pixels, latents)
            whole = whole or (encoded, decoded)
            apart = float((decoded - whole[1]).abs().max())
            near = (psnr(encoded, whole[0]), psnr(decoded, whole[1]), apart)
            cells = " | ".join(f"{taken[key]:.3g}" for key in names)
            print(f"| {name} | {cells} | {near[0]:.1f} | {near[1]:.1f} | {near[2]:.1e} |", flush=True)
            rows[name] = {**taken, "latents dB": near[0], "pixels dB": near[1], "error": apart}
    write(args.out, {"setting": setting, "machine": about(CPU), "rows": rows})


if __name__ == "__main__":
    main()
