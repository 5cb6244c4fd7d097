"""A block of a diffusion transformer while it runs: what a `Passage` may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...errors import UnsupportedModel
from .facts import Kind, Part, modulate

ROWS = 256  # query rows at once where attention is read


@dataclass
class Work:
    """Image tokens that one block worked on: its queries, keys, the MLP; multiply-adds on one
    sample that a method added; tokens that entered."""

    queries: float = 0
    keys: float = 0
    mlp: int = 0
    beside: float = 0
    tokens: int = 0

    def at(self, n: int) -> Work:
        """Of n tokens everything, until a passage does otherwise."""
        self.queries = self.keys = self.mlp = self.tokens = n
        return self


@dataclass
class RunningBlock:
    """See `vtc.reducer.Block`.

    Attributes:
        given: [B, 6 D], shift and scale of the attention first; set when the block has them.
        text: tokens of the prompt in front of those of the image (`single` blocks).
        kept: of an earlier call, what attention and MLP made of the text; replaced here.
    """

    index: int
    part: Part
    kept: dict[str, Tensor]
    work: Work
    given: Tensor | None = None
    text: int = 0
    run_attention: Callable[[Tensor, Tensor | None], Tensor] | None = None
    run_mlp: Callable[[Tensor], Tensor] | None = None

    @property
    def kind(self) -> Kind:
        return self.part.kind

    def attend(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        assert self.run_attention is not None
        self.work.queries, self.work.keys = x.shape[1], (x if other is None else other).shape[1]
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
        return value(self.part.attention, x).float().norm(dim=-1)

    def received(self, x: Tensor) -> Tensor:
        q, k = queries_and_keys(self.part.attention, x)
        total = torch.zeros(x.shape[0], x.shape[1], device=x.device)
        for rows in q.split(ROWS, 2):  # nothing N x N is held
            total = total + ops.qrow_scores(rows, k).sum(1)
        return total


def _norm(part: Part) -> Any:
    """The norm before the attention, without modulation."""
    norm: Any = part.block.norm1
    return getattr(norm, "norm", norm)


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


def queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two times [B, H, n, Dh], as they meet in the attention of models without rotary tables."""
    if hasattr(attention, "qkv"):
        q, k = _rows_of(attention.qkv, x, 0), _rows_of(attention.qkv, x, 1)
        heads = attention.num_heads
        norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    else:
        q, k = attention.to_q(x), attention.to_k(x)
        heads = attention.heads
        norms = (getattr(attention, "norm_q", None), getattr(attention, "norm_k", None))
    both = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    q, k = (t if norm is None else norm(t) for t, norm in zip(both, norms, strict=True))
    return q, k


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
    size = linear.out_features // 3
    rows = slice(part * size, (part + 1) * size)
    bias = None if linear.bias is None else linear.bias[rows]
    return F.linear(x, linear.weight[rows], bias)


# ---------------------------------------------------------------------- what it costs


def weights(module: Any) -> int:
    """Weights of the linears in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def flops(part: Part, work: Work, text: int, context: int, frames: int) -> float:
    """FLOPs of one block on one sample, 2 per multiply-add.

    text: tokens of the prompt beside or in front of those of the image; context: tokens of the
    prompt that cross-attention reads. frames: sequences of the image's tokens that attend apart
    from each other (Latte); `work` is of one of them."""
    if not work.tokens:
        return 0.0
    block: Any = part.block
    attention, width, tokens = part.attention, _width(part), work.tokens
    text = text if part.kind != "self" else 0
    beside = text if work.queries else 0  # the prompt goes along where the image's tokens attend
    own, added = _split(attention)
    # two of four projections are for queries (query, output), two for keys (key, value); a `single`
    # block has its output projection, of all tokens, in one linear with that of the MLP
    of_queries = own / 3 if part.kind == "single" else own / 2
    queries, keys = work.queries + beside, work.keys + beside
    total = of_queries * work.queries + (own - of_queries) * work.keys + 2 * width * queries * keys
    total += weights(part.mlp) * work.mlp
    second = getattr(block, "attn2", None)
    if part.kind == "joint":
        extra = getattr(block, "ff_context", None)
        total += beside * added + text * (weights(extra) if extra is not None else 0)
    if part.kind == "single":
        total += beside * own + weights(block.proj_out) * (tokens + text)
        total += weights(part.mlp) * (text if work.mlp else 0)
    if second is not None:  # to the prompt, in SD3 to the image itself
        other = context if part.kind == "self" else tokens
        total += weights(second) * (tokens + other) / 2 + 2 * width * tokens * other
    if part.over_time is not None:
        over: Any = part.over_time
        total += tokens * (weights(over.attn1) + weights(over.ff) + 2 * width * frames)
    return 2 * (frames * total + work.beside + _modulation(part))


def _width(part: Part) -> int:
    attention: Any = part.attention
    if hasattr(attention, "qkv"):
        return attention.qkv.out_features // 3
    return attention.to_q.out_features


def _split(attention: Any) -> tuple[int, int]:
    """Weights of the image's tokens and of those of the prompt."""
    names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    added = sum(weights(m) for n in names if (m := getattr(attention, n, None)) is not None)
    return weights(attention) - added, added


def _modulation(part: Part) -> int:
    """Weights that a sample is multiplied with once, for its timestep and class."""
    inside: list[Any] = [part.attention, part.mlp]
    for name in ("attn2", "ff_context", "proj_out"):
        inside.append(getattr(part.block, name, None))
    return weights(part.block) - sum(weights(m) for m in inside if m is not None)


def context_length(call: Mapping[str, Any]) -> int:
    """Tokens of the prompt that a model is given, 0 without one."""
    given = call.get("encoder_hidden_states")
    return given.shape[1] if torch.is_tensor(given) else 0
