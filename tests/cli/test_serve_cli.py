"""`openlance serve`: what it refuses, new keys, and a server that starts and stops."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from ran import Run, refused

HASH = hashlib.sha256(b"key").hexdigest()


def test_a_new_key(run: Run) -> None:
    ran = run("serve", "--new-key", model=None)
    assert ran.code == 0
    found = re.fullmatch(r"key   (\S{40,})\nhash  ([0-9a-f]{64})\n", ran.out)
    assert found is not None
    assert hashlib.sha256(found[1].encode()).hexdigest() == found[2]


def test_the_network_needs_keys(run: Run) -> None:
    refused(run("serve", "--host", "0.0.0.0"), "0.0.0.0", "--api-keys", "--new-key")


def test_a_key_instead_of_its_hash(run: Run) -> None:
    ran = run("serve", "--api-keys", "my-secret-key")
    refused(ran, "SHA-256")
    assert "my-secret-key" not in ran.err


def test_a_file_of_keys_that_is_missing(run: Run, tmp_path: Path) -> None:
    refused(run("serve", "--key-file", tmp_path / "keys"), "keys", "cannot be read")


def test_a_port_that_is_taken(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(run("serve", "--port", port, "--no-page"), f"port {port} is in use", "--port")
    refused(run("serve", "--port", 99_999), "--port", "65535")


def test_a_host_that_is_not_here(run: Run) -> None:
    refused(run("serve", "--host", "192.0.2.1", "--api-keys", HASH, "--no-page"), "192.0.2.1", "--host")


@pytest.mark.slow
def test_devices_and_models_that_are_not_there(tmp_path: Path) -> None:
    for options, word in (("--devices warp9", "warp9"), ("--model nowhere/at-all/x", "nowhere/at-all/x")):
        done = subprocess.run(
            [sys.executable, "-m", "openlance", "serve", "--port", "0", "--no-page", *options.split()],
            capture_output=True, text=True, cwd=tmp_path, timeout=280, check=False,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2, done.stderr
        assert last.startswith("openlance: error: ") and word in last
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_it_serves_until_ctrl_c(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "keys").write_text(f"{HASH}  # mine\n")
    command = [
        "serve",
        "--port",
        "0",
        "--model",
        str(tiny_checkpoint),
        "--name",
        "tiny",
        "--key-file",
        "keys",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "openlance", *command, "--no-page", "--devices", "cpu"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
            while (answer := http.get("/models", headers={"Authorization": "Bearer key"})).status_code == 503:
                time.sleep(0.5)
            assert [model["id"] for model in answer.json()["data"]] == ["tiny"]
            assert http.get("/models").status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
