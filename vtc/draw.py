"""Pictures of plans: kept patches stay bright, merged ones take the colour of the token they went
into, dropped ones go dark. The grid comes from the recorded layout, whatever it is.

    with vtc.attach(model, "divprune", keep=0.25, merge="nearest") as session:
        model.generate(**inputs)
    overlay(image, session.trace).save("kept.png")
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageChops, ImageDraw, ImageFont

from .context import Layout
from .errors import InvalidInput
from .session import Reduction

Picture = Image.Image
Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND: Color = (250, 250, 248)
INK: Color = (38, 40, 46)
FAINT: Color = (122, 126, 136)
RIGHT: Color = (20, 122, 62)
WRONG: Color = (190, 44, 36)
EDGE: Color = (255, 255, 255)
BOX: Color = (205, 210, 218)
GAP = 8

#: fill, edge and meaning of the boxes in the legend
LEGEND: tuple[tuple[Color, Color, str], ...] = (
    ((168, 176, 190), INK, "kept"),
    ((139, 192, 226), (70, 140, 190), "merged into the kept patch with that outline"),
    ((26, 27, 30), (26, 27, 30), "dropped"),
)

#: brightness of lost patches, first stage to last stage, and of merged ones under their tint
DARK, DUSK, UNDER = 0.13, 0.36, 0.7
TINT, LINE = 0.55, 0.5


@dataclass(frozen=True)
class Fate:
    """What became of the tokens of one image, up to and including one stage.

    Attributes:
        home: for every original token the place of the kept token it lives in, -1 when lost.
        lost: for every original token the stage that lost it, -1 while it lives.
        layout: original grid, None where unknown.
        stage, stages: number of this stage, and of all.
        label: site and method.
    """

    home: tuple[int, ...]
    lost: tuple[int, ...]
    layout: Layout | None
    stage: int
    stages: int
    label: str

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the kept tokens."""
        return tuple(place for place, home in enumerate(self.home) if home == place)

    @property
    def merged(self) -> tuple[int, ...]:
        """Places of the tokens that were averaged into a kept token."""
        return tuple(p for p, home in enumerate(self.home) if home not in (-1, p))

    @property
    def hosts(self) -> frozenset[int]:
        """Places of the kept tokens that took others in."""
        return frozenset(self.home[place] for place in self.merged)

    @property
    def caption(self) -> str:
        return f"{self.label}: {len(self.kept)} of {len(self.home)} tokens"


def fates(reductions: Reduction | Iterable[Reduction], row: int = 0) -> list[Fate]:
    """Follow the tokens of image `row` through the reductions of one forward, stage by stage.

    Places are those of the original grid (`Reduction.source_in`), so stages compose. Of a longer
    trace the last forward is read.
    """
    stages = _last_forward(reductions)
    first = stages[0]
    if not 0 <= row < len(first.n_in):
        raise InvalidInput(f"row {row}: these reductions have {len(first.n_in)} image(s).")
    layout = first.layout[row]
    places = _places(first, row)
    n = layout.n if layout is not None and layout.n > max(places) else max(places) + 1
    home, lost = list(range(n)), [-1] * n
    out = []
    for number, reduction in enumerate(stages):
        moves = _moves(reduction, row)
        home = [-1 if old < 0 else moves.get(old, -1) for old in home]
        lost = [number if h < 0 and s < 0 else s for h, s in zip(home, lost, strict=True)]
        fits = layout if layout is not None and layout.n == n else None
        label = f"{reduction.site} {reduction.method}"
        out.append(Fate(tuple(home), tuple(lost), fits, number, len(stages), label))
    return out


