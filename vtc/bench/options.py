"""Command-line options that the commands share. Wrong values are reported by argparse itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..budget import Budget, Keep
from ..commands.loading import value_of
from ..commands.outputs import output
from ..errors import InvalidRecipe

#: methods that stand beside others for comparison
CONTROLS = ("random", "grid")
#: (merge, mass) rows of --merge-mass
VARIANTS: dict[str, list[tuple[str, float]]] = {
    "off": [("none", 0.0)],
    "on": [("nearest", 1.0)],
    "both": [("none", 0.0), ("nearest", 1.0)],
    "full": [("none", 0.0), ("nearest", 0.0), ("none", 1.0), ("nearest", 1.0)],
}


def prepare(parser: argparse.ArgumentParser, description: str, epilog: str) -> None:
    """Texts of `--help`, and the options of every command."""
    parser.description, parser.epilog = description, epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=output, metavar="FILE", help="also write records to FILE")


def names(text: str) -> list[str]:
    """`a,b` -> ["a", "b"]."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("give at least one name")
    return found


def budgets(text: str) -> list[Keep]:
    """`0.5,64,auto` -> [0.5, 64, "auto"], as `keep` of `vtc.attach`."""
    try:
        return [Budget(_keep(part.strip())).keep for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _keep(text: str) -> Keep:
    if text == "auto":
        return "auto"
    return int(text) if text.isdigit() else float(text)


def method_and_params(text: str) -> tuple[str, dict[str, Any]]:
    """`zoo_prune:mode=jacobian:step=0.1` -> its name and parameters."""
    name, *options = text.split(":")
    pairs = [option.partition("=") for option in options]
    if not all(key and sign for key, sign, _ in pairs):
        raise InvalidRecipe(f"{text!r}: write a method and its parameters as name:key=value.")
    return name, {key: value_of(key, value) for key, _, value in pairs}


def counts(text: str) -> list[int]:
    """`64,144` -> [64, 144]."""
    return [at_least(1)(part) for part in text.split(",")]


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not smaller."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number
