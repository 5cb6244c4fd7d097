"""Write frames as a video file."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np

from ..errors import InvalidVideo


def write(path: str | os.PathLike[str], frames: np.ndarray, fps: float = 8.0) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as mp4 (needs PyAV).

    h264 where the build of PyAV has it (libx264, crf 18), else mpeg4. Colour is yuv420p, which
    every player knows: H and W must be even, and colour has half the resolution.
    """
    try:
        import av
    except ImportError as error:
        raise InvalidVideo("writing a video needs PyAV: pip install av") from error
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise InvalidVideo(
            f"frames are {frames.dtype} {list(frames.shape)}: give uint8 [T, H, W, 3]."
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidVideo(f"frames are {height}x{width}: height and width must be even.")
    if not 0 < fps < 1000:
        raise InvalidVideo(f"fps={fps!r}: give frames per second above 0.")
    h264 = "libx264" in av.codecs_available
    with av.open(os.fspath(path), "w", format="mp4") as file:
        rate = Fraction(fps).limit_denominator(1001)
        stream = file.add_stream("libx264" if h264 else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"} if h264 else {"qscale": "2"}
        for frame in frames:
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(image))
        file.mux(stream.encode(None))
