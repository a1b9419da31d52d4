"""Who is let in, how much they may send, and what their words may not do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openlance.errors import InputError
from openlance.serve.errors import ApiError, error_response
from openlance.serve.settings import ServeConfig
from openlance.tokenizer import CONTROL, MARKUP

OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that need no key: load balancers ask them."""

DISCARDED = 4 * 2**20
"""Bytes of a body beyond the limit that are taken before it is refused."""

_HASH = re.compile(r"[0-9a-f]{64}")
_NAMES = (re.escape(name[1:]) for name in (*CONTROL, *MARKUP))
_CONTROL = re.compile(rf"<(?=\|[^\s|<>]+\|>|{'|'.join(_NAMES)})")


def plain_text(text: str) -> str:
    """Words of a client in which nothing is a control token of the tokenizer.

    `<|im_end|>` becomes `< |im_end|>`: it reads the same, but ends no turn. To be applied to the words of a
    turn as a whole, since a token may be put together from several parts.
    """
    return _CONTROL.sub("< ", text)


def new_key() -> tuple[str, str]:
    """A random key and its hash."""
    key = f"lance-{secrets.token_urlsafe(32)}"
    return key, key_hash(key)


def key_hash(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are random and long: nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_key_file(path: Path) -> tuple[str, ...]:
    """The hashes in a file, one a line; what follows a # is a comment. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the file of API keys cannot be read ({error})") from error
    hashes = tuple(found for line in lines if (found := line.partition("#")[0].strip()))
    if not hashes:
        raise InputError(f"{path}: holds no hash of an API key: make one with `openlance serve --new-key`")
    return hashes


def check_access(config: ServeConfig) -> None:
    """Raises InputError for hashes that are none, and for a server open to the network without keys."""
    if not 0 <= config.port < 2**16:
        raise InputError(f"--port must lie between 0 and 65535, not {config.port}")
    for given in config.api_keys:
        if not _HASH.fullmatch(given):
            raise InputError(
                f"{given[:8]}… is no SHA-256 of an API key (64 digits 0-9a-f): "
                f"make one with `openlance serve --new-key`"
            )
    if not config.api_keys and not _is_loopback(config.host):
        raise InputError(
            f"--host {config.host} lets the network in: give the hash of an API key with --api-keys "
            f"(`openlance serve --new-key` makes one), or stay on 127.0.0.1"
        )


class Keys:
    """Lets requests through that show a known key, before anything of them is read.

    API clients send `Authorization: Bearer KEY`. Browsers ask for a name (any) and a password (the key) and
    send them as Basic; under /v1 that is not taken, since a browser would add it to what other sites send.
    `request.state.owner` becomes the key's hash, where there are keys.
    """

    def __init__(self, app: ASGIApp, hashes: Collection[str]):
        self.app, self.hashes = app, tuple(hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self.hashes or scope["path"] in OPEN:
            return await self.app(scope, receive, send)  # with no keys, all is everybody's
        basic = not scope["path"].startswith("/v1")
        key = _shown_key(Headers(scope=scope).get("authorization", ""), basic=basic)
        shown = None if key is None else key_hash(key)
        if shown is None or not self._known(shown):
            challenge = 'Basic realm="openlance", charset="UTF-8"' if basic else "Bearer"
            message = "no API key was sent" if shown is None else "the API key is not known"
            error = ApiError(
                401,
                f"{message}: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )
            return await error_response(error)(scope, receive, send)
        scope.setdefault("state", {})["owner"] = shown
        await self.app(scope, receive, send)

    def _known(self, shown: str) -> bool:
        """All hashes are compared, each in constant time."""
        return sum(hmac.compare_digest(shown, known) for known in self.hashes) > 0


class Local:
    """For a server without keys: lets programs of this machine and the server's own page through, not what
    other sites have a browser send.

    A browser says which site asks (`Origin`), and under which name it found the server (`Host`): a site that
    has its own name resolve to this machine is known by the latter.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            if not _from_here(headers.get("host", ""), headers.get("origin")):
                error = ApiError(403, "this server takes requests of this machine only", code="forbidden")
                return await error_response(error)(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies beyond a number of bytes with 413: by their header, or, without one, as they come."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.most:
            await _discard(receive)
            return await error_response(self._error())(scope, receive, send)
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise self._error()
            return message

        await self.app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self.most} bytes: send smaller pictures or clips",
            code="request_too_large",
            headers={"Connection": "close"},  # the rest of the body is not read
        )


async def _discard(receive: Receive) -> None:
    """Take the beginning of a body: a client that is still sending when its connection is closed does not
    read the answer."""
    count, more = 0, True
    while more and count < DISCARDED:
        message = await receive()
        count += len(message.get("body", b""))
        more = message.get("more_body", False)


def _from_here(host: str, origin: str | None) -> bool:
    try:
        name, site = urlsplit(f"//{host}").hostname, host if origin is None else urlsplit(origin).netloc
    except ValueError:  # no address at all
        return False
    return _is_loopback(name or "") and site == host


def _shown_key(header: str, *, basic: bool) -> str | None:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if basic and scheme.lower() == "basic":
        try:
            _, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except ValueError:  # no base64, no UTF-8, or not even ASCII
            return None
        return password or None
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
