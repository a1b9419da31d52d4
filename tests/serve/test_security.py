"""Who is let in, what is fetched and decoded, and what words may not do."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import struct
import threading
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import address_of, gif, png
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from openlance.errors import InputError
from openlance.model.checkpoint import find_release
from openlance.serve.errors import add_handlers
from openlance.serve.fetch import fetch, is_public
from openlance.serve.media_in import Shown, check_media, read_media
from openlance.serve.security import (
    BodyLimit,
    Keys,
    Local,
    check_access,
    key_hash,
    new_key,
    plain_text,
    read_key_file,
)
from openlance.serve.settings import ServeConfig
from openlance.tokenizer import CONTROL, MARKUP, Tokenizer

CONFIG = ServeConfig()


# -- words ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(find_release("nano", None, frozenset({"und"})).folder)


@pytest.mark.parametrize("token", [*CONTROL, *MARKUP])
def test_no_word_is_a_control_token(tokenizer: Tokenizer, token: str) -> None:
    [forged] = tokenizer.encode(token)
    text = f"say {token}{token} or <{token}, {token[:4]}{token}{token[4:]}"
    assert forged in tokenizer.encode(text)
    ids = tokenizer.encode(plain_text(text))
    added = {tokenizer.encode(name)[0] for name in (*CONTROL, *MARKUP)}
    assert not added & set(ids)
    assert plain_text(text).replace("< ", "<") == text


def test_control_tokens_of_other_checkpoints_are_words_too() -> None:
    assert plain_text("<|extra_0|>") == "< |extra_0|>"


@pytest.mark.parametrize("text", ["a < b | c > d", "<|", "|>", "x <tool> y", "1<|2|>", "日本語 <3", ""])
def test_other_words_stay(text: str) -> None:
    expected = "1< |2|>" if "|2|" in text else text
    assert plain_text(text) == expected
    assert plain_text(plain_text(text)) == plain_text(text)


# -- other sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),  # a name that resolves to this machine
        ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:3000"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "null"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "127.0.0.1", "origin": "http://[bad"}, 403),
    ],
)
def test_a_server_without_keys_answers_no_other_site(headers: dict[str, str], status: int) -> None:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", answer)])
    app.add_middleware(Local)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.get("/", headers=headers)

    assert asyncio.run(ask()).status_code == status


# -- keys ----------------------------------------------------------------------------------------------


def test_a_new_key_and_its_hash() -> None:
    (key, hashed), (other, _) = new_key(), new_key()
    assert hashed == hashlib.sha256(key.encode()).hexdigest() == key_hash(key)
    assert key != other and len(key) > 40


def test_a_file_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the team\n{key_hash('a')}\n\n{key_hash('b')}  # Berta\n")
    assert read_key_file(file) == (key_hash("a"), key_hash("b"))
    file.write_text("# nobody\n")
    with pytest.raises(InputError, match="no hash"):
        read_key_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_key_file(tmp_path / "missing")


def test_only_loopback_is_open_without_keys() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        check_access(ServeConfig(host=host))
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(InputError, match="api-keys"):
            check_access(ServeConfig(host=host))
        check_access(ServeConfig(host=host, api_keys=(key_hash("x"),)))
    with pytest.raises(InputError, match="no SHA-256"):
        check_access(ServeConfig(api_keys=("my-secret-key",)))


def app(*middleware: tuple[type, dict[str, Any]]) -> Starlette:
    """An application that says whose the request is, and how much it sent."""

    async def told(request: Request) -> PlainTextResponse:
        size = sum([len(piece) async for piece in request.stream()])
        return PlainTextResponse(f"{getattr(request.state, 'owner', None)} {size}")

    made = Starlette(routes=[Route("/{path:path}", told, methods=["GET", "POST"])])
    add_handlers(made)  # type: ignore[arg-type]
    for kind, options in middleware:
        made.add_middleware(kind, **options)
    return made


def call(made: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{name}:{password}".encode()).decode()}


def test_keys() -> None:
    made = app((Keys, {"hashes": (key_hash("first"), key_hash("sécond"))}))
    answer = call(made, "GET", "/v1/models", headers={"Authorization": "Bearer first"})
    assert answer.text == f"{key_hash('first')} 0"
    for headers in ({}, {"Authorization": "Bearer firs"}, {"Authorization": "first"}, basic("a", "first")):
        answer = call(made, "GET", "/v1/models", headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/healthz", "/readyz"):
        assert call(made, "GET", path).status_code == 200
    assert call(made, "GET", "/", headers=basic("anyone", "sécond")).status_code == 200
    for headers in ({}, basic("first", ""), basic("a", "b"), {"Authorization": "Basic ÿ".encode("latin-1")}):
        answer = call(made, "GET", "/metrics", headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic")


def test_without_keys_everybody_is_let_in() -> None:
    assert call(app((Keys, {"hashes": ()})), "GET", "/v1/models").text == "None 0"


# -- bodies --------------------------------------------------------------------------------------------


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 10


@pytest.mark.parametrize("sent", [b"x" * 101, "pieces"])
def test_bodies_are_limited(sent: Any) -> None:
    made = app((BodyLimit, {"most": 100}))
    answer = call(made, "POST", "/", content=pieces(11) if sent == "pieces" else sent)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert call(made, "POST", "/", content=pieces(10)).text == "None 100"


# -- media ---------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes whose header says side x side."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_headers_are_looked_at() -> None:
    assert check_media(png(30, 40), CONFIG) == Shown("image", (30, 40), 1)
    assert check_media(gif(5, 32), CONFIG) == Shown("video", (32, 32), 5)


def test_a_clip_is_counted(tmp_path: Path) -> None:
    import numpy as np

    from openlance.data.save import save_video

    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    data = save_video(frames, tmp_path / "clip.mp4", 8).read_bytes()
    assert check_media(data, CONFIG) == Shown("video", (32, 48), 9)
    with pytest.raises(InputError, match="more than 8 frames"):
        check_media(data, ServeConfig(max_input_frames=8))
    with pytest.raises(InputError, match="48x32 pixels"):
        check_media(data, ServeConfig(max_pixels=48 * 32 - 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(50_000), "too many pixels"),
        (bomb(9_000), "at most 40000000"),
        (b"", "empty"),
        (b"hello, I am a picture", "no picture or clip"),
        (png()[:40], "no picture or clip"),
        (b"PK\x03\x04" + bytes(100), "no picture or clip"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no picture or clip"),
        (gif(6), "more than 5 frames"),
    ],
)
def test_what_may_not_be_decoded(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_media(data, ServeConfig(max_input_frames=5), "the picture")


def read(address: str, **settings: Any) -> bytes:
    return asyncio.run(read_media(address, ServeConfig(**settings)))


def test_data_addresses() -> None:
    assert read(address_of(png())) == png()
    assert read(address_of(png(), "Image/PNG; charset=x ").replace("data:", "DATA:")) == png()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("data:image/png;base64,@@@@", "malformed"),
        ("data:image/png;base64,iVBO", "no picture"),
        ("data:image/png;base64,iVB", "malformed"),
        ("data:image/png,abc", "must be"),
        ("data:text/html;base64,AAAA", "neither a picture nor a clip"),
        ("data:image/png;base64", "must be"),
        ("file:///etc/passwd", "data:image/png"),
        ("/etc/passwd", "data:image/png"),
        ("ftp://example.org/a.png", "data:image/png"),
        ("https://example.org/a.png", "not fetched from 'example.org'"),
        ("http://[::1/a.png", "malformed"),
        ("http://example.org:99999/a.png", "malformed"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_media(read(address), CONFIG)


# -- other hosts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:169.254.169.254", "64:ff9b::a01:203", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_addresses_inside(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"])
def test_addresses_outside(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


class Files(BaseHTTPRequestHandler):
    """What another host might answer."""

    def do_GET(self) -> None:
        kind, length, status = "image/png", None, 200
        data = png()
        if self.path == "/page":
            kind = "text/html"
        elif self.path == "/elsewhere":
            status = 302
        elif self.path == "/missing":
            status = 404
        elif self.path == "/large":
            length = 10**9
        elif self.path == "/endless":
            data = bytes(100_000)
        elif self.path == "/host":
            data = str(self.headers["Host"]).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Location", "http://127.0.0.1/secret")
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.path == "/slow":
            threading.Event().wait(2)
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    """host:port of a real web server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"localhost:{web.server_port}"
        web.shutdown()
        thread.join()


