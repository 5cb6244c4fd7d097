"""Small video files of every awkward kind, and a plain decoder that never seeks."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vtc.video import Clip, read

X264 = {"preset": "ultrafast", "x264-params": "bframes=2"}


def moving(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Coarse noise that moves 3 pixels per frame: uint8 [count, H, W, 3], no two frames alike."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    base = coarse.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(base, 3 * i, 1) for i in range(count)])


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    gop: int = 12,
    flags: dict[str, str] | None = None,
) -> Path:
    """Frames at 25 per second, or at the times given, through PyAV."""
    with av.open(str(path), "w", options=flags or {}) as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = pixels, gop
        stream.options = X264 if options is None and codec == "libx264" else options or {}
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.time_base = Fraction(1, 25) if milliseconds is None else Fraction(1, 1000)
            image.pts = i if milliseconds is None else milliseconds[i]
            file.mux(stream.encode(image))
        file.mux(stream.encode(None))
    return path


def remux(source: Path, path: Path, flags: dict[str, str], shift: float = 0.0) -> Path:
    """The same packets in another arrangement, `shift` seconds later."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=flags) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is None or packet.pts is None:
                continue
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = stream
            new.mux(packet)
    return path


def silent_film(path: Path) -> Path:
    """An mp4 with sound alone."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("aac", rate=44100, layout="mono")
        for i in range(8):
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.rate, sound.pts = 44100, 1024 * i
            file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    return path


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames from first to last, upright, and their seconds from the first."""
    with av.open(str(path)) as file:
        both = [
            (np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)), f.time)
            for f in file.decode(video=0)
        ]
    times = np.array([t for _, t in both])
    return np.stack([f for f, _ in both]), times - times[0]


def uneven(count: int) -> list[int]:
    """Milliseconds of frames that last between 20 and 500."""
    rng = random.Random(3)
    times = [0]
    while len(times) < count:
        times.append(times[-1] + rng.choice([20, 40, 250, 500]))
    return times


def misbehaving(path: str, *options: Any) -> Clip:
    """A decoder that hangs, dies or fails as the name of the file asks; for child processes."""
    name = Path(path).name
    if name == "hang":
        time.sleep(60)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "bug":
        raise ZeroDivisionError("a bug")
    return read(path, *options)
