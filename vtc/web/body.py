"""Bodies of requests while they arrive: none may take its time, or more room than there is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.formparsers import MultiPartException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

#: A body begins within so many seconds, and then comes at so many bytes a second or faster.
GRACE, PACE = 10.0, 2**16
SLOW = (408, "This came too slowly. Try again over a faster line.")
GONE = (0, "the client is gone")  # nobody is left to be told


class Body:
    """What `receive` gives to the application, until the body has to be cut off.

    took: called with the bytes of every part; what it returns, status and reason, cuts it off.

    Attributes:
        cut: status and reason, once it was cut off.
    """

    def __init__(
        self, receive: Receive, took: Callable[[int], tuple[int, str] | None] = lambda _: None
    ) -> None:
        self._receive, self._took = receive, took
        self._start, self._bytes, self._more = time.monotonic(), 0, True
        self.cut: tuple[int, str] | None = None

    async def part(self) -> Message:
        """The next message; where the body is cut off, the error at which gradio's reader of
        uploads deletes what it has written."""
        if not self._more:
            return await self._receive()
        message = None
        try:
            async with asyncio.timeout(self._start + GRACE + self._bytes / PACE - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self.cut = SLOW
        if message is not None:
            self._more = message.get("more_body", False)
            self._bytes += len(message.get("body", b""))
            gone = message["type"] == "http.disconnect"
            self.cut = GONE if gone else self._took(len(message.get("body", b"")))
        if self.cut is not None:
            raise MultiPartException(self.cut[1])
        assert message is not None
        return message

    async def whole(self) -> bytes | None:
        """All of it; None where it was cut off."""
        parts = []
        try:
            while self._more:
                parts.append((await self.part()).get("body", b""))
        except MultiPartException:
            return None
        return b"".join(parts)

    def again(self, body: bytes) -> Receive:
        """What gives a body that was read here once more."""
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return left.pop() if left else await self._receive()

        return receive
