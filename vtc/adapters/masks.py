"""Attention masks and rotary tables of a shortened sequence, in every form transformers passes
them: None, [B, L], [B, 1, L, KV], or a dict of those per layer type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .. import ops
from .columns import Stage


def new_columns(
    mask: Any, b: int, length: int, past: int, device: torch.device
) -> tuple[Tensor, bool]:
    """[B, L] which columns of this forward are real tokens, and whether all of them are."""
    if isinstance(mask, dict):
        four = [m for m in mask.values() if torch.is_tensor(m) and m.ndim == 4]
        mask = mask.get("full_attention", four[0] if four else None)
    if torch.is_tensor(mask) and mask.ndim == 2:
        valid = mask[:, -length:].bool()
    elif torch.is_tensor(mask) and mask.ndim == 4 and past == 0:
        # Left padding: a column is padding when the last query cannot see it.
        row = mask[:, 0, -1, :length]
        row = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        valid = row.expand(b, length)
    else:
        return torch.ones(b, length, dtype=torch.bool, device=device), True
    return valid, False if torch.compiler.is_compiling() else bool(valid.all())


def past_columns(mask: Any, new: Tensor, past: int) -> Tensor:
    """[B, past] validity of columns that were written before anything was dropped."""
    if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] >= past + new.shape[1]:
        return mask[:, :past].bool()
    return new.new_ones(new.shape[0], past)


def gather_tables(tables: Any, index: Tensor) -> Any:
    """Rotary tables [..., B|1, L, D], one tensor or a tuple, at the kept columns."""
    if torch.is_tensor(tables):
        return ops.gather_tokens(tables, index, -2)
    return tuple(ops.gather_tokens(t, index, -2) for t in tables)


def gather_mask(mask: Tensor, index: Tensor, valid: Tensor, length: int) -> Tensor:
    """[B|1, H|1, L, KV] -> kept rows and kept columns; a static cache's columns beyond L blank."""
    b, k = index.shape
    mask = mask.expand(b, -1, -1, -1)
    heads, kv = mask.shape[1], mask.shape[-1]
    mask = mask.gather(2, index[:, None, :, None].expand(b, heads, k, kv))
    out = mask[..., :length].gather(3, index[:, None, None, :].expand(b, heads, k, k))
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    out = out.masked_fill(~valid[:, None, None, :], off)
    if kv > length:
        out = torch.cat([out, out.new_full((b, heads, k, kv - k), off)], -1)
    return out.contiguous()


def shrink_mask(
    mask: Any, index: Tensor, valid: Tensor, length: int, stage: Stage, cache: Any, past: int
) -> tuple[Any, bool]:
    """The mask argument for a shortened text model, and whether ready 4-D masks were gathered.

    Ready masks are never rebuilt: they hold the family's own geometry (bidirectional image
    blocks, sliding windows).
    """
    if isinstance(mask, dict):
        parts = list(mask.values())
        four = all(m is None or (torch.is_tensor(m) and m.ndim == 4) for m in parts)
        if four and past == 0 and (stage.dense or all(m is not None for m in parts)):
            gathered = {
                kind: None if m is None else gather_mask(m, index, valid, length)
                for kind, m in mask.items()
            }
            return gathered, all(m is not None for m in parts)
    elif torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[-2] == length and past == 0:
        return gather_mask(mask, index, valid, length), True
    # Without a cache never None: gapped positions would be read as packed sequences.
    return (None if stage.dense and cache is not None else stage.valid), False


def layer_mask(config: Any, kind: str, layer: int, stage: Stage, hidden: Tensor, cache: Any) -> Any:
    """A fresh mask for the columns that a layer really has; windows count original columns."""
    extra: dict[str, Any] = {}
    make = create_causal_mask
    if kind == "sliding_attention":
        make, window, at = create_sliding_window_causal_mask, config.sliding_window, stage.origin
        extra["and_mask_function"] = lambda b, h, q, kv: at[b, kv] > at[b, q] - window
    return make(
        config=config,
        inputs_embeds=hidden,
        attention_mask=None if stage.dense else stage.valid,
        past_key_values=cache,
        position_ids=None,
        layer_idx=layer,
        **extra,
    )


def restore(output: Any, drops: list[tuple[int, Tensor, Tensor]], width: int) -> Any:
    """Outputs at their original length: a dropped row repeats the kept row before it.

    drops: (layer, index [B, K], valid [B, K]) of every reduction, index into original columns.
    """

    def back(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        b, k = index.shape
        kept = torch.zeros(b, width + 1, dtype=torch.bool, device=x.device)
        kept = kept.scatter(1, torch.where(valid, index, width), True)[:, :width]
        padding = k - valid.sum(1, keepdim=True)
        return ops.gather_rows(x, (kept.cumsum(1) - 1 + padding).clamp(min=0, max=k - 1))

    _, index, valid = drops[-1]
    if isinstance(output, tuple):
        return (back(output[0], index, valid), *output[1:])
    output.last_hidden_state = back(output.last_hidden_state, index, valid)
    if getattr(output, "hidden_states", None) is not None:
        by_width = {i.shape[1]: (i, v) for _, i, v in drops}
        output.hidden_states = tuple(
            back(h, *by_width[h.shape[1]]) if h.shape[1] in by_width else h
            for h in output.hidden_states
        )
    return output
