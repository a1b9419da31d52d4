"""The server as a whole: health, models, keys, errors, log, limits, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from serving import Server, serving

from openlance.errors import InputError
from openlance.serve.logs import traces
from openlance.serve.security import key_hash

KEY = "lance-test-key"
SERVE = {"api_keys": [key_hash(KEY), key_hash("other")], "max_body": 100_000, "host": "127.0.0.1"}
BEARER = {"Authorization": f"Bearer {KEY}"}


def ask(words: str = "hi", **fields: object) -> dict[str, object]:
    return {"model": "nano", "messages": [{"role": "user", "content": words}], **fields}


def test_health_needs_no_key(server: Server) -> None:
    with server.http() as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready"}
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 401, path


def test_models(server: Server) -> None:
    client = server.openai(KEY)
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("nano", "model", "openlance")
    assert client.models.retrieve("nano") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("owner/other")
    assert caught.value.code == "model_not_found"


def test_a_wrong_key(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert server.openai("other").models.list().data


def test_errors_have_openais_shape(server: Server) -> None:
    with server.http(headers=BEARER) as http:
        answers = {
            404: http.get("/v1/nothing"),
            405: http.get("/v1/chat/completions"),
            400: http.post(
                "/v1/chat/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}
            ),
            413: http.post("/v1/chat/completions", json=ask("x" * 100_001)),
        }
        assert http.get("/nothing").status_code == 404, "without a page too"
        assert http.post("/v1/chat/completions", content=b"model=nano").status_code == 400
    for status, answer in answers.items():
        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and error["message"]


def test_a_body_without_a_length_is_limited(server: Server) -> None:
    def pieces():
        yield b'{"model": "'
        for _ in range(200):
            yield b"x" * 1000

    with server.http(headers=BEARER | {"Content-Type": "application/json"}) as http:
        answer = http.post("/v1/chat/completions", content=pieces())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_requests_have_ids_and_a_line_in_the_log(server: Server) -> None:
    with server.http(headers=BEARER) as http:
        own = http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
        drawn = http.get("/v1/models", headers={"X-Request-Id": "bad id\t<script>"})
    assert own.headers["X-Request-Id"] == "mine-1"
    assert own.headers["X-Content-Type-Options"] == "nosniff"
    assert len(drawn.headers["X-Request-Id"]) == 32
    [line] = [line for line in server.log() if line.get("request_id") == "mine-1"]
    told = {name: line[name] for name in ("event", "level", "method", "path", "status")}
    assert told == {"event": "request", "level": "info", "method": "GET", "path": "/v1/models", "status": 200}
    assert KEY not in json.dumps(server.log())


def test_metrics(server: Server) -> None:
    client = server.openai(KEY)
    answer = client.chat.completions.create(**ask("what is it?", max_tokens=3))
    with server.http(headers=BEARER) as http:
        text = http.get("/metrics").text
    for line in (
        'openlance_jobs_total{end="done",method="chat"} 1.0',
        f'openlance_tokens_total{{kind="answer"}} {float(answer.usage.completion_tokens)}',
        f'openlance_tokens_total{{kind="prompt"}} {float(answer.usage.prompt_tokens)}',
        'openlance_job_seconds_count{method="chat",phase="waiting"} 1.0',
        'openlance_job_seconds_count{method="chat",phase="answer"} 1.0',
        'openlance_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0',
        'openlance_worker_up{device="cpu",worker="0"} 1.0',
        'openlance_worker_restarts_total{device="cpu",worker="0"} 0.0',
        "openlance_jobs_waiting 0.0",
    ):
        assert line in text.splitlines()
    assert "openlance_worker_memory_bytes" in text and "process_resident_memory_bytes" in text


def test_telemetry_without_its_package_is_an_error() -> None:
    if "opentelemetry.sdk" in sys.modules or _installed("opentelemetry.sdk"):
        pytest.skip("OpenTelemetry is installed")
    with pytest.raises(InputError, match=r"openlance\[telemetry\]"):
        traces("http://localhost:4318")
    assert traces(None) is None


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec("opentelemetry") is not None and find_spec(module) is not None


# -- how it begins and ends, each with a server of its own ---------------------------------------------


@pytest.mark.slow
def test_it_tells_that_it_is_loading_and_finishes_what_it_accepted(tmp_path: Path) -> None:
    """SIGTERM while a request runs: it is answered, new ones are refused, and the exit code is 0."""
    with serving(tmp_path, ready=False) as server:
        with server.http() as http:
            assert http.get("/healthz").status_code == 200
            early = http.get("/v1/models")
            if early.status_code != 200:
                assert early.status_code == 503 and early.headers["Retry-After"]
                assert http.get("/readyz").status_code in (200, 503)
        _wait(server)
        body = json.dumps(ask("a red circle", modalities=["image"], steps=60))
        command = ["-c", _POST, f"{server.address}/v1/chat/completions", body]
        asking = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        while server.metric("openlance_jobs_running") == 0:
            time.sleep(0.1)
        assert server.stop() == 0
        out, _ = asking.communicate(timeout=60)
        assert out.strip() == "200"
        assert not [line for line in server.log() if line["level"] == "error"]


@pytest.mark.slow
def test_what_takes_longer_than_the_patience_is_told(tmp_path: Path) -> None:
    """Ctrl-C with little patience: the client hears 503."""
    with serving(tmp_path, patience=1) as server:
        body = json.dumps(ask("a red circle", modalities=["image"], steps=200))
        command = ["-c", _POST, f"{server.address}/v1/chat/completions", body]
        asking = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        while server.metric("openlance_jobs_running") == 0:
            time.sleep(0.1)
        assert server.stop(signal.SIGINT) == 0
        out, _ = asking.communicate(timeout=60)
        assert out.strip() == "503"


@pytest.mark.slow
def test_the_page_takes_the_key_as_a_password(tmp_path: Path) -> None:
    with serving(tmp_path, page=True, api_keys=[key_hash(KEY)]) as server:
        assert (tmp_path / "out.log").read_text().startswith(f"page {server.address}/\n")
        with server.http() as http:
            refused = http.get("/")
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"].startswith("Basic")
        with server.http(auth=("anyone", KEY)) as http:
            page = http.get("/")
            assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
            assert http.get("/config").status_code == 200, "gradio's own"
            assert http.get("/v1/models").status_code == 401, "not by what browsers add on their own"
            missing = http.get("/v1/nothing", headers=BEARER, auth=None)
            assert missing.json()["error"]["type"] == "invalid_request_error"


_POST = """
import sys, httpx
print(httpx.post(sys.argv[1], content=sys.argv[2], headers={"Content-Type": "application/json"}, timeout=200,
      trust_env=False).status_code)
"""


def _wait(server: Server) -> None:
    with server.http() as http:
        while http.get("/readyz").status_code != 200:
            time.sleep(0.2)
