"""The scorer of STTS: how much every patch group of every frame is worth, in (0, 1).

Zhang et al., "Unified Spatio-Temporal Token Scoring", 2026, https://arxiv.org/abs/2603.18004."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import InvalidInput
from .borrowed import at_hand
from .lookup_side import attention_and_heads
from .weights import load_weights, save_weights

#: layers as the released code names them -> as they are named here
_RELEASED = {
    **{"patch_token_pooler.wq": "query", "patch_token_pooler.wk": "key"},
    **{"patch_token_pooler.wv": "value", "patch_token_pooler.wo": "out"},
    **{"mlp.w1": "mlp.0", "mlp.w2": "mlp.2", "mlp.w3": "mlp.4"},
}


def _known(name: str) -> str:
    """The name here of a weight in a file; released ones may have their path in that model, too."""
    layer, _, kind = name.rpartition("temporal_token_scorer.")[2].rpartition(".")
    return f"{_RELEASED[layer]}.{kind}" if layer in _RELEASED else name


class TokenScorer(nn.Module):
    """Pools each group by attention with its mean as the query, puts the same group of the frame
    before beside it, and scores both with an MLP (SiLU, sigmoid).

    Args:
        dim: width D of the tower. heads: of the pooling attention, as in the tower.
        hidden: width of the MLP, that of the tower's own MLP.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InvalidInput(
                f"dim={dim} does not split into heads={heads}: give a divisor of dim"
            )
        self.dim, self.heads, self.hidden = dim, heads, hidden
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for layer in (m for m in self.mlp if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)  # cut at 2, not 2 std
            nn.init.zeros_(layer.bias)

    @classmethod
    def beside(cls, block: nn.Module, seed: int = 0) -> TokenScorer:
        """A random scorer with the width, heads and MLP width of a block of the tower; drawn from
        `seed`, the global generator is not touched. ValueError: no such parts are found."""
        attn, heads = attention_and_heads(block)
        inside = [m for m in attn.modules() if isinstance(m, nn.Linear)]
        outside = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in inside]
        if not inside or not outside:
            raise InvalidInput(
                f"{type(block).__name__} has no linear layers in its attention and its MLP, from "
                f"which the scorer takes its widths"
            )
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            scorer = cls(inside[0].in_features, heads, max(m.out_features for m in outside))
        with at_hand(inside[0]):
            return scorer.to(inside[0].weight)

    def pool(self, groups: Tensor) -> Tensor:
        """[..., G, D] -> [..., D]; attention in fp32."""
        query = self.query(groups.mean(-2, keepdim=True))
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(-2, -3).float()
            for x in (query, self.key(groups), self.value(groups))
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        mixed = (weights @ v).transpose(-2, -3).flatten(-2).squeeze(-2)
        return self.out(mixed.to(groups.dtype))

    def forward(self, groups: Tensor) -> Tensor:
        """Groups [videos, frames, P, G, D], zeros where a group has no patch -> fp32 scores
        [videos, frames, P]. The first frame has zeros as its frame before."""
        pooled = self.pool(groups)
        before = F.pad(pooled, (0, 0, 0, 0, 1, 0))[:, :-1]
        return self.mlp(torch.cat([before, pooled], -1))[..., 0].float().sigmoid()

    def flops(self, frames: int, groups: int, size: int) -> float:
        """Of a forward over that many frames of `groups` groups of `size` patches."""
        d, m = self.dim, self.hidden
        pooling = 2 * groups * size * d * d + 2 * groups * d * d + 2 * groups * size * d
        return 2.0 * frames * (pooling + groups * (2 * d * m + m * m + m))

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file."""
        save_weights(self, path, {"heads": str(self.heads)})

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, or the released scorer's own weights (`patch_token_pooler.wq`,
        `mlp.w1`, ...), cut out of its checkpoint. InvalidWeights: they do not fit."""
        load_weights(self, path, {"heads": str(self.heads)}, _known)


def similarity_loss(scores: Tensor, groups: Tensor, detach: bool) -> Tensor:
    """Mean of (s - (1 - c))^2 over all frames but each video's first, where c is the cosine of a
    group with itself in the frame before, all its patches side by side.

    Args:
        scores: [videos, T, P], T at least 2. groups: [videos, T, P, G, D].
        detach: no gradient through the target (for a frozen tower).
    """
    cosine = ops.temporal_cosine(groups.detach().flatten(3) if detach else groups.flatten(3))
    return (scores[:, 1:] - (1 - cosine)).square().mean()


def attention_bias(scores: Tensor, axis: str) -> Tensor:
    """Scores [videos, T, H, W] rescaled linearly to [e^-2, 1], as a logarithm in [-2, 0]; the first
    frame of each video gets 0.

    axis: what the smallest and largest score are taken over: "row" of the grid, as published code
    does, "frame", or "video".
    """
    over = {"row": (3,), "frame": (2, 3), "video": (1, 2, 3)}[axis]
    low, high = scores.amin(over, keepdim=True), scores.amax(over, keepdim=True)
    floor = math.exp(-2)
    scaled = floor + (scores - low) * (1 - floor) / (high - low + 1e-6)
    bias = scaled.log()
    return torch.cat([torch.zeros_like(bias[:, :1]), bias[:, 1:]], 1)
