"""Decode videos ahead of their use, in child processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from ..errors import InvalidInput, InvalidVideo
from .decode import Clip, check_options, plan, read
from .files import LEAST_MEMORY, MEMORY, MOST_PIXELS
from .sampling import Sampling
from .worker import attempt


@dataclass(frozen=True)
class Result:
    """One submitted video: its `clip`, or the `error` that says why there is none."""

    key: Any
    path: str
    clip: Clip | None
    error: InvalidVideo | None
    seconds: float  # of decoding


class Readers:
    """Decode in child processes; iterate over `Result`s in the order of `submit`.

        with Readers(2, "8") as readers:
            for key, path in videos:
                readers.submit(key, path)
            for result in readers:
                ...

    Decoding starts at `submit`, which may also be called while iterating. At most 2 `workers`
    videos are decoded or being decoded ahead of the one in use. A video on which a decoder hangs
    for `timeout` seconds, or dies, becomes a `Result` with an error, and its worker is replaced.
    A child gets `memory` bytes of address space (4 GiB; where the system can bound that); a video
    that needs more is an error too. 0 workers decode in the caller, where neither is bounded.
    `max_pixels` as for `read`. Needs a POSIX system.

    The children run a module of their own, not the caller's script, so a script needs no
    `if __name__ == "__main__"`. Pixels come through a socket straight into the array of the clip:
    shared memory is 64 MB in many containers, and nobody frees it after a kill.
    """

    _read = staticmethod(read)

    def __init__(
        self,
        workers: int,
        sampling: Sampling | str | int,
        timeout: float = 60.0,
        backend: str = "auto",
        size: tuple[int, int] | None = None,
        max_pixels: int = MOST_PIXELS,
        memory: int = MEMORY,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise InvalidInput(f"workers={workers!r}: give a whole number; 0 decodes right here.")
        if not timeout > 0 or math.isinf(timeout):
            raise InvalidInput(f"timeout={timeout!r}: give seconds above 0.")
        if type(memory) is not int or memory < LEAST_MEMORY:
            raise InvalidInput(
                f"memory={memory!r}: give bytes for a decoder, {LEAST_MEMORY:,} or more."
            )
        check_options(backend, size, max_pixels)
        self._options = (Sampling.parse(sampling), backend, size, max_pixels)
        self._memory = memory
        self._timeout = timeout
        self._size = workers
        self._waiting: deque[_Job] = deque()  # not handed out yet
        self._ordered: deque[_Job] = deque()  # handed out, not given to the caller yet
        self._children: list[_Child] = []
        self._end = weakref.finalize(self, _end_all, self._children)  # also when Python exits

    def submit(self, key: Any, path: str | os.PathLike[str]) -> None:
        """Queue a video; `key` comes back with its result."""
        if not self._end.alive:
            raise InvalidInput("these Readers are closed: make new ones.")
        self._waiting.append(_Job(key, os.fspath(path)))
        self._hand_out()

    def __iter__(self) -> Iterator[Result]:
        while self._waiting or self._ordered:
            try:
                result = self._next()
            except BaseException:  # a clip may have been received in part, at Ctrl-C for instance
                self.close()
                raise
            yield result

    def __len__(self) -> int:
        """Videos that were submitted and not given out yet."""
        return len(self._waiting) + len(self._ordered)

    def close(self) -> None:
        """End the children and forget what is queued."""
        self._waiting.clear()
        self._ordered.clear()
        self._end()

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Result:
        if not self._size:
            return self._here(self._waiting.popleft())
        self._hand_out()
        while self._ordered[0].result is None:
            self._receive()
            self._hand_out()
        result = self._ordered.popleft().result
        self._hand_out()
        assert result is not None
        return result

    def _here(self, job: _Job) -> Result:
        start = time.perf_counter()
        clip, error = attempt(self._read, job.path, *self._options)
        return job.done(clip, error, time.perf_counter() - start)

    def _hand_out(self) -> None:
        """Give queued videos to children that have nothing to do, starting children as needed."""
        while self._size and self._waiting and len(self._ordered) < 2 * self._size:
            idle = next((child for child in self._children if child.job is None), None)
            if idle is None:
                if len(self._children) == self._size:
                    return
                idle = _Child((self._read, self._options, self._timeout, self._memory))
                self._children.append(idle)
            job = self._waiting.popleft()
            self._ordered.append(job)
            if not idle.take(job, self._timeout):
                self._children.remove(idle)  # it died while idle: the video is not to blame
                self._waiting.appendleft(self._ordered.pop())

    def _receive(self) -> None:
        """Wait until a child answers, dies, or has had its time."""
        busy = [child for child in self._children if child.job is not None]
        patience = min(child.deadline for child in busy) - time.monotonic()
        ready = wait([child.pipe for child in busy], max(0.0, patience))
        for child in busy:
            if child.pipe in ready:
                lost = child.answer()
            elif child.deadline <= time.monotonic():
                lost = f"decoding took longer than {self._timeout:g} s and was ended"
            else:
                continue
            if lost:
                self._children.remove(child)
                child.lose(lost)


class Planners(Readers):
    """Clips without pixels: what `read` would give, for a look ahead."""

    _read = staticmethod(plan)


class _Job:
    """A submitted video."""

    def __init__(self, key: Any, path: str) -> None:
        self.key, self.path = key, path
        self.result: Result | None = None

    def done(self, clip: Clip | None, error: InvalidVideo | None, seconds: float) -> Result:
        self.result = Result(self.key, self.path, clip, error, seconds)
        return self.result


class _Child:
    """A process that decodes, and the video it has at the moment."""

    def __init__(self, setup: Any) -> None:
        self.job: _Job | None = None
        self.deadline = math.inf
        self.pipe, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from vtc.video.worker import main; main({theirs.fileno()})"
        )
        with theirs, _signals_held():
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.pipe.send(setup)

    def take(self, job: _Job, timeout: float) -> bool:
        """Start on a video; False if the process has ended."""
        try:
            self.pipe.send(job.path)
        except OSError:
            self.end()
            return False
        self.job, self.deadline = job, time.monotonic() + timeout
        return True

    def answer(self) -> str | None:
        """Receive the result of the video. What went wrong, if the process ended instead."""
        assert self.job is not None
        try:
            problem, head, seconds = self.pipe.recv()
            clip = None
            if head is not None:
                frames = np.empty(head[0], np.uint8)
                self.pipe.recv_bytes_into(frames.reshape(-1).data)
                clip = Clip(frames, *head[1:])
        except (EOFError, OSError):
            return f"the decoder crashed ({_ending(self.process)})"
        self.job.done(clip, None if problem is None else InvalidVideo(problem), seconds)
        self.job, self.deadline = None, math.inf
        return None

    def lose(self, why: str) -> None:
        """Give the video up, and the process with it."""
        job = self.job
        self.end()
        if job is not None:
            job.done(None, InvalidVideo(f"cannot read {job.path}: {why}."), math.nan)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process that is started in here never sees the signals that ask a run to end, also not
    while it starts: they may go to all processes of a group, and it is for the parent to end us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
