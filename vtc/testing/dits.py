"""Diffusion transformers of every family, with random weights, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Calls = Callable[..., Tensor]


def dit(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=side,
        num_embeds_ada_norm=10,
    )


def pixart(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=side,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )


def latte(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=side,
        patch_size=2,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        cross_attention_dim=32,
        caption_channels=24,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        video_length=3,
    )


def sd3(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=depth // 2,
        num_single_layers=depth - depth // 2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )


def wan(side: int = 12, depth: int = 4) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=depth,
        rope_max_seq_len=32,
    )


class _OriginalBlock(nn.Module):
    """A block of the original DiT: adaLN-Zero, fused projections."""

    def __init__(self, width: int, heads: int) -> None:
        from timm.layers.mlp import Mlp  # no other family needs timm
        from timm.models.vision_transformer import Attention

        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class Original(nn.Module):
    """The layout of the original DiT, on a grid of any shape."""

    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.patch_size = 2
        self.x_embedder = nn.Conv2d(4, width, 2, 2)
        self.t_embedder = nn.Linear(8, width)
        self.y_embedder = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(_OriginalBlock(width, 2) for _ in range(depth))
        self.final = nn.Linear(width, 2 * 2 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        frequencies = torch.arange(1, 5, device=x.device)
        angles = t.float()[:, None] / 1000 * frequencies
        c = self.t_embedder(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        c = c + self.y_embedder(y)
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, c)
        x = self.final(x).unflatten(1, (height, width)).unflatten(-1, (2, 2, 8))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def original(side: int = 12, depth: int = 4) -> nn.Module:
    return Original(depth)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "dit": dit,
    "pixart": pixart,
    "latte": latte,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "original": original,
}


def make(name: str, depth: int = 4, side: int = 12) -> nn.Module:
    """A model whose gates are open: freshly made ones add nothing."""
    torch.manual_seed(0)
    model = FAMILIES[name](side, depth)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def inputs(
    name: str, batch: int = 2, time: float = 0.7, shape: tuple[int, int] = (12, 12), seed: int = 1
) -> dict[str, Any]:
    """Arguments of one call; `time` is the share of noise."""
    dice = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice)

    t = torch.full((batch,), 1000 * time)
    text = draw(batch, 5, 24)
    if name == "original":
        return {"x": draw(batch, 4, *shape), "t": t, "y": torch.arange(batch)}
    if name == "dit":
        labels = torch.arange(batch)
        return {"hidden_states": draw(batch, 4, *shape), "timestep": t, "class_labels": labels}
    if name == "flux":
        height, width = (side // 2 for side in shape)
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)
        return {
            "hidden_states": draw(batch, height * width, 4),
            "timestep": t / 1000,
            "encoder_hidden_states": text,
            "pooled_projections": draw(batch, 20),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": torch.zeros(5, 3),
        }
    frames = (3,) if name in ("latte", "wan") else ()
    out: dict[str, Any] = {
        "hidden_states": draw(batch, 4, *frames, *shape),
        "timestep": t,
        "encoder_hidden_states": text,
    }
    if name == "sd3":
        out["pooled_projections"] = draw(batch, 20)
    if name == "pixart":
        out["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return out


def call(model: nn.Module, given: dict[str, Any]) -> Tensor:
    out = model(**given)
    return out if torch.is_tensor(out) else out.sample


def halved(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for a model in bfloat16."""
    exact = ("t", "timestep", "img_ids", "txt_ids")
    return {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() and k not in exact else v
        for k, v in given.items()
    }
