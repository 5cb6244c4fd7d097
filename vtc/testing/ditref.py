"""Independent references for diffusion transformers: nothing is dropped, attention is masked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT = 5  # tokens of the prompts of `dits.inputs`
TEXT_FIRST = ("flux",)


def blocks(model: Any) -> list[Any]:
    """In the order in which they run."""
    if not hasattr(model, "transformer_blocks"):
        return list(model.blocks)
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def attention(block: Any) -> Any:
    return block.attn1 if hasattr(block, "attn1") else block.attn


@contextmanager
def _in_place(attend: Any, handles: list[Any]) -> Iterator[None]:
    """`attend` is the fused attention inside; behind it hooks are gone too."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()


@contextmanager
def masked(model: Any, family: str, spans: list[tuple[int, int, Tensor]]) -> Iterator[None]:
    """In blocks [start, end) image tokens outside `keep` [rows, N] are seen by nobody; behind them
    they are what they were before."""
    handles, active, original = [], list[Tensor](), F.scaled_dot_product_attention
    saved: dict[int, Tensor] = {}
    times = getattr(model, "temporal_transformer_blocks", None)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        n = active[0].shape[1] if active else -1
        if key.shape[2] in (n, n + TEXT) and query.shape[2] == key.shape[2]:
            assert attn_mask is None
            seen = torch.stack(active).all(0)
            text = torch.ones(len(seen), key.shape[2] - n, dtype=torch.bool)
            order = [text, seen] if family in TEXT_FIRST else [seen, text]
            attn_mask = torch.cat(order, 1)[:, None, None]
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    for number, (start, end, keep) in enumerate(spans):
        ran = blocks(model)

        def enter(
            module: Any, args: Any, kwargs: Any, number: int = number, keep: Any = keep
        ) -> None:
            saved[number] = (args[0] if args else kwargs["hidden_states"]).clone()
            active.append(keep)

        def leave(module: Any, args: Any, out: Any, number: int = number, keep: Any = keep) -> Any:
            active.pop()
            x = out[1] if isinstance(out, tuple) else out
            before, gone = saved[number], ~keep[..., None]
            if times is not None:  # [B N, F, C]
                rows, n, width = before.shape
                frames = x.shape[1]
                back = before.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
                lost = gone.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
                return torch.where(lost, back, x)
            x = torch.where(gone, before, x)
            return (out[0], x) if isinstance(out, tuple) else x

        handles.append(ran[start].register_forward_pre_hook(enter, with_kwargs=True))
        last = ran[end - 1] if times is None else times[end - 1]
        handles.append(last.register_forward_hook(leave))
    with _in_place(attend, handles):
        yield


@contextmanager
def masked_attention(model: Any, family: str, i: int, keep: Tensor) -> Iterator[None]:
    """The same for the self-attention of one block alone, which adds nothing for dropped tokens."""
    module, original = attention(blocks(model)[i]), F.scaled_dot_product_attention
    inside = False

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        if inside:
            text = torch.ones(len(keep), key.shape[2] - keep.shape[1], dtype=torch.bool)
            order = [text, keep] if family in TEXT_FIRST else [keep, text]
            attn_mask = torch.cat(order, 1)[:, None, None]
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal inside
        inside = True

    def leave(module: nn.Module, args: Any, out: Any) -> Any:
        nonlocal inside
        inside = False
        if isinstance(out, tuple):
            return (out[0] * keep[..., None], *out[1:])
        own = out[:, out.shape[1] - keep.shape[1] :] * keep[..., None]
        return torch.cat([out[:, : out.shape[1] - keep.shape[1]], own], 1)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with _in_place(attend, handles):
        yield
