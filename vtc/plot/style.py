"""What all plots share: matplotlib, colours for colour-blind readers too, and saving."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commands import outputs
from ..errors import VtcError

#: Okabe and Ito without black and yellow, then Tol's muted ones
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#882255", "#999933", "#332288", "#44AA99"),
)
MARKERS = "osD^v<>pPh"
INK, FAINT, FRONT = "#26282e", "#7a7e88", "#f3d98b"
#: formats that a plot is written in
FORMATS = (".png", ".pdf", ".svg")
#: how merging and mass are drawn
LINES = {"": "-", "merge": ":", "mass": "-.", "merge+mass": "--"}


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    color: str
    marker: str
    line: str
    plain: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """For `Axes.plot` and its like; a filled marker says: nothing merged, no mass."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "markerfacecolor": self.color if self.plain else "white",
            "markersize": 5.5,
            "linewidth": 1.4,
        }


def look(method: str, methods: Sequence[str], place: int = 0, options: str = "") -> Look:
    """Methods have colours, places (sites) markers; random and grid are grey crosses."""
    line = LINES.get(options, "--")
    for control, color, markers in (("random", "#9a9a9a", "x12"), ("grid", "#5c5c5c", "+34")):
        if re.split("[: ]", method)[0] == control:
            return Look(color, markers[place % 3], ":" if not options else line)
    number = methods.index(method)
    color = COLORS[number % len(COLORS)]
    marker = MARKERS[(place + number // len(COLORS)) % len(MARKERS)]
    return Look(color, marker, line, not options)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise VtcError(
            "plots need matplotlib: pip install 'vision-token-compression[plot]'"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def prepare(
    parser: argparse.ArgumentParser,
    description: str,
    epilog: str,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Texts of `--help`, and where the picture goes."""
    parser.description, parser.epilog = description, epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    *others, last = [name.removeprefix(".") for name in formats]
    told = f"{', '.join(others)} or {last}" if others else last
    parser.add_argument("--out", type=outputs.picture(formats), required=True, metavar="PNG",
        help=f"picture to write ({told})")  # fmt: skip
    parser.add_argument("--title", help="above the plot")


def tidy(panel: Any) -> None:
    """Fewer lines than matplotlib draws by itself."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=INK, labelsize=9)
    panel.grid(color="#e3e5ea", linewidth=0.7)
    panel.set_axisbelow(True)


def save(figure: Any, path: Path) -> None:
    """Write a figure and say where it is."""
    try:
        with outputs.writing(path):
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    finally:
        pyplot().close(figure)
    print(f"plot: {path}")
