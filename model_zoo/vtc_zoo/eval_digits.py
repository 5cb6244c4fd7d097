# SPDX-License-Identifier: Apache-2.0
"""How well tiny-dit-digits draws, with how many steps and how few tokens, over measured cost.

Run as `python -m vtc_zoo.eval_digits [--methods] [--model DIR] [--picture PNG]`. Fewer steps are
the plainest way to save work, so any method that compresses has to be better than they are at equal
cost. The cost is what torch counts while one digit is drawn, in float operations (two per
multiply-add).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vtc
import vtc_zoo
from vtc_zoo import digits

STEPS = (30, digits.STEPS, 8, 5)
SEEDS = (0, 1, 2)
DRAWN = 300
"""Digits drawn from each seed, 0 to 9 in turn."""

MIDDLE = {"at": "dit.1", "until": "dit.5"}
METHODS: dict[str, dict[str, Any]] = {
    "random 50 %": {"method": "random", "keep": 0.5, **MIDDLE},
    "random 25 %": {"method": "random", "keep": 0.25, **MIDDLE},
    "grid 50 %": {"method": "grid", "keep": 0.5, **MIDDLE},
    "grid 25 %": {"method": "grid", "keep": 0.25, **MIDDLE},
    "tomesd 50 %, attention": {"method": "tomesd", "keep": 0.5},
    "tomesd 50 %": {"method": "tomesd", "keep": 0.5, **MIDDLE},
    "tomesd 25 %": {"method": "tomesd", "keep": 0.25, **MIDDLE},
    "pooled 50 %": {"method": "pooled", "keep": 0.5, **MIDDLE},
    "pooled 25 %": {"method": "pooled", "keep": 0.25, **MIDDLE},
    "pooled 25 %, early steps": {"method": "pooled", "keep": 0.25, "noise": (0.5, 1.0), **MIDDLE},
    "pooled 25 %, late steps": {"method": "pooled", "keep": 0.25, "noise": (0.0, 0.499), **MIDDLE},
    "toca": {"method": "toca"},
    "duca": {"method": "duca"},
    "flexdit, not trained": digits.FLEXDIT,
}
"""What is attached to the dense model at 15 steps: label -> arguments of `vtc.attach`. Four of the
six blocks work on fewer tokens."""

EXAMPLES = """examples:
  python -m vtc_zoo.eval_digits                               # the table, five to ten minutes
  python -m vtc_zoo.eval_digits --methods --json digits.json  # methods too, half an hour
  python -m vtc_zoo.eval_digits --picture out/digits.png      # and a sheet of what was drawn
  python -m vtc_zoo.eval_digits --steps 5 --smoke             # 40 digits, to see that it runs"""


@dataclass(frozen=True)
class Row:
    """One line of the table: recognised share and Frechet distance for each seed, and operations
    for one digit."""

    label: str
    recognised: tuple[float, ...]
    frechet: tuple[float, ...]
    flops: int


def draw(model: nn.Module, n: int, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """`n` digits [n, 1, 16, 16], 0 to 9 in turn, and their labels [n]; `options` (steps, guidance)
    go to `digits.sample`."""
    labels = torch.arange(n) % digits.CLASSES
    return digits.sample(model, labels, seed=seed, **options), labels


def row(
    label: str, model: nn.Module, n: int = DRAWN, seeds: Sequence[int] = SEEDS, **options: Any
) -> Row:
    """Draw `n` digits from each seed and judge them, with the model as it is now: a method that is
    attached is measured too."""
    shares, distances = [], []
    for seed in seeds:
        images, labels = draw(model, n, seed, **options)
        shares.append(digits.recognised(images, labels))
        distances.append(digits.frechet(images))
    return Row(label, tuple(shares), tuple(distances), flops(model, **options))


def rows_of_methods(
    model: nn.Module, n: int, seeds: Sequence[int], guidance: float
) -> Iterator[Row]:
    """Every method of the table at 15 steps. Those that draw do it from the seed of the noise."""
    options = {"steps": digits.STEPS, "guidance": guidance}
    for label, request in tqdm(METHODS.items(), "methods", mininterval=2):
        found = []
        for seed in seeds:
            with vtc.attach(model, seed=seed, **request):
                found.append(row(label, model, n, (seed,), **options))
        shares, distances = (
            tuple(getattr(r, name)[0] for r in found) for name in ("recognised", "frechet")
        )
        yield Row(label, shares, distances, found[0].flops)
    trained, _ = vtc_zoo.load("tiny-flexdit-digits")
    with vtc.attach(trained, **digits.flexdit()):
        yield row("flexdit, trained", trained, n, seeds, **options)


def flops(model: nn.Module, **options: Any) -> int:
    """Operations for one digit, all steps, as `torch.utils.flop_counter` counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        draw(model, 1, 0, **options)
    return counter.get_total_flops()


def table(rows: Sequence[Row], dense: Row) -> str:
    """The rows as a markdown table; the cost is also given as a share of that of `dense`."""
    lines = [
        "| model | recognised | Frechet distance | Gflop per digit | of dense |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.label} | {spread([100 * x for x in r.recognised], 1)} % | {spread(r.frechet, 3)} | "
        f"{r.flops / 1e9:.2f} | {100 * r.flops / dense.flops:.0f} % |"
        for r in rows
    ]
    return "\n".join(lines)


def spread(values: Sequence[float], places: int) -> str:
    """Mean and standard deviation over seeds."""
    around = f" ± {stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{mean(values):.{places}f}{around}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Test tiny-dit-digits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder of another model; default: the shipped one")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N")
    parser.add_argument("--guidance", type=float, default=digits.GUIDANCE)
    parser.add_argument("--picture", type=Path, metavar="PNG", help="100 digits, the first N steps")
    parser.add_argument("--methods", action="store_true", help="rows of methods of vtc too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--smoke", action="store_true", help="40 digits from one seed")
    args = parser.parse_args()
    if min(args.steps) < 1:
        parser.error("--steps must be at least 1")
    torch.set_num_threads(1)
    model, _ = vtc_zoo.load_folder(args.model or vtc_zoo.path("tiny-dit-digits"))

    n, seeds = (40, SEEDS[:1]) if args.smoke else (DRAWN, SEEDS)
    found = {
        steps: row(f"{steps} steps", model, n, seeds, steps=steps, guidance=args.guidance)
        for steps in tqdm(args.steps, "steps", mininterval=2)
    }
    dense = found.get(digits.STEPS) or found[args.steps[0]]
    rows = list(found.values())
    if args.methods:
        rows += rows_of_methods(model, n, seeds, args.guidance)
    print(table(rows, dense))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    real, labels = digits.read("test")
    print(
        f"\nreal test digits: {100 * digits.recognised(real, labels):.1f} % recognised, Frechet "
        f"distance {digits.frechet(real[:n]):.3f} ({min(n, len(real))} digits)"
    )
    if args.picture is not None:
        images, _ = draw(model, 100, 0, steps=args.steps[0], guidance=args.guidance)
        digits.write_sheet(images, args.picture)


if __name__ == "__main__":
    main()
