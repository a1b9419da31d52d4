"""The command that encodes training data beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from openlance.cli.options import LoadOptions, check_seed, option
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.data.encode import Encoder

NEEDS = ("t2i", "x2t_image")  # between them, the VAE and the vision tower


def encode(
    address: Annotated[Positional[str], option("As for `openlance data check`.")],
    *,
    out: Annotated[Path, option("Folder for the encoded shards; the same command goes on from there.")],
    format: Annotated[
        str | None,
        option("parquet, webdataset, jsonl or datasets. Default: what the names of the files tell."),
    ] = None,
    task: Annotated[
        str | None, option("Read every row as this: t2i, i2v, image_edit, … Default: the columns tell.")
    ] = None,
    seed: Annotated[int, option("Of the captions that are drawn, where a row has several.")] = 0,
    ray: Annotated[
        int, option("Processes of Ray Data, on this machine or a cluster; 0 encodes in this process.")
    ] = 0,
    ray_gpus: Annotated[float, option("GPUs of each such process.")] = 0,
    load: LoadOptions,
) -> None:
    """Encode a dataset once, so that training reads latents and features instead of pictures and clips.

    Every shard becomes a Parquet file; those that are there are not made again. Rows that cannot be used are
    counted and named. Pictures keep the resolution at which they were encoded.

    For example:
      openlance data encode shapes.parquet --out encoded
      openlance data encode "clips/{000..127}.tar" --model weights --out encoded --ray 8 --ray-gpus 1
    """
    from openlance.data.encode import encode_source, encode_with_ray
    from openlance.data.save import check_folder
    from openlance.data.sources import open_source
    from openlance.sequence.template import parse_task

    check_seed(seed)
    if ray < 0 or ray_gpus < 0:
        raise InputError("--ray and --ray-gpus must be 0 or more")
    if task is not None:
        parse_task(task)
    check_folder(out / "shard-00000.parquet")
    source = open_source(address, format=format)
    build = _Build(load, task, seed)
    if ray:
        tally = encode_with_ray(source, out.absolute(), build, ray, ray_gpus)
    else:
        tally = encode_source(source, out, build(), quiet=load.quiet)
    print(f"{out}: {tally}")


@dataclass(frozen=True)
class _Build:
    """Makes the encoder, in whichever process."""

    load: LoadOptions
    task: str | None
    seed: int

    def __call__(self) -> Encoder:
        from openlance.data.encode import Encoder
        from openlance.sequence.template import Task

        pipeline = self.load.pipeline(NEEDS)
        assert pipeline.vae is not None
        task = None if self.task is None else Task(self.task)
        return Encoder(pipeline.config, pipeline.vae, pipeline.model.vision, task, self.seed)
