"""`openlance plan`, and the launch examples that stand beside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from ran import Run, refused

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
NANO = ("plan", "--preset", "nano", "--tokens", 1400, "--longest", 1400, "--gpus", 1)


def test_a_plan_that_fits(run: Run) -> None:
    ran = run(*NANO, "--gpu-memory", 8, "--gpu", "RTX 4090", model=None)
    assert ran.code == 0, ran.err
    assert "chosen: single device, without activation checkpointing" in ran.out
    assert "165.2 TFLOPs" in ran.out
    assert "days: pt" in ran.out


def test_a_plan_that_does_not_fit_ends_with_1_and_says_what_would(run: Run) -> None:
    job = ("--tokens", 8192, "--longest", 8192)
    ran = run("plan", *job, "--gpus", 1, "--gpu-memory", 24, model=None)
    assert ran.code == 1
    assert "nothing fits" in ran.out
    assert "--gpus 16" in ran.out
    assert run("plan", *job, "--gpus", 16, "--gpu-memory", 24, model=None).code == 0
    assert "GiB" in ran.out.split("nothing fits")[1]


def test_json_says_the_same(run: Run) -> None:
    arguments = ("--gpu-memory", 8, "--trains", "gen", "--lora-rank", 4, "--encoded", "--no-ema", "--json")
    found = json.loads(run(*NANO, *arguments, model=None).out)
    assert found["job"]["trains"] == ["gen"]
    assert found["chosen"] == next(option for option in found["options"] if option["fits"])
    assert found["chosen"]["total"] <= found["machine"]["room"]
    assert (found["chosen"]["memory"]["ema"], found["chosen"]["memory"]["encoder"]) == (0, 0)
    assert set(found["speed"]["days"]) == {"pt", "ct", "sft", "rl"}


def test_mistakes_are_named(run: Run) -> None:
    refused(run("plan", "--gpu", "Abacus", model=None), "Abacus", "--peak-tflops")
    refused(run("plan", "--preset", "lance_4b", model=None), "lance_4b")
    refused(run("plan", "--trains", "vae", model=None), "trains")


@pytest.mark.parametrize("name", ["slurm.sbatch"])
def test_the_batch_script_is_a_shell_script(name: str) -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


def test_the_batch_script_starts_every_node_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    """The script runs with stand-ins for Slurm's commands: half an hour before its end, and at its end."""
    for name, body in {
        "srun": 'echo "$@" > srun.txt; exit 1',
        "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" > scontrol.txt; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = (
        "export SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=2 SLURM_GPUS_ON_NODE=4 SLURM_JOB_NODELIST=node[1-2]; "
        f"export PATH={tmp_path}:$PATH; export SLURM_JOB_END_TIME=$(($(date +%s) + $1)); shift; "
        f'exec bash {EXAMPLES / "slurm.sbatch"} "$@"'
    )
    for left, requeued in ((1800, False), (100, True)):
        words = ["bash", "-c", slurm, "-", str(left), "--preset", "sft"]
        assert subprocess.run(words, cwd=tmp_path, check=False).returncode == 1
        assert (tmp_path / "scontrol.txt").exists() == requeued
    started = (tmp_path / "srun.txt").read_text()
    assert "--nnodes 2 --nproc-per-node 4" in started
    assert "--rdzv-endpoint node1:29500" in started
    assert started.rstrip().endswith("--lanes 8 --resume --preset sft")


def test_the_kubernetes_job_agrees_with_itself() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    service, job = documents
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    nodes, gpus = int(env["NODES"]), int(env["GPUS"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert int(env["LANES"]) % (nodes * gpus) == 0
    assert pod["terminationGracePeriodSeconds"] > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}" in container["args"][0]
