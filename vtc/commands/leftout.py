"""Items that cannot be used cost themselves: they are left out, counted, and named at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import VtcError

T = TypeVar("T")
Made = TypeVar("Made")

#: items that fail before any is fine until the fault is not theirs
FAULTS = 3
#: lines that are printed
MOST = 20


class LeftOut:
    """What is left out, as (name, why), in the order in which it was found."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._faults = 0
        self._fine = False

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        lines = [f"  {name}: {' '.join(why.split())}" for name, why in self.found[:MOST]]
        if len(self) > MOST:
            lines.append(f"  and {len(self) - MOST} more")
        what = "1 item was" if len(self) == 1 else f"{len(self)} items were"
        return "\n".join([f"{what} left out:", *lines])

    def add(self, name: object, why: object) -> None:
        self.found.append((str(name), str(why)))

    def tell(self) -> int:
        """Print what is left out, if anything; returns the exit code."""
        if self.found:
            print(f"\n{self}")
        return 3 if self.found else 0

    def sound(
        self, batch: Sequence[T], make: Callable[[list[T]], Made], name: Callable[[T], object]
    ) -> tuple[list[T], Made] | None:
        """What `make` gives of a batch without the items that fail alone too, and the others.

        None where no item is left. Where all are fine alone the batch is at fault, and where
        nothing was ever fine and three items have failed, all are: these errors are raised.
        """
        whole = list(batch)
        try:
            return self._made(whole, make)
        except VtcError as error:
            together, bad = error, [(item, str(error)) for item in whole if len(whole) == 1]
        good = []
        for item in whole if len(whole) > 1 else []:
            try:
                self._made([item], make)
                good.append(item)
            except VtcError as error:
                bad.append((item, str(error)))
        self._faults += len(bad)
        if not bad or (not self._fine and self._faults >= FAULTS):
            raise together
        for item, why in bad:
            self.add(name(item), why)
        return self._made(good, make) if good else None

    def _made(self, some: list[T], make: Callable[[list[T]], Made]) -> tuple[list[T], Made]:
        made = make(some)
        self._fine = True
        return some, made
