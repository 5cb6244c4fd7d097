"""Draw digits with a small diffusion transformer, dense and with fewer tokens, from the same noise.

    python demos/dit_digits.py                       # writes out/digits.png
    python demos/dit_digits.py --method pooled --keep 0.25 --at dit.1 --until dit.5
    python demos/dit_digits.py --recipe my.yaml

The picture has two rows for every setting: what was drawn, and how many tokens a block worked on at
every step, from noise on the left to the picture on the right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import vtc_zoo
from vtc_zoo import digits, drawing

import vtc


def _keep(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-dit-digits", help="zoo name, or a folder")
    parser.add_argument("--method", help="instead of three that are shown")
    parser.add_argument("--keep", type=_keep, help="share (0.25) or number (16) of tokens")
    parser.add_argument("--at", help="site, such as dit.1 or dit.1.attn")
    parser.add_argument("--until", help="block before which all tokens are there again")
    parser.add_argument("--noise", type=float, nargs=2, metavar=("LEAST", "MOST"),
                        help="act only while the images are this noisy, 0 to 1")  # fmt: skip
    parser.add_argument("--recipe", type=Path, help="a YAML file instead of a method")
    parser.add_argument("--steps", type=int, default=digits.STEPS, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and draws (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="(%(default)s)")
    args = parser.parse_args()
    given = {n: v for n in ("keep", "at", "until", "noise") if (v := getattr(args, n)) is not None}
    if given and args.method is None:
        parser.error(f"{', '.join(given)} without a method: give --method too")
    try:
        show(args, given)
    except (vtc.VtcError, ValueError) as error:
        parser.error(str(error))


def show(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Draw, print, write the picture. `given`: arguments of `attach` beside the method."""
    torch.set_num_threads(1)
    load = vtc_zoo.load if args.model in vtc_zoo.names() else vtc_zoo.load_folder
    model, _ = load(args.model)
    settings = drawing.SETTINGS
    if args.recipe is not None:
        settings = {args.recipe.stem: {"method": args.recipe}}
    elif args.method is not None:
        name = " ".join(map(str, (args.method, *given.values())))
        settings = {name: {"method": args.method, **given}}
    digits.sample(model, range(digits.CLASSES), steps=1)  # what is slow the first time is not timed
    settings = {"dense": drawing.DENSE, **settings}
    found = [
        drawing.draw(model, name, request, steps=args.steps, seed=args.seed)
        for name, request in settings.items()
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawing.picture(found).save(args.out)
    for one in found:
        share = digits.recognised(one.images, range(digits.CLASSES))
        tokens = " ".join(f"{count:.0f}" for count in one.tokens)
        print(f"{one.name}: {one.gigaflops:.2f} GFLOPs, {one.seconds:.2f} s CPU, {share:.0%} "
              f"recognised\n  tokens per block and step: {tokens}")  # fmt: skip
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
