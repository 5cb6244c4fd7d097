# SPDX-License-Identifier: Apache-2.0
"""Digits drawn dense and with fewer tokens, from the same noise, and what that took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

import vtc
from vtc_zoo import digits

SCALE, BARS, MARGIN = 4, 40, 18
DENSE: dict[str, Any] = {"method": "grid", "keep": 1.0, "at": "dit.0"}
"""The dense model as a recipe that keeps everything, so that its cost is counted too."""
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
"""Shown when nothing is asked for."""


@dataclass(frozen=True)
class Drawn:
    """Digits of one setting and what they took; `tokens` are those per block and picture at every
    step."""

    name: str
    images: Tensor
    seconds: float
    gigaflops: float
    tokens: tuple[float, ...]
    report: str


def draw(
    model: Any,
    name: str,
    request: dict[str, Any],
    *,
    steps: int = digits.STEPS,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> Drawn:
    """Digits 0 to 9 from one seed; `request` is what `vtc.attach` takes."""
    tokens: list[float] = []

    def note(session: vtc.Session, *_: Any) -> None:
        stats = session.stats()
        tokens.append(stats["visual_tokens"] * stats["prefills"] - sum(tokens))

    with vtc.attach(model, **request) as session:
        handle = model.register_forward_hook(partial(note, session))
        try:
            started = clock()
            images = digits.sample(model, range(digits.CLASSES), steps=steps, seed=seed)
            seconds = clock() - started
        finally:
            handle.remove()
    gigaflops = session.stats()["flops"] / 1e9
    return Drawn(name, images, seconds, gigaflops, tuple(tokens), session.report())


def picture(found: Sequence[Drawn]) -> Image.Image:
    """All settings below each other: digits, then tokens per step as bars."""
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
