"""Budget: how many tokens stay. Separate from the method, so methods compare at equal tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidBudget

#: a share, a number of tokens, or "auto": the method decides by its own thresholds
Keep = float | int | Literal["auto"]


@dataclass(frozen=True)
class Budget:
    """Tokens that one image keeps: a share (float in (0, 1]) or a number of tokens (int >= 1).

    A share always refers to the tokens the image had before the first reduction, so that two
    steps `0.5` then `0.25` leave a quarter. A number larger than what is there keeps everything.
    "auto" leaves the number to the method.
    """

    keep: Keep

    def __post_init__(self) -> None:
        keep = self.keep
        if keep == "auto":
            return
        if isinstance(keep, bool) or not isinstance(keep, int | float):
            raise InvalidBudget(
                f"keep={keep!r}: give a share like 0.25, a token count like 64, or "
                f"'auto' where the method allows it."
            )
        if isinstance(keep, int) and keep < 1:
            raise InvalidBudget(f"keep={keep}: a token count must be at least 1.")
        if isinstance(keep, float) and not 0.0 < keep <= 1.0:
            whole = math.isfinite(keep) and keep == int(keep)
            more = f" For a token count write an int: keep={int(keep)}." if whole else ""
            raise InvalidBudget(f"keep={keep}: a share must be above 0 and at most 1.0.{more}")

    def tokens(self, available: int, original: int) -> int:
        """k for a row that has `available` tokens now and had `original` at first."""
        if self.keep == "auto":
            return available
        if isinstance(self.keep, int):
            return min(self.keep, available)
        return min(max(1, math.floor(self.keep * original + 0.5)), available)

    def __str__(self) -> str:
        if self.keep == "auto":
            return "auto"
        return f"{self.keep} tokens" if isinstance(self.keep, int) else f"{self.keep:.4g}"


def parse_schedule(schedule: Mapping[int, float | int]) -> dict[int, Budget]:
    """`{layer: keep}`, layers ascending, kept tokens never growing."""
    if not schedule:
        raise InvalidBudget(
            "schedule is empty: give {layer: keep}, for instance {2: 0.5, 8: 0.25}."
        )
    for layer in schedule:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise InvalidBudget(f"schedule layer {layer!r}: layers are numbers from 0.")
    out = {layer: Budget(schedule[layer]) for layer in sorted(schedule)}
    for kind in (int, float):
        same = [b.keep for b in out.values() if isinstance(b.keep, kind)]
        if same != sorted(same, reverse=True):
            raise InvalidBudget(f"schedule {dict(schedule)}: kept tokens cannot grow again.")
    return out
