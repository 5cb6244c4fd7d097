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


class Unreadable(Exception):
    """One backend cannot read the file; another might. Never leaves `vtc.video`."""


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
