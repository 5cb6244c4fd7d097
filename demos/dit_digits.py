"""Draw digits with a small diffusion transformer, dense and with fewer tokens, from the same noise.

    python demos/dit_digits.py                       # writes out/digits.png
    python demos/dit_digits.py --method pooled --keep 0.25 --at dit.1 --until dit.5
    python demos/dit_digits.py --recipe my.yaml

The picture has two rows for every setting: what was drawn, and how many tokens a block worked on at
every step, from noise on the left to the picture on the right."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vtc_zoo
from PIL import Image, ImageDraw
from torch import Tensor
from vtc_zoo import digits

import vtc

SCALE, BARS, MARGIN = 4, 40, 18
#: shown when nothing is asked for
SETTINGS: dict[str, dict[str, Any]] = {
    "pooled 25 % while noisy": {
        "method": "pooled",
        "keep": 0.25,
        "at": "dit.1",
        "until": "dit.5",
        "noise": (0.5, 1.0),
    },
    "tomesd 50 %": {"method": "tomesd", "keep": 0.5, "at": "dit.1", "until": "dit.5"},
    "random 25 %": {"method": "random", "keep": 0.25, "at": "dit.1", "until": "dit.5"},
}


@dataclass
class Drawn:
    """Digits of one setting, tokens per block at every step, and what they took."""

    name: str
    images: Tensor
    seconds: float
    gigaflops: float
    tokens: list[float] = field(default_factory=list)


def draw(model: Any, name: str, request: dict[str, Any] | None, args: argparse.Namespace) -> Drawn:
    """Digits 0 to 9 from one seed. The dense model is a recipe that keeps everything, so that its
    cost is counted too."""
    request = request or {"method": "grid", "keep": 1.0, "at": "dit.0"}
    tokens: list[float] = []

    def note(session: vtc.Session, *_: Any) -> None:
        stats = session.stats()
        tokens.append(stats["visual_tokens"] * stats["prefills"] - sum(tokens))

    with vtc.attach(model, **request) as session:
        handle = model.register_forward_hook(partial(note, session))
        started = time.process_time()
        images = digits.sample(model, range(digits.CLASSES), steps=args.steps, seed=args.seed)
        seconds = time.process_time() - started
        handle.remove()
    return Drawn(name, images, seconds, session.stats()["flops"] / 1e9, tokens)


def picture(found: list[Drawn]) -> Image.Image:
    """All settings below each other."""
    side, most = digits.SIDE * SCALE, max(max(one.tokens) for one in found)
    width, height = side * digits.CLASSES, MARGIN + side + BARS
    sheet = Image.new("RGB", (width, height * len(found)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(found):
        top = number * height
        told = f"{one.name}: {one.gigaflops:.2f} GFLOPs, {one.seconds:.2f} s"
        pen.text((4, top + 3), told, fill="black")
        sheet.paste(digits.sheet(one.images, digits.CLASSES, SCALE), (0, top + MARGIN))
        bottom, wide = top + height - 4, width / len(one.tokens)
        for step, count in enumerate(one.tokens):
            tall = (BARS - 8) * count / most
            pen.rectangle(
                (step * wide + 2, bottom - tall, (step + 1) * wide - 2, bottom), fill="steelblue"
            )
    return sheet


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
    settings = SETTINGS
    if args.recipe is not None:
        settings = {args.recipe.stem: {"method": args.recipe}}
    elif args.method is not None:
        name = " ".join(map(str, (args.method, *given.values())))
        settings = {name: {"method": args.method, **given}}
    digits.sample(model, range(digits.CLASSES), steps=1)  # what is slow the first time is not timed
    found = [draw(model, "dense", None, args)]
    found += [draw(model, name, request, args) for name, request in settings.items()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture(found).save(args.out)
    for one in found:
        share = digits.recognised(one.images, range(digits.CLASSES))
        tokens = " ".join(f"{count:.0f}" for count in one.tokens)
        print(f"{one.name}: {one.gigaflops:.2f} GFLOPs, {one.seconds:.2f} s CPU, {share:.0%} "
              f"recognised\n  tokens per block and step: {tokens}")  # fmt: skip
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