def overlay(
    image: Picture | Sequence[Picture],
    reductions: Reduction | Iterable[Reduction],
    row: int = 0,
    *,
    size: int = 360,
    stages: Literal["all", "last"] = "all",
    captions: bool = True,
) -> Picture:
    """Draw what was kept of an image or video.

    Args:
        image: the picture as the model saw it (after cropping), or the frames of a video.
        reductions: one reduction, or the stages of one forward, such as `session.trace`.
        row: which image of the batch.
        size: longer side of one panel in pixels, rounded so that every patch is whole pixels.
        stages: "all" puts every stage side by side, "last" draws the final state alone, where
            patches lost in later stages stay less dark.
        captions: write site, method and counts under each panel.

    Returns:
        One panel per stage. The frames of a video stand in a row, the stages then one below the
        other. Without a known grid the panel is a strip of the tokens in reading order below the
        picture, and says so.
    """
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames:
        raise InvalidInput("overlay needs a picture, or at least one frame.")
    story = fates(reductions, row)
    video = story[0].layout is not None and story[0].layout.frames > 1
    chosen = story if stages == "all" else story[-1:]
    panels = []
    for fate in chosen:
        panel = _panel(frames, fate, size)
        panels.append(_captioned(panel, [(fate.caption, INK)]) if captions else panel)
    return join(panels, down=video)


