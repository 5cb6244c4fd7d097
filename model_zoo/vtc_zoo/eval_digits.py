# SPDX-License-Identifier: Apache-2.0
"""How well tiny-dit-digits draws, with how many steps, over measured cost.

Run as `python -m vtc_zoo.eval_digits [--model DIR] [--picture PNG]`. Fewer steps are the plainest
way to save work, so any method that compresses has to be better than they are at equal cost. The
cost is what torch counts while one digit is drawn, in float operations (two per multiply-add).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vtc_zoo
from vtc_zoo import digits

STEPS = (30, digits.STEPS, 8, 5)
SEEDS = (0, 1, 2)
DRAWN = 300
"""Digits drawn from each seed, 0 to 9 in turn."""

EXAMPLES = """examples:
  python -m vtc_zoo.eval_digits                               # the table, five to ten minutes
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
    print(table(list(found.values()), dense))
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
