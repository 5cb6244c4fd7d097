"""Which frames of a video are read. Indices count frames in the order in which they are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InvalidInput, InvalidVideo

FORMS = (
    '"8" or "uniform:8" (frames over the whole video), "2fps" or "fps:2,max=64" (by time, at most '
    '64), "frames:0,5,9" (numbers), "seconds:0,1.5" (times)'
)


SLACK = 5e-7  # seconds: containers round times to clocks of their own


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video stream; no frame is decoded for it.

    `width` and `height` are those of the upright frames, `rotation` (0, 90, 180, 270 degrees
    clockwise) is what was applied to make them upright. `times` float64 [frames] are the
    timestamps in seconds, ascending (frames may share one), the first is 0; without it frames are
    evenly spaced.
    """

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    backend: str
    times: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, starts: np.ndarray, sides: tuple[int, int], rotation: int, backend: str
    ) -> VideoInfo:
        """From the start of every frame. `duration` counts the last one as long as the average:
        containers differ about it, and many do not say. A single frame lasts a second.
        """
        times = starts - starts[0]
        count, last = len(times), float(times[-1])
        # twelve digits, not places: the clock of a file may count in years
        fps = float(f"{(count - 1) / last:.12g}") if last > 0 else float(count)
        return cls(count, fps, count / fps, sides[1], sides[0], rotation, backend, times)

    def timestamps(self) -> np.ndarray:
        """Seconds at which each frame is shown: float64 [frames]."""
        return np.arange(self.frames) / self.fps if self.times is None else self.times

    def at(self, seconds: Any) -> np.ndarray:
        """Index of the frame that is on the screen: the nearest one at or before each time."""
        seconds = np.asarray(seconds, np.float64)
        found = np.searchsorted(self.timestamps(), seconds + SLACK, side="right") - 1
        return np.maximum(found, 0)


