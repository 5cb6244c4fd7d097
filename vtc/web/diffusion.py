"""One request to the digits: drawn dense and with fewer tokens, from the same noise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidInput
from .answers import chosen
from .models import Loaded

MOST_STEPS, MOST_SEED = 50, 2**31 - 1


@dataclass(frozen=True)
class Sketch:
    """What a visitor chose.

    Attributes:
        keep: share of tokens that stay; None: as the method decides.
        at: site, "" where the method goes by itself; until: block before which all tokens are
            there again, "" behind the last one.
        noise: act only while the images are at least this noisy, 0 to 1.
    """

    method: str
    at: str = ""
    until: str = ""
    keep: float | None = None
    noise: float = 0.0
    steps: int = 15
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """The digits of the dense model and of the compressed one (`vtc_zoo.drawing.Drawn`), the time
    of every step (1 noise, 0 picture), and what a support vector machine recognises of them."""

    dense: Any
    compressed: Any
    times: tuple[float, ...]
    recognised: tuple[float, float] | None


@torch.no_grad()
def sketch(loaded: Loaded, wish: Sketch) -> Pair:
    """Draw twice. The caller has the model to itself."""
    from vtc_zoo import digits, drawing

    for name, value, least, most in (
        ("steps", wish.steps, 1, MOST_STEPS),
        ("seed", wish.seed, 0, MOST_SEED),
    ):
        if value is None or value != int(value) or not least <= value <= most:
            raise InvalidInput(f"{name} {value}: give a whole number from {least} to {most}.")
    given = _request(loaded, wish)
    digits.sample(loaded.model, [0], steps=1)  # the first run is slow
    how: dict[str, Any] = {"steps": int(wish.steps), "seed": int(wish.seed)}
    how["clock"] = time.perf_counter
    compressed = drawing.draw(loaded.model, wish.method, given, **how)
    dense = drawing.draw(loaded.model, "dense", drawing.DENSE, **how)
    return Pair(dense, compressed, tuple(digits.times(int(wish.steps))), _judged(dense, compressed))


def _judged(dense: Any, compressed: Any) -> tuple[float, float] | None:
    """None where scikit-learn is not installed."""
    from vtc_zoo import digits

    labels = range(digits.CLASSES)
    try:
        return digits.recognised(dense.images, labels), digits.recognised(compressed.images, labels)
    except ImportError:
        return None


def _request(loaded: Loaded, wish: Sketch) -> dict[str, Any]:
    """Arguments of `attach`."""
    choice = chosen(loaded, wish.method)
    given: dict[str, Any] = {"method": choice.name, "keep": wish.keep, **choice.params}
    if not choice.sites:
        if wish.at or wish.until or wish.noise:
            raise InvalidInput(
                f"{choice.name!r} acts in all blocks and at every step: it takes no site, no "
                f"`until` and no least noise."
            )
        return given
    at = given["at"] = wish.at or choice.sites[0]
    if at not in choice.sites:
        raise InvalidInput(
            f"{choice.name!r} cannot be put at {at!r}. It can be at: {', '.join(choice.sites)}."
        )
    if wish.until and at.endswith(".attn"):
        raise InvalidInput(f"all tokens are back behind the attention at {at!r}: leave until out.")
    if wish.until:
        given["until"] = wish.until
    if wish.noise:
        given["noise"] = (wish.noise, 1.0)
    return given
