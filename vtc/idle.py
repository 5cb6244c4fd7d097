"""Steps of a recipe that can never drop a token, whatever the images are, are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .context import Site
from .errors import InvalidRecipe
from .reducer import Trained
from .registry import REDUCERS

if TYPE_CHECKING:
    from .recipe import Step


def refuse_idle(steps: Sequence[Step]) -> None:
    """Raise InvalidRecipe for the first of `steps`, in the order they act, that finds no more
    tokens than it keeps.

    Only what the recipe alone makes certain: a share beside a number depends on the image, "auto"
    on the tokens, and steps have to count the same tokens. keep=1.0 says itself that nothing is
    dropped, keep=1 that nothing more can be, and a step that renumbers positions acts without.
    """
    placed = [(step, step.site) for step in steps if step.keep != "auto"]
    for number, (later, site) in enumerate(placed):
        if later.positions == "renumber":
            continue
        for earlier, before in placed[:number]:
            if _count_alike(before, site) and _fewer(earlier, later) and _exact(earlier, later):
                raise _never_drops(earlier, later)


def _count_alike(earlier: Site, later: Site) -> bool:
    """Whether all tokens that the later site sees have passed the earlier one. Early layers of a
    cache have not passed a decoder layer."""
    if earlier.kind == "projector":
        return later.kind in ("decoder", "cache")
    return earlier.kind == later.kind and earlier.kind in ("vision", "decoder")


def _fewer(earlier: Step, later: Step) -> bool:
    """Whether the earlier step keeps at most as many tokens of every image as the later one."""
    first, second = earlier.keep, later.keep
    if isinstance(first, str) or isinstance(second, str):
        return False
    if second == 1:  # all tokens, or the fewest that there are: methods of several steps go to it
        return False
    if isinstance(first, int) and isinstance(second, float):
        return first == 1
    return isinstance(first, int) == isinstance(second, int) and first <= second


def _exact(earlier: Step, later: Step) -> bool:
    """Whether both count whole rows of one kind, and keep the number that they are given."""
    first, second = REDUCERS[earlier.method], REDUCERS[later.method]
    alike = first.frames == second.frames and earlier.scope == later.scope
    return alike and not first.merging and not issubclass(second, Trained)


def _never_drops(earlier: Step, later: Step) -> InvalidRecipe:
    if isinstance(earlier.keep, float):
        why = (
            f"shares refer to the tokens that an image had at first. Give less than {earlier.keep} "
            f"(half of what is left is {earlier.keep / 2:.4g})"
        )
    else:
        why = f"{earlier.keep} of an image are left. Give fewer"
    return InvalidRecipe(
        f"{later.at}: keep={later.keep} can never drop a token after {earlier.at} with "
        f"keep={earlier.keep}: {why}, or leave the step out."
    )
