"""Words on pictures, the colours of a page, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image
Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND: Color = (250, 250, 248)
INK: Color = (38, 40, 46)
FAINT: Color = (122, 126, 136)
GAP = 8


def join(pictures: Sequence[Picture], *, down: bool = False, gap: int = GAP) -> Picture:
    """Put pictures side by side, or one below the other."""
    if len(pictures) == 1:
        return pictures[0]
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    space = gap * (len(pictures) - 1)
    whole = (max(widths), sum(heights) + space) if down else (sum(widths) + space, max(heights))
    out = Image.new("RGB", whole, BACKGROUND)
    at = 0
    for picture in pictures:
        out.paste(picture, (0, at) if down else (at, 0))
        at += (picture.height if down else picture.width) + gap
    return out


def captioned(picture: Picture, lines: Sequence[tuple[str, Color]]) -> Picture:
    """Text below a picture."""
    out = Image.new("RGB", (picture.width, picture.height + 18 * len(lines) + 2), BACKGROUND)
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    for i, (text, ink) in enumerate(lines):
        fitted(draw, (out.width / 2, picture.height + 18 * i + 4), text, out.width, ink)
    return out


def fitted(
    draw: ImageDraw.ImageDraw, top: tuple[float, float], text: str, width: int, ink: Color
) -> None:
    """Centred text in the largest size that fits, shortened when none does."""
    size = 13
    while size > 9 and font(size).getlength(text) > width:
        size -= 1
    short = text
    while short and font(size).getlength(short + "..." * (short != text)) > width:
        short = short[:-1]
    draw.text(top, short + "..." * (short != text), ink, font(size), "ma")


def wrapped(text: str, font: Font, width: int) -> str:
    """The text with its lines broken so that they fit."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def font(size: int) -> Font:
    return ImageFont.load_default(size)
