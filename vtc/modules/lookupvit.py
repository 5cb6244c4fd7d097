"""LookupViT: a vision transformer that thinks on few tokens and looks up the many.

Koner et al., 2024, https://arxiv.org/abs/2407.12753. It is an architecture, not a token dropper:
it has to be trained, or warm-started from a ViT (`LookupViT.from_vit`) and then trained on.

Every block carries two streams: lookup tokens z_l [B, N, D], all patches of the image, and
compressed tokens z_p [B, M, D], M << N, which start as a resized copy of the lookup tokens.
    gather   z_p += W_o (A V),  A = softmax(Q K^T / sqrt d)  [B, H, M, N],  Q from z_p, K V from z_l
    refine   z_p += attention(z_p);  z_p += MLP(z_p), 4 times as wide inside
    infuse   z_l += W_o' (A^T V'),  V' from z_p; the same A
    lookup   z_l += MLP(z_l), half as wide inside
A block costs (3NM + 2M^2) D + (4N + 15M) D^2 multiply-adds; one of a ViT 2N^2 D + 12N D^2.
No weight depends on M, so a model trained on several grids runs on any of them.

Choices where the paper is silent or its code was never seen: the resize is anti-aliased; V' is
normed and z_l before the infusion is not; prefix tokens (class, registers) are part of z_p and are
not resized; LayerNorm everywhere; grids are drawn uniformly, one per step. Whether A^T is
normalised again is unverified: by default it is not, `infuse_norm="softmax"` takes the transposed
logits and a new softmax over the M compressed tokens, as a public re-implementation does.
`from_vit`, `mask` and `infuse_norm="col"` are ours.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput, InvalidWeights
from .lookup_side import (
    InfuseNorm,
    LookupSide,
    Mlp,
    activation,
    check_square,
    copy_weights,
    init,
    layer_norm,
    nothing,
    qkv,
    share,
)
from .weights import building, load_weights, read_settings, stored_dtype

__all__ = ["LookupBlock", "LookupViT", "LookupViTConfig", "resize_matrix"]

Grid = tuple[int, ...]
"""Tokens along each axis: (height, width), or (time, height, width) for video."""

_POOLS = ("avg", "token")


def _axis_matrix(source: int, target: int, antialias: bool, device: Any) -> Tensor:
    """Linear interpolation along one axis as [target, source]; the rows sum to 1."""
    scale = source / target
    reach = max(scale, 1.0) if antialias else 1.0
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    place = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    weight = (1 - (place - centre[:, None]).abs() / reach).clamp(min=0)
    return weight / weight.sum(1, keepdim=True)


def resize_matrix(
    source: Sequence[int],
    target: Sequence[int],
    antialias: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """The (bi-, tri-)linear resize of a grid of tokens as one float32 matrix.

    Args:
        source: tokens along each axis, (h, w) or (t, h, w); N is their product.
        target: the same after the resize; M is their product.
        antialias: average over all tokens that fall into a cell when the grid shrinks. Without it
            only the two nearest along each axis count.

    Returns:
        [M, N], rows in raster order and summing to 1; the identity when the grids are equal.
    """
    source, target = _grid(source, len(source)), _grid(target, len(source))
    matrix = torch.ones(1, 1, device=device, dtype=torch.float32)
    for n, m in zip(source, target, strict=True):
        axis = _axis_matrix(n, m, antialias, device)
        matrix = (matrix[:, None, :, None] * axis[None, :, None, :]).reshape(
            matrix.shape[0] * m, matrix.shape[1] * n
        )
    return matrix


def _grid(value: Sequence[int], axes: int) -> Grid:
    """`value` as a tuple of `axes` positive integers."""
    if isinstance(value, (list, tuple)) and len(value) == axes:  # noqa: SIM102
        if all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
            return tuple(value)
    names = {2: "(height, width)", 3: "(time, height, width)"}.get(axes, "")
    raise InvalidInput(
        f"{value!r} is not a grid: give {axes} positive integers {names} such as {(3,) * axes}"
    )


class LookupBlock(LookupSide):
    """One block of LookupViT: gather, refine, infuse, lookup MLP, all before-norm and residual.

    Args:
        dim: width D of both streams.
        heads: attention heads; D is split among them.
        mlp_ratio: hidden width of the MLP of compressed tokens, in D.
        lookup_ratio: hidden width of the MLP of lookup tokens, in D.
        qkv_bias, proj_bias: whether these linear layers have a bias (`proj_bias` also for MLPs).
        qk_norm: LayerNorm on queries and keys of each head.
        layer_scale: a learned factor per channel on both parts of refine; None for no such factor.
        eps: of every LayerNorm.
        act: activation of the MLPs, a key of `ACTIVATIONS`.
        infuse_norm: how the weights of what lookup tokens hear are normalised, see `LookupSide`.
        infuse: False leaves the lookup stream as it is, and has no weights for it; for the last
            block of a network whose lookup output is not used.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        lookup_ratio: float = 0.5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        eps: float = 1e-6,
        act: str = "gelu",
        infuse_norm: InfuseNorm = "none",
        infuse: bool = True,
    ) -> None:
        super().__init__(
            dim,
            heads,
            lookup_ratio=lookup_ratio,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            eps=eps,
            act=act,
            infuse_norm=infuse_norm,
            infuse=infuse,
        )
        hidden = share(dim, "mlp_ratio", mlp_ratio)

        def norm(width: int = dim) -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=eps)

        self.refine_norm = norm()
        self.refine_qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.refine_q_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.refine_k_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.refine_proj = nn.Linear(dim, dim, bias=proj_bias)
        self.refine_mlp = Mlp(dim, hidden, eps, act, proj_bias)
        scaled = layer_scale is not None
        self.refine_scale1 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        self.refine_scale2 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        for part in (self.refine_qkv, self.refine_proj, self.refine_mlp):
            part.apply(init)

    def forward(
        self, z_p: Tensor, z_l: Tensor, mask: Tensor | None = None, infuse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            z_p: [B, M, D] compressed tokens, prefix tokens among them.
            z_l: [B, N, D] lookup tokens.
            mask: [B, N] bool, False for padding: never gathered from, never infused to.
            infuse: False to save the work for a lookup stream that nobody reads any more.

        Returns:
            The new z_p [B, M, D] and z_l [B, N, D].
        """
        z_p, weights = self.gather(z_p, z_l, mask)
        z_p = self.refine(z_p)
        if infuse and self.infuse:
            z_l = self.infuse_into(z_l, z_p, weights)
        return z_p, z_l

    def refine(self, z_p: Tensor) -> Tensor:
        """Self-attention and MLP on the compressed tokens [B, M, D], as in a ViT block."""
        qkv = self.refine_qkv(self.refine_norm(z_p)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.refine_q_norm(q), self.refine_k_norm(k)
        out = self.refine_proj(self._merge(F.scaled_dot_product_attention(q, k, v)))
        z_p = z_p + (out if self.refine_scale1 is None else out * self.refine_scale1)
        out = self.refine_mlp(z_p)
        return z_p + (out if self.refine_scale2 is None else out * self.refine_scale2)

    @classmethod
    def from_vit(
        cls,
        block: nn.Module,
        *,
        lookup_ratio: float = 0.5,
        infuse_norm: InfuseNorm = "none",
        infuse: bool = True,
    ) -> LookupBlock:
        """Start from the weights of a before-norm ViT block, as timm builds them.

        Refine becomes the block itself; gather starts with its projections. The output projections
        of gather and infuse and the second layer of the lookup MLP start at zero, so at first
        compressed tokens go through the original block and lookup tokens stay as they are.

        Args:
            block: has norm1, attn (qkv, or q k v, or q_proj k_proj v_proj; proj; num_heads), norm2,
                mlp (fc1, fc2, act), and maybe ls1 and ls2 (gamma), attn.q_norm and attn.k_norm.

        Raises:
            ValueError: the block has a part that this one has no place for.
        """
        attn, mlp = _need(block, "attn"), _need(block, "mlp")
        norms = [layer_norm(_need(block, n), n) for n in ("norm1", "norm2")]
        for owner, name in ((attn, "norm"), (attn, "gate"), (attn, "rope"), (mlp, "norm")):
            if not nothing(getattr(owner, name, None)):
                raise InvalidInput(
                    f"the block has {name!r} ({type(getattr(owner, name)).__name__}) inside "
                    f"{type(owner).__name__}, which LookupBlock has no place for: use a block "
                    f"without it"
                )
        weight, bias = qkv(attn)
        proj, fc1, fc2 = _need(attn, "proj"), _need(mlp, "fc1"), _need(mlp, "fc2")
        dim = norms[0].normalized_shape[0]
        heads = int(_need(attn, "num_heads"))
        check_square(weight, dim)
        if tuple(fc2.weight.shape) != (dim, fc1.weight.shape[0]):
            raise InvalidInput(
                f"the MLP goes {tuple(fc1.weight.shape[::-1])} then {tuple(fc2.weight.shape[::-1])}"
                f", and LookupBlock knows plain two-layer ones only: use a block without gating"
            )
        head_norms: list[Any] = [getattr(attn, n, None) for n in ("q_norm", "k_norm")]
        qk_norm = not all(nothing(n) for n in head_norms)
        scales = [getattr(block, n, None) for n in ("ls1", "ls2")]
        scaled = not all(nothing(s) for s in scales)
        eps = {n.eps for n in norms}
        if qk_norm:
            eps |= {layer_norm(n, "attn.q_norm, attn.k_norm").eps for n in head_norms}
        if len(eps) > 1:
            raise InvalidInput(
                f"the norms of the block have different eps ({sorted(eps)}), and LookupBlock has "
                f"one: set them equal first"
            )
        new = cls(
            dim,
            heads,
            mlp_ratio=fc1.weight.shape[0] / dim,
            lookup_ratio=lookup_ratio,
            qkv_bias=bias is not None,
            proj_bias=proj.bias is not None,
            qk_norm=qk_norm,
            layer_scale=1.0 if scaled else None,
            eps=eps.pop(),
            act=activation(_need(mlp, "act")),
            infuse_norm=infuse_norm,
            infuse=infuse,
        )
        if (fc1.bias is None) != (proj.bias is None) or (fc2.bias is None) != (proj.bias is None):
            raise InvalidInput(
                "only some of proj, fc1 and fc2 of the block have a bias: give all or none one"
            )
        with torch.no_grad():
            new.start_from(norms[0], weight, bias, head_norms)
            copy_weights(new.refine_norm, norms[0])
            copy_weights(new.refine_mlp.norm, norms[1])
            new.refine_qkv.weight.copy_(weight)
            if bias is not None:
                new.refine_qkv.bias.copy_(bias)
            if qk_norm:
                copy_weights(new.refine_q_norm, head_norms[0])
                copy_weights(new.refine_k_norm, head_norms[1])
            copy_weights(new.refine_proj, proj)
            copy_weights(new.refine_mlp.fc1, fc1)
            copy_weights(new.refine_mlp.fc2, fc2)
            for target, scale in zip((new.refine_scale1, new.refine_scale2), scales, strict=True):
                if target is not None and not nothing(scale):
                    target.copy_(_need(scale, "gamma"))
        _check_refine(new, block)
        return new.to(weight.device, weight.dtype).train(block.training)


@torch.no_grad()
def _check_refine(new: LookupBlock, block: nn.Module) -> None:
    """Names can be right and the order of operations still another (norms after the attention)."""
    tokens = torch.randn(1, 4, new.dim, generator=torch.Generator().manual_seed(0))
    original = copy.deepcopy(block).to("cpu", torch.float32).eval()
    try:
        expected, why = original(tokens), "computes something else"
    except Exception as error:
        expected, why = None, f"cannot be run on tokens alone ({error})"
    found = new.refine(tokens)
    if not isinstance(expected, Tensor) or not torch.allclose(found, expected, 1e-3, 1e-4):
        raise InvalidInput(
            f"{type(block).__name__} has the parts of a before-norm ViT block, but {why}: from_vit "
            f"needs x + attn(norm1(x)), then x + mlp(norm2(x)), and no further arguments"
        )


def _need(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise InvalidInput(
            f"{type(owner).__name__} has no {name!r}: from_vit needs a before-norm ViT block with "
            f"norm1, attn (qkv, proj, num_heads), norm2 and mlp (fc1, act, fc2)"
        )
    return found


@dataclass(frozen=True)
class LookupViTConfig:
    """Everything that is needed to build a `LookupViT`.

    Args:
        img_size: pixels (height, width), or frames and pixels (time, height, width).
        patch_size: pixels of a patch along the same axes.
        in_chans: channels of the image.
        num_classes: outputs of the heads; 0 for none, then pooled features come out.
        dim, depth, heads, mlp_ratio, lookup_ratio, qkv_bias, proj_bias, qk_norm, layer_scale, eps,
            act, infuse_norm: see `LookupBlock`.
        grids: compressed grids to draw from in training.
        grid: the compressed grid used unless another one is asked for; default: the last of
            `grids`.
        prefix: learned tokens (class, registers) in front of the compressed ones.
        pool: what the compressed head reads: "avg", the mean of the grid, or "token", the first
            prefix token.
        norm_after_pool: the last norms come after pooling instead of before.
        final_norm: False for no last norms at all.
        pre_norm: a LayerNorm before the first block, as CLIP has it.
        patch_bias: whether the patch convolution has a bias.
        antialias: see `resize_matrix`.
        lookup_head: False for a network of which only the compressed tokens are used; its last
            block then has no infusion.
    """

    img_size: Grid = (224, 224)
    patch_size: Grid = (16, 16)
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    lookup_ratio: float = 0.5
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    eps: float = 1e-6
    act: str = "gelu"
    infuse_norm: InfuseNorm = "none"
    grids: tuple[Grid, ...] = ((3, 3), (5, 5), (7, 7), (10, 10))
    grid: Grid | None = None
    prefix: int = 0
    pool: Literal["avg", "token"] = "avg"
    norm_after_pool: bool = False
    final_norm: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    antialias: bool = True
    lookup_head: bool = True

    def __post_init__(self) -> None:
        axes = len(self.patch_size)
        if axes not in (2, 3):
            raise InvalidInput(
                f"patch_size={self.patch_size!r} has {axes} axes: give (height, width), or "
                f"(time, height, width) for video"
            )
        sizes = {n: _grid(getattr(self, n), axes) for n in ("img_size", "patch_size")}
        if any(s % p for s, p in zip(*sizes.values(), strict=True)):
            raise InvalidInput(
                f"img_size={self.img_size!r} is not a multiple of patch_size={self.patch_size!r}: "
                f"pad or resize the images"
            )
        if not self.grids:
            raise InvalidInput("grids is empty: give at least one compressed grid")
        if self.pool not in _POOLS or (self.pool == "token" and self.prefix < 1):
            raise InvalidInput(
                f"pool={self.pool!r} with prefix={self.prefix}: give 'avg', or 'token' with at "
                f"least one prefix token"
            )
        grids = tuple(_grid(g, axes) for g in self.grids)
        tidy = {**sizes, "grids": grids, "grid": _grid(self.grid or grids[-1], axes)}
        for name, value in tidy.items():
            object.__setattr__(self, name, value)

    @property
    def lookup_grid(self) -> Grid:
        """Patches along each axis of an image of `img_size`."""
        return tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))


class LookupViT(nn.Module):
    """A classifier and encoder of images [B, C, H, W] or clips [B, C, T, H, W].

    Args:
        config: how to build it; further keyword arguments replace its fields.
    """

    def __init__(self, config: LookupViTConfig | None = None, **changes: Any) -> None:
        super().__init__()
        unknown = sorted(set(changes) - {f.name for f in fields(LookupViTConfig)})
        if unknown:
            raise InvalidInput(
                f"LookupViT has no option {', '.join(unknown)}: the options are "
                f"{', '.join(f.name for f in fields(LookupViTConfig))}"
            )
        if config is None:
            config = LookupViTConfig(**changes)
        elif changes:
            config = replace(config, **changes)
        self.config = config
        c, dim = config, config.dim
        conv = nn.Conv2d if len(c.patch_size) == 2 else nn.Conv3d
        patch: Any = c.patch_size
        self.patch_embed = conv(c.in_chans, dim, patch, stride=patch, bias=c.patch_bias)
        self.pos_embed = nn.Parameter(torch.randn(1, math.prod(c.lookup_grid), dim) * 0.02)
        self.prefix_tokens = (
            nn.Parameter(torch.randn(1, c.prefix, dim) * 0.02) if c.prefix else None
        )
        self.norm_pre = nn.LayerNorm(dim, eps=c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            LookupBlock(
                dim,
                c.heads,
                mlp_ratio=c.mlp_ratio,
                lookup_ratio=c.lookup_ratio,
                qkv_bias=c.qkv_bias,
                proj_bias=c.proj_bias,
                qk_norm=c.qk_norm,
                layer_scale=c.layer_scale,
                eps=c.eps,
                act=c.act,
                infuse_norm=c.infuse_norm,
                infuse=c.lookup_head or i + 1 < c.depth,
            )
            for i in range(c.depth)
        )

        def norm() -> nn.Module:
            return nn.LayerNorm(dim, eps=c.eps) if c.final_norm else nn.Identity()

        def head() -> nn.Module:
            return nn.Linear(dim, c.num_classes) if c.num_classes else nn.Identity()

        self.norm_p, self.head_p = norm(), head()
        self.norm_l, self.head_l = (norm(), head()) if c.lookup_head else (None, None)
        for each in (self.head_p, self.head_l):
            if each is not None:
                init(each)

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int] | None = None,
        mask: Tensor | None = None,
        heads: Literal["both", "compressed"] = "both",
    ) -> Tensor:
        """Classify.

        Args:
            x: [B, C, H, W] or [B, C, T, H, W].
            grid: the compressed grid, any size; default: `config.grid`.
            mask: [B, N] bool over patches in raster order, False for padding.
            heads: "both" for the mean of the two heads' logits, "compressed" for that head alone,
                which saves the last infusion.

        Returns:
            Logits [B, classes].
        """
        if heads not in ("both", "compressed"):
            raise InvalidInput(f"heads={heads!r} is not known: give 'both' or 'compressed'")
        if heads == "compressed" or self.head_l is None:
            z_p, _ = self._encode(x, grid, mask, lookup=False)
            return self._head_p(z_p)
        first, second = self.forward_heads(x, grid, mask)
        return (first + second) / 2

    def forward_heads(
        self, x: Tensor, grid: Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] of the compressed and of the lookup head, for the training loss."""
        if self.head_l is None or self.norm_l is None:
            raise InvalidInput("this model has no lookup head: build it with lookup_head=True")
        z_p, z_l = self._encode(x, grid, mask)
        after = self.config.norm_after_pool
        z_l = z_l if after else self.norm_l(z_l)
        if mask is None:
            pooled = z_l.mean(1)
        else:
            seen = mask[..., None].to(z_l.dtype)
            pooled = (z_l * seen).sum(1) / seen.sum(1).clamp_min(1)
        return self._head_p(z_p), self.head_l(self.norm_l(pooled) if after else pooled)

    def forward_features(
        self, x: Tensor, grid: Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the last norm: compressed ones [B, prefix + M, D], prefix first, and
        lookup ones [B, N, D] (None when the model has no lookup head). For decoders and VLMs the
        first are all that is needed."""
        z_p, z_l = self._encode(x, grid, mask)
        if self.config.norm_after_pool:
            return z_p, z_l if self.norm_l is not None else None
        return self.norm_p(z_p), self.norm_l(z_l) if self.norm_l is not None else None

    def grid_of_step(self, step: int) -> Grid:
        """The compressed grid to train on in step `step`: drawn uniformly from `config.grids`
        with the step as the seed, so that every process of a run draws the same one."""
        return random.Random(step).choice(self.config.grids)

    def _head_p(self, z_p: Tensor) -> Tensor:
        c = self.config
        z_p = z_p if c.norm_after_pool else self.norm_p(z_p)
        pooled = z_p[:, 0] if c.pool == "token" else z_p[:, c.prefix :].mean(1)
        return self.head_p(self.norm_p(pooled) if c.norm_after_pool else pooled)

    def _encode(
        self, x: Tensor, grid: Sequence[int] | None, mask: Tensor | None, lookup: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the last block; `lookup=False` leaves out its last infusion."""
        c = self.config
        axes = len(c.patch_size)
        target = c.grid if grid is None else _grid(tuple(grid), axes)
        assert target is not None
        if x.ndim != axes + 2 or x.shape[1] != c.in_chans:
            raise InvalidInput(
                f"the input has shape {tuple(x.shape)}, and this model takes [B, {c.in_chans}, "
                f"{'H, W' if axes == 2 else 'T, H, W'}]"
            )
        if any(n % p or n < p for n, p in zip(x.shape[2:], c.patch_size, strict=True)):
            raise InvalidInput(
                f"the input measures {tuple(x.shape[2:])}, which is not a multiple of "
                f"patch_size={c.patch_size}: pad or resize it"
            )
        features = self.patch_embed(x)
        source = tuple(features.shape[2:])
        place = self.pos_embed
        if source != c.lookup_grid:
            place = self._resize(place, c.lookup_grid, source)
        z_l = features.flatten(2).transpose(1, 2) + place
        if mask is None:
            z_p = self._resize(z_l, source, target)
        else:
            _check_mask(mask, z_l)
            seen = mask[..., None].to(z_l.dtype)
            share = self._resize(seen, source, target)
            z_p = self._resize(z_l * seen, source, target) / share.clamp_min(1e-6)
        if self.prefix_tokens is not None:
            z_p = torch.cat([self.prefix_tokens.to(z_p.dtype).expand(len(z_p), -1, -1), z_p], 1)
        z_p, z_l = self.norm_pre(z_p), self.norm_pre(z_l)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            z_p, z_l = block(z_p, z_l, mask, infuse=lookup or i < last)
        return z_p, z_l

    def _resize(self, x: Tensor, source: Grid, target: Grid) -> Tensor:
        """[B, N, D] -> [B, M, D]; the same tensor when the grids are equal."""
        if source == target:
            return x
        matrix = resize_matrix(source, target, self.config.antialias, x.device)
        return (matrix.to(x.dtype) @ x).to(x.dtype)

    @classmethod
    def from_vit(
        cls,
        model: nn.Module,
        grids: Sequence[Sequence[int]],
        grid: Sequence[int] | None = None,
        lookup_ratio: float = 0.5,
        infuse_norm: InfuseNorm = "none",
    ) -> LookupViT:
        """Start from a ViT as timm builds it (`VisionTransformer`: learned positions, LayerNorm).

        At first the compressed head computes what the ViT computes on resized tokens, and the
        lookup head gives zeros: the mean of both ranks classes as the ViT does. Train it on.

        Args:
            model: has patch_embed.proj, pos_embed, blocks, head, and maybe cls_token, reg_token,
                norm_pre, norm, fc_norm.
            grids, grid, lookup_ratio, infuse_norm: see `LookupViTConfig`.

        Raises:
            ValueError: the model has a part that LookupViT has no place for.
        """
        vit: Any = model
        pool: Any = getattr(vit, "global_pool", "")
        proj: Any = getattr(vit.patch_embed, "proj", None)
        wrong = [
            text
            for failed, text in (
                (not isinstance(proj, nn.Conv2d), "patch_embed.proj is not a Conv2d"),
                (not nothing(getattr(vit.patch_embed, "norm", None)), "patch_embed has a norm"),
                (getattr(vit, "pos_embed", None) is None, "pos_embed is missing"),
                (getattr(vit, "rope", None) is not None, "positions are rotary"),
                (getattr(vit, "attn_pool", None) is not None, "it pools by attention"),
                (pool not in _POOLS, f"global_pool={pool!r} is neither 'avg' nor 'token'"),
                (
                    pool == "avg" and getattr(vit, "pool_include_prefix", False),
                    "it pools prefix tokens too",
                ),
            )
            if failed
        ]
        if wrong:
            raise InvalidInput(
                f"cannot start from this {type(model).__name__}: {'; '.join(wrong)}. Give a plain "
                f"ViT with learned positions and 'avg' or 'token' pooling"
            )
        blocks: list[Any] = [
            LookupBlock.from_vit(b, lookup_ratio=lookup_ratio, infuse_norm=infuse_norm)
            for b in vit.blocks
        ]
        first = blocks[0]
        parts = [p for p in (vit.cls_token, getattr(vit, "reg_token", None)) if p is not None]
        norm: Any = getattr(vit, "norm", None)
        norm_pre: Any = getattr(vit, "norm_pre", None)
        fc_norm: Any = getattr(vit, "fc_norm", None)
        if not nothing(norm) and not nothing(fc_norm):
            raise InvalidInput("the ViT has both norm and fc_norm: remove one of them")
        prefix = sum(p.shape[1] for p in parts)
        config = LookupViTConfig(
            img_size=tuple(vit.patch_embed.img_size),
            patch_size=tuple(proj.kernel_size),
            in_chans=proj.in_channels,
            num_classes=getattr(vit.head, "out_features", 0),
            dim=first.dim,
            depth=len(blocks),
            heads=first.heads,
            mlp_ratio=first.refine_mlp.fc1.out_features / first.dim,
            lookup_ratio=lookup_ratio,
            qkv_bias=first.refine_qkv.bias is not None,
            proj_bias=first.refine_proj.bias is not None,
            qk_norm=not nothing(first.refine_q_norm),
            layer_scale=None if first.refine_scale1 is None else 1.0,
            eps=first.refine_norm.eps,
            act=first.refine_mlp.act,
            infuse_norm=infuse_norm,
            grids=tuple(tuple(g) for g in grids),
            grid=None if grid is None else tuple(grid),
            prefix=prefix,
            pool=pool,
            norm_after_pool=not nothing(fc_norm),
            final_norm=not (nothing(norm) and nothing(fc_norm)),
            pre_norm=not nothing(norm_pre),
            patch_bias=proj.bias is not None,
        )
        new = cls(config).to(proj.weight.device, proj.weight.dtype)
        with torch.no_grad():
            for target, block in zip(new.blocks, blocks, strict=True):
                copy_weights(target, block)
            copy_weights(new.patch_embed, proj)
            place = vit.pos_embed
            if prefix and new.prefix_tokens is not None:
                tokens = torch.cat(parts, 1)
                if place.shape[1] != new.pos_embed.shape[1]:  # positions of the prefix come first
                    tokens, place = tokens + place[:, :prefix], place[:, prefix:]
                new.prefix_tokens.copy_(tokens)
            new.pos_embed.copy_(place)
            for source, targets in (
                (norm_pre, (new.norm_pre,)),
                (fc_norm if nothing(norm) else norm, (new.norm_p, new.norm_l)),
                (vit.head, (new.head_p,)),
            ):
                for target in targets:
                    if target is not None and source is not None:
                        copy_weights(target, source)
            if isinstance(new.head_l, nn.Linear):
                new.head_l.weight.zero_()
                new.head_l.bias.zero_()
        return new.train(model.training)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, in `dtype` (default: as it is), to `folder`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_type": "lookupvit", **asdict(self.config)}, indent=1)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        state = {
            k: v.detach().to("cpu", dtype).contiguous().clone()
            for k, v in self.state_dict().items()
        }
        save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = torch.float32
    ) -> LookupViT:
        """Read what `save_pretrained` wrote, in eval mode; `dtype=None` keeps the stored one.

        Raises:
            InvalidWeights: a file is missing or damaged, or the two do not fit each other.
        """
        settings, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        options = read_settings(settings)
        kind = options.pop("model_type", None)
        if kind != "lookupvit":
            raise InvalidWeights(
                f"{str(settings)!r} says model_type={kind!r}, not 'lookupvit': give a folder "
                f"written by LookupViT.save_pretrained"
            )
        with building(settings):
            model = cls(**{name: _tuples(value) for name, value in options.items()})
        model.to(stored_dtype(weights) if dtype is None else dtype)
        load_weights(model, weights)
        return model.eval()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_mask(mask: Tensor, z_l: Tensor) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(z_l.shape[:2]):
        raise InvalidInput(
            f"mask is {mask.dtype} {tuple(mask.shape)}: give bool {tuple(z_l.shape[:2])}, False "
            f"for padding"
        )
