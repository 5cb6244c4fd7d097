"""Pictures of everything a prompt held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InvalidInput
from ..session import Reduction
from .fate import Stages, last_forward
from .panels import overlay
from .text import Picture, join


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
    images: Sequence[Picture],
    seen: Sequence[Picture],
    trace: Iterable[Reduction],
    *,
    size: int = 360,
    stages: Stages = "all",
) -> Picture:
    """Overlays of all images of a prompt, or of the frames of its video; `seen` comes from
    `as_seen` and may be empty, `size` and `stages` are those of `overlay`."""
    told = last_forward(trace)
    rows = len(told[0].n_in)
    frames = [1 if layout is None else layout.frames for layout in told[0].layout]
    tiled = len(images) == rows and any(told[0].parts)
    shown = [] if tiled else seen or images
    drawn: Sequence[Picture | Sequence[Picture]] = images
    if len(shown) == rows:  # one whole picture, or one tile, per run of tokens
        drawn = shown
    elif len(shown) == sum(frames):  # several runs, frames of a video, are one row
        ends = list(accumulate(frames))
        drawn = [shown[end - n : end] for n, end in zip(frames, ends, strict=True)]
    elif rows != len(images):
        raise InvalidInput(f"cannot draw: {len(images)} image(s) became {rows} runs of tokens.")
    elif seen and not tiled:  # several tiles in one run of tokens have no grid in common
        told = [replace(stage, layout=(None,) * rows) for stage in told]
    panels = [overlay(each, told, row, size=size, stages=stages) for row, each in enumerate(drawn)]
    return join(panels, down=True)


def save(image: Picture, path: Path) -> None:
    """Write a picture, make its folder, say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(f"\npicture of the kept patches: {path}")
