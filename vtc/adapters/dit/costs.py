"""What a block of a diffusion transformer costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .facts import Kind, Part


@dataclass
class Work:
    """Image tokens that one block worked on: its queries, keys, the MLP; and multiply-adds on one
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


@dataclass(frozen=True)
class Costs:
    """Weights of one block that tokens are multiplied with.

    Attributes:
        kind, width: of the attention.
        queries, keys: for queries and outputs, for keys and values. A `single` block has its
            output projection in one linear with that of the MLP.
        mlp: of the image's tokens; out: that linear of a `single` block, for all tokens.
        prompt: projections of the prompt in the attention; prompt_mlp: its MLP.
        second: a further attention, to the prompt or, in SD3, to the image itself.
        over_time: the block over time behind this one.
        modulation: for timestep and class, once a sample.
    """

    kind: Kind
    width: int
    queries: float
    keys: float
    mlp: int
    out: int
    prompt: int
    prompt_mlp: int
    second: int
    over_time: int
    modulation: int

    @classmethod
    def of(cls, part: Part) -> Costs:
        block, attention, over = part.block, part.attention, part.over_time
        single, joint = part.kind == "single", part.kind == "joint"
        own, added = _projections(attention)
        queries = own / 3 if single else own / 2
        out, second, other = (
            _weights(getattr(block, name, None)) for name in ("proj_out", "attn2", "ff_context")
        )
        whole = _weights(attention) + _weights(part.mlp) + out + second + other
        return cls(
            part.kind,
            _width(attention),
            queries,
            own - queries,
            _weights(part.mlp),
            out if single else 0,
            own if single else added,
            _weights(part.mlp) if single else other if joint else 0,
            second,
            0 if over is None else _weights(over.attn1) + _weights(over.ff),
            _weights(block) - whole,
        )

    def flops(self, work: Work, text: int, context: int, frames: int) -> float:
        """FLOPs on one sample, 2 per multiply-add.

        text: tokens of the prompt beside or in front of those of the image; context: tokens of the
        prompt that cross-attention reads. frames: sequences of the image's tokens that attend apart
        from each other (Latte); `work` is of one of them."""
        if not work.tokens:
            return 0.0
        tokens, text = work.tokens, text if self.kind != "self" else 0
        beside = text if work.queries else 0  # the prompt goes along where the image's tokens do
        total = self.queries * work.queries + self.keys * work.keys + self.mlp * work.mlp
        total += 2 * self.width * (work.queries + beside) * (work.keys + beside)
        total += self.prompt * beside + self.out * (tokens + text)
        if self.kind == "joint" or work.mlp:
            total += self.prompt_mlp * text
        if self.second:
            other = context if self.kind == "self" else tokens
            total += self.second * (tokens + other) / 2 + 2 * self.width * tokens * other
        if self.over_time:
            total += tokens * (self.over_time + 2 * self.width * frames)
        return 2 * (frames * total + work.beside + self.modulation)


def _weights(module: Any) -> int:
    """Weights of the linears in a module, 0 for one that is not there."""
    if module is None:
        return 0
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _projections(attention: Any) -> tuple[int, int]:
    """Weights of the image's tokens and of those of the prompt. Fused linears stand beside those
    that they replace."""
    fused = bool(getattr(attention, "fused_projections", False))
    prompt = ["to_added_qkv"] if fused else ["add_q_proj", "add_k_proj", "add_v_proj"]
    added = sum(_weights(getattr(attention, name, None)) for name in (*prompt, "to_add_out"))
    if fused:
        names = ("to_qkv", "to_out")
        return sum(_weights(getattr(attention, name, None)) for name in names), added
    return _weights(attention) - added, added


def _width(attention: Any) -> int:
    fused = getattr(attention, "qkv", None)
    return attention.to_q.out_features if fused is None else fused.out_features // 3
