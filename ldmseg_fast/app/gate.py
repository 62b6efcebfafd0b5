"""Stands before the web app: who may come in, how much they may send, and when a visitor has left."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import re
import shutil
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ldmseg_fast.app.limits import Limits
from ldmseg_fast.files import real_path

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 8 * 2**20  # bytes of a request that uploads no file
UPLOADS = 10  # files of the largest size that one upload may have
FREE = 256 * 2**20  # bytes that the disk keeps beside an upload
WRONG = 0.5  # seconds that a wrong password waits
OPEN = ("/health",)  # paths without a password
_STREAM = re.compile(r"/gradio_api/(?:call/(?:v2/)?[^/]+/([0-9a-f]+)|queue/data)")
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """Wraps an ASGI app (https://asgi.readthedocs.io/en/latest/specs/www.html).

    Args:
        app: FastAPI's, with gradio's in it.
        limits: hear of visitors who come and leave, and count what is turned away.
        folder: of the uploads.
        check: is given the path and the JSON of a POST, and says in a line what is wrong with it.
        local: whether only programs of this machine are to come in. A browser is one, whose pages may be of any site:
            then `Host` is to be an address or localhost, or a site whose name leads to this machine could read all.
        auth: "USER:PASSWORD" that HTTP's Basic authentication asks for; None: everybody may come in.
        forget: is told the id of a request of the API whose connection has closed.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        folder: Path,
        auth: str | None = None,
        forget: Callable[[str], None] = lambda event: None,
        *,
        check: Callable[[str, Any], str | None] = lambda path, body: None,
        local: bool = False,
    ) -> None:
        self.app, self.limits, self.folder, self.forget = app, limits, folder, forget
        self.check, self.local = check, local
        self._auth = None if auth is None else auth.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self._auth is not None and not self._may_enter(scope):
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path not in OPEN and not self._may_enter(scope):
            await asyncio.sleep(WRONG)
            self.limits.metrics.rejected("auth")
            await _answer(send, 401, "a user name and a password are needed", ((b"www-authenticate", b"Basic"),))
            return
        if refusal := self._of_another_site(scope) or self._refusal(scope):
            await _answer(send, *refusal)
            return
        if scope["method"] == "POST" and not path.startswith("/gradio_api/upload"):
            body = await _body(receive)
            if body is None:
                await _answer(send, 413, f"over {MAX_BODY} bytes were sent")
                return
            if refusal := self._body_refusal(path, body):
                await _answer(send, *refusal)
                return
            if path == "/gradio_api/cancel":
                self._cancel(body)
            receive = _again(body, receive)
        await self._watched(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs a request; where a visitor waits for results in it, tells when they come and leave."""
        visitor = _visitor_of(scope)
        finished = gone = False

        async def hear() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def watch(message: Message) -> None:
            nonlocal finished
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
                if message["status"] == 503:
                    self.limits.metrics.rejected("queue")
                elif message["status"] == 413:
                    self.limits.metrics.rejected("upload")
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                finished = True
            await send(message)

        if visitor is not None:
            self.limits.arrive(visitor)
        try:
            await self.app(scope, hear, watch)
        except Exception as error:
            if gone and type(error).__name__ == "ClientDisconnect":  # Starlette's, in the middle of an upload
                return
            if not isinstance(error, RuntimeError) or "response already started" not in str(error):
                raise
            with contextlib.suppress(RuntimeError):  # gradio's answer to an id that is not known
                await send({"type": "http.response.body", "body": b""})
        finally:
            if visitor is not None:
                self.limits.leave(visitor, finished)
                if _STREAM.fullmatch(scope["path"])[1] and finished:  # type: ignore[index]
                    self.forget(visitor)

    def _may_enter(self, scope: Scope) -> bool:
        if self._auth is None:
            return True
        kind, _, given = _header(scope, b"authorization").partition(" ")
        try:
            content = base64.b64decode(given.strip(), validate=True) if kind.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            content = b""
        return hmac.compare_digest(content, self._auth)

    def _of_another_site(self, scope: Scope) -> tuple[int, str] | None:
        """Refuses what a page of another site sends through the browser of somebody who may come in."""
        refusal = None
        if scope["method"] == "POST" and _header(scope, b"sec-fetch-site") == "cross-site":
            refusal = 403, "a page of another site sent this: open the app itself"
        elif self.local and not _is_local(host := _header(scope, b"host")):
            refusal = (
                403,
                (
                    f"Host: {host:.80} is no address of this machine: open http://127.0.0.1 with the app's port. A "
                    "server before the app sends Host: 127.0.0.1, or the app asks for a password by --auth"
                ),
            )
        if refusal:
            self.limits.metrics.rejected("site")
        return refusal

    def _body_refusal(self, path: str, body: bytes) -> tuple[int, str] | None:
        if not body.strip():
            return None
        try:
            value = json.loads(body)  # always: JSON may write "path" with escapes, and in UTF-16
        except (ValueError, RecursionError):
            return 400, "no JSON"
        refusal = _file_refusal(value, self.folder)
        if refusal is None and (wrong := self.check(path, value)) is not None:
            refusal = 400, wrong
        return refusal

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if scope["method"] != "POST":
            return None
        length = _header(scope, b"content-length")
        size, upload = int(length) if length.isdigit() else 0, scope["path"].startswith("/gradio_api/upload")
        if upload and not length.isdigit():  # or one upload without a length could fill the disk
            return 411, "an upload says its length in Content-Length"
        most = UPLOADS * self.limits.max_upload if upload else MAX_BODY
        if size > most:
            self.limits.metrics.rejected("upload")
            return 413, f"{size} bytes: this app takes {most} in one request"
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            free = 0
        if free < size + FREE:
            self.limits.metrics.rejected("disk")
            return 507, "the disk of this machine is full: try again later, or tell the one who runs this app"
        return None

    def _cancel(self, body: bytes) -> None:
        """Ends the work of a request that gradio is asked to cancel; gradio itself lets a function run to its end."""
        try:
            event = json.loads(body)["event_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(event, str):
            self.limits.cancel_event(event)


def _visitor_of(scope: Scope) -> str | None:
    """Finds whose results a request waits for: the session, or the id of a request without one."""
    found = _STREAM.fullmatch(scope["path"])
    if found is None or scope["method"] != "GET":
        return None
    return found[1] or next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), None)


def _is_local(host: str) -> bool:
    """Tells whether a Host header is an address or localhost; no other machine's name server leads either here."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _file_refusal(body: Any, folder: Path) -> tuple[int, str] | None:
    """Refuses files that lie elsewhere: gradio would fetch them from the network, or copy them from this machine."""
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and re.match(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*:/", path):
                return 400, "upload the file itself: this app fetches nothing from the network"
            if isinstance(path, str) and "meta" in value and not _is_upload(path, folder):
                return 400, "no such upload, or it was dropped after some time: upload the file again"
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return None


def _is_upload(path: str, folder: Path) -> bool:
    try:
        real = real_path(path)
        return real.is_relative_to(real_path(folder)) and real.is_file()
    except (ValueError, OSError):  # a null character, a name that is too long
        return False


async def _body(receive: Receive) -> bytes | None:
    """Reads a request's body; None where it is longer than MAX_BODY."""
    parts, length = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read once more; afterwards what `receive` gives."""
    told = False

    async def give() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


async def _answer(send: Send, status: int, text: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    content = json.dumps({"detail": text}).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": content})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")
