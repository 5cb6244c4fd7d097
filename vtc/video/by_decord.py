"""Frames through decord."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from .files import MOST_PIXELS, Unreadable, check_sides
from .mp4 import Mp4
from .sampling import VideoInfo

H264_PROFILES = (66, 77, 88, 100)  # baseline, main, extended, high: 8 bits 4:2:0


class Video:
    """An open file: `info`, and `frames(indices)` of ascending indices."""

    def __init__(self, path: str, max_pixels: int = MOST_PIXELS) -> None:
        try:
            import decord
        except ImportError as error:
            raise Unreadable("not installed (pip install decord)") from error
        self._errors = (decord.DECORDError, RuntimeError, AssertionError, StopIteration)
        kind = _trusted(path)
        check_sides(*kind.sides, max_pixels)
        try:
            self._reader = decord.VideoReader(path, num_threads=1)
            count = len(self._reader)
            height, width, channels = self._reader[0].shape
        except self._errors as error:
            raise Unreadable(_short(error)) from error
        if channels != 3:  # rows of narrow rotated frames come with their padding
            raise Unreadable(f"it gives frames of {channels} channels")
        if count != len(kind.starts):
            raise Unreadable(f"it finds {count} frames where the file lists {len(kind.starts)}")
        self.info = VideoInfo.of(kind.starts, (height, width), kind.rotation, "decord")

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


def _trusted(path: str) -> Mp4:
    """Only files of which decord 0.6 gives the right frames.

    After seeks it returns wrong frames of HEVC, of MPEG-TS, and of H.264 with open groups of
    pictures; it counts frames that an edit list hides; colours of 10-bit video are off; it does
    not see that a Matroska file is rotated. None of that raises anything.
    """
    kind = Mp4.of(path)
    if kind is None:
        raise Unreadable("left to PyAV: not an mp4 or mov file with a video track")
    if kind.codec not in ("avc1", "mp4v"):
        raise Unreadable(f"left to PyAV: its codec is {kind.codec}, not H.264 or MPEG-4")
    if not kind.closed:
        raise Unreadable("left to PyAV: it has fragments or open groups of pictures")
    if (np.diff(kind.starts) == 0).any():
        raise Unreadable("left to PyAV: some of its frames have one timestamp")
    if kind.cut:
        raise Unreadable("left to PyAV: an edit list hides some of its frames")
    if kind.codec == "avc1" and kind.profile not in H264_PROFILES:
        raise Unreadable(f"left to PyAV: H.264 profile {kind.profile}, not 8 bits 4:2:0")
    return kind


def _short(error: BaseException) -> str:
    """The cause alone: decord's errors begin with places in its source and end in a C++ stack."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", first).strip().rstrip(".")
