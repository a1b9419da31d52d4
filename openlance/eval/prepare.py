"""`openlance eval setup`: a folder with the configuration of a benchmark, and what its user must fetch.

Nothing is downloaded: data and scorers have licences and environments of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openlance.data.media import load_image
from openlance.data.save import save_image
from openlance.errors import InputError
from openlance.eval.stand_in import BENCHMARKS as STAND_INS

CONFIG = "config.toml"


@dataclass(frozen=True)
class Recipe:
    """explain: what to fetch, and how. config: the file to edit. files: what else goes beside it.

    extra: what a scorer's command is given beside its folders.
    """

    explain: str
    config: str
    files: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


_REWRITER = """
# Prompts in more words (--rewrite); without this table the measured model's own chat writes them.
# [rewriter]
# url = "https://host/v1"
# model = "name"
# key = "REWRITER_KEY"                  # the environment variable that holds the key
"""

GENEVAL = Recipe(
    explain="""GenEval: the 553 prompts are bundled. The scorer needs CUDA and mmdet 2, in an environment of
its own:
  git clone https://github.com/djghosh13/geneval
  cd geneval && conda env create -f environment.yml && conda activate geneval && mim install mmdet==2.27.0
  ./evaluation/download_models.sh models/
Its object_names.txt must stand beside evaluate_images.py.""",
    config=f"""# data = "prompts.jsonl"                # other prompts of the form; default: the bundled ones

[scorer]
folder = "geneval"                      # the clone, as seen from this file
command = [
    "python", "evaluation/evaluate_images.py", "{{samples}}",
    "--outfile", "{{output}}/results.jsonl", "--model-path", "models",
]
# "python" must be that of the scorer's environment: give its full path.
together = 400                          # pictures of one call; one that fails loses no others
{_REWRITER}""",
)

DPG = Recipe(
    explain="""DPG-Bench: prompts, questions and scorer are in one repository; the scorer needs modelscope:
  git clone https://github.com/TencentQQGYLab/ELLA
  cd ELLA && pip install -r requirements-for-dpg_bench.txt    (in an environment of its own)
What it asks the model mPLUG is written to *_detail.txt; the sums are made here from that file. The questions
are handed to it with their first row twice, since it drops the first one; --as-published hands them as they
are.""",
    config=f"""data = "ELLA/dpg_bench"                 # with prompts/ and dpg_bench.csv

[scorer]
folder = "ELLA"
command = [
    "accelerate", "launch", "--num_processes", "1", "dpg_bench/compute_dpg_bench.py",
    "--image-root-path", "{{samples}}", "--resolution", "{{tile}}", "--pic-num", "4", "--csv", "{{csv}}",
    "--res-path", "{{output}}/dpg.txt", "--vqa-model", "mplug",
]
together = 100                          # grids of one call
{_REWRITER}""",
    extra=("{csv}", "{tile}"),
)

VBENCH = Recipe(
    explain="""VBench: the list of entries and the scorer are in one repository; the scorer pins transformers
4.33 and needs torchvision and detectron2:
  git clone https://github.com/Vchitect/VBench
  cd VBench && pip install -e .
  pip install detectron2@git+https://github.com/facebookresearch/detectron2.git
score.sh calls it for one dimension; for temporal_flickering it first picks the clips that stand still, as the
benchmark says.""",
    config=f"""data = "VBench/vbench/VBench_full_info.json"

[scorer]
folder = "."
command = ["bash", "score.sh", "{{samples}}", "{{output}}", "{{dimension}}", "{{info}}"]
{_REWRITER}""",
    files={
        "score.sh": """#!/usr/bin/env bash
# One dimension of VBench: score.sh SAMPLES OUTPUT DIMENSION INFO. Activate the scorer's environment here.
set -euo pipefail
samples=$1 output=$2 dimension=$3 info=$4
if [ "$dimension" = temporal_flickering ]; then
    vbench static_filter --videos_path "$samples" --result_path "$output/filter"
    samples="$output/filter/filtered_videos"
fi
vbench evaluate --videos_path "$samples" --dimension "$dimension" \\
    --output_path "$output" --full_json_dir "$info"
"""
    },
    extra=("{dimension}",),
)

GEDIT = Recipe(
    explain="""GEdit-Bench: get the data set stepfun-ai/GEdit-Bench from the Hugging Face hub (parquet), then
  openlance eval setup gedit --data FOLDER_OF_PARQUET_FILES
