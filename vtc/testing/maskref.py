"""Run the real model in any generate mode with prompt columns masked instead of dropped.

Nothing is ever removed, so the cache keeps its full length and the masks that transformers
builds are right.  A pre-hook on each decoder layer takes the mask of that layer, turns it into
an additive 4-D float mask and closes (or biases) prompt columns in it.  Stages, `keep`, `bias`
and `evict` are those of `oracle.run`; the code is separate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..versions import cache_of

Stage = str | int


@contextmanager
def masked(
    model: PreTrainedModel,
    keep: Mapping[Stage, Tensor] | None = None,
    bias: Mapping[Stage, Tensor] | None = None,
    evict: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Within the context the model sees only the kept prompt columns.

    keep: {stage: [B, L] bool}, bias: {stage: [B, L] float}; L is the length of the prompt.  Rows
    that generate repeats (beams, several returned sequences) get the mask of their prompt.
    evict: {layer: [B, L] bool}, prompt columns that queries behind the prompt see at this layer.
    """
    base = model.model
    text = base.language_model if hasattr(base, "language_model") else base.text_model
    handles = []
    try:
        for i, layer in enumerate(text.layers):
            visible = _visible_at(keep or {}, i)
            extra = _bias_at(bias or {}, i)
            later = (evict or {}).get(i)
            if visible is not None or extra is not None or later is not None:
                hook = _hook(i, visible, extra, later)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _depth(stage: Stage) -> int:
    return -1 if stage == "projector" else int(stage)


def _visible_at(keep: Mapping[Stage, Tensor], layer: int) -> Tensor | None:
    """AND of the keep masks of all stages up to this layer."""
    visible = None  # [B, L]
    for stage, mask in keep.items():
        if _depth(stage) <= layer:
            visible = mask if visible is None else visible & mask
    return visible


def _bias_at(bias: Mapping[Stage, Tensor], layer: int) -> Tensor | None:
    """The bias of the last stage up to this layer."""
    reached = [stage for stage in bias if _depth(stage) <= layer]
    return bias[max(reached, key=_depth)] if reached else None  # [B, L]


def _hook(
    layer: int, visible: Tensor | None, bias: Tensor | None, later: Tensor | None
) -> Callable[..., Any]:
    def pre_hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, queries = hidden.shape[:2]
        cache = cache_of(kwargs)
        if cache is None:
            keys, first, past = queries, 0, 0
        else:
            keys, first = (int(n) for n in cache.get_mask_sizes(queries, layer))
            past = int(cache.get_query_offset(layer))
        dtype = hidden.dtype
        lowest = torch.finfo(dtype).min
        mask = kwargs.get("attention_mask")
        if mask is None:  # plain causal; first and past count columns of the whole sequence
            query = past + torch.arange(queries)
            key = first + torch.arange(keys)
            mask = (key[None] <= query[:, None])[None, None]  # [1, 1, q, k]
        mask = _additive(mask, rows, queries, keys, dtype)
        open_ = mask > lowest / 2  # [rows, 1, q, k]
        if visible is not None:
            columns = _columns(visible, rows, first, keys, True)  # [rows, k]
            open_ = open_ & columns[:, None, None]
        if later is not None:
            columns = _columns(later, rows, first, keys, True)  # [rows, k]
            inside = past + torch.arange(queries) < later.shape[1]  # [q] queries of the prompt
            open_ = open_ & (columns[:, None, None] | inside[:, None])
        if bias is not None:
            columns = _columns(bias.to(dtype), rows, first, keys, 0.0)  # [rows, k]
            mask = mask + columns[:, None, None]
        return args, kwargs | {"attention_mask": mask.masked_fill(~open_, lowest)}

    return pre_hook


def _additive(mask: Tensor, rows: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """The mask of a layer as 0 and the lowest number, [rows, 1, q, k]."""
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
        raise ValueError(f"expected a mask for {queries} queries and {keys} keys: {mask.shape}")
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype)
        mask = zeros.masked_fill(~mask, torch.finfo(dtype).min)
    return mask.expand(rows, 1, queries, keys)


def _columns(per_prompt: Tensor, rows: int, first: int, keys: int, fill: float) -> Tensor:
    """Values of the keys `first .. first + keys` of a layer; later keys get `fill`."""
    prompts, length = per_prompt.shape
    if rows % prompts:
        raise ValueError(f"{rows} rows are no multiple of {prompts} prompts")
    values = per_prompt.repeat_interleave(rows // prompts, 0)  # [rows, L]
    missing = max(0, first + keys - length)
    values = nn.functional.pad(values, (0, missing), value=fill)
    return values[:, first : first + keys]  # [rows, k]
