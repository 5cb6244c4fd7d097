"""Rows that pack several samples one after another, told by positions that start again.

transformers keeps the samples of such a row apart when it gets neither a mask nor a cache, and so
do we; rows that it would not keep apart are refused once something is to be dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

WHAT = "position_ids start again within a row, as when it packs several samples, "


def samples_of(
    positions: Tensor, batch: int, axes: bool, caches: bool, flash: bool
) -> tuple[Tensor | None, str | None]:
    """[B, L] number of the sample within its row, None for one prompt per row; and the reason why
    nothing can be dropped.

    positions: [B, L] or [axes, B, L], from the caller, who gives no mask. axes: the model has
    multimodal positions. caches: the forward fills a cache. flash: its attention is flash.
    """
    whole = positions.ndim == 3 and positions.shape[0] == 4  # the first are those of text
    line = positions if positions.ndim == 2 else positions[0]
    again = line[..., 1:] < line[..., :-1]
    if positions.ndim == 3 and not whole:  # the first axis may fall after a video
        again = (positions[..., 1:] == 0).all(0)
    if torch.compiler.is_compiling():
        torch._assert_async(~again.any(), "vtc under torch.compile needs one prompt per row")
        return None, None
    if caches or flash or (axes and not whole):
        if not bool(again.any()):
            return None, None
        if caches:
            return None, (
                f"{WHAT}but transformers keeps them apart only in a forward without a cache and "
                f"without a mask: pass use_cache=False and no attention_mask, or one prompt per "
                f"row."
            )
        if flash:
            return None, (
                f"{WHAT}which flash attention finds by positions without gaps, and dropping makes "
                f"gaps: load the model with attn_implementation='sdpa', or pass one prompt per row."
            )
        return None, (
            f"{WHAT}but the text model of this family keeps them apart only by position_ids "
            f"[4, B, L], positions of the text first: pass those, or one prompt per row."
        )
    return find_packed_sequence_indices(line.expand(batch, -1)), None


def fills_cache(text: Any, wanted: bool | None) -> bool:
    """A forward of the text model called with use_cache=`wanted` makes a cache."""
    wanted = getattr(text.config, "use_cache", None) if wanted is None else wanted
    return bool(wanted) and not (text.training and getattr(text, "gradient_checkpointing", False))


def ends_of(part: Tensor, visual: Tensor) -> Tensor:
    """[B, L] visual columns after the end of each column's own sample."""
    each = torch.zeros(part.shape[0], int(part.max()) + 1, dtype=torch.long, device=part.device)
    each = each.scatter_add(1, part, visual.long())
    after = each.sum(1, keepdim=True) - each.cumsum(1)
    return after.gather(1, part)
