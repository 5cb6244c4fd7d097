"""A block of a diffusion transformer while it runs: what a `Passage` may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModel
from ...reducer import Passage
from .costs import Work
from .facts import Kind, Part, modulate

#: query rows of a head at once where attention is read, and logits at once: on a CPU they stay in
#: the cache of a core
ROWS, LOGITS = 256, {"cpu": 1 << 18}


@dataclass
class RunningBlock:
    """See `vtc.reducer.Block`.

    Attributes:
        given: [B, 6 D], shift and scale of the attention first; set when the block has them.
        text: tokens of the prompt in front of those of the image (`single` blocks).
        kept: of an earlier call, what attention and MLP made of the text; replaced here.
        read: places of the tokens that attention and MLP are given.
        attended, projected: the tokens that attended to each other last, and what the linears for
            queries, keys and values made of them, by name.
    """

    index: int
    part: Part
    kept: dict[str, Tensor]
    work: Work
    given: Tensor | None = None
    text: int = 0
    attended: Tensor | None = None
    projected: dict[str, Tensor] = field(default_factory=dict)
    run_attention: Callable[[Tensor, Tensor | None], Tensor] | None = None
    run_mlp: Callable[[Tensor], Tensor] | None = None
    read: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.part.kind

    def reads(self, what: Literal["attention", "mlp"], passage: Passage) -> Tensor | None:
        """What the passage says, asked once."""
        if what not in self.read:
            self.read[what] = passage.reads(self, what)
        return self.read[what]

    def attend(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        assert self.run_attention is not None
        self.work.queries, self.work.keys = x.shape[1], (x if other is None else other).shape[1]
        self.projected.clear()
        self.attended = x if other is None else None
        return self.run_attention(x, other)

    def feed(self, x: Tensor) -> Tensor:
        assert self.run_mlp is not None
        self.work.mlp = x.shape[1]
        return self.run_mlp(x)

    def mean_value(self, x: Tensor) -> Tensor:
        self.work.queries, self.work.keys = 0, x.shape[1] / 2  # values alone, no keys
        return project_out(self.part.attention, value(self.part.attention, x).mean(1, keepdim=True))

    def spend(self, amount: float) -> None:
        self.work.beside += amount

    def modulated(self, y: Tensor) -> Tensor:
        if self.given is None:
            raise UnsupportedModel(
                f"what modulates block {self.index} was not seen: was it called by itself?"
            )
        return modulate(self.part, _norm(self.part), self.given, y)

    def value_norm(self, x: Tensor) -> Tensor:
        done = self._projected_of(x)
        seen = done.get("to_v")
        if "qkv" in done:
            seen = done["qkv"].chunk(3, -1)[2]
        of_image = value(self.part.attention, x) if seen is None else seen[:, self.text :]
        heads = of_image.float().unflatten(-1, (_heads(self.part.attention), -1))
        return heads.norm(dim=-1).sum(-1)

    def _projected_of(self, x: Tensor) -> dict[str, Tensor]:
        return self.projected if self.attended is x else {}

    def received(self, x: Tensor) -> Tensor:
        q, k = queries_and_keys(self.part.attention, x, self._projected_of(x))
        heads = max(1, LOGITS.get(x.device.type, 1 << 24) // (min(ROWS, x.shape[1]) * x.shape[1]))
        both = (t.flatten(0, 1).split(heads) for t in (q, k))
        sums = [_received(few, keys) for few, keys in zip(*both, strict=True)]
        return torch.cat(sums).unflatten(0, q.shape[:2]).mean(1)


def _norm(part: Part) -> Any:
    """The norm before the attention, without modulation."""
    norm: Any = part.block.norm1
    return getattr(norm, "norm", norm)


def _received(q: Tensor, k: Tensor) -> Tensor:
    """[H, n] sum over rows of softmax(q k^T) in fp32; nothing n x n is held. q, k: [H, n, Dh]."""
    total = torch.zeros(k.shape[:2], device=k.device, dtype=torch.float32)
    for rows in q.split(ROWS, 1):
        logits = (rows @ k.transpose(1, 2)).float().mul_(q.shape[-1] ** -0.5)
        total = total + logits.softmax(-1).sum(1)
    return total


# ---------------------------------------------------------------------- inside an attention


def value(attention: Any, x: Tensor) -> Tensor:
    """[B, n, C] values of tokens x, heads side by side."""
    if hasattr(attention, "qkv"):
        return _rows_of(attention.qkv, x, 2)
    if getattr(attention, "fused_projections", False):
        raise UnsupportedModel(
            "the projections of this attention are fused: call unfuse_qkv_projections() first."
        )
    return attention.to_v(x)


def queries_and_keys(
    attention: Any, x: Tensor, projected: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Two times [B, H, n, Dh], as they meet in the attention of models without rotary tables.
    projected: what its linears have made of x already."""
    done = projected or {}
    if hasattr(attention, "qkv"):
        parts = (
            done["qkv"].chunk(3, -1)[:2]
            if "qkv" in done
            else (_rows_of(attention.qkv, x, 0), _rows_of(attention.qkv, x, 1))
        )
        q, k = parts
        norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    else:
        q, k = (
            done[name] if name in done else getattr(attention, name)(x) for name in ("to_q", "to_k")
        )
        norms = (getattr(attention, "norm_q", None), getattr(attention, "norm_k", None))
    both = (t.unflatten(-1, (_heads(attention), -1)).transpose(1, 2) for t in (q, k))
    q, k = (t if norm is None else norm(t) for t, norm in zip(both, norms, strict=True))
    return q, k


def _heads(attention: Any) -> int:
    return attention.num_heads if hasattr(attention, "qkv") else attention.heads


def project_out(attention: Any, x: Tensor) -> Tensor:
    """The output projection."""
    if hasattr(attention, "qkv"):
        return attention.proj(x)
    return attention.to_out[0](x)


def attend_to(attention: Any, x: Tensor, other: Tensor) -> Tensor:
    """Attention of x [B, n, C] to other [B, k, C] where queries, keys and values are one linear."""
    q, _ = queries_and_keys(attention, x)
    _, k = queries_and_keys(attention, other)
    v = value(attention, other).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attention.proj(out)


def _rows_of(linear: Any, x: Tensor, part: int) -> Tensor:
    """A third of the outputs of the linear that makes queries, keys and values."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):  # adapted or offloaded
        return linear.forward(x).chunk(3, -1)[part]
    size = linear.out_features // 3
    rows = slice(part * size, (part + 1) * size)
    bias = None if linear.bias is None else linear.bias[rows]
    return F.linear(x, linear.weight[rows], bias)
