"""What can be told about a file before a decoder sees it."""

from __future__ import annotations

import os
import stat

from ..errors import InvalidVideo

# ffmpeg reads pictures as videos of one frame
PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}


#: of a frame, unless somebody asks for more: 8K has 7680 x 4320
MOST_PIXELS = 2**25
#: a day of video at 25 a second; every one is looked at before any is decoded
MOST_FRAMES = 2_500_000
#: bytes of address space of a decoder; Python and the libraries take 0.4 GiB of it
MEMORY = 4 * 2**30
LEAST_MEMORY = 2**30


class Unreadable(Exception):
    """One backend cannot read the file; another might. Never leaves `vtc.video`."""


def check_sides(width: int, height: int, most: int) -> None:
    """Refuse frames of more than `most` pixels; nothing has been decoded yet."""
    if width * height > most:
        raise Unreadable(
            f"its frames have {width} x {height} pixels, and at most {most:,} are read: give a "
            f"higher max_pixels (--max-pixels) if that is meant"
        )


def check_count(frames: int) -> None:
    """Refuse an index that would take minutes to look through."""
    if frames > MOST_FRAMES:
        raise Unreadable(
            f"it lists {frames:,} frames, and at most {MOST_FRAMES:,} are read: cut it into parts"
        )


def checked(path: str | os.PathLike[str]) -> str:
    """The path as text, if it is a file with something in it that is no picture."""
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise InvalidVideo(f"{name} is not a file: give the path of one video.")
        with open(name, "rb") as stream:
            head = stream.read(16)
    except FileNotFoundError as error:
        raise InvalidVideo(f"no such file: {name}") from error
    except (OSError, ValueError) as error:  # also a name that is too long, or that has a zero byte
        why = getattr(error, "strerror", None) or error
        raise InvalidVideo(f"cannot open {name}: {why}.") from error
    if not head:
        raise InvalidVideo(f"{name} is empty (0 bytes).")
    for magic, kind in PICTURES.items():
        if head.startswith(magic) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
            raise InvalidVideo(f"{name} is a picture ({kind}), not a video.")
    return name
