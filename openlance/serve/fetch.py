"""Media from other hosts: only from those that the operator named, and never from inside the network."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection

import httpx

from openlance.errors import InputError

SECONDS = 30.0
"""For one file, from the look-up of the host to the last byte."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_media_type(content_type: str) -> bool:
    """Whether a Content-Type can be a picture or clip."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith(("image/", "video/")) or kind == "application/octet-stream"


def is_public(address: Address) -> bool:
    """Whether an address lies outside of private, loopback, link-local and other special ranges; of an IPv6
    address that stands for one of IPv4, that one counts."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


async def fetch(
    address: str,
    *,
    hosts: Collection[str],
    most: int,
    seconds: float = SECONDS,
    allowed: Callable[[Address], bool] = is_public,
) -> bytes:
    """The file at an http(s) address, of one of these hosts and of at most so many bytes.

    The host's name is looked up once, every address of it must be allowed, and the connection goes to the one
    that was checked: a name that later resolves to something else gains nothing. Redirects are not followed,
    and no proxy of the environment is used. Raises InputError for everything that hinders it.
    """
    try:
        url = httpx.URL(address)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        if port >= 2**16:
            raise ValueError(f"there is no port {port}")
    except (httpx.InvalidURL, KeyError, ValueError) as error:
        raise InputError(f"the address is malformed ({error})") from error
    host = url.raw_host.decode("ascii")
    if host.lower() not in {name.lower() for name in hosts}:
        named = ", ".join(sorted(hosts)) or "none"
        raise InputError(
            f"media are not fetched from {host[:200]!r} (hosts that are: {named}): send them as data:…"
        )
    try:
        async with asyncio.timeout(seconds):
            target = await _look_up(host, port, allowed)
            return await _get(url, host, target, most)
    except TimeoutError:
        raise InputError(f"{host}: the file did not come within {seconds:g} seconds") from None
    except httpx.HTTPError as error:
        raise InputError(f"{host}: the file cannot be fetched ({type(error).__name__})") from error


async def _look_up(host: str, port: int, allowed: Callable[[Address], bool]) -> Address:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{host}: no such host") from error
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(map(allowed, addresses)):
        raise InputError(f"{host}: its address is not public, so nothing is fetched from it")
    return addresses[0]


async def _get(url: httpx.URL, host: str, target: Address, most: int) -> bytes:
    """The body, from this address; the name stays in the Host header and in the certificate's check."""
    headers = {"Host": url.netloc.decode(), "Accept": "image/*, video/*", "Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
        client.stream(
            "GET", url.copy_with(host=str(target)), headers=headers, extensions={"sni_hostname": host}
        ) as response,
    ):
        _check(host, response, most)
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > most:
                raise _too_large(host, most)
        return bytes(data)


def _check(host: str, response: httpx.Response, most: int) -> None:
    """What the header says. Raises InputError."""
    if response.is_redirect:
        raise InputError(f"{host}: the address leads elsewhere, which is not followed: give the final one")
    if response.status_code != 200:
        raise InputError(f"{host}: answered {response.status_code} instead of the file")
    kind = response.headers.get("content-type", "")
    if not is_media_type(kind):
        raise InputError(f"{host}: sent {kind[:100]!r}, neither a picture nor a clip")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise InputError(f"{host}: sent the file compressed, which was not asked for")
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(host, most)


def _too_large(host: str, most: int) -> InputError:
    return InputError(f"{host}: the file is larger than {most} bytes")
