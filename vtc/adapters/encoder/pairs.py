"""Attention with a bias per pair of places (BEiT, ViTs with relative positions): the table is the
model's own; tokens that are left see the rows and columns of their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from ..units import GridUnits, gather_mask

#: arguments of blocks that carry a bias of all pairs, which the model makes once for all blocks
_ARGUMENTS = ("shared_rel_pos_bias", "shared_rel_pos")
#: parts of a block that make one of their own, and the method that returns it
_MAKERS = (("attn", "_get_rel_pos_bias"), ("attn.rel_pos", "get_bias"))
#: the parameters by which such a part is known to be in use
_TABLES = ("relative_position_bias_table", "mlp")


@dataclass(frozen=True)
class Pairs:
    """Where the biases are. All are [1, H, N, N] or [H, N, N].

    Attributes:
        argument: of the blocks.
        makers: (module, name of its method), at most one for each block.
    """

    argument: str
    makers: tuple[tuple[nn.Module, str], ...]

    def fit(self, units: GridUnits, kwargs: dict[str, Any], own: Tensor | None) -> None:
        """Cut what a block is given. `own` [B, 1, 1, K] joins where the block makes no bias."""
        given: Tensor | None = kwargs.get(self.argument)
        if given is not None:
            given = units.once(id(given), given, partial(cut, units, given))
        if own is not None and not self.makers:
            given = own if given is None else given + own
        kwargs[self.argument] = given


def find(blocks: Sequence[nn.Module], arguments: Sequence[str]) -> Pairs | None:
    """The biases of these blocks, None when they have none that can be cut."""
    argument = next((name for name in _ARGUMENTS if name in arguments), None)
    if argument is None:
        return None
    return Pairs(argument, tuple(filter(None, map(_maker, blocks))))


def _maker(block: nn.Module) -> tuple[nn.Module, str] | None:
    for path, method in _MAKERS:
        owner: Any = block
        for name in path.split("."):
            owner = getattr(owner, name, None)
        used = any(getattr(owner, table, None) is not None for table in _TABLES)
        if used and callable(getattr(owner, method, None)):
            return owner, method
    return None


def cut(units: GridUnits, bias: Tensor) -> Tensor:
    """A bias of all pairs -> [B, H, K, K] of the tokens that are left."""
    return gather_mask(bias[None] if bias.ndim == 3 else bias, units.index())


def changed(change: Callable[[Tensor], Tensor], original: Callable[[], Tensor]) -> Any:
    """A method that makes a bias, with its result going through `change`."""

    @wraps(original)
    def make() -> Tensor:
        return change(original())

    return make