def as_seen(processor: Any, pixels: Any) -> list[Picture]:
    """The pictures that `pixel_values` hold, cropped and resized as the model gets them.

    Empty when they do not hold whole pictures (Qwen packs loose patches, nothing is cropped).
    """
    if pixels is None or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return []
    tool, whole = processor.image_processor, pixels.float().flatten(0, -4)
    std, mean = (whole.new_tensor(v)[:, None, None] for v in (tool.image_std, tool.image_mean))
    shown = ((whole * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in shown.cpu()]


def prompt_picture(
    images: Sequence[Picture], seen: Sequence[Picture], trace: Iterable[Reduction]
) -> Picture:
    """Overlays of all images of a prompt; `seen` comes from `as_seen` and may be empty."""
    stages = _last_forward(trace)
    rows = len(stages[0].n_in)
    frames = [1 if layout is None else layout.frames for layout in stages[0].layout]
    shown = seen or images
    if len(shown) == rows:  # one whole picture, or one tile, per run of tokens
        images = shown
    elif len(shown) == sum(frames):  # several runs, frames of a video, are one row
        ends = list(accumulate(frames))
        clips = [shown[end - n : end] for n, end in zip(frames, ends, strict=True)]
        drawn = [overlay(clip, stages, row) for row, clip in enumerate(clips)]
        return join(drawn, down=True)
    elif rows != len(images):
        raise InvalidInput(f"cannot draw: {len(images)} image(s) became {rows} runs of tokens.")
    elif seen:  # several tiles in one run of tokens have no grid in common
        stages = [replace(stage, layout=(None,) * rows) for stage in stages]
    return join([overlay(image, stages, row) for row, image in enumerate(images)], down=True)


def save(image: Picture, path: Path) -> None:
    """Write a picture, make its folder, say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(f"\npicture of the kept patches: {path}")


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
    names, small = _font(15), _font(13)
    labels = [line for name, _ in rows for line in name.split("\n")]
    left = margin + max(int(names.getlength(line)) for line in labels) + 20
    starts, x = [], left
    for group in groups:
        starts.append([x + c * (wide + gap) for c in range(len(group.columns))])
        x = starts[-1][-1] + wide + apart
    columns = [x for group in starts for x in group]
    top = margin + 64 + max(group.head.picture.height for group in groups)
    foot = top + (high + under) * len(rows) + 6
    needed = (margin + int(_font(20).getlength(title)), left + _legend_width())
    width = max(columns[-1] + wide, left + int(small.getlength(note)), *needed) + margin
    out = Image.new("RGB", (width, foot + 58), BACKGROUND)
    draw = ImageDraw.Draw(out)
    draw.text((margin, margin - 6), title, INK, _font(20))
    for group, places in zip(groups, starts, strict=True):
        head = group.head.picture
        out.paste(head, (places[0], margin + 34))
        beside = places[0] + head.width + 14
        text = _wrapped(group.head.caption, names, places[-1] + wide - beside)
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
            _fitted(draw, (place + wide / 2, y + high + 4), cell.caption, wide, ink)
    _legend(draw, left, foot)
    draw.text((left, foot + 28), note, FAINT, small)
    return out


def token_color(place: int) -> Color:
    """A colour of its own for every place: neighbours are far apart on the colour circle."""
    hue = (place * 0.61803398875) % 1.0
    light = (0.58, 0.7, 0.48)[place % 3]
    r, g, b = colorsys.hls_to_rgb(hue, light, 0.7)
    return round(r * 255), round(g * 255), round(b * 255)


def _last_forward(reductions: Reduction | Iterable[Reduction]) -> list[Reduction]:
    """The trailing reductions that belong together: each site at most once, counts chained."""
    entries = [reductions] if isinstance(reductions, Reduction) else list(reductions)
    if not entries:
        raise InvalidInput("no reductions to draw: run the model while the session is attached.")
    # Every layer's cache is a story of its own: what the prefill dropped is drawn before it.
    entries = [e for e in entries if not e.site.startswith("cache")] or entries[-1:]
    out = [entries[-1]]
    for entry in reversed(entries[:-1]):
        if entry.n_out != out[0].n_in or entry.site in {e.site for e in out}:
            break
        out.insert(0, entry)
    return out


def _places(reduction: Reduction, row: int) -> list[int]:
    """Original places of the tokens that came in."""
    return [int(p) for p in reduction.source_in[row].tolist()[: reduction.n_in[row]]]


def _moves(reduction: Reduction, row: int) -> dict[int, int]:
    """Original place of each token that came in -> place of the token it lives in afterwards."""
    places = _places(reduction, row)
    if reduction.plan is None:
        return {p: p for p in places}
    slots = reduction.plan.destination()[row].tolist()
    kept = [places[i] for i in reduction.plan.index[row].tolist()]
    return {p: kept[slot] if slot >= 0 else -1 for p, slot in zip(places, slots, strict=False)}


def _panel(frames: Sequence[Picture], fate: Fate, size: int) -> Picture:
    """All frames of one stage, or the strip when the grid is unknown."""
    if fate.layout is None:
        return _strip(frames[0], fate, size)
    grid, count = fate.layout, fate.layout.frames
    area = grid.height * grid.width
    panels = []
    for frame in range(count):
        picture = frames[min(frame * len(frames) // count, len(frames) - 1)]
        cells = range(frame * area, (frame + 1) * area)
        width, height = _whole(picture.size, size, grid.width, grid.height)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        panels.append(_shade(resized, fate, cells, grid.width, grid.height))
    return join(panels, gap=GAP // 2)


def _whole(picture: tuple[int, int], size: int, columns: int, rows: int) -> tuple[int, int]:
    """Panel size with the picture's shape where every patch is a whole number of pixels."""
    scale = size / max(picture)
    across, down = picture[0] * scale / columns, picture[1] * scale / rows
    return columns * max(1, round(across)), rows * max(1, round(down))


def _shade(base: Picture, fate: Fate, cells: range, columns: int, rows: int) -> Picture:
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


def _outline(base: Picture, fate: Fate, cells: range, columns: int, rows: int) -> Picture:
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
    told = _captioned(resized, [("grid unknown: tokens in reading order", FAINT)])
    return join([told, _shade(base, fate, range(n), columns, rows)], down=True, gap=2)


def _captioned(picture: Picture, lines: Sequence[tuple[str, Color]]) -> Picture:
    """Text below a picture."""
    out = Image.new("RGB", (picture.width, picture.height + 18 * len(lines) + 2), BACKGROUND)
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    for i, (text, ink) in enumerate(lines):
        _fitted(draw, (out.width / 2, picture.height + 18 * i + 4), text, out.width, ink)
    return out


def _fitted(
    draw: ImageDraw.ImageDraw, top: tuple[float, float], text: str, width: int, ink: Color
) -> None:
    """Centred text in the largest size that fits, shortened when none does."""
    size = 13
    while size > 9 and _font(size).getlength(text) > width:
        size -= 1
    short = text
    while short and _font(size).getlength(short + "..." * (short != text)) > width:
        short = short[:-1]
    draw.text(top, short + "..." * (short != text), ink, _font(size), "ma")


def _wrapped(text: str, font: Font, width: int) -> str:
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


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """Kept, merged, dropped."""
    for fill, edge, text in LEGEND:
        draw.rectangle((x, y, x + 14, y + 14), fill, edge, 1)
        draw.text((x + 21, y + 7), text, INK, _font(13), "lm")
        x += 45 + int(_font(13).getlength(text))


def _legend_width() -> int:
    return sum(45 + int(_font(13).getlength(text)) for _, _, text in LEGEND) - 24


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
