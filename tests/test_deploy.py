"""What deploys a server: every command in it is one that `openlance serve` takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


def entry_point() -> list[str]:
    line = re.search(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert line
    command: list[str] = yaml.safe_load(line[1])
    assert command[:2] == ["openlance", "serve"]
    return command[2:]


def more() -> dict[str, list[str]]:
    """What is added to the entry point, by where."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    _, servers = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    (container,) = servers["spec"]["template"]["spec"]["containers"]
    return {
        "Dockerfile": [],
        "compose": compose["services"]["cpu"]["command"],
        "kubernetes": container["args"],
    }


@pytest.mark.parametrize("where", ["Dockerfile", "compose", "kubernetes"])
def test_commands_are_taken(where: str) -> None:
    """`--new-key` checks all options and serves nothing."""
    command = [sys.executable, "-m", "openlance", "serve", *entry_point(), *more()[where], "--new-key"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"key   \S+\nhash  [0-9a-f]{64}\n", done.stdout)


def test_there_is_time_to_finish_what_was_accepted() -> None:
    _, servers = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    spec = servers["spec"]["template"]["spec"]
    args = spec["containers"][0]["args"]
    assert spec["terminationGracePeriodSeconds"] > float(args[args.index("--patience") + 1])
