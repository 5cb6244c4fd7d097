"""Pictures of everything a prompt held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from ..commands.outputs import writing
from ..errors import InvalidInput
from ..session import Reduction
from .fate import Stages, choose, fates, last_forward
from .panels import overlay, shaded, views
from .text import INK, Picture, captioned, join
from .tiles import Arrangement, arrange


def as_seen(processor: Any, pixels: Any) -> list[Picture]:
    """The pictures that `pixel_values` hold, cropped and resized as the model gets them, without
    the empty ones that fill a batch up.

    Empty when they do not hold whole pictures (Qwen packs loose patches, nothing is cropped).
    """
    if pixels is None or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return []
    tool, whole = processor.image_processor, pixels.float().flatten(0, -4)
    if pixels.ndim == 5:
        whole = whole[whole.flatten(1).any(1)]
    std, mean = (whole.new_tensor(v)[:, None, None] for v in (tool.image_std, tool.image_mean))
    shown = ((whole * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in shown.cpu()]


@dataclass(frozen=True)
class Shown:
    """Rows that are drawn together: pictures of each, and the picture that all of them may be tiles
    of."""

    rows: Sequence[int]
    clips: Sequence[Sequence[Picture]]
    whole: Picture | None = None


def prompt_picture(
    images: Sequence[Picture],
    seen: Sequence[Picture],
    trace: Iterable[Reduction],
    *,
    size: int = 360,
    stages: Stages = "all",
) -> Picture:
    """Overlays of all images of a prompt, or of the frames of its video.

    Args:
        images: the pictures, or frames, that the processor was given.
        seen: what `as_seen` makes of its output; may be empty.
        trace: reductions of the last forward, such as `session.trace`.
        size, stages: those of `overlay`.

    Returns:
        One overlay below the other. Tiles of a picture stand where they were cut out, beside the
        view of the whole picture.
    """
    told = last_forward(trace)
    groups = _match(images, seen, told)
    if groups is None:  # several tiles in one run of tokens have no grid in common
        told = [replace(stage, layout=(None,) * len(images)) for stage in told]
        groups = [Shown([row], [[image]]) for row, image in enumerate(images)]
    panels = []
    for group in groups:
        tiles = [tile for clip in group.clips for tile in clip]
        way = None if group.whole is None else arrange(group.whole, tiles)
        if way is not None:
            panels.append(_mosaic(group, told, way, size, stages))
            continue
        for row, clip in zip(group.rows, group.clips, strict=True):
            panels.append(overlay(clip, told, row, size=size, stages=stages))
    return join(panels, down=True)


def _match(
    images: Sequence[Picture], seen: Sequence[Picture], told: Sequence[Reduction]
) -> list[Shown] | None:
    """Which pictures are whose; None where tiles are there but nothing says which tokens they
    are."""
    first = told[0]
    rows, known = len(first.n_in), all(layout is not None for layout in first.layout)
    frames = [1 if layout is None else layout.frames for layout in first.layout]
    tiled = len(images) == rows and any(first.parts)
    shown = [] if tiled else seen or images
    if len(shown) == rows:  # one whole picture, or one tile, per run of tokens
        if seen and known and len(images) == 1 < rows:
            return [Shown(range(rows), [[tile] for tile in shown], images[0])]
        return [Shown([row], [[picture]]) for row, picture in enumerate(shown)]
    if len(shown) == sum(frames):  # frames of a video, or tiles of an image, are one row
        ends = list(accumulate(frames))
        clips = [shown[end - n : end] for n, end in zip(frames, ends, strict=True)]
        wholes = images if seen and known and len(images) == rows else [None] * rows
        return [Shown([row], [clips[row]], whole) for row, whole in enumerate(wholes)]
    if rows == 1 and frames[0] > 1:  # more, or fewer, frames than steps of time
        return [Shown([0], [shown])]
    if rows != len(images):
        raise InvalidInput(f"cannot draw: {len(images)} image(s) became {rows} runs of tokens.")
    if seen and not tiled:
        return None
    return [Shown([row], [[image]]) for row, image in enumerate(images)]


def _mosaic(
    group: Shown, told: Sequence[Reduction], way: Arrangement, size: int, stages: Stages
) -> Picture:
    """One panel per stage, of tiles in their places."""
    stories = [choose(fates(told, row), stages) for row in group.rows]
    small = size // max(way.columns, way.rows)
    panels = []
    for state in zip(*stories, strict=True):
        found = [
            (*view, fate)
            for clip, fate in zip(group.clips, state, strict=True)
            for view in views(clip, fate)
        ]
        drawn = [
            shaded(picture, part, fate, size if number == way.whole else small)
            for number, (picture, part, fate) in enumerate(found)
        ]
        kept, n = (
            sum(map(len, each)) for each in zip(*((f.kept, f.home) for f in state), strict=True)
        )
        told_below = f"{state[0].label}: {kept} of {n} tokens"
        panels.append(captioned(way.compose(drawn), [(told_below, INK)]))
    return join(panels, down=True)


def save(image: Picture, path: Path) -> None:
    """Write a picture, make its folder, say where it is."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    print(f"\npicture of the kept patches: {path}")
