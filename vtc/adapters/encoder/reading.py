"""Queries and keys of an attention module, from what its projections have just returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reader:
    """One call of an attention module; computes nothing until it is asked.

    Holds the output of the fused `qkv` projection where that is called as a module, else the
    module's input, from which queries and keys are projected once more.
    """

    def __init__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attention = attention
        self._fused: Tensor | None = None
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._mean: Tensor | None = None

    @staticmethod
    def missing(attention: Any) -> str | None:
        """What a module lacks to be read."""
        fused = _is_linear(getattr(attention, "qkv", None))
        apart = all(_is_linear(getattr(attention, n, None)) for n in ("q_proj", "k_proj"))
        packed = torch.is_tensor(getattr(attention, "in_proj_weight", None))
        if not (fused or apart or packed) or not hasattr(attention, "num_heads"):
            return (
                f"{type(attention).__name__} has no linear qkv, no linear q_proj and k_proj, no "
                f"in_proj_weight"
            )
        if fused and _keys_per_head(attention) not in (1, 2):
            return f"{type(attention).__name__} has fewer keys than queries in one projection"
        return None

    @staticmethod
    def differs(attention: Any) -> bool:
        """Whether what attention gives to a token is a difference of two softmaxes."""
        return getattr(attention, "qkv", None) is not None and _keys_per_head(attention) == 2

    def projected(self, fused: Tensor, keys_only: bool) -> None:
        """What the `qkv` projection returned. Mean keys are small: when nothing else is wanted they
        are made while the projection is at hand, and the rest is not held."""
        self._fused = fused.detach()
        if keys_only:
            self._mean = self.mean_key()
            self._fused = self._given = None

    @property
    def scale(self) -> float:
        """Of the logits; nn.MultiheadAttention does not say it."""
        known = getattr(self.attention, "scale", None)
        return self.attention.head_dim**-0.5 if known is None else known

    def query(self) -> Tensor:
        """[B, H, N, Dh] after norm and rotation."""
        return self._side(0)

    def key(self) -> Tensor:
        """[B, Hkv, N, Dh] after norm and rotation."""
        return self._side(1)

    def mean_key(self) -> Tensor:
        """[B, N, Dh] keys averaged over heads."""
        if self._mean is not None:
            return self._mean
        key = self.key()  # [B, Hkv, N, Dh], the heads of a token lie side by side
        if key.dtype in (torch.float32, torch.float64):
            return key.mean(1)
        heads, width = key.shape[1], key.shape[3]  # a product sums in fp32 without a wide copy
        share = torch.eye(width, dtype=key.dtype, device=key.device).repeat(heads, 1)
        return key.transpose(1, 2).flatten(2) @ share / heads

    def _side(self, which: int) -> Tensor:
        module = self.attention
        x = self._projected(which)
        for name in (("q_norm", "k_norm")[which], ("ln_q", "ln_k")[which]):
            norm: Callable[[Tensor], Tensor] | None = getattr(module, name, None)
            x = x if norm is None else norm(x)
        args, kwargs = self._call()
        if hasattr(module, "in_proj_weight"):  # called with queries, keys and values
            return x
        rope = kwargs.get("rope", args[1] if len(args) > 1 else None)
        return x if rope is None else _rotated(module, x, rope)

    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._given is not None  # let go only where nothing else was wanted
        return self._given

    def _projected(self, which: int) -> Tensor:
        """One third of the fused projection, or its own one, as [B, H, N, Dh]."""
        module, x = self.attention, self._call()[0][0].detach()
        if hasattr(module, "in_proj_weight"):
            weight, bias = module.in_proj_weight.chunk(3)[which], module.in_proj_bias
            y = F.linear(x, weight, None if bias is None else bias.chunk(3)[which])
            return y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        if getattr(module, "qkv", None) is None:
            heads = module.num_heads if which == 0 else getattr(module, "num_kv_heads", 0)
            y = (module.q_proj, module.k_proj)[which](x)
            return y.unflatten(-1, (heads or module.num_heads, -1)).transpose(1, 2)
        width = module.qkv.out_features // 3
        own = slice(which * width, (which + 1) * width)
        if self._fused is not None:  # a bias that is added in place is in it
            y = self._fused[..., own]
        else:  # the module reads the weights itself
            y = F.linear(x, module.qkv.weight[own], getattr(module, ("q_bias", "k_bias")[which]))
        heads = int(module.num_heads * _keys_per_head(module))
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def _is_linear(module: Any) -> bool:
    """A linear layer, also one around another (LoRA)."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Module) and all(isinstance(size, int) for size in sizes)


def _keys_per_head(attention: Any) -> float:
    """Of a fused projection in three equal parts: 1, or 2 for differential attention."""
    width = attention.qkv.out_features // 3
    return (
        width / attention.num_heads / getattr(attention, "head_dim", width // attention.num_heads)
    )


def _rotated(module: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = module.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, getattr(module, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned.type_as(x)], 2)
