"""What an encoder is made of, found by looking at it: blocks, prefix, grid, masks, tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...context import Layout
from ...errors import UnsupportedModel
from ..units import gather_mask
from . import pairs
from .pairs import Pairs

#: blocks whose second half is x + leave(...enter(x)), by where they come from: (enter, leave)
BRANCHES = {
    ("timm.models.vision_transformer", "Block"): ("norm2", "drop_path2"),
    ("timm.models.eva", "EvaBlock"): ("norm2", "drop_path2"),
    ("open_clip.transformer", "ResidualAttentionBlock"): ("ln_2", "ls_2"),
    ("open_clip.transformer", "CustomResidualAttentionBlock"): ("ln_2", "ls_2"),
}
#: attention that knows places by a bias table or by windows, by the names of its parts
_PLACED = (
    "relative_position_bias_table",
    "rel_pos_bias",
    "rel_pos",
    "rel_pos_h",
    "rel_pos_w",
    "pos_proj",
)
#: attention that mixes its weights between heads, by the names of its parts
_MIXED = ("proj_l", "proj_w")


@dataclass(frozen=True)
class Facts:
    """A plain vision transformer: patches and a few prefix tokens go through blocks, [B, N, D].

    Attributes:
        model: what is called with images; its forward pools.
        embed: the module in it that sees the images.
        gridded: knows the patch grid by `grid_size` or `dynamic_feat_size`.
        checkpoints: owner of the switch `grad_checkpointing`.
        width: channels of a token.
        blocks: in order.
        prefix: tokens in front of the patches (CLS, registers), which always stay.
        cls: whether the first of them is a class token.
        tokens: name of the blocks' first argument.
        takes_mask: blocks take `attn_mask`, or the bias of `pairs`, which does the same.
        takes_rope: blocks take `rope`.
        pairs: biases of attention per pair of places, None without.
        padded: attention modules of blocks and poolers that take a bias of keys as
            `key_padding_mask` [B, K], as nn.MultiheadAttention does.
        cut: a mask that is given to blocks and tokens [B, K] -> the mask of these tokens.
        hides_padding: nothing that the model returns reads the padding of images that keep fewer
            tokens than others: it pools prefix tokens, or all tokens under a mask.
        branch: names of the first and the last module of the MLP's branch, None if not known.
        dense: methods whose results are read token by token, with their owners.
        pools: methods that pool what these made, so that they have to see what is left.
        unpooled: place in what the model returns -> prefix tokens that precede the patches there.
    """

    model: nn.Module
    embed: nn.Module
    gridded: nn.Module
    checkpoints: nn.Module
    width: int
    blocks: tuple[nn.Module, ...]
    prefix: int
    cls: bool
    takes_mask: bool
    takes_rope: bool
    hides_padding: bool
    branch: tuple[str, str] | None
    dense: tuple[tuple[nn.Module, str], ...]
    tokens: str = "x"
    pairs: Pairs | None = None
    padded: tuple[nn.Module, ...] = ()
    cut: Callable[[Tensor, Tensor], Tensor] = gather_mask
    pools: tuple[tuple[nn.Module, str], ...] = ()
    unpooled: Mapping[int, int] = field(default_factory=dict)

    @property
    def bias_in_blocks(self) -> bool:
        """Whether a bias of keys is given to the blocks, as `attn_mask` [B, 1, 1, K]."""
        return self.takes_mask and getattr(self.blocks[0], "attn", None) not in self.padded

    def grid(self, tokens: int, image: torch.Size | None) -> Layout:
        """The patch grid of one image: of the embedding, or of the image that it has just seen."""
        patches = tokens - self.prefix
        embed: Any = self.gridded
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


#: timm's methods whose results are read token by token
_DENSE = ("forward_features", "forward_intermediates", "get_intermediate_layers")


def look_timm(model: nn.Module) -> Facts | str:
    """The facts of a timm vision transformer, or what it lacks."""
    found: Any = model
    blocks = getattr(found, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        return "a timm vision transformer with a list of blocks"
    if not hasattr(found, "patch_embed") or not isinstance(
        getattr(found, "num_prefix_tokens", None), int
    ):
        return "a patch_embed and num_prefix_tokens, as timm's plain vision transformers have"
    if not hasattr(found, "head"):
        return f"a head behind the blocks ({type(found).__name__} gives its tokens on as a grid)"
    if len({type(block) for block in blocks}) > 1:
        names = sorted({type(block).__name__ for block in blocks})
        return f"blocks of one kind (this one has {', '.join(names)})"
    arguments = inspect.signature(type(blocks[0]).forward).parameters
    for block in blocks:
        odd = _odd(block, arguments)
        if odd:
            return odd
    biases = pairs.find(list(blocks), list(arguments))
    placed = _placed(list(blocks), found) if biases is None else None
    if placed:
        return f"attention without relative positions per pair of patches (this one has {placed})"
    kind = type(blocks[0])
    pool = getattr(found, "global_pool", None)
    pooler = getattr(found, "attn_pool", None)
    return Facts(
        model=model,
        embed=found.patch_embed,
        gridded=found.patch_embed,
        checkpoints=model,
        width=found.embed_dim,
        blocks=tuple(blocks),
        prefix=found.num_prefix_tokens,
        cls=getattr(found, "cls_token", None) is not None,
        takes_mask="attn_mask" in arguments or biases is not None,
        takes_rope="rope" in arguments,
        pairs=biases,
        hides_padding=pool in ("token", "") and pooler is None,
        branch=BRANCHES.get((kind.__module__, kind.__name__)),
        dense=tuple((model, name) for name in _DENSE if hasattr(model, name)),
        pools=((model, "forward_head"),) if hasattr(model, "forward_head") else (),
        cut=_cut_plain,
        unpooled={0: found.num_prefix_tokens} if pool == "" and pooler is None else {},
    )


def _odd(block: nn.Module, arguments: Mapping[str, inspect.Parameter]) -> str | None:
    """What a block should be where more than its attention looks at other tokens."""
    name = type(block).__name__
    needed = [a.name for a in list(arguments.values())[2:] if a.default is a.empty]
    if needed:
        return f"blocks that need tokens only ({name} also needs {', '.join(needed)})"
    parts = all(hasattr(block, part) for part in ("norm1", "attn", "norm2", "mlp"))
    if not parts and "attn_mask" not in arguments:
        return f"blocks with one attention and one MLP (this one has {name})"
    for path, module in block.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return f"blocks without convolutions over neighbours ({name} has {path})"
        if path.split(".")[-1] in _MIXED:
            return f"attention whose weights stay within their head ({name} has {path})"
    return None


def _cut_plain(mask: Tensor, index: Tensor) -> Tensor:
    """A mask that broadcasts to [B, H, N, N] for the tokens index [B, K]."""
    return gather_mask(mask[None, None] if mask.ndim == 2 else mask, index)


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
