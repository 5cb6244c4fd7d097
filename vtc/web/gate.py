"""What of the server can be reached from outside, and what the page may reach."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from .body import GONE, Body, Message, Receive
from .line import Line
from .media import MOST_BYTES
from .serve import is_local

Scope = Message
Send = Callable[[Message], Awaitable[None]]

#: The page and its parts, its queue, uploads. Of what else gradio serves nothing is needed here:
#: no files of this machine, no files or pages of others fetched for somebody, no editing.
OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static)/(?!.*\.\.)[\w./@-]+"
    r"|/gradio_api/(queue/(join|data)|run/predict|upload|upload_progress|heartbeat/\w+|startup-events|cancel"
    r"|reset/?|theme\.css|info/?|app_id/?)"
)

UPLOAD, JOIN, LISTEN = (f"/gradio_api/{path}" for path in ("upload", "queue/join", "queue/data"))
FULL = (507, "There is no room for uploads now: old ones are deleted. Try again later.")
#: Bytes of a request: an upload with what is around it, and everything else.
MOST_UPLOADED, MOST_SENT = MOST_BYTES + 2**16, 2**20
#: Bytes of all uploads together, and what a file counts at least, so that many are few in number.
MOST_STORED, LEAST = 2**30, 2**16
#: The name in a `Host` header: an address in brackets, or what stands before the port.
HOST = re.compile(r"\[([0-9a-f:.]+)\](?::\d+)?|([^:\[\]]+)(?::\d+)?", re.I)

#: The browser itself refuses to fetch anything from elsewhere for this page.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """ASGI middleware: answers 404 to every path that is not `OPEN`, refuses requests that are too
    long, come too slowly, or from a page of others, and uploads that the folder has no room for;
    adds `HEADERS`.

    folder: where uploads are stored.
    local: the server listens for this machine alone, so requests must be meant for it: a page from
        elsewhere whose name leads here (DNS rebinding) is refused.
    line: who waits for runs.
    """

    def __init__(self, app: Any, folder: Callable[[], str], local: bool, line: Line) -> None:
        self.app, self._folder, self._local, self._line = app, folder, local, line
        self._received = 0  # bytes of all uploads until now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif self._local and not _meant(scope):
            await self._refuse(send, 403, "Only localhost, 127.0.0.1 and [::1] are served here.")
        elif not _own(scope, self._local):
            await self._refuse(send, 403, "Only the page of this server itself may ask it.")
        elif not OPEN.fullmatch(scope["path"]):
            await self._refuse(send, 404, "There is nothing here.")
        elif _too_long(scope):
            await self._refuse(send, 413, "This is too long, or does not say how long it is.")
        elif scope["path"] == UPLOAD and scope["method"] == "POST":
            await self._upload(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await self._call(scope, receive, send)
        elif scope["path"] == LISTEN:
            await self._listen(scope, receive, send)
        else:
            await self.app(scope, receive, self._with_headers(send))

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes the room that its bytes need as they arrive: none that were only announced."""
        before = self._received
        stored = await asyncio.to_thread(_size, Path(self._folder()))

        taken = 0

        def took(count: int) -> tuple[int, str] | None:
            nonlocal taken
            more = max(LEAST, taken + count) - max(LEAST, taken)  # `LEAST` is paid at the start
            taken += count
            self._received += more
            return FULL if stored + self._received - before > MOST_STORED else None

        if stored + max(LEAST, _length(scope)) > MOST_STORED:
            await self._refuse(send, *FULL)
            return
        body = Body(receive, took)
        self._received += LEAST

        async def sending(message: Message) -> None:
            if body.cut is None:
                await outward(message)

        outward = self._with_headers(send)
        await self.app(scope, body.part, sending)
        if body.cut not in (None, GONE):
            await self._refuse(send, *body.cut)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request with a short body, which is read here."""
        body = Body(receive)
        data = await body.whole()
        if data is None:
            if body.cut not in (None, GONE):
                await self._refuse(send, *body.cut)
            return
        outward, statuses = self._with_headers(send), []

        async def sending(message: Message) -> None:
            statuses.append(message.get("status"))
            await outward(message)

        await self.app(scope, body.again(data), sending)
        if scope["path"] == JOIN and statuses[:1] == [200]:
            self._line.joined(str(json.loads(data)["session_hash"]))

    async def _listen(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The stream of a visitor's results."""
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if not self._line.knows(session):
            await self._refuse(send, 404, "Nothing was asked for in this session.")
            return
        with self._line.listening(session):
            await self.app(scope, receive, self._with_headers(send))

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        return sending

    async def _refuse(self, send: Send, status: int, why: str) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": why.encode()})


def _too_long(scope: Scope) -> bool:
    """Whether a request with a body has too many bytes, or may have."""
    if scope["method"] in ("GET", "HEAD"):
        return False
    most = MOST_UPLOADED if scope["path"] == UPLOAD else MOST_SENT
    return not 0 <= _length(scope) <= most


def _length(scope: Scope) -> int:
    """Bytes of the body, as the request says; -1 where it does not."""
    told = _header(scope, "content-length")
    return int(told) if told.isascii() and told.isdigit() else -1


def _header(scope: Scope, name: str) -> str:
    """Empty where it is missing."""
    return dict(scope["headers"]).get(name.encode(), b"").decode("latin-1")


def _meant(scope: Scope) -> bool:
    """Whether a request names this machine."""
    found = HOST.fullmatch(_header(scope, "host").lower())
    return found is not None and is_local(found[1] or found[2])


def _own(scope: Scope, local: bool) -> bool:
    """Whether a request comes from a page of this server, or from no page. Behind a proxy the name
    is what it passes on, which a page of others cannot send without being asked first."""
    names, origin = [_header(scope, "host")], _header(scope, "origin").lower()
    if not local:
        names.append(_header(scope, "x-forwarded-host").partition(",")[0].strip())
    own = (f"{way}://{name.lower()}" for name in names if name for way in ("http", "https"))
    return not origin or origin in own


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; files may go meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += max(LEAST, os.lstat(os.path.join(path, name)).st_size)
            except FileNotFoundError:
                continue
    return total
