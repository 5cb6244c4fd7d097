"""Writes docs/images/kept.png: what some methods keep of a picture, and what is then answered.

`python docs/make/kept.py`; the same as `vtc demo --quick` draws, with fewer methods."""

from __future__ import annotations

from pathlib import Path

import torch
import vtc_zoo
from PIL import Image

from vtc.commands import demo

TARGET = Path(__file__).parent.parent / "images" / "kept.png"
SHOWN = ("", "random", "grid", "divprune", "fastv", "tome")


def main() -> None:
    torch.set_num_threads(1)
    model, processor = vtc_zoo.load("tiny-llava-shapes")
    wanted = [s for s in demo.settings(model, quick=True) if s.method in SHOWN]
    items = demo.load_items(demo.QUICK_QUESTIONS)
    sheet = demo.picture(demo.measure(model, processor, items, wanted), items)
    small = sheet.convert("RGB").quantize(
        256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    small.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
