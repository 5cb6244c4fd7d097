"""The visual towers of open_clip: its own vision transformer, or a timm model in a wrapper."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModel
from ..units import gather_mask
from .facts import BRANCHES, Facts, look_timm

_PARTS = ("ln_1", "attn", "ln_2", "mlp")


def tower(model: Any) -> nn.Module | None:
    """The visual tower of a CLIP (`encode_image`), or the model itself if it is one."""
    visual = getattr(model, "visual", None)
    if isinstance(visual, nn.Module) and callable(getattr(model, "encode_image", None)):
        return visual
    inner = getattr(model, "trunk", None), getattr(model, "transformer", None)
    own = hasattr(inner[1], "resblocks") and hasattr(model, "class_embedding")
    wraps = isinstance(inner[0], nn.Module) and isinstance(getattr(model, "head", None), nn.Module)
    return model if own or wraps else None


def look_open_clip(model: nn.Module) -> Facts | str:
    """The facts of the visual tower in `model`, or what it lacks."""
    visual: Any = tower(model)
    if hasattr(visual, "trunk"):
        return _wrapped(visual)
    if not hasattr(getattr(visual, "transformer", None), "resblocks"):
        return (
            f"a visual tower with transformer.resblocks or a timm trunk (this one is "
            f"{type(visual).__name__}: a convolutional tower has no tokens to drop)"
        )
    if hasattr(model, "text_decoder") and getattr(visual, "attn_pool", None) is None:
        return (
            "an attentional pooler (this text decoder reads patch tokens, where zeros in place of "
            "dropped ones would count; its .visual alone is supported)"
        )
    return _native(visual)


def _wrapped(visual: Any) -> Facts | str:
    """A timm model whose pooled output goes through a head."""
    facts = look_timm(visual.trunk)
    if isinstance(facts, str):
        return f"{facts}; the trunk of this visual tower is {type(visual.trunk).__name__}"
    if facts.unpooled:
        return "a timm trunk that pools its tokens (the head of this one reads the whole grid)"
    return replace(
        facts,
        dense=(*facts.dense, (visual, "forward_intermediates")),
        pools=((visual.trunk, "forward_head"),),
    )


def _native(visual: Any) -> Facts | str:
    """open_clip's own vision transformer."""
    transformer = visual.transformer
    blocks = tuple(transformer.resblocks)
    lacks = _lacks(visual, blocks)
    if lacks:
        return lacks
    kind, attention = type(blocks[0]), blocks[0].attn
    multi = isinstance(attention, nn.MultiheadAttention)
    poolers = _poolers(visual)
    unpooled = {} if poolers else _unpooled(visual.pool_type)
    return Facts(
        model=visual,
        embed=visual.conv1,
        gridded=visual,
        checkpoints=transformer,
        width=transformer.width,
        blocks=blocks,
        prefix=1,
        cls=True,
        tokens=next(iter(inspect.signature(blocks[0].forward).parameters)),
        takes_mask=True,
        takes_rope=False,
        padded=(*(block.attn for block in blocks if multi), *poolers),
        cut=partial(_cut, attention.num_heads) if multi else _not_cut,
        hides_padding=bool(poolers) or visual.pool_type != "avg",
        branch=BRANCHES.get((kind.__module__, kind.__name__)),
        dense=((visual, "forward_intermediates"), (transformer, "forward_intermediates")),
        pools=() if 0 in unpooled else ((visual, "_pool"),),
        unpooled=unpooled,
    )


def _lacks(visual: Any, blocks: tuple[Any, ...]) -> str | None:
    """What a native tower lacks to be shortened."""
    parts = ("conv1", "grid_size", "pool_type", "_pool", "forward_intermediates")
    missing = [name for name in parts if not hasattr(visual, name)]
    if missing:
        return f"{', '.join(missing)} in the visual tower, as open_clip 3.3 has them"
    if not blocks or len({type(block) for block in blocks}) > 1:
        return "transformer.resblocks of one kind in the visual tower"
    if not all(hasattr(block, part) for block in blocks for part in _PARTS):
        return f"blocks with one attention and one MLP (it has {type(blocks[0]).__name__})"
    if not getattr(visual.transformer, "batch_first", False) or not all(
        getattr(block.attn, "batch_first", True) for block in blocks
    ):
        return "blocks that see [images, tokens, width] (batch_first=True)"
    if getattr(blocks[0].attn, "logit_scale", None) is not None:
        return "attention by dot products (this one has scaled cosine attention)"
    return None


def _poolers(visual: Any) -> tuple[nn.Module, ...]:
    """Attention modules that pool the tokens of the last block."""
    if getattr(visual, "attn_pool", None) is None:
        return ()
    first = (visual.attn_pool.attn,)
    parallel = getattr(visual, "attn_pool_type", "") == "parallel"
    return (*first, visual.attn_pool_contrastive.attn) if parallel else first


def _unpooled(pool: str) -> dict[int, int]:
    """Patch tokens in (pooled, tokens): tokens go without the class token if one is pooled."""
    return {0: 1, 1: 1} if pool == "none" else {1: 0}


def _cut(heads: int, mask: Tensor, index: Tensor) -> Tensor:
    """A mask [N, N] or [B * heads, N, N] for the tokens index [B, K] -> [B * heads, K, K]."""
    planes = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, heads))
    return gather_mask(planes, index).expand(-1, heads, -1, -1).flatten(0, 1)


def _not_cut(mask: Tensor, index: Tensor) -> Tensor:
    raise UnsupportedModel(
        f"an attn_mask of shape {tuple(mask.shape)} is given to these blocks: it cannot be cut. "
        f"Run them without one."
    )
