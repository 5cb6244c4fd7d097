"""Attention masks and rotary tables of a shortened sequence, in every form transformers passes
them: None, [B, L], [B, 1, L, KV], or a dict of those per layer type."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ... import ops
from ...errors import UnsupportedModel
from ...versions import cache_argument
from .columns import Stage

#: arguments of a text model and its layers that have rules of their own
_FITTED = {
    *("inputs_embeds", "hidden_states", "attention_mask", "position_ids", "position_embeddings"),
}


class Reach(NamedTuple):
    """How far a layer looks: back over a window of `size` original columns, or within a chunk."""

    size: int
    chunked: bool

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Where both are original columns; chunks begin at column 0, the first real one."""
        if self.chunked:
            return key // self.size == query // self.size
        return key > query - self.size


def reach_of(config: Any, kind: str) -> Reach | None:
    """None for layers that look at everything."""
    if kind == "sliding_attention":
        return Reach(config.sliding_window, False)
    return Reach(config.attention_chunk_size, True) if kind == "chunked_attention" else None


def real_columns(
    mask: Any, past: int, origin: Tensor, stage: Stage | None, start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which columns are real tokens: [B, past] before this forward, [B, L] in it.

    origin: [B, L] columns of this forward as if nothing had been dropped. stage: what is known of
    the past once something was.
    """
    b, length = origin.shape
    before = torch.ones(b, past, dtype=torch.bool, device=origin.device)
    if stage is not None:
        before = stage.valid[:, :past]
    if isinstance(mask, dict):
        four = [m for m in mask.values() if is_ready(m)]
        mask = mask.get("full_attention", four[0] if four else None)
    if is_ready(mask):
        seen = (
            mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        )
        seen = seen.expand(-1, length, -1)
        first = seen.shape[2] - length if start is None else start
        new = seen.diagonal(first, 1, 2)[:, :length]  # padding sees not even itself
        if (
            stage is None and past
        ):  # what the mask of a window leaves out is like what it begins with
            known = seen[..., :first].any(1).expand(b, first)
            oldest = known[:, :1] if first else before[:, :1]
            before = torch.cat([oldest.expand(b, past - first), known], 1)
        return before, new.expand(b, length)
    if torch.is_tensor(mask) and mask.ndim == 2:
        if stage is None and mask.shape[1] >= past + length:
            before = mask[:, :past].bool()
        return before, mask[:, -length:].bool()
    return before, torch.ones_like(origin, dtype=torch.bool)


def padding_before(
    past: Tensor, now: Tensor, start: int, known: Tensor | None, fresh: bool
) -> Tensor:
    """[B] original columns before the first real one.

    past, now: [B, past], [B, L] real columns. start: original columns before `now`. known: what the
    forward before this one found. fresh: nothing was dropped of `past`.
    """
    blank = (now.cumsum(1) == 0).sum(1)
    if not past.shape[1]:
        return blank
    if known is None:
        known = (past.cumsum(1) == 0).sum(1) if fresh else torch.zeros_like(blank)
    return torch.where(past.any(1), known, start + blank)


def is_ready(mask: Any) -> TypeGuard[Tensor]:
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
    reach: Reach | None = None,
    start: int | None = None,
    columns: Tensor | None = None,
    held: int | None = None,
) -> Tensor:
    """A ready mask [B|1, H|1, L, KV] for the columns that a stage really has.

    What this forward's tokens may see of one another is kept as it was made (bidirectional image
    blocks, windows); only rows and columns of kept tokens stay. What they may see of the past is
    what the stage knows, or what a mask of the whole sequence says.

    length: L. index: [B, K] kept columns, None for all. reach: of a layer that does not look at
    everything. start: for a static cache, where this forward's columns are in the mask (else they
    are its last); columns after them are not written yet and stay blank. columns: [B, past] where
    in the mask the past is, None when it has other columns. held: how many columns of the past the
    cache still has, None for all.
    """
    b, total = stage.valid.shape
    k = total - past
    first = mask.shape[-1] - length if start is None else start
    rows = mask.expand(b, -1, length, -1)
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    heads = mask.shape[1]
    if index is not None:
        rows = rows.gather(2, index[:, None, :, None].expand(b, heads, k, mask.shape[-1]))
    new = rows[..., first : first + length]
    if index is not None:
        new = new.gather(3, index[:, None, None, :].expand(b, heads, k, k))
        new = new.masked_fill(~stage.valid[:, None, None, past:], off)
    stored = past if held is None else held
    seen = stage.valid[:, None, None, past - stored : past].expand(b, heads, k, stored)
    if columns is not None:
        at = columns[:, None, None, past - stored : past].expand(b, heads, k, stored)
        seen = rows.gather(3, at).masked_fill(~seen, off)
    else:
        if reach is not None:
            at = stage.origin[:, None, past - stored : past]
            seen = seen & reach.sees(stage.origin[:, past:, None], at)[:, None]
        if mask.dtype != torch.bool:
            seen = torch.where(seen, 0.0, off).to(mask.dtype)
    blank = 0 if start is None else mask.shape[-1] - total
    return torch.cat([seen, new, new.new_full((b, heads, k, blank), off)], -1).contiguous()


class Stored:
    """A cache as makers of masks ask it: every layer by the columns that it stores."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.is_compileable = getattr(cache, "is_compileable", False)

    def get_query_offset(self, layer: int) -> Any:
        return type(self.cache).get_seq_length(self.cache, layer)

    def get_mask_sizes(self, queries: int, layer: int) -> tuple[Any, Any]:
        return type(self.cache).get_mask_sizes(self.cache, queries, layer)


def layer_mask(
    config: Any, reach: Reach | None, layer: int, stage: Stage, hidden: Tensor, cache: Any
) -> Any:
    """A fresh mask for the columns that a layer really has; windows and chunks count original
    columns, and packed samples do not see one another."""
    at, part = stage.origin, stage.part

    def near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Any:
        seen = True if reach is None else reach.sees(at[b, q], at[b, kv])
        return seen if part is None else seen & (part[b, q] == part[b, kv])

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=None if stage.dense else stage.valid,
        position_ids=None,
        layer_idx=layer,
        and_mask_function=None if reach is None and part is None else near,
        **cache_argument(create_causal_mask, None if cache is None else Stored(cache)),
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
