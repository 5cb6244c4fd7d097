"""What of the server can be reached from outside, and what the page may reach."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .media import MOST_BYTES

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
    too long before they are read; adds `HEADERS`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not OPEN.fullmatch(scope["path"]):
            await self._refuse(send, 404, "There is nothing here.")
        elif _too_long(scope):
            await self._refuse(send, 413, "This is too long, or does not say how long it is.")
        else:
            await self.app(scope, receive, self._with_headers(send))

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
    told = dict(scope["headers"]).get(b"content-length", b"")
    most = MOST_UPLOADED if scope["path"] == UPLOAD else MOST_SENT
    return not told.isdigit() or int(told) > most
