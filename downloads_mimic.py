"""Downloads an `http(s)` address, within limits on size, time and hosts.

Whoever writes an address into a table makes the machine that reads it send a request. So the IP addresses of a host
are checked before anything is sent, and so is each redirect. Knows nothing of images.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import threading
import urllib.parse
import urllib.request
from typing import Any

from .errors_mimic import MimicImageError
from .texts_mimic import shortened

MAX_BYTES = 64 * 2**20
MAX_SECONDS = 20.0
_CHUNK = 2**16
# What RFC 3986 lets stand in a path and in a query; `%` stays too, for it mostly begins what is escaped already.
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"
_QUERY_CHARACTERS = _PATH_CHARACTERS + "?[]"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(url: str, private: bool = False) -> bytes:
    """The bytes at an address, 64 MiB and 20 seconds at most, from the first look-up to the last byte.

    Args:
        url: an `http` or `https` address. As browsers do, a space or a letter outside ASCII is escaped.
        private: whether the address may be of this machine or of a private network. A public address never leads to a
            private one, whatever it redirects to.

    Raises:
        MimicImageError: if it cannot be had, for whatever reason.
    """
    shown = shortened(url)
    deadline = _Deadline(MAX_SECONDS)
    try:
        opener = urllib.request.OpenerDirector()
        guard = _Guard(deadline, private)
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(guard),
            _HttpHandler(guard),
            _HttpsHandler(guard),
        ):
            opener.add_handler(handler)
        with deadline:
            request = urllib.request.Request(as_browsers_send(url), headers={"User-Agent": "mimic-el"})
            with opener.open(request, timeout=MAX_SECONDS) as response:
                return _read(response, shown, deadline)
    except MimicImageError:
        raise
    except Exception as error:  # http.client, ssl, codecs and others have errors of their own
        if deadline.passed:
            raise MimicImageError(
                f"The image {shown} cannot be downloaded: it takes more than {MAX_SECONDS:g} s."
            ) from error
        raise MimicImageError(
            f"The image {shown} cannot be downloaded: {shortened(str(error) or repr(error))}"
        ) from error


def as_browsers_send(url: str) -> str:
    """An address with what may not stand in one escaped: spaces, letters outside ASCII, in the host as IDNA.

    Raises:
        ValueError: if it is not an `http(s)` address with a host.
    """
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is not an http(s) address with a host")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    place = f"[{host}]" if ":" in host else host
    if parts.port is not None:
        place = f"{place}:{parts.port}"
    path = urllib.parse.quote(parts.path, safe=_PATH_CHARACTERS)
    query = urllib.parse.quote(parts.query, safe=_QUERY_CHARACTERS)
    return urllib.parse.urlunsplit((parts.scheme, place, path, query, ""))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; also of those that stand for an IPv4 address in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Deadline:
    """Ends a connection when its time is over: the time limit of a socket is one of each read, not of all."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._watched: list[socket.socket] = []

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()
        with self._lock:
            for watched in self._watched:
                watched.close()
            self._watched.clear()

    def watch(self, connected: socket.socket) -> None:
        # A duplicate: TLS takes the socket itself over.
        with self._lock:
            self._watched.append(connected.dup())

    def check(self) -> None:
        if self.passed:
            raise TimeoutError

    def _pass(self) -> None:
        self.passed = True
        with self._lock:
            for watched in self._watched:
                with contextlib.suppress(OSError):
                    watched.shutdown(socket.SHUT_RDWR)


class _Guard:
    """What every connection of a download asks: which addresses a host has, and whether they may be connected to."""

    def __init__(self, deadline: _Deadline, private: bool) -> None:
        self.deadline = deadline
        self.private = private

    def connect(self, host: str, port: int, timeout: float | None) -> socket.socket:
        """A connection to a host, at an address that was checked."""
        self.deadline.check()
        problem: Exception = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in self.addresses(host, port):
            connected = socket.socket(family, kind, protocol)
            try:
                connected.settimeout(timeout)
                self.deadline.watch(connected)
                connected.connect(address)
            except OSError as error:
                connected.close()
                problem = error
            else:
                return connected
            self.deadline.check()
        raise problem

    def addresses(self, host: str, port: int) -> list[Any]:
        """What `getaddrinfo` gives. Once a public host was asked, private ones are not any more."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        public = all(is_public(str(entry[4][0])) for entry in found)
        if not public and not self.private:
            raise MimicImageError(
                f"The image is at {shortened(host)}, an address of this machine or of a private network, which is not "
                'read here. To read it, pass allow_urls="private".'
            )
        self.private = self.private and not public
        return found

    def check_behind_proxy(self, request: urllib.request.Request) -> None:
        """The proxy looks names up; what this machine knows of them is checked all the same."""
        with contextlib.suppress(socket.gaierror):
            self.addresses(urllib.parse.urlsplit(request.full_url).hostname or "", 0)


class _Connection(http.client.HTTPConnection):
    """Connects through the guard; to a proxy as it is configured."""

    guard: _Guard
    proxied = False

    def connect(self) -> None:
        if self.proxied:
            super().connect()
            self.guard.deadline.watch(self.sock)
        else:
            self.sock = self.guard.connect(self.host, self.port, self.timeout)


class _TlsConnection(http.client.HTTPSConnection, _Connection):
    """The same, with TLS."""


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self.guard = guard

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_connection_for(_Connection, self.guard, request), request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self.guard = guard

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_connection_for(_TlsConnection, self.guard, request), request)


def _connection_for(kind: type[_Connection], guard: _Guard, request: urllib.request.Request) -> Any:
    """What makes the connection of a request."""
    proxied = request.has_proxy() or bool(getattr(request, "_tunnel_host", None))
    if proxied:
        guard.check_behind_proxy(request)

    def make(host: str, **options: Any) -> _Connection:
        connection = kind(host, **options)
        connection.guard, connection.proxied = guard, proxied
        return connection

    return make


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other `http(s)` addresses only; the guard sees each."""

    def __init__(self, guard: _Guard) -> None:
        self.guard = guard

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.guard.deadline.check()
        try:
            newurl = as_browsers_send(newurl)
        except ValueError as error:
            raise MimicImageError(
                f"The image {shortened(req.full_url)} redirects to {shortened(newurl)}, which is not http(s)."
            ) from error
        fp.read = lambda *_: b""  # what follows would read the body, however long
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(response: Any, shown: str, deadline: _Deadline) -> bytes:
    """What a response holds, a piece at a time: its limit is not to be the memory that is asked for."""
    data = bytearray()
    while piece := response.read1(_CHUNK):
        data += piece
        deadline.check()
        if len(data) > MAX_BYTES:
            raise MimicImageError(f"The image {shown} is larger than {MAX_BYTES >> 20} MiB.")
    deadline.check()
    if response.length:  # what the header promised and did not come
        raise OSError(f"{response.length:,} bytes of it are missing")
    return bytes(data)


__all__ = ["as_browsers_send", "download", "is_public"]
