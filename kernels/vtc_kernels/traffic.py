"""Bytes and launches of a case: the eager formulation, our kernels, and the least possible.

Eager operations are counted one by one on tensors without storage. The bytes of our kernels come
from the formula of the case; tests prove the formulas in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from .cases import Case

#: reserve memory or rename it: nothing moves
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "_local_scalar_dense",
    "sym_size",
}
#: read as much of their first tensor as they write
_SELECT = {"gather", "index_select", "index", "embedding", "take", "masked_select"}
#: write their first tensor without reading it
_OVERWRITE = {"fill_", "zero_", "copy_"}
#: write as much of their first tensor, in place, as there is in their last
_PLACE = {"scatter_", "index_copy_", "index_put_"}
#: the same, and read it to add
_ADD = {"scatter_add_", "index_add_", "scatter_reduce_"}


def distinct(t: Tensor) -> int:
    """Bytes of a tensor, expanded axes counted once."""
    count = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        count *= length if stride or not length else 1
    return count * t.element_size()


class EagerTraffic(TorchDispatchMode):
    """Adds up what every operation reads and writes, as if each were one kernel.

    Views are free. A gather reads the rows it selects, not the whole tensor. Kernels that an
    operation uses inside (a sort takes several) count as one launch, so launches are a lower
    estimate; so are bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        alias = [a.alias_info for a in func._schema.arguments]
        view = any(a is not None and not a.is_write for a in alias)
        if view or name in _FREE:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read, written = sum(map(distinct, given)), sum(map(distinct, made))
        if name in _SELECT:
            read += written - distinct(given[0])
        elif name in _OVERWRITE:
            read -= distinct(given[0])
        elif name in _PLACE:
            read, written = read - distinct(given[0]), distinct(given[-1])
        elif name in _ADD:
            written = distinct(given[-1])
            read += written - distinct(given[0])
        self.launches += 1
        self.bytes += read + written
        self.operations.append((name, read + written))
        return out


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`function` of every tensor inside dicts, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, function) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        new = {f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)}
        return replace(value, **new)
    return value


@dataclass(frozen=True)
class Line:
    """One line of the report: launches, and bytes of the eager formulation, of ours (kernels and
    what torch does around them), and the compulsory ones."""

    case: Case
    eager_launches: int
    launches: int
    eager: int
    ours: int
    bound: int

    @property
    def saved(self) -> float:
        """Bytes of the eager formulation per compulsory byte."""
        return self.eager / self.bound

    @property
    def ratio(self) -> float:
        """Bytes of ours per compulsory byte."""
        return self.ours / self.bound

    @property
    def within(self) -> bool:
        return self.ratio <= self.case.limit


def count(case: Case, dtype: torch.dtype = torch.bfloat16, batch: int | None = None) -> Line:
    """The traffic of a case. Rows are left empty unless the eager formulation needs values."""
    tensors = case.tensors("cpu", dtype, batch, values=not case.eager_on_meta)
    inputs = tensors
    if case.eager_on_meta:
        inputs = map_tensors(tensors, lambda t: t.to("meta"))
    with EagerTraffic() as eager:
        case.eager(inputs)
    around = EagerTraffic()
    if case.around is not None:
        with around:
            case.around(tensors)
    return Line(
        case,
        eager.launches,
        case.kernels + around.launches,
        eager.bytes,
        case.moved(tensors) + around.bytes,
        case.bound(tensors),
    )
