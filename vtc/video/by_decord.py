"""Frames through decord."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .files import Unreadable
from .sampling import VideoInfo


class Video:
    """An open file: `info`, and `frames(indices)`, ascending and each once."""

    def __init__(self, path: str) -> None:
        try:
            import decord
        except ImportError as error:
            raise Unreadable("not installed (pip install decord)") from error
        self._errors = (decord.DECORDError, RuntimeError, AssertionError, StopIteration)
        try:
            self._reader = decord.VideoReader(path, num_threads=1)
            spans = self._reader.get_frame_timestamp(range(len(self._reader)))
            height, width, channels = self._reader[0].shape
        except self._errors as error:
            raise Unreadable(_short(error)) from error
        if channels != 3:
            raise Unreadable("it does not give the frames of rotated files right")
        spans = spans.astype(np.float64)
        length = float(spans[-1, 1] - spans[0, 0])
        self.info = VideoInfo(
            frames=len(spans),
            fps=len(spans) / length,
            duration=length,
            width=width,
            height=height,
            rotation=0,
            backend="decord",
            times=spans[:, 0] - spans[0, 0],
        )

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Upright RGB frames uint8 [H, W, 3] of ascending indices."""
        try:
            for index in indices:
                yield self._reader[index].asnumpy()
        except self._errors as error:
            raise Unreadable(_short(error)) from error

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        del self._reader


def _short(error: BaseException) -> str:
    """decord's errors end in a stack of C++ frames."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