@dataclass(frozen=True)
class Sampling:
    """Frames to read. Give one of `count`, `rate`, `frames`, `seconds`.

    count    n frames spread evenly over the numbers 0 .. F-1, both ends included: frame i is
             round(i (F-1) / (n-1)), halves upwards; n = 1 is the middle frame, (F-1) // 2.
             A video of fewer than n frames gives all its frames, each once.
    rate     the frame shown at 0, 1/rate, 2/rate ... seconds, then the last frame if it is not
             there yet. Where that would be more than `limit` frames (64; None: no limit), it is
             `count=limit` instead, which has the last frame too. No frame is read twice, so a
             rate above that of the file gives every frame of the file.
    frames   these numbers, in this order, repeats allowed.
    seconds  the frame on the screen at each of these times, in this order, repeats allowed.
    """

    count: int | None = None
    rate: float | None = None
    limit: int | None = 64
    frames: tuple[int, ...] | None = None
    seconds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("count", "rate", "frames", "seconds") if getattr(self, n) is not None]
        if len(given) != 1:
            raise InvalidInput(
                f"sampling by {' and '.join(given) or 'nothing'}: give exactly one of count, rate, "
                f"frames, seconds."
            )
        _whole("count", self.count, 1)
        _whole("max", self.limit, 1)
        for name, least in (("frames", 0), ("seconds", None)):
            listed = getattr(self, name)
            if listed is None:
                continue
            if isinstance(listed, str) or not len(tuple(listed)):
                raise InvalidInput(f"{name}={listed!r}: give at least one, like {name}=(0, 1).")
            object.__setattr__(self, name, tuple(listed))  # a list would not be hashable
            for value in listed:
                if least is None:
                    _number(name, value, "a time in seconds from 0", zero=True)
                else:
                    _whole(name, value, least)
        if self.rate is not None:
            _number("rate", self.rate, "frames per second above 0")

    @classmethod
    def parse(cls, text: Sampling | str | int) -> Sampling:
        """From the text of a command line; a `Sampling` is returned as it is."""
        if isinstance(text, Sampling):
            return text
        if isinstance(text, bool) or not isinstance(text, str | int):
            raise InvalidInput(f"sampling {text!r}: give {FORMS}.")
        plain = str(text).strip().lower()
        kind, colon, rest = plain.partition(":")
        if not colon:
            kind, rest = _short(plain)
        reader = {"uniform": _uniform, "fps": _fps, "frames": _frames, "seconds": _seconds}
        if kind not in reader:
            raise InvalidInput(f"sampling {text!r} is not understood. Give {FORMS}.")
        try:
            return cls(**reader[kind](rest))
        except InvalidInput:
            raise
        except ValueError as error:
            raise InvalidInput(f"sampling {text!r} is not understood. Give {FORMS}.") from error

    def indices(self, info: VideoInfo) -> tuple[int, ...]:
        """Frame numbers to read, in 0 .. info.frames - 1."""
        if info.frames < 1:
            raise InvalidVideo("the video has no frames to sample from.")
        if self.count is not None:
            return _spread(self.count, info.frames)
        if self.rate is not None:
            return self._by_rate(self.rate, info)
        if self.frames is not None:
            beyond = [i for i in self.frames if i >= info.frames]
            if beyond:
                raise InvalidVideo(f"frame {beyond[0]} is beyond the end: {_extent(info)}.")
            return self.frames
        wanted = self.seconds or ()
        late = [t for t in wanted if t > info.duration]
        if late:
            raise InvalidVideo(f"{late[0]:g} s is beyond the end: {_extent(info)}.")
        return tuple(int(i) for i in info.at(wanted))

    def _by_rate(self, rate: float, info: VideoInfo) -> tuple[int, ...]:
        start = info.timestamps() - SLACK
        # a frame is read if a multiple of 1/rate falls between its start and that of the next
        ticks = np.ceil(start * rate)
        chosen = np.append(ticks[1:] > ticks[:-1], True)
        if self.limit is not None and chosen.sum() > self.limit:
            return _spread(self.limit, info.frames)
        return tuple(int(i) for i in np.flatnonzero(chosen))

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        if self.count is not None:
            return f"uniform:{self.count}"
        if self.rate is not None:
            return f"fps:{self.rate!r},max={self.limit or 'none'}"
        if self.frames is not None:
            return "frames:" + ",".join(map(str, self.frames))
        return "seconds:" + ",".join(map(repr, self.seconds or ()))


def _spread(count: int, frames: int) -> tuple[int, ...]:
    """`count` numbers over 0 .. frames-1 with both ends, all of them if there are fewer."""
    if count >= frames:
        return tuple(range(frames))
    if count == 1:
        return ((frames - 1) // 2,)
    gaps = count - 1
    return tuple((2 * i * (frames - 1) + gaps) // (2 * gaps) for i in range(count))


def _extent(info: VideoInfo) -> str:
    return f"the video has {info.frames} frames and lasts {info.duration:.3f} s"


def _short(plain: str) -> tuple[str, str]:
    """ "8" is uniform:8, "2fps" and "2fps,max=16" are fps:2 and fps:2,max=16."""
    head, comma, tail = plain.partition(",")
    if head.endswith("fps"):
        return "fps", head.removesuffix("fps") + comma + tail
    return ("uniform", plain) if plain.lstrip("+-").isdigit() else ("", plain)


def _uniform(rest: str) -> dict[str, Any]:
    return {"count": int(rest)}


def _fps(rest: str) -> dict[str, Any]:
    rate, comma, tail = rest.partition(",")
    if not comma:
        return {"rate": float(rate)}
    name, _, limit = tail.partition("=")
    if name.strip() != "max":
        raise ValueError(f"{tail!r} is not max=N")
    return {"rate": float(rate), "limit": None if limit.strip() == "none" else int(limit)}


def _frames(rest: str) -> dict[str, Any]:
    return {"frames": tuple(int(part) for part in rest.split(","))}


def _seconds(rest: str) -> dict[str, Any]:
    return {"seconds": tuple(float(part) for part in rest.split(","))}


def _whole(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{name}={value!r}: give a whole number from {least}.")


def _number(name: str, value: Any, what: str, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InvalidInput(f"{name}={value!r}: give {what}.")
