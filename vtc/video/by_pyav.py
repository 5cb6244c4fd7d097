"""Frames through PyAV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .files import MOST_PIXELS, Unreadable, check_count, check_sides
from .mp4 import Mp4
from .sampling import VideoInfo


class Video:
    """An open file: `info`, and `frames(indices)` of ascending indices.

    Stricter than decord: bits that contradict the format are an error, not a concealed frame.

    Frames are told apart by their timestamps. Where these do not tell them apart, or are those of
    the order in which frames are stored (as in an AVI file with B-frames), they are counted, from
    the start of the file: the decoder gives them in the order in which they are shown.
    """

    def __init__(self, path: str, max_pixels: int = MOST_PIXELS) -> None:
        try:
            import av
        except ImportError as error:
            raise Unreadable("not installed (pip install av)") from error
        self._errors = (av.FFmpegError, OSError, ValueError)
        self._path, self._most = path, max_pixels
        try:
            self._file = av.open(path, metadata_errors="ignore")
        except self._errors as error:
            raise Unreadable(f"not a video, or its index is missing ({_short(error)})") from error
        try:
            self._stream = self._choose()
            first = next(self._file.decode(self._stream), None)
            if first is None:
                raise Unreadable("no frame of it can be decoded")
            self._open()
            self._index()
            self.info = self._describe(first)
        except self._errors as error:
            self._file.close()
            raise Unreadable(_short(error)) from error
        except BaseException:
            self._file.close()
            raise

    def _choose(self) -> Any:
        """The stream a player would show."""
        kind = self._file.format.name
        if kind == "tty" or kind.startswith("image2") or kind.endswith("_pipe"):
            raise Unreadable(f"a text or a picture ({kind}), not a video")
        stream: Any = self._file.streams.best("video")
        if stream is None:
            kinds = sorted({s.type for s in self._file.streams})
            raise Unreadable(f"no video stream in it, only {' and '.join(kinds) or 'nothing'}")
        if stream.codec_context is None:
            raise Unreadable("its codec is not known")
        check_sides(stream.codec_context.width, stream.codec_context.height, self._most)
        check_count(stream.frames)
        stream.thread_type = "NONE"  # else errors arrive with later packets
        stream.codec_context.options = {"err_detect": "explode"}
        return stream

    def _open(self) -> None:
        """From the first packet: some containers cannot be sought back to it."""
        import av

        self._file.close()
        self._file = av.open(self._path, metadata_errors="ignore")
        self._stream = self._choose()

    def _index(self) -> None:
        """Timestamps of all frames and of key frames, from the packets alone."""
        shown, keys, whole = [], [], 0
        for packet in self._file.demux(self._stream):
            if not packet.size:
                continue
            whole += not packet.is_corrupt
            if packet.pts is None:
                raise Unreadable("its frames carry no timestamps")
            if packet.is_keyframe:
                keys.append(packet.pts)
            if not packet.is_discard:
                shown.append(packet.pts)
                check_count(len(shown))
        kind = Mp4.of(self._path)  # other files only guess how many frames they have
        if kind is not None and not kind.cut and whole < self._stream.frames:
            raise Unreadable(f"cut off: {whole} of its {self._stream.frames} frames are whole")
        if not shown:
            raise Unreadable("its video stream has no frames")
        self._keys = np.unique(np.asarray(keys or shown[:1], np.int64))
        stored = np.asarray(shown, np.int64)
        ascending = bool((np.diff(stored) > 0).all())
        reordered = bool(self._stream.codec_context.has_b_frames)
        pts = np.sort(stored)
        pts = pts[pts >= self._keys[0]]  # nothing before a key frame can be decoded
        self._counted = (ascending and reordered) or bool((np.diff(pts) == 0).any())
        self._pts = pts

    def _describe(self, first: Any) -> VideoInfo:
        """From the first frame."""
        self._turns = round(-first.rotation / 90) % 4
        sides = (first.height, first.width)
        height, width = sides if self._turns % 2 == 0 else sides[::-1]
        starts = self._pts * float(self._stream.time_base)
        return VideoInfo.of(starts, (height, width), self._turns * 90, "pyav")

    def _start(self) -> Iterator[Any]:
        """All frames, in the order in which they are shown."""
        self._open()
        return self._file.decode(self._stream)

    def _from(self, key: int) -> Iterator[Any]:
        """Frames from the key frame at `key` on."""
        self._file.seek(key, stream=self._stream)
        return self._file.decode(self._stream)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Upright RGB frames uint8 [H, W, 3] of ascending indices."""
        try:
            for frame in self._in_turn(indices) if self._counted else self._found(indices):
                yield np.rot90(frame.to_ndarray(format="rgb24"), -self._turns)
        except self._errors as error:
            raise Unreadable(_short(error)) from error

    def _found(self, indices: Sequence[int]) -> Iterator[Any]:
        """Seeks where that skips a key frame, and decodes on where it does not.

        Frames behind some key frames refer to what is before it, and some containers end a seek
        too late. Then, once, the file is decoded from its start: what is still wrong is damage.
        """
        stream: Iterator[Any] = iter(())
        reached, seeking = -math.inf, True
        for index in indices:
            pts = int(self._pts[index])
            key = int(self._keys[np.searchsorted(self._keys, pts, side="right") - 1])
            if seeking and key > reached:
                stream = self._from(key)
            frame, why = self._at(stream, pts)
            if frame is None and seeking:
                seeking, stream = False, self._start()
                frame, why = self._at(stream, pts)
            if frame is None:
                raise Unreadable(f"damaged at or before frame {index} ({why})")
            reached = pts
            yield frame

    def _in_turn(self, indices: Sequence[int]) -> Iterator[Any]:
        """Counts frames to the end of the file: that all came out is known there only."""
        wanted, count = set(indices), 0
        for count, frame in enumerate(self._start(), 1):
            if frame.is_corrupt:
                raise Unreadable(f"damaged at frame {count - 1} (it is marked as corrupt)")
            if count - 1 in wanted:
                yield frame
        if count != len(self._pts):
            raise Unreadable(
                f"its timestamps do not tell its frames apart, and {count} frames came out of "
                f"{len(self._pts)} packets: write it anew, with `ffmpeg -i` for instance"
            )

    def _at(self, stream: Iterator[Any], pts: int) -> tuple[Any, str]:
        """The frame of this time, or why it cannot be had."""
        try:
            frame = next((f for f in stream if f.pts is not None and f.pts >= pts), None)
        except self._errors as error:
            return None, _short(error)
        if frame is None or frame.pts != pts:
            return None, "it is missing"
        return (None, "it is marked as corrupt") if frame.is_corrupt else (frame, "")

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _short(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
