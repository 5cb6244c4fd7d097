"""The queue of runs is for visitors who wait for an answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LISTEN = 10.0  # seconds after a run was asked for within which somebody listens for its result


class Line:
    """Takes runs out of gradio's queue for whose results nobody listens; what listens and leaves
    takes its own with it.

    queue: what gives gradio's queue.
    """

    def __init__(self, queue: Callable[[], Any]) -> None:
        self._queue = queue
        self._listening: Counter[str] = Counter()
        self._awaited: dict[str, asyncio.Task[None]] = {}

    def joined(self, session: str) -> None:
        """A run was asked for."""
        if session not in self._awaited:
            self._awaited[session] = asyncio.create_task(self._wait(session))

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Somebody listens for results meanwhile."""
        self._listening[session] += 1
        awaited = self._awaited.pop(session, None)
        if awaited is not None:
            awaited.cancel()
        try:
            yield
        finally:
            self._listening[session] -= 1
            if not self._listening[session]:
                del self._listening[session]

    def knows(self, session: str) -> bool:
        """Whether there may be results to listen for."""
        return session in self._queue().pending_messages_per_session

    async def _wait(self, session: str) -> None:
        for _ in range(10):  # a server that was busy meanwhile hears late of who listens
            await asyncio.sleep(LISTEN / 10)
        del self._awaited[session]
        if session not in self._listening:
            queue = self._queue()
            await queue.clean_events(session_hash=session)
            queue.pending_messages_per_session.pop(session, None)
