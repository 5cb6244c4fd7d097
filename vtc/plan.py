"""Plan: the decision of a method, as data. Methods decide, `vtc.ops` moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidPlan


@dataclass(frozen=True)
class Plan:
    """Which tokens stay, and which merge into which. One row is one image (or one video).

    Attributes:
        index: [R, M] source token that each kept token sits on, ascending. A row that keeps fewer
            than M tokens repeats its last index.
        n: number of tokens per row before the reduction (N).
        counts: tokens that each row keeps; None when every row keeps M.
        assign: [R, N] kept slot that each source token goes into, -1 for a token that is lost.
            None when nothing is merged or counted: kept tokens go into themselves.
        weight: [R, N] share of each source token in its slot: out[m] = sum weight[n] * x[n] over
            assign[n] == m. None when kept tokens are moved unchanged.
        size: [R, M] how many original tokens each kept token stands for. None means one each.
    """

    index: Tensor
    n: int
    counts: tuple[int, ...] | None = None
    assign: Tensor | None = None
    weight: Tensor | None = None
    size: Tensor | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, counts: tuple[int, ...] | None = None) -> Plan:
        """Keep the tokens that are True in `keep` [R, N]; `counts` if already known on the host."""
        counts = counts or tuple(int(c) for c in keep.sum(1).tolist())
        m = max(counts)
        if min(counts) == m:
            places = torch.nonzero_static(keep, size=m * len(counts))
            return cls(places[:, 1].reshape(len(counts), m), keep.shape[1])
        order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :m]
        last = torch.tensor(counts, device=keep.device)[:, None] - 1
        slot = torch.arange(m, device=keep.device)[None].minimum(last)
        return cls(order.gather(1, slot), keep.shape[1], counts)

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    @property
    def m(self) -> int:
        return self.index.shape[1]

    @property
    def kept(self) -> tuple[int, ...]:
        """Number of tokens that each row keeps."""
        return self.counts or (self.m,) * self.rows

    @property
    def slots(self) -> Tensor:
        """[R, M] True where a slot holds a kept token, False on the padding of shorter rows."""
        steps = torch.arange(self.m, device=self.index.device)
        if self.counts is None:
            return torch.ones_like(self.index, dtype=torch.bool)
        return steps[None] < torch.tensor(self.counts, device=self.index.device)[:, None]

    def changes(self, counts: tuple[int, ...]) -> bool:
        """Whether it drops or merges anything of rows with that many tokens."""
        return self.kept != counts or self.weight is not None

    def keep_mask(self) -> Tensor:
        """[R, N] True for the source tokens that kept tokens sit on."""
        mask = torch.zeros(self.rows, self.n, dtype=torch.bool, device=self.index.device)
        return mask.scatter(1, self.index, True)

    def destination(self) -> Tensor:
        """[R, N] slot of every source token, -1 when it is lost: `assign`, or the kept tokens."""
        if self.assign is not None:
            return self.assign
        inverse = torch.full((self.rows, self.n), -1, device=self.index.device)
        slot = torch.arange(self.m, device=self.index.device).expand_as(self.index)
        if self.counts is not None:  # padding slots repeat the last index: they map to its slot
            slot = slot.minimum(torch.tensor(self.counts, device=slot.device)[:, None] - 1)
        return inverse.scatter(1, self.index, slot)

    def then(self, later: Plan) -> Plan:
        """This plan followed by `later`, as one plan over the tokens of this one."""
        if later.n != self.m:
            raise InvalidPlan(f"cannot compose: first plan keeps {self.m}, second reads {later.n}")
        first, second = self.destination(), later.destination()
        assign = torch.where(first >= 0, second.gather(1, first.clamp(min=0)), -1)
        weight = None
        if self.weight is not None or later.weight is not None:
            own = self.weight if self.weight is not None else torch.ones_like(first, dtype=_F32)
            own = torch.where(first >= 0, own, 0.0)
            after = (
                later.weight if later.weight is not None else torch.ones_like(second, dtype=_F32)
            )
            weight = own * after.gather(1, first.clamp(min=0))
        index = self.index.gather(1, later.index)
        size = later.size
        if size is None and self.size is not None:
            size = self.size.gather(1, later.index)
        return Plan(index, self.n, later.counts, assign, weight, size)

    def behind(self, prefix: int) -> Plan:
        """The same plan for rows that have `prefix` more tokens in front, which all stay."""
        if not prefix:
            return self

        def shift(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(x < 0, x, x + prefix)

        def front(x: Tensor | None, value: Tensor | float) -> Tensor | None:
            if x is None:
                return None
            own = torch.as_tensor(value, dtype=x.dtype, device=x.device)
            return torch.cat([own.expand(self.rows, prefix), x], 1)

        steps = torch.arange(prefix, device=self.index.device)
        index = torch.cat([steps.expand(self.rows, -1), self.index + prefix], 1)
        counts = None if self.counts is None else tuple(c + prefix for c in self.counts)
        assign, weight = front(shift(self.assign), steps), front(self.weight, 1.0)
        return Plan(index, self.n + prefix, counts, assign, weight, front(self.size, 1.0))

    def check(self, valid: Tensor) -> None:
        """Raise `InvalidPlan` when an index is out of range, repeated, unsorted or padding."""
        if self.index.ndim != 2 or self.rows != valid.shape[0] or self.n != valid.shape[1]:
            raise InvalidPlan(
                f"plan is [{tuple(self.index.shape)}] over {self.n} tokens, context is "
                f"{tuple(valid.shape)}: a plan has one row per context row"
            )
        step = self.index.diff(dim=1) > 0
        if not bool((step if self.counts is None else step | ~self.slots[:, 1:]).all()):
            raise InvalidPlan("plan indices must ascend strictly within a row")
        if self.m == 0 or int(self.index[:, 0].min()) < 0 or int(self.index[:, -1].max()) >= self.n:
            raise InvalidPlan(f"plan indices must be in [0, {self.n}) and keep at least one token")
        if not bool(valid.gather(1, self.index).all()):
            raise InvalidPlan("plan keeps a padding token (visual is False there)")


_F32 = torch.float32
