"""The child process of `vtc.video.pool`: decode one video after another."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..errors import InvalidVideo
from .decode import Clip


def attempt(reader: Callable[..., Clip], *args: Any) -> tuple[Clip | None, InvalidVideo | None]:
    """A clip, or the reason why there is none: one video must not end a run of thousands."""
    try:
        return reader(*args), None
    except InvalidVideo as error:
        return None, error
    except MemoryError as error:
        return None, InvalidVideo(f"cannot read {args[0]}: it takes too much memory ({error}).")
    except Exception as error:
        return None, InvalidVideo(f"cannot read {args[0]}: {type(error).__name__}: {error}")


def main(handle: int) -> None:
    """Answer paths that arrive at `handle` with clips, until the other end is closed."""
    _quiet()
    with Connection(handle) as parent, contextlib.suppress(EOFError, BrokenPipeError):
        reader, options, timeout, memory = parent.recv()
        with contextlib.suppress(ValueError, OSError):  # a lower limit holds already, or none can
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        while True:
            path = parent.recv()
            # the parent ends a hanging decoder; the alarm is for one whose parent was killed
            signal.setitimer(signal.ITIMER_REAL, timeout + 5)
            start = time.perf_counter()
            clip, error = attempt(reader, path, *options)
            seconds = time.perf_counter() - start
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(parent, clip, error, seconds)


def send(to: Connection, clip: Clip | None, error: InvalidVideo | None, seconds: float) -> None:
    """A small header, then the pixels as they are in memory."""
    if clip is None:
        to.send((str(error), None, seconds))
        return
    to.send((None, (clip.frames.shape, clip.times, clip.indices, clip.info), seconds))
    to.send_bytes(clip.frames.reshape(-1).data)


def _quiet() -> None:
    """decord's ffmpeg writes to stderr what the error of the video says already."""
    with contextlib.suppress(ImportError):
        import decord

        decord.logging.set_level(decord.logging.QUIET)


if __name__ == "__main__":
    main(int(sys.argv[1]))
