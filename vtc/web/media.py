"""Pictures and clips that a request is about: examples, or what was uploaded, which is told by its
content, bounded, and, if a video, decoded in a process of its own."""

from __future__ import annotations

import io
import struct
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from .. import video
from ..commands import demo, loading
from ..errors import InvalidInput, InvalidVideo, VtcError

MOST_BYTES = 25 * 2**20
MOST_PIXELS = 24_000_000  # of an image, and of a frame
MOST_SECONDS = 120.0  # of a video
MOST_FRAMES = 32
PATIENCE = 30.0  # seconds for decoding
AT_ONCE = threading.Semaphore(2)  # uploads that are decoded
SIDE = 1024  # pixels of the longer side, beyond which is scaled down

IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
KNOWN = "an image (PNG, JPEG, WebP, BMP, GIF) or a video (MP4, MOV, MKV, WebM, AVI)"
SCENES, CLIPS, CLIP_SEED = 12, 4, 7  # questions about scenes; clips, and what draws them


@dataclass(frozen=True)
class Media:
    """An image, or the frames of a video.

    answers: question -> right answer, where both are known.
    """

    name: str
    image: Image.Image | None = None
    clip: video.Clip | None = None
    answers: tuple[tuple[str, str], ...] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        if self.clip is not None:
            return [Image.fromarray(frame) for frame in self.clip.frames]
        return [] if self.image is None else [self.image]

    @property
    def about(self) -> str:
        """Name and size, for people."""
        first = self.pictures[0]
        size = f"{first.width} x {first.height} pixels"
        if self.clip is None:
            return f"{self.name}, {size}"
        return f"{self.name}, {len(self.clip)} frames of {self.clip.info.duration:.1f} s, {size}"


@cache
def examples() -> dict[str, Media]:
    """Name -> scenes that the zoo's image model knows, then clips for its video models."""
    return {media.name: media for media in (*_scenes(), *_clips())}


def read(data: bytes, name: str = "your upload", frames: int = 8, wait: bool = True) -> Media:
    """What was uploaded: by what is in it, whatever its name says.

    wait: for others whose uploads are being decoded; else that is refused.
    """
    if not data:
        raise InvalidInput("the upload is empty (0 bytes).")
    if len(data) > MOST_BYTES:
        raise InvalidInput(
            f"the upload has {len(data) / 2**20:.0f} MB: give at most {MOST_BYTES / 2**20:.0f} MB."
        )
    containers = (b"ftyp", b"moov", b"mdat", b"wide")
    film = data[4:8] in containers or data[:4] == b"\x1a\x45\xdf\xa3"
    if not AT_ONCE.acquire(blocking=wait):
        raise VtcError(
            "no preview now: uploads of others are being read. Run waits for its turn, or upload "
            "it again."
        )
    try:
        if film or (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
            return Media(name, clip=_clip(data, frames))
        return Media(name, image=_image(data))
    finally:
        AT_ONCE.release()


def _image(data: bytes) -> Image.Image:
    """Upright RGB. Its size is checked before it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGES) as image:
            _check_pixels(image.width, image.height, "image")
            image.load()
            upright = loading.upright(image)
    except Image.UnidentifiedImageError as error:
        raise InvalidInput(f"this file is neither {KNOWN}.") from error
    except InvalidInput:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError) as error:
        raise InvalidInput(f"this image is damaged: {error}.") from error
    except Image.DecompressionBombError as error:
        raise InvalidInput("this image is too large to be decoded.") from error
    upright.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return upright


def _clip(data: bytes, frames: int) -> video.Clip:
    """Frames spread over the video. What the file says of itself is read first, in a child too."""
    if isinstance(frames, bool) or frames != int(frames) or not 1 <= frames <= MOST_FRAMES:
        raise InvalidInput(f"{frames} frames: give a whole number from 1 to {MOST_FRAMES}.")
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(data)
        file.flush()
        info = _decoded(file.name, "frames:0", (16, 16)).info
        _check_pixels(info.width, info.height, "video")
        if info.duration > MOST_SECONDS:
            raise InvalidInput(
                f"the video lasts {info.duration:.0f} s: give at most {MOST_SECONDS:.0f} s."
            )
        scale = min(1.0, SIDE / max(info.width, info.height))
        size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        return _decoded(file.name, int(frames), size)


def _decoded(path: str, sampling: str | int, size: tuple[int, int]) -> video.Clip:
    """Decoded in a child process: what hangs or kills a decoder costs this request alone."""
    with video.Readers(1, sampling, timeout=PATIENCE, size=size) as readers:
        readers.submit("upload", path)
        result = next(iter(readers))
    if result.clip is None:
        why = str(result.error).replace(path, "the upload").replace(repr(path), "the upload")
        raise InvalidVideo(why)
    return result.clip


def _check_pixels(width: int, height: int, what: str) -> None:
    if width * height > MOST_PIXELS:
        raise InvalidInput(
            f"the {what} has {width} x {height} pixels: give at most {MOST_PIXELS / 1e6:.0f} "
            f"million."
        )


def _scenes() -> list[Media]:
    """Those of demos/pictures, with their questions."""
    asked: dict[int, list[demo.Item]] = {}
    for item in demo.load_items(SCENES):
        asked.setdefault(id(item.image), []).append(item)
    return [
        Media(
            f"scene {number}",
            image=items[0].image,
            answers=tuple((item.question, item.answer) for item in items),
        )
        for number, items in enumerate(asked.values(), 1)
    ]


def _clips() -> list[Media]:
    from vtc_zoo import moving

    found = []
    for number, (_, frames, asked) in enumerate(moving.test_set(CLIPS, 5, CLIP_SEED), 1):
        answers = tuple((question.text, question.answer) for question in asked)
        found.append(Media(f"clip {number}", clip=_drawn(frames, moving.FPS), answers=answers))
    return found


def _drawn(frames: np.ndarray, fps: float) -> Any:
    """A clip that no file holds."""
    from ..video.sampling import VideoInfo

    count, height, width = frames.shape[:3]
    info = VideoInfo(count, fps, count / fps, width, height, 0, "drawn")
    return video.Clip(frames, _times(count, fps), tuple(range(count)), info)


def _times(count: int, fps: float) -> tuple[float, ...]:
    return tuple(number / fps for number in range(count))


def thumbnails(pictures: Sequence[Image.Image], side: int) -> list[Image.Image]:
    """Copies that fit into a square."""
    out = [picture.copy() for picture in pictures]
    for picture in out:
        picture.thumbnail((side, side))
    return out
