"""What became of the tokens of an image, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..context import Layout, Part
from ..errors import InvalidInput
from ..session import Reduction

#: which stages of a forward are drawn: all, the last one, or one by its number
Stages = Literal["all", "last"] | int


@dataclass(frozen=True)
class Fate:
    """What became of the tokens of one image, up to and including one stage.

    Attributes:
        home: for every original token the place of the kept token it lives in, -1 when lost.
        lost: for every original token the stage that lost it, -1 while it lives.
        layout: original grid, None where unknown.
        parts: grids over the picture, of an image that was cut into tiles.
        stage, stages: number of this stage, and of all.
        label: site and method.
    """

    home: tuple[int, ...]
    lost: tuple[int, ...]
    layout: Layout | None
    stage: int
    stages: int
    label: str
    parts: tuple[Part, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the kept tokens."""
        return tuple(place for place, home in enumerate(self.home) if home == place)

    @property
    def merged(self) -> tuple[int, ...]:
        """Places of the tokens that were averaged into a kept token."""
        return tuple(p for p, home in enumerate(self.home) if home not in (-1, p))

    @property
    def hosts(self) -> frozenset[int]:
        """Places of the kept tokens that took others in."""
        return frozenset(self.home[place] for place in self.merged)

    @property
    def caption(self) -> str:
        return f"{self.label}: {len(self.kept)} of {len(self.home)} tokens"


def fates(reductions: Reduction | Iterable[Reduction], row: int = 0) -> list[Fate]:
    """Follow the tokens of image `row` through the reductions of one forward, stage by stage.

    Places are those of the original grid (`Reduction.source_in`), so stages compose. Of a longer
    trace the last forward is read.
    """
    stages = last_forward(reductions)
    first = stages[0]
    if not 0 <= row < len(first.n_in):
        raise InvalidInput(f"row {row}: these reductions have {len(first.n_in)} image(s).")
    layout = first.layout[row]
    parts = tuple(first.parts[row]) if first.parts else ()
    places = _places(first, row)
    whole = layout.n if layout is not None else max((part.end for part in parts), default=0)
    n = max(whole, max(places) + 1)
    home, lost = list(range(n)), [-1] * n
    out = []
    for number, reduction in enumerate(stages):
        if number and _grown(stages[number - 1], reduction):
            layout = reduction.layout[row]
            n = len(home) + _tail(reduction, row)
            home, lost = [*home, *range(len(home), n)], lost + [-1] * (n - len(lost))
        moves = _moves(reduction, row)
        home = [-1 if old < 0 else moves.get(old, -1) for old in home]
        lost = [number if h < 0 and s < 0 else s for h, s in zip(home, lost, strict=True)]
        fits = layout if layout is not None and layout.n == n else None
        label = f"{reduction.site} {reduction.method}"
        out.append(Fate(tuple(home), tuple(lost), fits, number, len(stages), label, parts))
    return out


def stage_labels(reductions: Reduction | Iterable[Reduction]) -> list[str]:
    """Site and method of every stage that `overlay` draws, in order."""
    return [f"{entry.site} {entry.method}" for entry in last_forward(reductions)]


def choose(story: Sequence[Fate], stages: Stages) -> list[Fate]:
    """The stages that were asked for."""
    if stages == "all":
        return list(story)
    number = -1 if stages == "last" else stages
    if not isinstance(number, int) or not -len(story) <= number < len(story):
        named = ", ".join(f"{i} ({fate.label})" for i, fate in enumerate(story))
        raise InvalidInput(f"stages={stages!r}: give 'all', 'last' or one of {named}.")
    return [story[number]]


def last_forward(reductions: Reduction | Iterable[Reduction]) -> list[Reduction]:
    """The trailing reductions that belong together: each site at most once, counts chained. A tail
    may be put behind the tokens between two of them."""
    entries = [reductions] if isinstance(reductions, Reduction) else list(reductions)
    if not entries:
        raise InvalidInput("no reductions to draw: run the model while the session is attached.")
    # Every layer's cache is a story of its own: what the prefill dropped is drawn before it.
    entries = [e for e in entries if not e.site.startswith("cache")] or entries[-1:]
    out = [entries[-1]]
    for entry in reversed(entries[:-1]):
        follows = entry.n_out == out[0].n_in or _grown(entry, out[0])
        if not follows or entry.site in {e.site for e in out}:
            break
        out.insert(0, entry)
    return out


def _grown(before: Reduction, after: Reduction) -> bool:
    """Whether what came in is what went out before, with the tail of its layout put behind it."""
    if before.samples != after.samples or len(before.n_out) != len(after.n_in):
        return False
    return any(_tail(after, row) for row in range(len(after.n_in))) and all(
        _only_tail(before, after, row) for row in range(len(after.n_in))
    )


def _only_tail(before: Reduction, after: Reduction, row: int) -> bool:
    old, new = before.layout[row], after.layout[row]
    if old is None or new is None or old.tail or replace(new, tail=0) != old:
        return False
    left = before.source[row, : before.n_out[row]].tolist()
    return _places(after, row) == [*left, *range(old.n, new.n)]


def _tail(reduction: Reduction, row: int) -> int:
    layout = reduction.layout[row]
    return 0 if layout is None else layout.tail


def _places(reduction: Reduction, row: int) -> list[int]:
    """Original places of the tokens that came in."""
    return [int(p) for p in reduction.source_in[row].tolist()[: reduction.n_in[row]]]


def _moves(reduction: Reduction, row: int) -> dict[int, int]:
    """Original place of each token that came in -> place of the token it lives in afterwards."""
    places = _places(reduction, row)
    if reduction.plan is None:
        return {p: p for p in places}
    slots = reduction.plan.destination()[row].tolist()
    kept = [places[i] for i in reduction.plan.index[row].tolist()]
    return {p: kept[slot] if slot >= 0 else -1 for p, slot in zip(places, slots, strict=False)}
