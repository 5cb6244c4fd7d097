# SPDX-License-Identifier: Apache-2.0
"""Accuracy over measured cost of the two Fashion-MNIST models.

Run as `python -m vtc_zoo.eval_fmnist --data DIR`. The cost is what torch counts while one image
goes through, in float operations (two per multiply-add), beside that of the plain ViT. `--smoke`
runs on the 200 test images that are shipped.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vtc_zoo
from vtc_zoo import fmnist

TRAINED_GRIDS = ((2, 2), (3, 3), (4, 4), (5, 5))
"""Compressed grids that LookupViT meets in training."""
OTHER_GRIDS = ((1, 1), (3, 4), (6, 6), (8, 8))
DROPPING = ("random", "grid", "norm", "fastervlm", "divprune")
"""Methods that drop before the third block, plain and with merge and mass."""
KEPT = (0.5, 0.25)
MERGED = (3, 5, 8, 10)
"""Tokens that ToMe merges per block."""

Variant = tuple[str, Callable[[], AbstractContextManager[Any]]]
"""A label and a factory of a context manager under which the model is tested."""


@dataclass(frozen=True)
class Row:
    """One line of the table: right answers out of `asked`, and operations for one image."""

    label: str
    right: int
    asked: int
    flops: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.asked)


def label_of(grid: Sequence[int] | None) -> str:
    """A grid as text: "3x4"."""
    return "dense" if grid is None else "x".join(map(str, grid))


@torch.inference_mode()
def accuracy(
    model: nn.Module, pixels: np.ndarray, labels: np.ndarray, batch: int = 250, **options: Any
) -> float:
    """Share of images [N, 28, 28] uint8 that `model` puts into the right class; `options` (grid,
    heads) go to its forward."""
    return _right(model, pixels, labels, batch, options) / len(labels)


def _right(
    model: nn.Module, pixels: np.ndarray, labels: np.ndarray, batch: int, options: dict[str, Any]
) -> int:
    options = {name: value for name, value in options.items() if value is not None}
    right = 0
    for start in range(0, len(labels), batch):
        logits = model(fmnist.preprocess(pixels[start : start + batch]), **options)
        right += int((logits.argmax(-1).numpy() == labels[start : start + batch]).sum())
    return right


@torch.inference_mode()
def flops(model: nn.Module, **options: Any) -> int:
    """Operations of one forward of one image, as `torch.utils.flop_counter` counts them."""
    options = {name: value for name, value in options.items() if value is not None}
    image = torch.zeros(1, 1, fmnist.FRAME, fmnist.FRAME)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image, **options)
    return counter.get_total_flops()


@torch.inference_mode()
def rows(
    model: nn.Module,
    pixels: np.ndarray,
    labels: np.ndarray,
    variants: Iterable[Variant],
    batch: int = 250,
    **options: Any,
) -> list[Row]:
    """Test one model several ways.

    Args:
        model: takes [B, 1, 32, 32] and gives logits [B, 10].
        pixels, labels: uint8 [N, 28, 28] and int [N].
        variants: (label, factory of a context manager) pairs; the model is counted and tested
            inside, for example `("ToMe", lambda: vtc.attach(model, "tome", keep=32))`.
        batch: images per forward.
        options: go to the model's forward (grid, heads of LookupViT).
    """
    found = []
    for label, inside in variants:
        with inside():
            cost = flops(model, **options)
        with inside():
            found.append(
                Row(label, _right(model, pixels, labels, batch, options), len(labels), cost)
            )
    return found


def variants(model: nn.Module) -> list[Variant]:
    """The ViT as it is, with dropping methods and with ToMe."""
    import vtc

    found: list[Variant] = [("ViT", nullcontext)]
    for keep in KEPT:
        for name in DROPPING:
            for more in ({}, {"merge": "nearest", "mass": 1.0}):
                label = f"ViT + {name}, {keep:.0%} from block 2 on" + ", merge + mass" * bool(more)
                options = {"keep": keep, "at": "vision.2", **more}
                found.append((label, partial(vtc.attach, model, name, **options)))
    for r in MERGED:
        found.append((f"ViT + ToMe, r = {r}", partial(vtc.attach, model, "tome", r=r)))
    return found


@torch.inference_mode()
def lookup_rows(
    model: Any, pixels: np.ndarray, labels: np.ndarray, grid: Sequence[int], batch: int = 250
) -> list[Row]:
    """LookupViT on one grid, once with both heads and once with the compressed head alone. Both
    come from one pass over the images; each is charged what it costs by itself."""
    right = [0, 0]
    for start in range(0, len(labels), batch):
        truth = labels[start : start + batch]
        first, second = model.forward_heads(fmnist.preprocess(pixels[start : start + batch]), grid)
        for i, logits in enumerate((first + second, first)):
            right[i] += int((logits.argmax(-1).numpy() == truth).sum())
    note = "" if tuple(grid) in TRAINED_GRIDS else ", not trained on"
    return [
        Row(f"LookupViT {label_of(grid)}{note}, {what}", n, len(labels), flops(model, **options))
        for n, what, options in (
            (right[0], "both heads", {"grid": grid}),
            (right[1], "compressed head", {"grid": grid, "heads": "compressed"}),
        )
    ]


def table(found: Sequence[Row], dense: Row) -> str:
    """The rows as a markdown table; the cost is also given as a share of that of `dense`."""
    lines = ["| model | accuracy | Mflop per image | of the ViT |", "|---|---|---|---|"]
    lines += [
        f"| {row.label} | {100 * row.accuracy:.2f} ± {100 * row.error:.2f} % | "
        f"{row.flops / 1e6:.1f} | {100 * row.flops / dense.flops:.0f} % |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Test the Fashion-MNIST models.")
    parser.add_argument("--data", help=f"folder of the files; default: ${fmnist.VARIABLE}")
    parser.add_argument("--vit", help="folder of another ViT; default: the shipped one")
    parser.add_argument("--lookupvit", help="folder of another LookupViT; default: the shipped one")
    parser.add_argument("--limit", type=int, help="test the first LIMIT images only")
    parser.add_argument("--smoke", action="store_true", help="only the 200 shipped images")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    torch.set_num_threads(1)
    data = fmnist.sample() if args.smoke else fmnist.read("test", args.data)
    pixels, labels = (part[: args.limit] for part in data)
    vit, _ = vtc_zoo.load_folder(args.vit or vtc_zoo.path("tiny-vit-fmnist"))
    lookup, _ = vtc_zoo.load_folder(args.lookupvit or vtc_zoo.path("tiny-lookupvit-fmnist"))

    found = rows(vit, pixels, labels, tqdm(variants(vit), "ViT", mininterval=2))
    for grid in tqdm((*TRAINED_GRIDS, *OTHER_GRIDS), "grids", mininterval=2):
        found += lookup_rows(lookup, pixels, labels, grid)
    print(table(found, found[0]))


if __name__ == "__main__":
    main()
