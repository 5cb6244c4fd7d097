"""What a setting scores over what it costs, with the settings that no other beats."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands.loading import typed
from ..errors import InvalidInput
from .points import Axis, Kind, Point, read
from .style import FAINT, FRONT, INK, Look, look, prepare, pyplot, save, tidy

EPILOG = """The broad line is the Pareto front: settings that none beats at the same cost or
less; they are marked with their budget. The dense model is the star, random and grid are
grey crosses, dashed lines with hollow markers merge or add mass. Bars are standard deviations over
seeds, or standard errors. Records of speed, dit and vit have no score: drawn is how much faster a
case is over the FLOPs that are left, and what would follow from the FLOPs alone.

examples:
  vtc bench quality --json quality.json && vtc plot pareto quality.json --out pareto.png
  vtc plot pareto quality.json --x flops --score exact_match,counting --out counting.png
  vtc plot pareto monday.json tuesday.json --x time --methods divprune,fastv --out both.svg
  vtc plot pareto dit.json --out speed.png
"""

#: panels of a figure that stand side by side
ACROSS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc plot pareto`."""
    from ..bench.options import names

    prepare(parser, "Scores over FLOPs, time or tokens, from what benches write.", EPILOG)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="JSON", help="written by vtc bench NAME --json")
    add("--x", type=names, metavar="COST", help="flops, time, tokens, or several, comma separated "
        "(default: flops and time, where they are there)")  # fmt: skip
    add("--score", type=names, help="such as exact_match,counting (default: the usual one)")
    add("--methods", type=names, help="only these, and dense, random and grid")


def run(args: argparse.Namespace) -> int:
    """Read, draw, say where."""
    pyplot()  # a missing matplotlib is reported first
    with typed():
        kind, points = read(args.files)
        if args.methods:
            points = chosen(points, args.methods)
        costs, scores = axes(kind, points, args.x, args.score)
    draw(kind, points, costs, scores, args.out, args.title)
    return 0


def chosen(points: Sequence[Point], methods: Sequence[str]) -> list[Point]:
    """Only some methods, and what they are compared with."""
    there = list(dict.fromkeys(point.method for point in points))
    missing = [name for name in methods if name not in there]
    if missing:
        raise InvalidInput(f"not in these files: {', '.join(missing)}. There: {', '.join(there)}.")
    wanted = {*methods, "dense", "random", "grid", "limit"}
    return [point for point in points if point.method in wanted]


def axes(
    kind: Kind, points: Sequence[Point], costs: list[str] | None, scores: list[str] | None
) -> tuple[list[str], list[str]]:
    """The costs and scores that are drawn; what was asked for and is not there is an error."""
    there = {name for point in points if point.method != "dense" for name in point.costs}
    scored = dict.fromkeys(name for point in points for name in point.scores)
    if not scored:
        raise InvalidInput(f"no record has a score: {', '.join(kind.scores)} are all empty.")
    costs = costs or [n for n in kind.costs if n in there and (n != "tokens" or len(there) == 1)]
    scores = scores or [kind.score if kind.score in scored else next(iter(scored))]
    for what, wanted, found in (("--x", costs, there), ("--score", scores, scored)):
        for name in wanted:
            if name not in found:
                had = ", ".join(sorted(found)) or "nothing"
                raise InvalidInput(
                    f"{what} {name}: these records of vtc bench {kind.bench} have {had}. Use one "
                    f"of them, or measure again with this version."
                )
    return costs, scores


def front(points: Sequence[Point], cost: str, score: str) -> list[Point]:
    """The points that no other one beats, by rising cost: none is as cheap and better."""
    known = [p for p in points if cost in p.costs and score in p.scores]
    out: list[Point] = []
    for point in sorted(known, key=lambda p: (p.costs[cost], -p.scores[score][0])):
        if not out or point.scores[score][0] > out[-1].scores[score][0]:
            out.append(point)
    return out


def draw(
    kind: Kind,
    points: Sequence[Point],
    costs: Sequence[str],
    scores: Sequence[str],
    path: Path,
    title: str | None = None,
) -> None:
    """One panel for every group of cases, score and cost."""
    plt = pyplot()
    groups = dict.fromkeys(point.panel for point in points)
    wanted = [(g, score, cost) for g in groups for score in scores for cost in costs]
    across = len(costs) if len(costs) > 1 else math.ceil(len(wanted) ** 0.5)
    across = len(wanted) if len(wanted) <= ACROSS else min(ACROSS, across)
    down = math.ceil(len(wanted) / across)
    size = (6.2 * across, 4.6 * down)
    figure, panels = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    looks, handles = looks_of(points), dict[str, Any]()
    for panel in panels.flat[len(wanted) :]:
        panel.set_visible(False)
    for panel, (group, score, cost) in zip(panels.flat, wanted, strict=False):
        here = [point for point in points if point.panel == group]
        fill(panel, kind, here, (cost, score), looks, handles)
        panel.set_title(group, fontsize=10, color=INK)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right upper",
        fontsize=8.5,
        ncols=1 + (len(handles) > 26 * down),
        frameon=False,
    )
    if title:
        figure.suptitle(title, color=INK)
    save(figure, path)


