"""What an encoder is made of, found by looking at it: blocks, prefix, grid, masks, tables."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...context import Layout
from ...errors import UnsupportedModel

#: blocks whose second half is x + leave(...enter(x)), by where they come from: (enter, leave)
_BRANCHES = {
    ("timm.models.vision_transformer", "Block"): ("norm2", "drop_path2"),
    ("timm.models.eva", "EvaBlock"): ("norm2", "drop_path2"),
}
#: attention that knows places by a bias table or by windows, by the names of its parts
_PLACED = ("relative_position_bias_table", "rel_pos_bias", "rel_pos", "rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class Facts:
    """A plain vision transformer: patches and a few prefix tokens go through blocks, [B, N, D].

    Attributes:
        model: owner of the blocks.
        blocks: in order.
        prefix: tokens in front of the patches (CLS, registers), which always stay.
        cls: whether the first of them is a class token.
        takes_mask: blocks take `attn_mask`.
        takes_rope: blocks take `rope`.
        pooled_by_prefix: what the model returns reads prefix tokens only.
        branch: names of the first and the last module of the MLP's branch, None if not known.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    prefix: int
    cls: bool
    takes_mask: bool
    takes_rope: bool
    pooled_by_prefix: bool
    branch: tuple[str, str] | None

    def grid(self, patches: int, image: torch.Size | None) -> Layout:
        """The patch grid of one image: of the embedding, or of the image that it has just seen."""
        embed: Any = self.model.patch_embed
        fixed = getattr(embed, "grid_size", None)
        if fixed is not None and fixed[0] * fixed[1] == patches:
            return Layout(1, *map(int, fixed))
        if image is not None and hasattr(embed, "dynamic_feat_size"):
            height, width = embed.dynamic_feat_size(tuple(image))
            if height * width == patches:
                return Layout(1, int(height), int(width))
        raise UnsupportedModel(
            f"{patches} patches enter the blocks of {type(self.model).__name__}, which is not the "
            f"patch grid of its image (patch dropout, packed or pre-computed patches?): only whole "
            f"grids can be shortened."
        )


def look(model: nn.Module) -> Facts | str:
    """The facts of a timm vision transformer, or what it lacks."""
    found: Any = model
    blocks = getattr(found, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        return "a timm vision transformer with a list of blocks"
    if not hasattr(found, "patch_embed") or not isinstance(
        getattr(found, "num_prefix_tokens", None), int
    ):
        return "a patch_embed and num_prefix_tokens, as timm's plain vision transformers have"
    for block in blocks:
        if not all(hasattr(block, part) for part in ("norm1", "attn", "norm2", "mlp")):
            return f"blocks with one attention and one MLP (this one has {type(block).__name__})"
    if len({type(block) for block in blocks}) > 1:
        names = sorted({type(block).__name__ for block in blocks})
        return f"blocks of one kind (this one has {', '.join(names)})"
    placed = _placed(list(blocks), found)
    if placed:
        return f"attention without relative positions per pair of patches (this one has {placed})"
    kind = type(blocks[0])
    arguments = inspect.signature(kind.forward).parameters
    pool = getattr(found, "global_pool", None)
    return Facts(
        model=model,
        blocks=tuple(blocks),
        prefix=found.num_prefix_tokens,
        cls=getattr(found, "cls_token", None) is not None,
        takes_mask="attn_mask" in arguments,
        takes_rope="rope" in arguments,
        pooled_by_prefix=pool == "token" and getattr(found, "attn_pool", None) is None,
        branch=_BRANCHES.get((kind.__module__, kind.__name__)),
    )


def _placed(blocks: Sequence[nn.Module], model: Any) -> str | None:
    """The part that makes attention depend on pairs of places, if there is one."""
    if getattr(model, "rel_pos_bias", None) is not None:
        return "rel_pos_bias"
    for name, _ in blocks[0].named_parameters():
        if name.split(".")[-1] in _PLACED:
            return name
    for name, module in blocks[0].named_modules():
        if name.split(".")[-1] in _PLACED and module is not None:
            return name
    return None
