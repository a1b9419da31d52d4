"""The server on Ray Serve, where Ray is installed: a real cluster of one machine."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve")

from ray import serve

from openlance.errors import InputError
from openlance.serve.on_ray import build


@pytest.mark.parametrize(
    "given, said",
    [({}, "api_keys"), ({"open": "yes", "sampler": "x"}, "sampler"), ({"open": "yes", "port": "1"}, "port")],
)
def test_what_cannot_be_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(given)


@pytest.mark.slow
def test_two_replicas_answer_the_real_client() -> None:
    from openai import NotFoundError, OpenAI

    application = build({"open": "yes", "page": "no", "devices": "cpu", "replicas": "2"})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
        serve.run(application)
        client = OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="none", max_retries=60, timeout=200)
        assert client.models.list().data[0].id == "nano"
        asked = {"model": "nano", "prompt": "a red circle on white", "extra_body": {"seed": 1, "steps": 2}}
        first, second = (client.images.generate(**asked).data for _ in range(2))
        assert first and second and first[0].b64_json == second[0].b64_json
        with pytest.raises(NotFoundError):
            client.videos.list()
    finally:
        serve.shutdown()
