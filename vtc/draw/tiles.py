"""Tiles that a processor cut a picture into, put back where they were.

Models whose tiles are runs, or frames of a run, of their own are not told how the tiles stand. What
they were given says it: of all arrangements the one that gives the picture back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageStat

from .text import GAP, Picture, join

#: pixels along the tiles that are compared, and the mean difference (of 255) that still is likeness
SAMPLE, ALIKE = 24, 16.0


@dataclass(frozen=True)
class Arrangement:
    """Tiles in reading order in `columns`; number `whole` shows the whole picture, None: none."""

    columns: int
    rows: int
    whole: int | None = None

    def compose(self, panels: Sequence[Picture]) -> Picture:
        """The panels of all tiles, one each, in their places; the whole picture to the left."""
        tiles = [panel for number, panel in enumerate(panels) if number != self.whole]
        lines = [tiles[i : i + self.columns] for i in range(0, len(tiles), self.columns)]
        mosaic = join([join(line, gap=2) for line in lines], down=True, gap=2)
        return mosaic if self.whole is None else join([panels[self.whole], mosaic], gap=GAP // 2)


def arrange(picture: Picture, tiles: Sequence[Picture]) -> Arrangement | None:
    """How the tiles of a picture stand, None when no arrangement looks like it."""
    if len(tiles) < 2:
        return None
    small = [tile.convert("RGB").resize((SAMPLE, SAMPLE), Image.Resampling.BOX) for tile in tiles]
    found = [(_difference(picture, small, way), way) for way in _ways(len(tiles))]
    best = min(error for error, _ in found)
    if best > ALIKE:
        return None
    shape = math.log(picture.width / picture.height)
    near = [way for error, way in found if error <= best + 0.5]  # plain pictures: many are alike
    return min(near, key=lambda way: abs(math.log(way.columns / way.rows) - shape))


def _ways(n: int) -> Iterator[Arrangement]:
    """All arrangements of n tiles, of which the first or the last may be the whole picture."""
    for whole, left in ((None, n), (0, n - 1), (n - 1, n - 1)):
        for columns in range(1, left + 1):
            if left % columns == 0 and left > 1:
                yield Arrangement(columns, left // columns, whole)


def _difference(picture: Picture, tiles: Sequence[Picture], way: Arrangement) -> float:
    """Mean difference of the tiles put together and the picture made as large."""
    canvas = Image.new("RGB", (way.columns * SAMPLE, way.rows * SAMPLE))
    places = [i for i in range(len(tiles)) if i != way.whole]
    for number, place in enumerate(places):
        at = (number % way.columns * SAMPLE, number // way.columns * SAMPLE)
        canvas.paste(tiles[place], at)
    errors = [_unlike(canvas, picture)]
    if way.whole is not None:
        errors.append(_unlike(tiles[way.whole], picture))
    return max(errors)


def _unlike(one: Picture, picture: Picture) -> float:
    other = picture.convert("RGB").resize(one.size, Image.Resampling.BOX)
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3
