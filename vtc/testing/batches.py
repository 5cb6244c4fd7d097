"""Token ids and pixels of a sample, and how samples become a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

IMAGE, VIDEO, PAD, VOCAB = 500, 501, 0, 512
LAYERS, HIDDEN = 4, 64

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Segment:
    """A run of token ids and the per-item tensors (pixels, grids, sizes) that belong to it."""

    ids: Tensor  # [n]
    payload: Inputs


@dataclass(frozen=True)
class Recipe:
    """What one family needs: a model, its images and videos, and the collation details."""

    model: PreTrainedModel
    image: Callable[[int, torch.Generator], Segment]  # (size index, generator)
    video: Callable[[int, torch.Generator], Segment] | None = None
    types: str | None = None  # name of the token type input
    typed: bool = True  # types are 1 for image and 2 for video, otherwise all 0
    nested: bool = False  # pixel_values are [B, max images, 3, H, W], zero-filled


def collate(
    rows: Sequence[Sequence[Segment]], recipe: Recipe, side: str, dtype: torch.dtype
) -> Inputs:
    """Pad the token ids on one side and concatenate the payloads of all rows."""
    if side not in ("left", "right"):
        raise ValueError(f"padding side must be 'left' or 'right', not {side!r}")
    ids = nn.utils.rnn.pad_sequence(
        [torch.cat([s.ids for s in row]) for row in rows],
        batch_first=True,
        padding_value=-1,
        padding_side=side,
    )  # [B, L]
    mask = ids >= 0  # [B, L]
    ids = ids.masked_fill(~mask, PAD)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if recipe.types is not None:
        types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        inputs[recipe.types] = types if recipe.typed else torch.zeros_like(ids)
    payload: dict[str, list[Tensor]] = {}
    for segment in (s for row in rows for s in row):
        for key, value in segment.payload.items():
            payload.setdefault(key, []).append(value)
    merged = {key: torch.cat(values) for key, values in payload.items()}
    if "video_token_pooling" in merged:  # numbers count the patches of all frames of the batch
        frame = torch.arange(len(merged["pixel_values_videos"])).repeat_interleave(9)
        merged["video_token_pooling"] = merged["video_token_pooling"] + 36 * frame[:, None]
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if recipe.nested and merged:
        merged["pixel_values"] = _nest(rows)
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in merged.items()}
    return inputs | floats


def _nest(rows: Sequence[Sequence[Segment]]) -> Tensor:
    per_row = [[s.payload["pixel_values"] for s in row if s.payload] for row in rows]
    most = max(len(images) for images in per_row)
    shape = next(i for images in per_row for i in images).shape[1:]
    nested = torch.zeros(len(rows), most, *shape)  # [B, images, 3, H, W]
    for b, images in enumerate(per_row):
        for j, image in enumerate(images):
            nested[b, j] = image[0]
    return nested


def words(n: int, gen: torch.Generator) -> Segment:
    """`n` tokens of text."""
    return Segment(torch.randint(2, 490, (n,), generator=gen), {})
