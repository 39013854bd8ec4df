"""HTTP guard of the page: who may come in, which routes there are, and how much may be uploaded."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import html
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from ldm.data.images import Rejected, probe

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

USER, ENTRANCE = "ldm_user", "ldm_entrance"  # cookies: who it is, and that they showed the token
API = "/gradio_api/"
# The only paths that exist, besides files. Gradio has more: proxies, URLs that the server fetches, calls past the queue.
READ = re.compile(
    r"/|/api/(?:models|schema|gallery\.zip)|/config/?|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/(?:assets|static|svelte)/[\w./@+-]*|"
    rf"{API}(?:theme\.css|info/?|app_id/?|startup-events|queue/data|upload_progress|login_check|heartbeat/[\w-]+)"
)
WRITE = re.compile(rf"/api/draw|{API}(?:queue/join/?|upload/?|component_server/?|cancel|reset/?)")
FILE = f"{API}file="
BODY_BYTES = 2**20  # of a request that carries no picture
CALL, CALL_BYTES, CALLS = "/api/draw", 2**24, 8  # a call may carry pictures; so many are read at a time
JOIN = re.compile(rf"{API}queue/join/?")
CARRIES = re.compile(rf"{API}(?:upload|component_server)/?")
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' blob: data:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "form-action 'self'",
    )
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "same-origin"}
DOOR = """<!doctype html><meta charset="utf-8"><title>ldm</title><meta name="viewport" content="width=device-width">
<style>body{{font:16px system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}}
form{{display:flex;gap:8px}}input,button{{font:inherit;padding:8px 12px}}p{{color:#a33}}</style>
<form method="get" action="/"><input type="password" name="token" placeholder="token" autofocus autocomplete="current-password">
<button>Enter</button></form><p>{said}</p>"""


class Refused(Exception):
    """A request that is not let through."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Guard:
    """An ASGI application around another one.

    It lets in whoever shows the token, where there is one; else only requests that were sent to this machine by its own
    names, so that a foreign page cannot reach it by a name that leads here. It knows a user by a cookie, refuses every path but
    those of READ, WRITE and files below `files`, bodies that are too long, and file names from clients that lie elsewhere.

    Args:
        app: what is guarded.
        files: the folder of uploads and results.
        token: that users must show; None: nobody must.
        largest: bytes of a body that carries a picture.
        pixels: of a picture that a request names.
        functions: how many values each function of the page takes, by its number.
    """

    def __init__(
        self,
        app: App,
        files: Path,
        token: str | None = None,
        largest: int = 2**26,
        pixels: int = 2**24,
        functions: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.functions = functions
        self.app, self.files, self.token, self.largest, self.pixels = app, files.resolve(), token, largest, pixels
        self._calls = asyncio.Semaphore(CALLS)
        self._entrance = secrets.token_urlsafe(24)  # what the cookie says of those who showed the token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        ended = False

        async def until_end() -> Message:
            nonlocal ended
            message = await receive()
            ended = not message.get("more_body", False)
            return message

        async def refuse(message: Message) -> None:
            if message["type"] == "http.response.start":  # what is on its way already is read, or the answer might get lost
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(drain(), 0.5)
            await send(message)

        async def drain() -> None:
            seen = 0
            while not ended and seen < BODY_BYTES:
                seen += len((await until_end()).get("body", b""))

        try:
            if self.token is not None and not self._known(scope):
                await self._door(scope, refuse)
            else:
                await self._request(scope, until_end, send)
        except Refused as refused:
            await answer(refuse, refused.status, f"{refused}\n")

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        cookies = _cookies(headers.get("cookie", ""))
        method, path = scope["method"], scope["path"]
        self._same_site(headers)
        self._open(method, path)
        user, cookie = cookies.get(USER, ""), None
        if not re.fullmatch(r"[\w-]{16,64}", user):
            user = secrets.token_urlsafe(16)
            cookie = _cookie(USER, user)
            others = [(name, value) for name, value in scope["headers"] if name.lower() != b"cookie"]
            told = "; ".join(filter(None, [headers.get("cookie", ""), f"{USER}={user}"]))
            scope = {**scope, "headers": [*others, (b"cookie", told.encode("latin-1"))]}
        exchange = Exchange(receive, send, self._most(path, headers), cookie)
        if CARRIES.fullmatch(path) is None:
            async with self._calls if path == CALL else contextlib.nullcontext():
                exchange.receive = await self._read(exchange.receive, path)
        await exchange.through(self.app, scope)

    def _same_site(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.token is None and urlsplit(f"//{host}").hostname not in OWN_HOSTS:
            raise Refused(403, "this page answers to localhost alone; start `ldm demo` with --token to let others in")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host:
            raise Refused(403, "a request from another site")

    def _known(self, scope: Scope) -> bool:
        headers = _headers(scope)
        cookies = _cookies(headers.get("cookie", ""))
        told = headers.get("authorization", "").removeprefix("Bearer ")
        return _equal(cookies.get(ENTRANCE, ""), self._entrance) or _equal(told, self.token or "")

    async def _door(self, scope: Scope, send: Send) -> None:
        """Ask for the token; whoever brings it gets a cookie and an address without it."""
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and _equal(given, self.token or ""):
            headers = [(b"location", b"/"), (b"set-cookie", _cookie(ENTRANCE, self._entrance))]
            await answer(send, 303, "", headers)
            return
        said = html.escape("This is not the token." if given else "")
        await answer(send, 401, DOOR.format(said=said), [(b"content-type", b"text/html; charset=utf-8")])

    def _open(self, method: str, path: str) -> None:
        if method in ("GET", "HEAD") and path.startswith(FILE):
            self._inside(path[len(FILE) :])
        elif not (method in ("GET", "HEAD") and READ.fullmatch(path) and ".." not in path) and not (
            method == "POST" and WRITE.fullmatch(path)
        ):
            raise Refused(404, "no such page")

    def _inside(self, name: object) -> Path:
        """The file that is meant; whatever is not a file of ours is refused."""
        try:
            found = Path(str(name)).resolve(strict=True) if isinstance(name, str) and "\0" not in name else None
        except (OSError, RuntimeError, ValueError):
            found = None
        if found is None or not found.is_file() or self.files not in found.parents:
            raise Refused(404, "no such file")
        return found

    def _most(self, path: str, headers: dict[str, str]) -> int:
        """Bytes that a body may have."""
        most = self.largest if CARRIES.fullmatch(path) else CALL_BYTES if path == CALL else BODY_BYTES
        told = headers.get("content-length", "0")
        if not (told.isascii() and told.isdigit() and len(told) < 20) or int(told) > most:
            raise Refused(413, f"too large: at most {most >> 20} MB")
        return most

    async def _read(self, receive: Receive, path: str) -> Receive:
        """A body that carries no picture is read at once and looked through for file names."""
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "gone")
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        if body:
            try:
                said = json.loads(body)
                json.dumps(said, ensure_ascii=False).encode()  # half characters
                self._look_through(said)
                if JOIN.fullmatch(path):
                    self._callable(said)
            except (ValueError, RecursionError):
                raise Refused(400, "not JSON") from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again

    def _small(self, path: Path) -> None:
        """Refuse a picture whose pixels would fill the memory, before anyone decodes it."""
        try:
            probe(path, self.pixels)
        except Rejected as error:
            if error.reason == "too many pixels":
                raise Refused(413, str(error)) from None
        except OSError:
            raise Refused(404, "no such file") from None

    def _callable(self, said: Any) -> None:
        """Refuse a call of a function that the page has not, or with fewer values than it takes."""
        number = said.get("fn_index") if isinstance(said, dict) else None
        if type(number) is not int or number not in self.functions:
            raise Refused(400, "no such function")
        if not isinstance(said.get("data"), list) or len(said["data"]) < self.functions[number]:
            raise Refused(400, f"this function takes {self.functions[number]} values")

    def _look_through(self, value: Any) -> None:
        """Refuse file names that lie elsewhere, and addresses, wherever they stand."""
        if isinstance(value, dict):
            if "path" in value and (value["path"] is not None or value.get("url")):
                self._small(self._inside(value["path"]))
            for part in value.values():
                self._look_through(part)
        elif isinstance(value, list):
            for part in value:
                self._look_through(part)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


class Exchange:
    """One request and its response, on their way through the guard: bytes are counted, headers added."""

    def __init__(self, receive: Receive, send: Send, most: int, cookie: bytes | None) -> None:
        self._receive, self._send, self.most, self.cookie = receive, send, most, cookie
        self.receive: Receive = self.counted
        self.seen, self.started = 0, False
        self.refused: Refused | None = None

    async def counted(self) -> Message:
        """The next part of the body."""
        message = await self._receive()
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            self.refused = Refused(413, f"too large: at most {self.most >> 20} MB")
            raise self.refused
        return message

    async def send(self, message: Message) -> None:
        """The next part of the response; what an application says of a request that was refused meanwhile is dropped."""
        if message["type"] == "http.response.start":
            if self.refused is not None:
                return
            self.started = True
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            own = [(b"set-cookie", self.cookie)] if self.cookie else []
            if message["status"] >= 400:  # and read no more of it
                own.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", []), *more, *own]}
        if self.started:
            await self._send(message)

    async def through(self, app: App, scope: Scope) -> None:
        """Let the application answer.

        Raises:
            Refused: if the body was too long.
        """
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            if self.refused is None or self.started:
                raise
        if self.refused is not None and not self.started:
            raise self.refused


def _cookie(name: str, value: str) -> bytes:
    return f"{name}={quote(value)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000".encode()


def _cookies(text: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(text).items()}
    except CookieError:
        return {}


def _equal(given: str, wanted: str) -> bool:
    return bool(wanted) and hmac.compare_digest(given.encode(), wanted.encode())


async def answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """A whole response."""
    kind = [] if headers and any(name == b"content-type" for name, _ in headers) else [(b"content-type", b"text/plain; charset=utf-8")]
    safe = [(b"content-security-policy", b"default-src 'self'; style-src 'unsafe-inline'"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *safe, *(headers or [])]})
    await send({"type": "http.response.body", "body": text.encode()})
