"""A titled table of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .text import BACKGROUND, FAINT, INK, Color, Picture, fitted, font, wrapped

RIGHT: Color = (20, 122, 62)
WRONG: Color = (190, 44, 36)

#: fill, edge and meaning of the boxes in the legend
LEGEND: tuple[tuple[Color, Color, str], ...] = (
    ((168, 176, 190), INK, "kept"),
    ((139, 192, 226), (70, 140, 190), "merged into the kept patch with that outline"),
    ((26, 27, 30), (26, 27, 30), "dropped"),
)


@dataclass(frozen=True)
class Cell:
    """A picture of a sheet with its caption; `right` colours the caption."""

    picture: Picture
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class Group:
    """Columns of a sheet under one picture, whose caption stands beside it."""

    head: Cell
    columns: tuple[str, ...]


def sheet(
    title: str,
    groups: Sequence[Group],
    rows: Sequence[tuple[str, Sequence[Cell | None]]],
    note: str = "",
) -> Picture:
    """A titled table of pictures, all of one size, with a legend and a note below.

    `rows` have one cell per column of all groups; the first line of their label is the name.
    """
    shown = [cell.picture for _, cells in rows for cell in cells if cell]
    wide, high = max(p.width for p in shown), max(p.height for p in shown)
    margin, gap, apart, under = 24, 12, 26, 30
    names, small = font(15), font(13)
    labels = [line for name, _ in rows for line in name.split("\n")]
    left = margin + max(int(names.getlength(line)) for line in labels) + 20
    starts, x = [], left
    for group in groups:
        starts.append([x + c * (wide + gap) for c in range(len(group.columns))])
        x = starts[-1][-1] + wide + apart
    columns = [x for group in starts for x in group]
    top = margin + 64 + max(group.head.picture.height for group in groups)
    foot = top + (high + under) * len(rows) + 6
    needed = (margin + int(font(20).getlength(title)), left + _legend_width())
    width = max(columns[-1] + wide, left + int(small.getlength(note)), *needed) + margin
    out = Image.new("RGB", (width, foot + 58), BACKGROUND)
    draw = ImageDraw.Draw(out)
    draw.text((margin, margin - 6), title, INK, font(20))
    for group, places in zip(groups, starts, strict=True):
        head = group.head.picture
        out.paste(head, (places[0], margin + 34))
        beside = places[0] + head.width + 14
        text = wrapped(group.head.caption, names, places[-1] + wide - beside)
        draw.multiline_text((beside, margin + 34), text, INK, names, None, 6)
        for place, name in zip(places, group.columns, strict=True):
            draw.text((place + wide / 2, top - 8), name, INK, names, "ms")
    for r, (name, cells) in enumerate(rows):
        y = top + r * (high + under)
        lines = name.split("\n")
        for i, line in enumerate(lines):
            at = y + high / 2 + 20 * (i - (len(lines) - 1) / 2)
            draw.text((margin, at), line, FAINT if i else INK, small if i else names, "lm")
        for place, cell in zip(columns, cells, strict=True):
            if cell is None:
                draw.text((place + wide / 2, y + high / 2), "-", FAINT, names, "mm")
                continue
            out.paste(cell.picture, (place, y))
            ink = FAINT if cell.right is None else RIGHT if cell.right else WRONG
            fitted(draw, (place + wide / 2, y + high + 4), cell.caption, wide, ink)
    _legend(draw, left, foot)
    draw.text((left, foot + 28), note, FAINT, small)
    return out


def page(title: str, blocks: Sequence[tuple[str, Picture]], width: int = 1240) -> Picture:
    """Pictures with their names above them, in lines as long as `width` allows, and a legend."""
    margin, gap, head = 24, 22, 24
    names, whole = font(15), wrapped(title, font(20), width - 2 * margin)
    top = margin + 26 * len(whole.split("\n")) + 10
    at, x, y, line = [], margin, top, 0
    for name, picture in blocks:
        wide = max(picture.width, int(names.getlength(name)))
        if x > margin and x + wide > width - margin:
            x, y, line = margin, y + line + gap, 0
        at.append((x, y))
        x, line = x + wide + gap, max(line, picture.height + head)
    right = max(
        x + max(picture.width, int(names.getlength(name)))
        for (x, _), (name, picture) in zip(at, blocks, strict=True)
    )
    right = max(right, margin + _legend_width(), margin + int(font(20).getlength(whole)))
    out = Image.new("RGB", (right + margin, y + line + gap + 30), BACKGROUND)
    draw = ImageDraw.Draw(out)
    draw.multiline_text((margin, margin - 6), whole, INK, font(20))
    for (x, y), (name, picture) in zip(at, blocks, strict=True):
        draw.text((x, y), name, INK, names)
        out.paste(picture, (x, y + head))
    _legend(draw, margin, out.height - 32)
    return out


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """Kept, merged, dropped."""
    for fill, edge, text in LEGEND:
        draw.rectangle((x, y, x + 14, y + 14), fill, edge, 1)
        draw.text((x + 21, y + 7), text, INK, font(13), "lm")
        x += 45 + int(font(13).getlength(text))


def _legend_width() -> int:
    return sum(45 + int(font(13).getlength(text)) for _, _, text in LEGEND) - 24
