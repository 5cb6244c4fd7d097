"""What of the server can be reached from outside, and what the page may reach."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from .media import MOST_BYTES
from .serve import is_local

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: The page and its parts, its queue, uploads. Of what else gradio serves nothing is needed here:
#: no files of this machine, no files or pages of others fetched for somebody, no editing.
OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static)/(?!.*\.\.)[\w./@-]+"
    r"|/gradio_api/(queue/(join|data)|run/predict|upload|upload_progress|heartbeat/\w+|startup-events|cancel"
    r"|reset/?|theme\.css|info/?|app_id/?)"
)

UPLOAD = "/gradio_api/upload"
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
    """ASGI middleware: answers 404 to every path that is not `OPEN` and refuses requests that are
    too long, and uploads when the folder is full, before they are read; adds `HEADERS`.

    folder: where uploads are stored.
    local: the server listens for this machine alone, so requests must be meant for it: a page from
        elsewhere whose name leads here (DNS rebinding) is refused.
    """

    def __init__(self, app: Any, folder: Callable[[], str], local: bool) -> None:
        self.app, self._folder, self._local = app, folder, local
        self._arriving = 0  # bytes of uploads that are being read

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif self._local and not _meant(scope):
            await self._refuse(send, 403, "Only localhost, 127.0.0.1 and [::1] are served here.")
        elif not OPEN.fullmatch(scope["path"]):
            await self._refuse(send, 404, "There is nothing here.")
        elif _too_long(scope):
            await self._refuse(send, 413, "This is too long, or does not say how long it is.")
        elif scope["path"] == UPLOAD and scope["method"] == "POST":
            await self._upload(scope, receive, send)
        else:
            await self.app(scope, receive, self._with_headers(send))

    async def _upload(self, scope: Scope, receive: Any, send: Send) -> None:
        """Where there is room for it next to those that are on their way."""
        length = _length(scope)
        self._arriving += length
        try:
            stored = await asyncio.to_thread(_size, Path(self._folder()))
            if stored + self._arriving > MOST_STORED:
                why = "There is no room for uploads now: old ones are deleted. Try again later."
                await self._refuse(send, 507, why)
            else:
                await self.app(scope, receive, self._with_headers(send))
        finally:
            self._arriving -= length

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: MutableMapping[str, Any]) -> None:
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
    """Whether a request names this machine, and a page of its own as where it comes from."""
    host, origin = _header(scope, "host").lower(), _header(scope, "origin").lower()
    found = HOST.fullmatch(host)
    if found is None or not is_local(found[1] or found[2]):
        return False
    return origin in ("", f"http://{host}", f"https://{host}")


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
