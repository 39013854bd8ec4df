"""Guard of a table's links, in the processes of the program that fetches them: http(s) to public addresses alone, in bounded time and size.

The table is a stranger's, and so are the answers. Python imports a module of this name when it starts; `ldm.data.curation.fetch` puts this
folder on the path of the program, whose environment is its own, and says by LDM_LINK_GUARD what is allowed. Standard library only.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import os
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

VARIABLE = "LDM_LINK_GUARD"  # JSON: private (bool), seconds and bytes of a link, mark (a file that is written once the guard stands)
_PIECE = 2**16
_here = threading.local()


def is_public(place: str) -> bool:
    """Whether an address is one of the public network, the addresses within IPv6 addresses included."""
    address = ipaddress.ip_address(place.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def _refuse_private(host: str, places: Any) -> None:
    for place in places:
        if not is_public(place[4][0]):
            raise urllib.error.URLError(f"refused: {host} is {place[4][0]}, not a public address (--allow-private)")


class _Call:
    """One link: its end in time, and the sockets that it has opened, redirects and all."""

    def __init__(self, rules: dict[str, Any]) -> None:
        self.rules, self.sockets, self.expired = rules, [], False  # type: ignore[var-annotated]
        self.timer = threading.Timer(rules["seconds"], self._expire)
        self.timer.daemon = True
        self.timer.start()

    def connect(self, address: tuple[str, int], timeout: Any = None, source: Any = None, **more: Any) -> socket.socket:
        """As socket.create_connection, to the addresses that were looked at and no others."""
        host, port = address
        places = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        if not self.rules["private"] and host not in _proxies():
            _refuse_private(host, places)
        problem: Exception = OSError(f"{host}: no address")
        for place in places:
            if self.expired:
                break
            try:
                opened = socket.create_connection((str(place[4][0]), int(place[4][1])), timeout, source)
            except OSError as error:
                problem = error
                continue
            self.sockets.append(socket.socket(fileno=os.dup(opened.fileno())))  # TLS takes the other one over
            return opened
        raise problem

    def _expire(self) -> None:
        self.expired = True
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The link is done."""
        self.timer.cancel()
        for each in self.sockets:
            each.close()


def _proxies() -> set[str]:
    return {urllib.parse.urlsplit(url).hostname or "" for url in urllib.request.getproxies().values()}


class _Http(http.client.HTTPConnection):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._create_connection = _here.call.connect


class _Https(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._create_connection = _here.call.connect


def _check_behind_proxy(request: urllib.request.Request) -> None:
    """A proxy connects by itself: where this machine knows the name too, it must be a public one."""
    host = urllib.parse.urlsplit(request.full_url).hostname or ""
    if request.host.rpartition(":")[0] in _proxies() and not _here.call.rules["private"]:
        with suppress(OSError):
            _refuse_private(host, socket.getaddrinfo(host, None))


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        """As the standard handler's, by a guarded connection."""
        _check_behind_proxy(request)
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(context=context)
        self._own = context

    def https_open(self, request: urllib.request.Request) -> Any:
        """As the standard handler's, by a guarded connection."""
        _check_behind_proxy(request)
        return self.do_open(_Https, request, context=self._own)


class _Answer(io.BytesIO):
    """What came of a link, read whole."""

    def __init__(self, response: Any, body: bytes) -> None:
        super().__init__(body)
        self.headers, self.url, self.status, self.code = response.headers, response.url, response.status, response.status

    def info(self) -> Any:
        """The headers."""
        return self.headers

    def geturl(self) -> str:
        """Where the link led."""
        return str(self.url)


def _fetch(rules: dict[str, Any], url: Any, data: Any, timeout: Any, context: Any) -> _Answer:
    opener = urllib.request.OpenerDirector()
    handlers = (urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPDefaultErrorHandler)
    for kind in (*handlers, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor):
        opener.add_handler(kind())
    opener.add_handler(_HttpHandler())
    opener.add_handler(_HttpsHandler(context))
    call = _here.call = _Call(rules)
    try:
        with opener.open(url, data, timeout) as response:
            parts, count = [], 0
            while part := response.read1(_PIECE):
                parts.append(part)
                count += len(part)
                if count > rules["bytes"]:
                    raise urllib.error.URLError(f"refused: more than {rules['bytes']} bytes (--max-mb)")
            if call.expired:
                raise TimeoutError
            return _Answer(response, b"".join(parts))
    except Exception as error:
        if call.expired:
            raise urllib.error.URLError(f"refused: not done within {rules['seconds']} s (--seconds)") from error
        raise
    finally:
        call.close()


def install(rules: dict[str, Any]) -> None:
    """Have urllib.request.urlopen fetch as `rules` allow, in this process."""

    def urlopen(url: Any, data: Any = None, timeout: Any = socket.getdefaulttimeout(), *, context: Any = None, **more: Any) -> _Answer:
        return _fetch(rules, url, data, timeout, context)

    urllib.request.urlopen = urlopen  # type: ignore[assignment]
    with open(rules["mark"], "w"):
        pass


if VARIABLE in os.environ:
    install(json.loads(os.environ[VARIABLE]))
