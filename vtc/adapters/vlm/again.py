"""Features of images and videos that are used for several prompts: what the hooks noted while they
were encoded belongs to them, and is noted again for every batch of prompts that shares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .hooks import _GRIDS, _MADE, _TILE, _VIDEOS
from .tiles import TILES, Shown
from .tower import ENCODINGS, Encoding


@dataclass(frozen=True)
class Noted:
    """What one prompt's encoding left behind.

    grids: of its tower runs. videos: grids of whole videos. made: images and tokens of each, of its
    projector calls. tile: tokens of a projected image. parts: what
    the tokens of tiled images show. encodings: runs that a session remembers.
    """

    grids: tuple[list[Any], ...]
    videos: tuple[Any, ...]
    made: tuple[tuple[int, int], ...]
    tile: int
    parts: tuple[Shown, ...]
    encodings: tuple[Encoding, ...]


def forget() -> None:
    """Before an encoding: nothing was noted yet."""
    for slot in (_GRIDS, _VIDEOS, _MADE, TILES, ENCODINGS):
        slot.set(())


def noted() -> Noted:
    """Right after an encoding."""
    return Noted(
        _GRIDS.get(), _VIDEOS.get(), _MADE.get(), _TILE.get(), TILES.get(), ENCODINGS.get()
    )


def note(prompts: Sequence[Noted]) -> None:
    """Before a forward: as if the images of all its prompts had just been encoded together."""
    runs = zip(*(one.grids for one in prompts), strict=True)
    _GRIDS.set(tuple([grid for run in same for grid in run] for same in runs))
    _VIDEOS.set(tuple(grid for one in prompts for grid in one.videos))
    calls = zip(*(one.made for one in prompts), strict=True)
    _MADE.set(tuple((sum(images for images, _ in same), same[0][1]) for same in calls))
    _TILE.set(prompts[-1].tile)
    TILES.set(tuple(part for one in prompts for part in one.parts))
    ENCODINGS.set(tuple({id(e): e for one in prompts for e in one.encodings}.values()))
