"""Read chosen frames: decord first, PyAV where decord is missing or fails on the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InvalidInput, InvalidVideo
from . import by_decord, by_pyav
from .files import MOST_PIXELS, Unreadable, check_sides, checked
from .sampling import Sampling, VideoInfo

BACKENDS = {"decord": by_decord.Video, "pyav": by_pyav.Video}


@dataclass(frozen=True)
class Clip:
    """Frames that were read: uint8 [T, H, W, 3], RGB, upright.

    `times` are seconds from the first frame of the file, `indices` the frame numbers. T is what
    the file could give: a video of 5 frames asked for 8 has 5 (`len(clip)`), none is repeated.
    """

    frames: np.ndarray = field(repr=False)
    times: tuple[float, ...]
    indices: tuple[int, ...]
    info: VideoInfo

    def __len__(self) -> int:
        return len(self.indices)


def probe(
    path: str | os.PathLike[str], backend: str = "auto", max_pixels: int = MOST_PIXELS
) -> VideoInfo:
    """What the file holds. Reads its packets, decodes at most one frame.

    `max_pixels`: frames of more are refused (2^25, 8K). So are more than 2.5 million frames.
    """
    check_options(backend, None, max_pixels)
    return _first(path, backend, max_pixels, lambda video: video.info)


def read(
    path: str | os.PathLike[str],
    sampling: Sampling | str | int,
    backend: str = "auto",
    size: tuple[int, int] | None = None,
    max_pixels: int = MOST_PIXELS,
) -> Clip:
    """The frames that `sampling` chooses, scaled to `size` (height, width) if that is given.

    `backend` is "decord", "pyav" or "auto": decord where it is installed and known to give the
    right frames of this file, else PyAV; `Clip.info.backend` says which it was. Damage that decord
    conceals, by painting over it or by repeating what was there before, is an error with "pyav"
    wherever the bits contradict the format. `max_pixels` as for `probe`.
    """
    sampling = Sampling.parse(sampling)
    check_options(backend, size, max_pixels)

    def clip(video: Any) -> Clip:
        indices = _indices(path, sampling, video.info)
        times = tuple(float(t) for t in video.info.timestamps()[list(indices)])
        return Clip(_gather(video, indices, size), times, indices, video.info)

    return _first(path, backend, max_pixels, clip)


def plan(
    path: str | os.PathLike[str],
    sampling: Sampling | str | int,
    backend: str = "auto",
    size: tuple[int, int] | None = None,
    max_pixels: int = MOST_PIXELS,
) -> Clip:
    """What `read` would give, without the pixels: no frame is decoded but the first."""
    info = probe(path, backend, max_pixels)
    indices = _indices(path, Sampling.parse(sampling), info)
    times = tuple(float(t) for t in info.timestamps()[list(indices)])
    return Clip(np.empty((0, 0, 0, 3), np.uint8), times, indices, info)


def _indices(path: str | os.PathLike[str], sampling: Sampling, info: VideoInfo) -> tuple[int, ...]:
    try:
        return sampling.indices(info)
    except InvalidVideo as error:
        raise InvalidVideo(f"{os.fspath(path)!r}: {error}") from error


def _first(
    path: str | os.PathLike[str], backend: str, max_pixels: int, job: Callable[[Any], Any]
) -> Any:
    """`job` of the video opened by the first backend that can; the errors of all if none can."""
    name = checked(path)
    failed = []
    for kind in BACKENDS if backend == "auto" else (backend,):
        try:
            with BACKENDS[kind](name, max_pixels) as video:
                check_sides(video.info.width, video.info.height, max_pixels)  # as decoded
                return job(video)
        except Unreadable as error:
            failed.append(f"{kind}: {error}")
    raise InvalidVideo(f"cannot read {name}: " + "; ".join(failed) + ".")


def _gather(video: Any, indices: tuple[int, ...], size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [T, H, W, 3] of any indices, each frame decoded once and scaled before the next."""
    height, width = size or (video.info.height, video.info.width)
    out = np.empty((len(indices), height, width, 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    wanted = sorted(places)
    for index, frame in zip(wanted, video.frames(wanted), strict=True):
        if frame.shape[:2] != (video.info.height, video.info.width):
            raise Unreadable(f"frame {index} has another size than the first")
        out[places[index]] = _scaled(frame, height, width)
    return out


def _scaled(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def check_options(backend: str, size: object = None, max_pixels: object = MOST_PIXELS) -> None:
    """Refuse what `read` could not do with any file."""
    if backend != "auto" and backend not in BACKENDS:
        raise InvalidInput(f"backend={backend!r}: give 'auto', {', '.join(map(repr, BACKENDS))}.")
    if type(max_pixels) is not int or max_pixels < 1:
        raise InvalidInput(f"max_pixels={max_pixels!r}: give a whole number from 1 on.")
    good = size is None or (
        isinstance(size, tuple) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)
    )
    if not good:
        raise InvalidInput(f"size={size!r}: give (height, width) in pixels, or None.")
