"""Attention masks and rotary tables of a shortened sequence, in every form transformers passes
them: None, [B, L], [B, 1, L, KV], or a dict of those per layer type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ... import ops
from ...errors import UnsupportedModel
from .columns import Stage

#: arguments of a text model and its layers that have rules of their own
_FITTED = {"inputs_embeds", "hidden_states", "attention_mask", "position_ids"}


def real_columns(
    mask: Any, past: int, origin: Tensor, stage: Stage | None, start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which columns are real tokens: [B, past] before this forward, [B, L] in it.

    origin: [B, L] columns of this forward as if nothing had been dropped. stage: what is known of
    the past once something was.
    """
    b, length = origin.shape
    before = torch.arange(past, device=origin.device).expand(b, past)
    windows = isinstance(mask, dict) and not is_ready(mask.get("full_attention"))
    if isinstance(mask, dict):
        four = [m for m in mask.values() if is_ready(m)]
        mask = mask.get("full_attention", four[0] if four else None)
    if is_ready(mask):
        seen = (
            mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        )
        first = seen.shape[2] - length if start is None else start
        new = seen.diagonal(first, 1, 2)[:, :length]  # padding sees not even itself
        new = new.expand(b, length)
        if stage is not None:
            return stage.valid[:, :past], new
        if not windows and first == past:  # else it is sized for a layer that has lost columns
            return seen[..., :past].any(1).expand(b, past), new
        padding = (seen[:, -1].cumsum(1) == 0).sum(1, keepdim=True)  # on the left
        return before >= padding, new
    if torch.is_tensor(mask) and mask.ndim == 2:
        known = mask.shape[1] >= past + length
        return (mask[:, :past].bool() if known else before >= 0), mask[:, -length:].bool()
    return before >= 0, origin >= 0


def is_ready(mask: Any) -> bool:
    """A 4-D mask that somebody has built already."""
    return torch.is_tensor(mask) and mask.ndim == 4


def per_token(kwargs: dict[str, Any], size: tuple[int, int]) -> list[str]:
    """Arguments [B, L, ..] that say something else of every token, such as of which kind it is.
    size: (B, L)."""
    return [
        name
        for name, value in kwargs.items()
        if torch.is_tensor(value) and tuple(value.shape[:2]) == size and name not in _FITTED
    ]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, L] or [B, L, ..] at the kept columns."""
    return x.gather(1, index) if x.ndim == 2 else ops.gather_rows(x, index)


def gather_tables(tables: Any, index: Tensor) -> Any:
    """Rotary tables [..., B|1, L, D], one tensor or a tuple, at the kept columns."""
    given = (tables,) if torch.is_tensor(tables) else tables
    out = ops.gather_columns(index, *((t, -2) for t in given))
    return out[0] if torch.is_tensor(tables) else tuple(out)


def fit_mask(
    mask: Tensor,
    length: int,
    stage: Stage,
    past: int,
    index: Tensor | None = None,
    window: int | None = None,
    start: int | None = None,
) -> Tensor:
    """A ready mask [B|1, H|1, L, KV] for the columns that a stage really has.

    What this forward's tokens may see of one another is kept as it was made (bidirectional image
    blocks, windows); only rows and columns of kept tokens stay. What they may see of the past is
    what the stage knows.

    length: L. index: [B, K] kept columns, None for all. window: of a sliding layer. start: for a
    static cache, where this forward's columns are in the mask (else they are its last); columns
    behind them are not written yet and stay blank.
    """
    b, total = stage.valid.shape
    k = total - past
    first = mask.shape[-1] - length if start is None else start
    new = mask[..., first : first + length].expand(b, -1, -1, -1)
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    heads = new.shape[1]
    if index is not None:
        new = new.gather(2, index[:, None, :, None].expand(b, heads, k, length))
        new = new.gather(3, index[:, None, None, :].expand(b, heads, k, k))
        new = new.masked_fill(~stage.valid[:, None, None, past:], off)
    stored = past if window is None or past < window else window - 1
    seen = stage.valid[:, None, None, past - stored : past].expand(b, heads, k, stored)
    if window is not None:
        at = stage.origin[:, None, past - stored : past] > stage.origin[:, past:, None] - window
        seen = seen & at[:, None]
    if mask.dtype != torch.bool:
        seen = torch.where(seen, 0.0, off).to(mask.dtype)
    blank = 0 if start is None else mask.shape[-1] - total
    return torch.cat([seen, new, new.new_full((b, heads, k, blank), off)], -1).contiguous()


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


def returns_all(output: Any) -> bool:
    """The caller asked for more than the last hidden states."""
    return any(getattr(output, name, None) for name in ("hidden_states", "router_logits"))


def restore(output: Any, drops: list[tuple[int, Tensor, Tensor]], width: int, depth: int) -> Any:
    """Outputs at their original length: a dropped row repeats the kept row before it.

    drops: (layer, index [B, K] into original columns, filled [B, K] False where a shorter
    sequence is filled up on the left) of every reduction; layer -1 is the projector. depth: layers.
    """

    def back(x: Tensor | None, before: int) -> Tensor | None:
        """x [B, K, D], or [B * K, D], as the layers before `before` left it."""
        done = [drop for drop in drops if drop[0] < before]
        if x is None or not done:
            return x
        _, index, filled = done[-1]
        b, k = index.shape
        kept = torch.zeros(b, width + 1, dtype=torch.bool, device=x.device)
        kept = kept.scatter(1, torch.where(filled, index, width), True)[:, :width]
        empty = k - filled.sum(1, keepdim=True)
        rows = (kept.cumsum(1) - 1 + empty).clamp(min=0, max=k - 1)
        whole = ops.gather_rows(x.reshape(b, k, -1), rows)
        return whole.flatten(0, 1) if x.ndim == 2 else whole

    if isinstance(output, tuple):
        if any(isinstance(value, tuple) for value in output[1:]):
            raise UnsupportedModel(
                "the language model returned a tuple with more than its last hidden states: what "
                "is in it is only known by name. Call it with return_dict=True."
            )
        return (back(output[0], depth), *output[1:])
    output.last_hidden_state = back(output.last_hidden_state, depth)
    states = getattr(output, "hidden_states", None)
    if states is not None:  # entry i leaves layer i - 1
        output.hidden_states = tuple(back(x, i) for i, x in enumerate(states))
    routers = getattr(output, "router_logits", None)
    if routers:  # entry i is of layer i
        if len(routers) != depth and any(layer > 0 for layer, _, _ in drops):
            raise UnsupportedModel(
                f"{len(routers)} of {depth} layers returned router logits: of which length each "
                f"was cannot be known. Call the model without output_router_logits, or drop before "
                f"the language model (at='projector')."
            )
        output.router_logits = tuple(back(x, i + 1) for i, x in enumerate(routers))
    return output
