"""Requests to servers that may misbehave: http and https alone, bounded in time and in bytes."""

import http.client
import io
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, UnknownHandler

from .checks import cut

SCHEMES = ("http", "https")
MOST_REDIRECTS = 5
_MOVED = {301, 302, 303, 307, 308}
_BLOCK = 2**16
_MOST_OF_AN_ERROR = 2**16  # bytes that are read of an answer other than 2xx
_USER = re.compile(r"(?<=//)[^/?#]*@")


class WebError(OSError):
    """A server gave no usable answer, for the reason that the message tells; it does not name the URL."""


@dataclass(frozen=True)
class Answer:
    """A server's answer, and the address from which it came."""

    url: str
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


def masked(url: str) -> str:
    """Return an address for a message: short, without its user's name and password."""
    return cut(_USER.sub("***@", url))


def check_url(name: str, url: str) -> None:
    """Refuse what is no address of a web server; a ValueError says why."""
    rule = f"{name}='{masked(url)}' must be an address such as 'http://localhost:8000/v1'"
    if re.search(r"[\x00-\x20\x7f]", url):
        raise ValueError(f"{rule}, without spaces and control characters; %20 stands for a space")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:  # of urlsplit, its port and the encoding of names
        raise ValueError(f"{rule}, with a valid host and port") from error
    if parts.scheme not in SCHEMES or not host:
        raise ValueError(f"{rule}, with a host on http or https")
    if "@" in parts.netloc:
        raise ValueError(f"{rule}, without a user's name and password")


def fetch(
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    silence: float,
    total: float,
    most: int,
    redirects: int = MOST_REDIRECTS,
    direct: bool = False,
) -> Answer:
    """Ask a server, by POST if there is a body, and return its answer, whatever its status.

    Args:
        url: address, checked by `check_url`.
        silence: seconds without a byte, also while connecting, after which the server is given up.
        total: seconds for everything, redirects included.
        most: bytes that an answer may have. Of one whose status is no success, a part is read.
        redirects: how many are followed, to addresses of http and https alone; headers go along.
        direct: whether no proxy is used, as for addresses of this machine.

    Raises: TimeoutError: it takes too long. WebError: the answer is too large or leads elsewhere.
        OSError, http.client.HTTPException: what else connecting and reading raise.
    """
    end = time.monotonic() + total
    for _ in range(redirects + 1):
        request = Request(_ascii(url), body, {"User-Agent": "wan22", **(headers or {})})
        answer = _ask(request, url, silence, end, most, direct)
        target = answer.headers.get("location")
        if answer.status not in _MOVED or not redirects:
            return answer
        if not target:
            raise WebError("it is redirected to nowhere")
        try:
            url = urljoin(url, target)
            check_url("the redirect", url)
        except ValueError as error:
            raise WebError(
                f"it is redirected to '{masked(target)}', which is not on http or https"
            ) from error
    raise WebError(f"it is redirected more than {redirects} times")


def _ask(request: Request, url: str, silence: float, end: float, most: int, direct: bool) -> Answer:
    opener = OpenerDirector()  # of these handlers alone: none for files or ftp, none that follows redirects
    proxies = ProxyHandler({}) if direct or _is_local(urlsplit(url).hostname or "") else ProxyHandler()
    for handler in (proxies, UnknownHandler(), _Web(silence, end)):
        opener.add_handler(handler)
    try:
        response: Any = opener.open(request, timeout=min(silence, max(end - time.monotonic(), 0.001)))
    except URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from None
    with response:
        success = 200 <= response.status < 300
        length = response.headers.get("content-length", "")
        if success and length.isdecimal() and (len(length) > 18 or int(length) > most):
            raise WebError(f"the answer has {cut(length)} bytes; at most {most} are read")
        content = _read(response, most if success else min(most, _MOST_OF_AN_ERROR), success)
        found = {name.lower(): value for name, value in response.headers.items()}
        return Answer(url, response.status, response.reason, found, content)


def _read(response: Any, most: int, whole: bool) -> bytes:
    """Return an answer's body; one of more than `most` bytes is an error, or cut off unless `whole`."""
    content = bytearray()
    while len(content) <= most and (block := response.read(_BLOCK)):
        content += block
    if len(content) > most and whole:
        raise WebError(f"the answer has more than {most} bytes")
    if whole and response.length:  # reading in blocks, http.client does not tell
        raise WebError(f"the answer breaks off {response.length} bytes before its end")
    return bytes(content[:most])


def _ascii(url: str) -> str:
    """Return an address as requests carry it, in ASCII."""
    parts = urlsplit(url)
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    reserved = "%/:=&?~#+!$,;'@()*[]"
    path, query = quote(parts.path, reserved), quote(parts.query, reserved)
    return urlunsplit((parts.scheme, host, path, query, ""))


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- reading within limits of time ----


class _Timed(io.RawIOBase):
    """What a socket receives, with a limit for each wait and one for all of it."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, silence: float, end: float) -> None:
        self._raw, self._sock, self._silence, self._end = raw, sock, silence, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(min(self._silence, left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read within limits of time, from its first line on."""

    def __init__(self, sock: socket.socket, *given: Any, silence: float, end: float, **options: Any) -> None:
        super().__init__(sock, *given, **options)
        raw: Any = self.fp.detach()
        self.fp = io.BufferedReader(_Timed(raw, sock, silence, end))


class _Web(HTTPHandler, HTTPSHandler):
    """Connects to servers, and reads their answers within limits of time."""

    def __init__(self, silence: float, end: float) -> None:
        super().__init__()
        self._limits = silence, end

    def http_open(self, request: Request) -> Any:
        return self.do_open(_timed(http.client.HTTPConnection, *self._limits), request)

    def https_open(self, request: Request) -> Any:
        return self.do_open(_timed(http.client.HTTPSConnection, *self._limits), request)


def _timed(kind: Callable[..., Any], silence: float, end: float) -> Any:
    def connection(host: str, **options: Any) -> Any:
        made = kind(host, **options)
        made.response_class = partial(_Response, silence=silence, end=end)
        return made

    return connection