def fill(
    panel: Any,
    kind: Kind,
    points: Sequence[Point],
    what: tuple[str, str],
    looks: Mapping[tuple[str, ...], Look],
    handles: dict[str, Any],
) -> None:
    """One panel; `handles` collects what the legend names."""
    cost, score = what
    unit, letter = scale(kind.costs[cost], points, cost)
    tidy(panel)
    if not any(cost in p.costs and (kind.ideal or score in p.scores) for p in points):
        where = {"ha": "center", "va": "center", "transform": panel.transAxes}
        panel.text(0.5, 0.5, f"no {cost} in these records", color=INK, **where)
    elif kind.ideal:
        foretold(panel, points, cost, handles)
    else:
        mark_front(panel, front(points, cost, score), what, unit, handles)
    for series, its in by_series(points).items():
        line(panel, its, looks[series], what, unit, handles)
    panel.margins(x=0.1, y=0.08)
    panel.set_xlabel(kind.costs[cost].label + letter, color=INK)
    axis = kind.scores.get(score)
    panel.set_ylabel(axis.label if axis else f"right answers, {score}", color=INK)


def by_series(points: Sequence[Point]) -> dict[tuple[str, ...], list[Point]]:
    """The points of every line, dense first, the controls behind the methods."""
    out: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        out.setdefault(point.series, []).append(point)
    rank = {"dense": 0, "grid": 2, "random": 3, "limit": 4}
    return dict(sorted(out.items(), key=lambda item: rank.get(item[0][1], 1)))


def looks_of(points: Sequence[Point]) -> dict[tuple[str, ...], Look]:
    """How each series looks: colours by method, markers by site and file."""
    special = ("dense", "limit", "random", "grid")
    methods = [m for m in dict.fromkeys(p.method for p in points) if m not in special]
    out: dict[tuple[str, ...], Look] = {}
    for point in points:
        if point.method in ("dense", "limit"):
            star = point.method == "dense"
            mark, color = ("*", INK) if star else ("_", FAINT)
            out[point.series] = Look(color, mark, "", not point.options)
            continue
        places = list(dict.fromkeys((p.source, p.site) for p in points if p.method == point.method))
        place = places.index((point.source, point.site))
        out[point.series] = look(point.method, methods, place, point.options)
    return out


def line(
    panel: Any,
    points: Sequence[Point],
    look: Look,
    what: tuple[str, str],
    unit: float,
    handles: dict[str, Any],
) -> None:
    """One series."""
    cost, score = what
    name, first = label(points[0]), points[0]
    known = sorted(
        (p for p in points if cost in p.costs and score in p.scores), key=lambda p: p.costs[cost]
    )
    if first.method == "dense" and not first.options and score in first.scores:
        panel.axhline(first.scores[score][0], color=INK, linewidth=0.7, alpha=0.5, zorder=1)
    if not known:
        return
    xs = [p.costs[cost] / unit for p in known]
    ys, bars = zip(*(p.scores[score] for p in known), strict=True)
    joined = len({p.keep for p in known}) == len(known) and first.method != "limit"
    options = look.options | ({} if joined else {"linestyle": ""})
    options |= {"markersize": 13} if first.method == "dense" else {}
    if any(bars):
        shown = panel.errorbar(xs, ys, bars, elinewidth=0.7, zorder=3, **options)
    else:
        (shown,) = panel.plot(xs, ys, zorder=3, **options)
    handles.setdefault(name, shown)


def label(point: Point) -> str:
    """The name of a series in the legend."""
    words = [point.source, point.method, point.site, point.options.replace("+", ", ")]
    if point.method == "limit":
        words[1] = "the dense model on fewer tokens"
    return "  ".join(filter(None, words))


def mark_front(
    panel: Any, points: Sequence[Point], what: tuple[str, str], unit: float, handles: dict[str, Any]
) -> None:
    """A broad line below the best settings, and their budgets."""
    cost, score = what
    xs = [p.costs[cost] / unit for p in points]
    ys = [p.scores[score][0] for p in points]
    (shown,) = panel.plot(
        xs, ys, color=FRONT, linewidth=7, zorder=2, solid_capstyle="round", drawstyle="steps-post"
    )
    handles.setdefault("Pareto front", shown)
    for point, x, y in zip(points, xs, ys, strict=True):
        if point.method != "dense" and point.keep is not None:
            panel.annotate(
                budget(point.keep), (x, y), (-5, 6), textcoords="offset points", fontsize=8,
                ha="right", color=INK, zorder=5,
            )  # fmt: skip


def budget(keep: Any) -> str:
    """0.25 -> 25 %; 64 and auto as they are."""
    return f"{keep:.0%}".replace("%", " %") if isinstance(keep, float) else str(keep)


def foretold(panel: Any, points: Sequence[Point], cost: str, handles: dict[str, Any]) -> None:
    """How fast everything would be if time went with the FLOPs."""
    low = min(p.costs[cost] for p in points if cost in p.costs)
    xs = [low + (1 - low) * i / 50 for i in range(51)]
    (shown,) = panel.plot(xs, [1 / x for x in xs], color=FRONT, linewidth=5, zorder=2)
    handles.setdefault("as the FLOPs foretell", shown)


def scale(axis: Axis, points: Sequence[Point], cost: str) -> tuple[float, str]:
    """What numbers are divided by, and the unit behind the label."""
    if not axis.counts:
        return 1.0, ""
    most = max((p.costs[cost] for p in points if cost in p.costs), default=1.0)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if most >= unit:
            return unit, f", {letter}FLOPs"
    return 1.0, ""
