"""Pictures with their patches darkened, tinted and outlined."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageChops, ImageDraw

from ..context import WHOLE, Part
from ..errors import InvalidInput
from ..session import Reduction
from .fate import Fate, Stages, choose, fates
from .text import BACKGROUND, FAINT, GAP, INK, Color, Picture, captioned, join

EDGE: Color = (255, 255, 255)
BOX: Color = (205, 210, 218)

#: brightness of lost patches, first stage to last stage, and of merged ones under their tint
DARK, DUSK, UNDER = 0.13, 0.36, 0.7
TINT, LINE = 0.55, 0.5


def overlay(
    image: Picture | Sequence[Picture],
    reductions: Reduction | Iterable[Reduction],
    row: int = 0,
    *,
    size: int = 360,
    stages: Stages = "all",
    captions: bool = True,
) -> Picture:
    """Draw what was kept of an image or video.

    Args:
        image: the picture as the model saw it (after cropping; the whole picture where it was cut
            into tiles), or the frames of a video.
        reductions: one reduction, or the stages of one forward, such as `session.trace`.
        row: which image of the batch.
        size: longer side of one panel in pixels, rounded so that every patch is whole pixels.
        stages: "all" puts every stage side by side, "last" draws the final state alone, where
            patches lost in later stages stay less dark, a number one stage of `stage_labels` (0 is
            the first, -1 the last).
        captions: write site, method and counts under each panel.

    Returns:
        One panel per stage. The frames of a video stand in a row, the stages then one below the
        other. An image that was cut into tiles is there twice: with the tokens of the whole
        picture, and with those of its tiles. Without a known grid the panel is a strip of the
        tokens in reading order below the picture, and says so.
    """
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames:
        raise InvalidInput("overlay needs a picture, or at least one frame.")
    story = fates(reductions, row)
    grid = story[0].layout
    wide = bool(story[0].parts) or (grid is not None and grid.frames > 1)
    panels = []
    for fate in choose(story, stages):
        panel = _panel(frames, fate, size)
        panels.append(captioned(panel, [(fate.caption, INK)]) if captions else panel)
    return join(panels, down=wide)


def token_color(place: int) -> Color:
    """A colour of its own for every place: neighbours are far apart on the colour circle."""
    hue = (place * 0.61803398875) % 1.0
    light = (0.58, 0.7, 0.48)[place % 3]
    r, g, b = colorsys.hls_to_rgb(hue, light, 0.7)
    return round(r * 255), round(g * 255), round(b * 255)


def views(frames: Sequence[Picture], fate: Fate) -> list[tuple[Picture, Part]]:
    """Every grid of the tokens of one image or video, and the picture below it; none where the
    grid is unknown."""
    grid = fate.layout
    if fate.parts:
        return [(_inside(frames[0], part.box), part) for part in fate.parts]
    if grid is None:
        return []
    parts = [Part(i * grid.cells, grid.height, grid.width, WHOLE) for i in range(grid.frames)]
    which = [min(i * len(frames) // len(parts), len(frames) - 1) for i in range(len(parts))]
    return [(frames[i], part) for i, part in zip(which, parts, strict=True)]


def shaded(picture: Picture, part: Part, fate: Fate, size: int) -> Picture:
    """The panel of one grid."""
    whole = _whole(picture.size, size, part.width, part.height)
    resized = picture.convert("RGB").resize(whole, Image.Resampling.LANCZOS)
    return _shade(resized, fate, part.places, part.width, part.height)


def _panel(frames: Sequence[Picture], fate: Fate, size: int) -> Picture:
    """All frames, or all parts, of one stage; the strip when the grid is unknown."""
    panels = [shaded(picture, part, fate, size) for picture, part in views(frames, fate)]
    return join(panels, gap=GAP // 2) if panels else _strip(frames[0], fate, size)


def _inside(picture: Picture, box: tuple[float, float, float, float]) -> Picture:
    """The part of a picture in a box, given in shares of it; black beyond its edges."""
    wide, high = picture.size
    left, top, right, bottom = box
    pixels = (round(left * wide), round(top * high), round(right * wide), round(bottom * high))
    return picture.convert("RGB").crop(pixels)


def _whole(picture: tuple[int, int], size: int, columns: int, rows: int) -> tuple[int, int]:
    """Panel size with the picture's shape where every patch is a whole number of pixels."""
    scale = size / max(picture)
    across, down = picture[0] * scale / columns, picture[1] * scale / rows
    return columns * max(1, round(across)), rows * max(1, round(down))


def _shade(base: Picture, fate: Fate, cells: Sequence[int], columns: int, rows: int) -> Picture:
    """Darken, tint and outline the patches of one frame."""
    light = Image.new("RGB", (columns, rows), (255, 255, 255))
    color = Image.new("RGB", (columns, rows))
    alpha = Image.new("L", (columns, rows))
    for i, place in enumerate(cells):
        at = (i % columns, i // columns)
        home = fate.home[place]
        if home == place:
            level = 1.0
        elif home >= 0:
            level = UNDER
            color.putpixel(at, token_color(home))
            alpha.putpixel(at, round(255 * TINT))
        else:
            level = DARK + (DUSK - DARK) * fate.lost[place] / max(1, fate.stages - 1)
        light.putpixel(at, (round(255 * level),) * 3)
    nearest = Image.Resampling.NEAREST
    out = ImageChops.multiply(base, light.resize(base.size, nearest))
    tint = color.resize(base.size, nearest)
    out = Image.composite(tint, out, alpha.resize(base.size, nearest))
    return _outline(out, fate, cells, columns, rows)


def _outline(base: Picture, fate: Fate, cells: Sequence[int], columns: int, rows: int) -> Picture:
    """A line around every kept patch, in its own colour when it took others in."""
    wide, high = base.width // columns, base.height // rows
    if min(wide, high) < 5 or len(fate.kept) == len(fate.home):
        return base
    out, soft, hosts = base.copy(), base.copy(), fate.hosts
    draw, faint = ImageDraw.Draw(out), ImageDraw.Draw(soft)
    for i, place in enumerate(cells):
        if fate.home[place] != place:
            continue
        x, y = i % columns * wide, i // columns * high
        box = (x, y, x + wide - 1, y + high - 1)
        if place in hosts:
            for each in (draw, faint):
                each.rectangle(box, None, token_color(place), 2)
        else:
            faint.rectangle(box, None, EDGE, 1)
    return Image.blend(out, soft, LINE)


def _strip(picture: Picture, fate: Fate, size: int) -> Picture:
    """The picture, then its tokens in reading order as small boxes: the grid is not known."""
    width, height = _whole(picture.size, size, 1, 1)
    n = len(fate.home)
    side = max(4, min(14, math.isqrt(width * max(1, size // 3) // n)))
    columns = max(1, min(n, width // side))
    rows = math.ceil(n / columns)
    base = Image.new("RGB", (columns * side, rows * side), BOX)
    if n % columns:
        unused = (n % columns * side, (rows - 1) * side, base.width, base.height)
        base.paste(BACKGROUND, unused)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    told = captioned(resized, [("grid unknown: tokens in reading order", FAINT)])
    return join([told, _shade(base, fate, range(n), columns, rows)], down=True, gap=2)
