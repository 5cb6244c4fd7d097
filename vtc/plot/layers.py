"""How many visual tokens every layer works on, from what sessions recorded: dense, and recipe by
recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import asked
from .style import FAINT, INK, look, prepare, pyplot, save, tidy

EPILOG = """Counted are all visual tokens of the prompt that a layer works on. In the vision tower a
token is what becomes one token of the language model; tiles have newlines only behind it. The tower
is drawn when a setting acts inside it. What the site `cache` drops is not: it goes behind the last
layer. Lines that would hide each other are drawn a little apart; the numbers are in the legend.

examples:
  vtc plot layers --model tiny-llava-shapes --image demos/pictures/scene_1.png --out layers.png \\
      --prompt "how many objects are there ?" --method divprune fastv pdrop --keep 0.25
  vtc plot layers --model org/name --image a.png b.png --prompt "What is new?" --out layers.svg \\
      --recipe configs/divprune_25.yaml my_recipe.yaml --method mustdrop --keep 192
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc plot layers`."""
    prepare(parser, "Visual tokens that every layer works on.", EPILOG)
    asked.options(parser)


def run(args: argparse.Namespace) -> int:
    """Run every setting once, draw, say where."""
    pyplot()
    wanted = asked.requests(args)
    found = asked.ask(args, list(wanted.values()))
    whole = {"every token": {"method": "random", "keep": 1.0, "at": "projector"}}
    (_, dense), *others = asked.sessions(found, whole | wanted)
    tokens = sum(dense.trace[-1].n_in)
    rows = len(dense.trace[-1].n_in)
    told = {name: stages(session, rows) for name, session in others}
    draw(Depth.of(dense.adapter), tokens, told, args.out, args.title)
    return 0


@dataclass(frozen=True)
class Stages:
    """Visual tokens, all of a prompt: (layer, in, out) inside the tower and the language model
    (layer 0 is also in front of it), and how many enter the language model."""

    tower: tuple[tuple[int, int, int], ...]
    decoder: tuple[tuple[int, int, int], ...]
    enter: int


@dataclass(frozen=True)
class Depth:
    """Blocks of the tower (0: nothing can act there) and layers of the language model."""

    tower: int
    decoder: int

    @classmethod
    def of(cls, adapter: Any) -> Depth:
        sites = [site.split(".") for site in adapter.sites()]
        numbers = [int(parts[1]) for parts in sites if parts[0] == "vision"]
        return cls(max(numbers, default=-1) + 1, adapter.depth)


def stages(session: Any, images: int) -> Stages:
    """What one forward of a session recorded, site by site; several tower runs are one stage."""
    sums: dict[str, list[int]] = {}
    for entry in session.trace:
        total = sums.setdefault(entry.site, [0, 0])
        total[0] += sum(entry.n_in)
        total[1] += sum(entry.n_out)
    tower, decoder = [], []
    for site, (before, after) in sums.items():
        kind, _, layer = site.partition(".")
        if kind == "vision":
            tower.append((int(layer.partition(".")[0]), before, after))
        elif kind in ("projector", "decoder"):
            decoder.append((int(layer or 0), before, after))
    enter = decoder[0][1] if decoder else round(session.stats()["visual_tokens"] * images)
    return Stages(tuple(tower), tuple(decoder), enter)


def widths(start: int, steps: Sequence[tuple[int, int, int]], depth: int) -> list[int]:
    """Tokens that each of `depth` layers works on, from `start` on."""
    out = [start] * depth
    for layer, _, after in steps:
        out[layer:] = [after] * (depth - layer)
    return out


def draw(depth: Depth, tokens: int, told: Mapping[str, Stages], path: Path, title: Any) -> None:
    """Steps over the layers; the tower to the left when anything acts inside it."""
    units = next((s.tower[0][1] for s in told.values() if s.tower), 0)
    blocks = depth.tower if units else 0
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(8.2, 4.6), layout="constrained")
    tidy(panel)
    dense = widths(units, (), blocks) + widths(tokens, (), depth.decoder)
    top, edges = max(dense), [i - 0.5 for i in range(len(dense) + 1)]
    panel.stairs(dense, edges, baseline=None, color=INK, label=f"dense: {tokens}", zorder=2)
    methods = [name.partition(" ")[0] for name in told]
    for number, (name, s) in enumerate(told.items()):
        line = widths(units, s.tower, blocks) + widths(s.enter, s.decoder, depth.decoder)
        apart = 0.004 * top * (number - (len(told) - 1) / 2)
        panel.stairs(
            [n + apart for n in line],
            edges,
            baseline=None,
            label=f"{name}: {sum(line[blocks:]) / depth.decoder:.0f}",
            color=look(methods[number], list(dict.fromkeys(methods))).color,
            linestyle=("-", "--", ":", "-.")[methods[:number].count(methods[number]) % 4],
            linewidth=2.2,
            zorder=3,
        )
    _layers(panel, blocks, depth.decoder)
    panel.set_ylim(0, 1.08 * top)
    panel.set_ylabel("visual tokens of the prompt", color=INK)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, alignment="left",
        title="mean over the\nlanguage model's layers", title_fontsize=8.5)  # fmt: skip
    if title:
        figure.suptitle(title, color=INK)
    save(figure, path)


def _layers(panel: Any, blocks: int, layers: int) -> None:
    """The axis of the layers: those of the tower and of the language model count from 0."""
    numbers = [*range(blocks), *range(layers)]
    every = max(1, len(numbers) // 16)
    at = [i for i, number in enumerate(numbers) if number % every == 0]
    panel.set_xticks(at, [str(numbers[i]) for i in at])
    panel.set_xlim(-0.5, len(numbers) - 0.5)
    panel.set_xlabel("layer of the language model", color=INK)
    if blocks:
        panel.axvline(blocks - 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_xlabel("block of the vision tower, then layer of the language model", color=INK)
        for x, text in ((0.0, "vision tower"), (blocks, "language model")):
            panel.text((x - 0.3), 1.01, text, transform=panel.get_xaxis_transform(), color=FAINT,
                fontsize=9)  # fmt: skip