def get(address: str, **options: Any) -> bytes:
    given: dict[str, Any] = {"hosts": ("localhost",), "most": 50_000, "allowed": lambda _: True} | options
    return asyncio.run(fetch(address, **given))


def test_a_file_is_fetched_from_the_address_that_was_checked(files: str) -> None:
    seen = []

    def allowed(address: Any) -> bool:
        seen.append(str(address))
        return address.version == 4

    def look(host: str) -> bytes:
        return get(f"http://{host}/host", allowed=allowed)

    try:
        assert look(files) == files.encode()
    except InputError as error:  # where localhost is ::1 too
        assert "not public" in str(error)
    assert seen and set(seen) <= {"127.0.0.1", "::1"}
    assert get(f"http://{files}/a.png") == png()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("page", "neither a picture nor a clip"),
        ("elsewhere", "leads elsewhere"),
        ("missing", "answered 404"),
        ("large", "larger than 50000 bytes"),
        ("endless", "larger than 50000 bytes"),
        ("packed", "compressed"),
        ("slow", "within 0.5 seconds"),
    ],
)
def test_what_is_not_fetched(files: str, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get(f"http://{files}/{path}", seconds=0.5 if path == "slow" else 30)


def test_nothing_is_fetched_from_inside(files: str) -> None:
    with pytest.raises(InputError, match="not public"):
        get(f"http://{files}/a.png", allowed=is_public)
    with pytest.raises(InputError, match=r"not fetched from '127\.0\.0\.1'"):
        get(f"http://{files.replace('localhost', '127.0.0.1')}/a.png")
    with pytest.raises(InputError, match="no such host"):
        get("http://nowhere.invalid/a.png", hosts=("nowhere.invalid",))
    with pytest.raises(InputError, match="cannot be fetched"):
        get(f"https://{files}/a.png")
