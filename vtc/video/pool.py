"""Decode videos ahead of their use, in child processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidVideo, VtcError
from .decode import Clip, read
from .sampling import Sampling


@dataclass(frozen=True)
class Result:
    """One submitted video: its `clip`, or the `error` that says why there is none."""

    key: Any
    path: str
    clip: Clip | None
    error: VtcError | None
    seconds: float


class Readers:
    """Iterate over `Result`s in the order of `submit`; at most `ahead` videos are decoded ahead.

    with Readers(2, "8") as readers:
        for key, path in videos:
            readers.submit(key, path)
        for result in readers:
            ...

    `workers` child processes decode, 0 decodes in the caller (then nothing can be timed out). A
    video on which a decoder hangs for `timeout` seconds, or dies, is a `Result` with an error; its
    worker is replaced. `submit` may be called while iterating.
    """

    def __init__(
        self,
        workers: int,
        sampling: Sampling | str | int,
        timeout: float = 60.0,
        backend: str = "auto",
        size: tuple[int, int] | None = None,
        ahead: int | None = None,
    ) -> None:
        self._sampling, self._backend, self._size = Sampling.parse(sampling), backend, size
        self._waiting: deque[tuple[Any, str]] = deque()

    def submit(self, key: Any, path: str | os.PathLike[str]) -> None:
        """Queue a video; `key` comes back with its result."""
        self._waiting.append((key, os.fspath(path)))

    def __iter__(self) -> Iterator[Result]:
        import time

        while self._waiting:
            key, path = self._waiting.popleft()
            start = time.perf_counter()
            clip = error = None
            try:
                clip = read(path, self._sampling, self._backend, self._size)
            except InvalidVideo as caught:
                error = caught
            yield Result(key, path, clip, error, time.perf_counter() - start)

    def close(self) -> None:
        """Stop all workers."""
        self._waiting.clear()

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
