"""The OpenAPI document says what the server does: Schemathesis sends it what fits the document, and what does
not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving import Server

SERVE = {"max_steps": 2, "max_size": 64, "max_frames": 5, "max_tokens": 4, "max_pictures": 2}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_document_is_kept(server: Server) -> None:
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", f"{server.address}/openapi.json",
            "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "5",
            "--seed", "1", "--generation-database", "none", "--request-timeout", "100", "--no-color",
            "--continue-on-failure",
        ],
        capture_output=True, text=True, check=False, cwd=server.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    log = server.log()
    assert [line for line in log if line["level"] == "error"] == []
    assert sum(line["event"] == "request" for line in log) > 100
