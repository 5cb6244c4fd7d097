"""Low-rank changes of somebody's linear layers that live in hooks: nothing of the model is
replaced, and it is as before when the hooks are gone.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput

if TYPE_CHECKING:
    from ..hooks import Installed


class Lora(nn.Module):
    """y = W x becomes y + scale * up (down x) for each layer of `sizes`; `up` begins at zero.

    Args:
        sizes: name of a linear layer, counted from the first block ("0.self_attn.q_proj") -> its
            inputs and outputs.
        rank: of the change. scale: its strength, alpha / rank in the paper.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]], rank: int, scale: float = 2.0) -> None:
        super().__init__()
        if rank < 1:
            raise InvalidInput(f"lora: rank={rank}, use a number from 1 on.")
        self.sizes = {name: (int(size[0]), int(size[1])) for name, size in sizes.items()}
        self.rank, self.scale = rank, scale
        self.down = nn.ParameterList(
            torch.empty(rank, n).uniform_(-1, 1) * math.sqrt(3 / n) for n, _ in self.sizes.values()
        )
        self.up = nn.ParameterList(torch.zeros(m, rank) for _, m in self.sizes.values())

    @classmethod
    def beside(cls, blocks: Sequence[nn.Module], rank: int, scale: float = 2.0) -> Lora:
        """For all linear layers of these blocks."""
        found = _linears(blocks).items()
        return cls({n: (m.in_features, m.out_features) for n, m in found}, rank, scale)

    @property
    def about(self) -> dict[str, Any]:
        """The arguments that make this object again, as plain data."""
        return {"sizes": self.sizes, "rank": self.rank, "scale": self.scale}

    def check(self, blocks: Sequence[nn.Module]) -> None:
        """Raise when these blocks do not have its layers."""
        found = {n: (m.in_features, m.out_features) for n, m in _linears(blocks).items()}
        wrong = [name for name, size in self.sizes.items() if found.get(name) != size]
        if wrong:
            name = wrong[0]
            raise InvalidInput(
                f"lora: {len(wrong)} of its layers do not fit this model, the first is {name} "
                f"{self.sizes[name]}: here {found.get(name, 'missing')}. Use the model that it was "
                f"trained beside."
            )

    def install(self, blocks: Sequence[nn.Module], on: Installed) -> None:
        """Hook the layers of these blocks."""
        self.check(blocks)
        layers = _linears(blocks)
        for name, down, up in zip(self.sizes, self.down, self.up, strict=True):
            on.after(layers[name], partial(self._change, down, up))

    def _change(
        self, down: Tensor, up: Tensor, layer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        return output + self.scale * F.linear(F.linear(args[0], down), up)


def _linears(blocks: Sequence[nn.Module]) -> dict[str, nn.Linear]:
    named = ((f"{i}.{n}", m) for i, b in enumerate(blocks) for n, m in b.named_modules())
    return {name: module for name, module in named if isinstance(module, nn.Linear)}
