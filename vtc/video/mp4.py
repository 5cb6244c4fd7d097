"""Read in the index of an mp4 or mov file what decides whether decord gives its right frames."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .files import MOST_FRAMES

UNITS = 256  # before the first picture of a frame; more is no H.264


@dataclass(frozen=True)
class Mp4:
    """What the first video track of an mp4 or mov file says about itself."""

    codec: str  # four letters, "avc1"
    profile: int | None  # of H.264
    sides: tuple[int, int]  # width and height of a frame as it is stored
    rotation: int  # degrees clockwise: 0, 90, 180, 270
    closed: bool  # nothing behind a key frame needs, or is shown before, what is before it
    cut: bool  # an edit list hides some of the frames
    starts: np.ndarray = field(repr=False)  # seconds, ascending; empty where it cannot be told

    @classmethod
    def of(cls, path: str) -> Mp4 | None:
        """None where the file is something else, or its index is damaged."""
        index = _index(path)
        for track in _boxes(index, b"trak"):
            if _at(track, b"mdia", b"hdlr")[8:12] != b"vide":
                continue
            tables = _at(track, b"mdia", b"minf", b"stbl")
            entries = _at(tables, b"stsd")
            avc = entries[entries.find(b"avcC") + 4 :] if b"avcC" in entries else b""
            shown = _shown(tables)
            closed = len(shown) > 0 and _closed(tables, shown)
            if closed and avc:
                closed = _keys_are_idr(path, tables, (avc[4] & 3) + 1 if len(avc) > 4 else 4)
            clock = _clock(_at(track, b"mdia", b"mdhd"))
            return cls(
                codec=entries[12:16].decode("latin-1"),
                profile=avc[1] if len(avc) > 1 else None,
                sides=(int.from_bytes(entries[40:42]), int.from_bytes(entries[42:44])),
                rotation=_turn(_at(track, b"tkhd")),
                closed=closed,
                cut=len(shown) > 0 and _cut(index, track, shown),
                starts=np.sort(shown) / max(clock, 1),
            )
        return None


def _shown(tables: bytes) -> np.ndarray:
    """Times of the frames as they are stored: int64 [frames], none where tables are damaged."""
    lasts, delays = _rows(tables, b"stts"), _rows(tables, b"ctts")
    count = int(lasts[:, 0].sum())
    if count > MOST_FRAMES or (len(delays) and int(delays[:, 0].sum()) != count):
        return np.zeros(0, np.int64)
    durations = np.repeat(lasts[:, 1], lasts[:, 0])
    starts = np.cumsum(durations) - durations
    if len(delays):
        signed = delays[:, 1].astype(np.uint32).view(np.int32)
        starts += np.repeat(signed, delays[:, 0])
    return starts


def _closed(tables: bytes, shown: np.ndarray) -> bool:
    """Whether all that is stored behind a key frame is shown behind it."""
    keys = _words(tables, b"stss") - 1
    behind = np.minimum.accumulate(shown[::-1])[::-1]
    return bool((keys < len(shown)).all() and (behind[keys] == shown[keys]).all())


def _keys_are_idr(path: str, tables: bytes, width: int) -> bool:
    """Whether every key frame of H.264 is one that nothing reaches across (NAL unit type 5).

    Units follow each other behind their lengths of `width` bytes; pictures are types 1 to 5.
    """
    try:
        places = _places(tables)
        keys = _words(tables, b"stss") - 1
        starts = places[keys] if len(keys) else places
    except (ValueError, IndexError):
        return False
    with open(path, "rb") as stream:
        for start in starts.tolist():
            for _ in range(UNITS):
                stream.seek(start)
                unit = stream.read(width + 1)
                kind = unit[width] & 31 if len(unit) > width else 0
                if 1 <= kind <= 5 or len(unit) <= width:
                    break
                start += width + int.from_bytes(unit[:width])
            if kind != 5:
                return False
    return True


def _places(tables: bytes) -> np.ndarray:
    """Where in the file each frame starts: int64 [frames]. They lie in chunks, side by side."""
    same = int.from_bytes(_at(tables, b"stsz")[4:8])
    count, *_ = sizes = _words(tables, b"stsz")
    sizes = np.full(min(count, MOST_FRAMES), same) if same else sizes[1:]
    wide = np.frombuffer(_at(tables, b"co64")[8:], ">u8").astype(np.int64)
    chunks = wide if len(wide) else _words(tables, b"stco")
    runs = _words(tables, b"stsc").reshape(-1, 3)
    lengths = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0], len(chunks) + 1)))
    if lengths.sum() != len(sizes):
        raise ValueError("chunks and frames differ in number")
    before = np.cumsum(sizes) - sizes
    shift = np.maximum(chunks - before[np.cumsum(lengths) - lengths], 0)
    return before + np.repeat(shift, lengths)


def _cut(index: bytes, track: bytes, shown: np.ndarray) -> bool:
    """Whether the edit list leaves out frames: its parts are (length, first time, speed)."""
    box = _at(track, b"edts", b"elst")
    wide = box[:1] == b"\x01"
    parts = [
        p for p in struct.iter_unpack(">Qqi" if wide else ">Iii", _part(box, wide)) if p[1] >= 0
    ]
    if not parts:
        return False
    clock, movie = _clock(_at(track, b"mdia", b"mdhd")), _clock(_at(index, b"mvhd"))
    length, first, _ = parts[0]
    last = first + length * clock / max(movie, 1)
    hidden = length > 0 and last + clock / max(movie, 1) <= shown.max()
    return len(parts) > 1 or first > shown.min() or hidden


def _part(box: bytes, wide: bool) -> bytes:
    """Entries of an edit list, as many whole ones as there are."""
    size = 20 if wide else 12
    return box[8 : 8 + (len(box) - 8) // size * size] if len(box) > 8 else b""


def _clock(header: bytes) -> int:
    """Ticks per second of an mvhd or mdhd box."""
    at = 20 if header[:1] == b"\x01" else 12
    return int.from_bytes(header[at : at + 4])


def _turn(header: bytes) -> int:
    """Rotation of a tkhd box: its matrix is behind 40 bytes, or 52 where times have 64 bits."""
    at = 52 if header[:1] == b"\x01" else 40
    if len(header) < at + 8:
        return 0
    a, b = struct.unpack(">ii", header[at : at + 8])
    return round(math.degrees(math.atan2(b, a)) / 90) % 4 * 90


def _rows(tables: bytes, name: bytes) -> np.ndarray:
    """Runs of equal values in a table of an mp4: int64 [runs, 2], how many and which value."""
    words = _words(tables, name)
    return words[: len(words) // 2 * 2].reshape(-1, 2)


def _words(tables: bytes, name: bytes) -> np.ndarray:
    """Numbers of a table, behind its version and count: int64."""
    data = _at(tables, name)[8:]
    return np.frombuffer(data[: len(data) // 4 * 4], ">u4").astype(np.int64)


def _index(path: str) -> bytes:
    """Content of the moov box; the boxes before it are skipped, not read."""
    end = os.path.getsize(path)
    with open(path, "rb") as stream:
        while len(head := stream.read(8)) == 8:
            size, skip = int.from_bytes(head[:4]), 8
            if size == 1:
                size, skip = int.from_bytes(stream.read(8)), 16
            if size < skip or stream.tell() - skip + size > end:
                break
            if head[4:] == b"moov":
                return stream.read(size - skip)
            stream.seek(size - skip, os.SEEK_CUR)
    return b""


def _at(data: bytes, *names: bytes) -> bytes:
    """Content of the box at this path, empty if there is none."""
    for name in names:
        data = next(_boxes(data, name), b"")
    return data


def _boxes(data: bytes, name: bytes) -> Iterator[bytes]:
    """Contents of the boxes of this name that lie side by side in `data`."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        if size < 8:
            return
        if data[at + 4 : at + 8] == name:
            yield data[at + 8 : at + size]
        at += size
