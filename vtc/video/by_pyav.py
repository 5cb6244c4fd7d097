"""Frames through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .files import Unreadable
from .sampling import VideoInfo


class Video:
    """An open file: `info`, and `frames(indices)`, ascending and each once."""

    def __init__(self, path: str) -> None:
        try:
            import av
        except ImportError as error:
            raise Unreadable("PyAV is not installed (pip install av)") from error
        self._errors = (av.FFmpegError, ValueError, EOFError)
        try:
            self._file = av.open(path, metadata_errors="ignore")
        except self._errors as error:
            raise Unreadable(f"not a video ({error})") from error
        try:
            self._open(path)
        except self._errors as error:
            self._file.close()
            raise Unreadable(str(error)) from error
        except BaseException:
            self._file.close()
            raise

    def _open(self, path: str) -> None:
        stream = self._file.streams.best("video")
        if stream is None:
            kinds = sorted({s.type for s in self._file.streams}) or ["nothing"]
            raise Unreadable(f"no video stream in it, only {' and '.join(kinds)}")
        self._stream: Any = stream
        stream.thread_type = "NONE"
        self._index()
        self._rewind(0)
        first = self._next()
        if first is None:
            raise Unreadable("no frame of it can be decoded")
        self._turns = round(-first.rotation / 90) % 4
        upright = _upright(first, self._turns)
        seconds = self._pts * float(stream.time_base)
        self.info = VideoInfo(
            frames=len(self._pts),
            fps=len(self._pts) / self._length,
            duration=self._length,
            width=upright.shape[1],
            height=upright.shape[0],
            rotation=self._turns * 90,
            backend="pyav",
            times=seconds - seconds[0],
        )

    def _index(self) -> None:
        """Timestamps of all frames and of key frames, from the packets alone."""
        shown, keys, end = [], [], 0
        for packet in self._file.demux(self._stream):
            if packet.pts is None or packet.is_discard:
                continue
            shown.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append(packet.pts)
        if not shown:
            raise Unreadable("its video stream has no frames")
        self._pts = np.unique(np.asarray(shown, np.int64))
        self._keys = np.unique(np.asarray(keys, np.int64))
        step = float(self._stream.time_base)
        self._length = float(end - self._pts[0]) * step
        if self._length <= 0:
            raise Unreadable("its frames have no duration")

    def _rewind(self, pts: int) -> None:
        before = self._keys[self._keys <= pts]
        at = int(before[-1]) if len(before) else int(self._pts[0])
        self._file.seek(at, stream=self._stream)
        self._decoded = self._file.decode(self._stream)

    def _next(self) -> Any:
        for frame in self._decoded:
            if frame.pts is not None and frame.pts >= self._pts[0]:
                return frame
        return None

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Upright RGB frames uint8 [H, W, 3] of ascending indices."""
        try:
            yield from self._frames(indices)
        except self._errors as error:
            raise Unreadable(str(error)) from error

    def _frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        reached = None
        for index in indices:
            pts = int(self._pts[index])
            if reached is None or (self._keys[self._keys <= pts][-1:] > reached).any():
                self._rewind(pts)
            frame = self._next()
            while frame is not None and frame.pts < pts:
                frame = self._next()
            if frame is None or frame.pts != pts or frame.is_corrupt:
                raise Unreadable(f"frame {index} is damaged or missing")
            reached = pts
            yield _upright(frame, self._turns)

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _upright(frame: Any, turns: int) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), -turns)
