"""Search for the cheapest candidate that reaches a goal, by successive halving or over a grid.

Nothing here knows models: candidates are names, and `measure` says what is known of some after
their first n batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..bench.records import Record
from ..errors import InvalidInput
from .loyalty import interval

#: names, batches -> what `loyalty.summary` says of each, or {"error": why it cannot run}
Measure = Callable[[Sequence[str], int], Mapping[str, Record]]
#: one-sided 95 %
Z = 1.645


@dataclass(frozen=True)
class Goal:
    """Least loyalty, of which measure ("exact", "tokens" or "prefix"), and most KL in nats."""

    loyalty: float
    measure: str = "exact"
    kl: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.loyalty <= 1:
            raise InvalidInput(f"loyalty={self.loyalty}: give a share above 0, up to 1.")
        if self.kl is not None and not self.kl > 0:
            raise InvalidInput(f"kl={self.kl}: give nats above 0.")

    def __str__(self) -> str:
        most = "" if self.kl is None else f", KL <= {self.kl:g} nats"
        return f"{self.measure} >= {self.loyalty:g}{most}"

    def meets(self, record: Record) -> bool:
        """What was seen is good enough."""
        enough = record[self.measure] >= self.loyalty
        return enough and (self.kl is None or record["kl"] <= self.kl)

    def fails(self, record: Record) -> bool:
        """What was seen is so far below that chance does not explain it."""
        high = interval(record[self.measure], record["media"], Z)[1]
        far = self.kl is not None and record["kl"] - Z * _error(record) > self.kl
        return high < self.loyalty - 1e-9 or far

    def surely(self, record: Record) -> bool:
        """What was seen is so far above that chance does not explain it."""
        low = interval(record[self.measure], record["media"], Z)[0]
        near = self.kl is None or record["kl"] + Z * _error(record) <= self.kl
        return low >= self.loyalty and near


def _error(record: Record) -> float:
    """Standard error of the KL; unknown for a single picture."""
    return math.inf if record["kl_se"] is None else record["kl_se"]


@dataclass
class Result:
    """Where a search ended.

    best: the chosen one; None when nothing reached the goal.
    records: what is known of every candidate that ran; `items` says on how many.
    broken: candidates that cannot run, and why.
    """

    best: str | None = None
    records: dict[str, Record] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def front(self, measure: str) -> list[str]:
        """Cheapest first, each more loyal than all cheaper ones, of those seen on most items; and
        the chosen one."""
        records = self.records
        most = max((record["items"] for record in records.values()), default=0)
        whole = [name for name in records if records[name]["items"] == most]
        out, best = [], -1.0
        for name in sorted(whole, key=lambda n: (records[n]["flops"], -records[n][measure])):
            if records[name][measure] > best or name == self.best:
                out.append(name)
            best = max(best, records[name][measure])
        return out


def rungs(start: int, total: int) -> list[int]:
    """Batches of every rung: doubling from `start` to all."""
    out = [min(start, total)]
    while out[-1] < total:
        out.append(min(2 * out[-1], total))
    return out


def search(names: Sequence[str], steps: Sequence[int], measure: Measure, goal: Goal) -> Result:
    """The candidate of fewest FLOPs that reaches the goal on all batches; `steps` are the rungs,
    and a single one makes it a grid.

    After each rung but the last a candidate is out for good when the upper end of its interval is
    below the goal (`Goal.fails`). It has to wait when another surely reaches the goal
    (`Goal.surely`) for fewer FLOPs. If then more than half of the rung are left, half of the rung
    goes on, and the rest waits: those go on that reach the goal as it looks, cheapest first, then
    the others, nearest first. Those that wait go through the rungs themselves when nothing reaches
    the goal in the end.
    """
    result, waiting = Result(), list(names)
    while waiting and result.best is None:
        alive, waiting = waiting, []
        for step in steps:
            half = math.ceil(len(alive) / 2)
            alive = _measured(alive, step, measure, result)
            if step == steps[-1] or not alive:
                break
            alive = [name for name in alive if not goal.fails(result.records[name])]
            able = _ranked(_cheap(alive, result.records, goal), result.records, goal)[:half]
            waiting += [name for name in alive if name not in able]
            alive = able
        reached = [name for name in alive if goal.meets(result.records[name])]
        result.best = min(reached, key=lambda n: _price(result.records[n], goal), default=None)
    return result


def _measured(names: Sequence[str], step: int, measure: Measure, result: Result) -> list[str]:
    """Those that could run."""
    for name, record in measure(names, step).items():
        if "error" in record:
            result.broken[name] = record["error"]
            result.records.pop(name, None)
        else:
            result.records[name] = record
    return [name for name in names if name not in result.broken]


def _cheap(names: Sequence[str], records: Mapping[str, Record], goal: Goal) -> list[str]:
    """Without those that cost more FLOPs than one that surely reaches the goal."""
    price = {name: _price(records[name], goal)[0] for name in names}
    sure = [price[name] for name in names if goal.surely(records[name])]
    return [name for name in names if price[name] <= min(sure, default=math.inf)]


def _ranked(names: Sequence[str], records: Mapping[str, Record], goal: Goal) -> list[str]:
    """Reaching the goal, cheapest first; then the others, most loyal first."""

    def place(name: str) -> tuple[float, ...]:
        price = _price(records[name], goal)
        return (0, *price) if goal.meets(records[name]) else (1, price[-1])

    return sorted(names, key=place)


def _price(record: Record, goal: Goal) -> tuple[float, float, float]:
    """FLOPs to a thousandth of dense, then time to a tenth, then loyalty."""
    return round(record["flops"], 3), round(record["time"], 1), -record[goal.measure]
