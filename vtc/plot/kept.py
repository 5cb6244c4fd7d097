"""Which patches of images stay, are merged or dropped, setting by setting."""

from __future__ import annotations

import argparse
from typing import Any

from ..commands.outputs import writing
from . import asked
from .style import prepare

EPILOG = """Kept patches are bright, merged ones take the colour of the patch they went into,
dropped ones are dark. Stages of one setting stand side by side. Images that were cut into tiles are
drawn twice: the view of the whole picture, and the tiles.

examples:
  vtc plot kept --model tiny-llava-shapes --image demos/pictures/scene_1.png --out kept.png \\
      --prompt "how many objects are there ?" --method divprune fastv --keep 0.5,0.1
  vtc plot kept --model org/name --image a.png --prompt "Describe the image." --out kept.png \\
      --recipe configs/divprune_25.yaml my_recipe.yaml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc plot kept`."""
    from ..bench.options import at_least

    prepare(parser, "Which patches of an image every setting keeps.", EPILOG, (".png",))
    asked.options(parser)
    parser.add_argument(
        "--size", type=at_least(32), default=300, help="pixels of a panel (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run every setting once, draw, say where."""
    from .. import draw

    wanted = asked.requests(args)
    found = asked.ask(args, list(wanted.values()))
    seen = draw.as_seen(found.processor, found.inputs.get("pixel_values"))
    blocks = [("as it is", draw.join([_whole(image, args.size) for image in found.images]))]
    for name, session in asked.sessions(found, wanted):
        drawn = draw.prompt_picture(found.images, seen, session.trace, size=args.size)
        blocks.append((name, drawn))
    with writing(args.out):
        draw.page(args.title or args.prompt, blocks).save(args.out)
    print(f"plot: {args.out}")
    return 0


def _whole(image: Any, size: int) -> Any:
    """An image as large as the panels."""
    scale = size / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size])