writes the 606 English instructions and their pictures beside the configuration. The judge is any
OpenAI-compatible service that sees pictures; published numbers were judged by GPT-4.1 or Qwen2.5-VL-72B with
VIEScore's wording, which is read from its own file:
  git clone https://github.com/stepfun-ai/Step1X-Edit    (GEdit-Bench/viescore/vie_prompts.py)""",
    config=f"""data = "gedit"                          # instructions.jsonl and images/
prompts = "Step1X-Edit/GEdit-Bench/viescore/vie_prompts.py"
# Without `prompts` the judge is asked in our own words: such numbers compare with no published ones.

[judge]
url = "https://api.openai.com/v1"
model = "gpt-4.1"
key = "OPENAI_API_KEY"                  # the environment variable that holds the key
timeout = 120                           # seconds
tries = 4
parallel = 8
{_REWRITER}""",
    extra=("{model}", "{group}"),
)

MVBENCH = Recipe(
    explain="""MVBench: get the data set OpenGVLab/MVBench from the Hugging Face hub, unpack its archives, so
that json/TASK.json and video/… stand in one folder. Clips of fine_grained_pose (NTU RGB+D) are to be had from
their owners alone; --leave-out fine_grained_pose goes on without them. No scorer is needed: answers are read
here.""",
    config="""data = "MVBench"                        # with json/ and video/
""",
)

RECIPES = {"geneval": GENEVAL, "dpg": DPG, "vbench": VBENCH, "gedit": GEDIT, "mvbench": MVBENCH}


def prepare(name: str, folder: Path, *, data: Path | None = None, stand_in: bool = False) -> str:
    """Write the folder; gives what its user has to know. A configuration that is there stays as it is.

    data: of gedit, the folder with the published parquet files, which are unpacked. stand_in: name the
    stand-in for the scorer. Raises InputError for a benchmark that needs nothing of this.
    """
    if name not in RECIPES:
        raise InputError(f"unknown benchmark {name!r}: choose one of {', '.join(RECIPES)}")
    if stand_in and name not in STAND_INS:
        raise InputError(f"{name} needs no scorer, so it has no stand-in")
    if data is not None and name != "gedit":
        raise InputError(f"{name}: --data is for gedit; write where the data is into {CONFIG}")
    recipe = RECIPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {CONFIG: _config(name, recipe, stand_in), **recipe.files}.items():
        if not (folder / file).exists():
            (folder / file).write_text(text, encoding="utf-8")
    lines = [recipe.explain, f"Then look through {folder / CONFIG}, and give it by --config."]
    if data is not None:
        lines.append(
            f"{unpack_gedit(data, folder / 'gedit')} instructions with pictures in {folder / 'gedit'}."
        )
    return "\n".join(lines)


def _config(name: str, recipe: Recipe, stand_in: bool) -> str:
    if not stand_in:
        return recipe.config
    kept = [line for line in recipe.config.splitlines() if line.startswith("data")]
    command = ["{python}", "-m", "openlance.eval.stand_in", name, "{samples}", "{output}", *recipe.extra]
    return "\n".join([*kept, "", "[scorer]", f"command = {json.dumps(command)}", ""])


def unpack_gedit(source: Path, target: Path) -> int:
    """The English instructions of the published parquet files, as `instructions.jsonl` and `images/`; gives
    their number."""
    files = sorted(source.rglob("*.parquet"))
    if not files:
        raise InputError(f"{source}: no parquet files of GEdit-Bench there")
    part, lines = target / ".images.part", []
    shutil.rmtree(part, ignore_errors=True)
    for row in (row for file in files for row in _rows(file)):
        if row["instruction_language"] == "en":
            save_image(load_image(row["input_image_raw"]["bytes"]), part / f"{row['key']}.png")
            asked = {"key": row["key"], "group": row["task_type"], "instruction": row["instruction"]}
            lines.append(json.dumps(asked, ensure_ascii=False))
    if not lines:
        raise InputError(f"{source}: no English instructions there")
    (target / "instructions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(target / "images", ignore_errors=True)
    part.rename(target / "images")
    return len(lines)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("reading parquet files needs pyarrow: pip install 'openlance[train]'") from error
    columns = ["key", "task_type", "instruction", "instruction_language", "input_image_raw"]
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=16, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: no file of GEdit-Bench ({error})") from error
