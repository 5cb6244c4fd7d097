"""Grids: how many frames, lines and columns the tokens of an unbroken run of placeholders have, and
which runs are frames of one video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...context import Layout
from ...errors import InvalidInput

#: sample, first column, tokens
Run = tuple[int, int, int]
#: (t, h, w) of images and of videos, as the model is given them, in patches
Grids = Mapping[str, Sequence[tuple[int, int, int]]]


def find_grids(
    runs: Sequence[Run],
    kinds: list[int],
    grids: Grids,
    tile: int,
    made: Sequence[tuple[int, int]],
) -> list[tuple[Layout | None, int]]:
    """Grid of every run (sample, start, tokens), and the number of the video whose frame it is, -1
    for none: from the model's own grid arguments; from what the projector made; a square when it is
    one whole projected image; else unknown (tiles with newline tokens)."""
    given = _given_grids(runs, kinds, grids)
    present = sorted(set(kinds))
    calls = list(made)[-len(present) :] if len(made) >= len(present) else []
    own = dict(zip(present, calls, strict=False))  # images come before videos
    out: list[tuple[Layout | None, int]] = []
    for (_, _, n), kind in zip(runs, kinds, strict=True):
        layout, video = squares(n, tile) if n == tile else None, -1
        if given[kind]:
            grid, video = given[kind].pop(0)
            layout = _merged(grid, n)
        elif kind in own:
            counts = [m for (_, _, m), k in zip(runs, kinds, strict=True) if k == kind]
            layout = _projected(n, counts, *own[kind], bool(kind)) or layout
        out.append((layout, video))
    return out


def _given_grids(
    runs: Sequence[Run], kinds: list[int], grids: Grids
) -> dict[int, list[tuple[Any, int]]]:
    """What the model was told of every run: (t, h, w) in patches, and its video's number; nothing
    when it does not fit the runs."""
    left = {0: list(grids.get("image", [])), 1: list(grids.get("video", []))}
    if not left[0] and left[1] and not any(kinds):
        left[0] = left[1]
    if left[0] and not left[1] and all(kinds):
        left[0], left[1] = left[1], left[0]
    out: dict[int, list[tuple[Any, int]]] = {0: [], 1: []}
    for kind, grid in left.items():
        mine = [run for run, k in zip(runs, kinds, strict=True) if k == kind]
        whole = [(each, number) for number, each in enumerate(grid)]
        frames = [((1, h, w), i) for i, (t, h, w) in enumerate(grid) for _ in range(t)]
        ways = [whole, frames]  # every frame may be a run of its own
        ways += [repeat_beams(way, mine) for way in ways]
        same = [way for way in ways if len(way) == len(mine)]
        out[kind] = next((way for way in same if _fit(way, mine)), same[0] if same else [])
    return out


def _fit(grids: list[tuple[Any, int]], runs: Sequence[Run]) -> bool:
    pairs = zip(grids, runs, strict=True)
    return all(_merged(grid, n) is not None for (grid, _), (_, _, n) in pairs)


def _merged(grid: tuple[int, int, int], n: int) -> Layout | None:
    """A grid of patches as n tokens, each made of a square of them."""
    t, h, w = grid
    merge = math.isqrt(t * h * w // n) if n else 0
    fits = merge and t * h * w == n * merge * merge and h % merge == 0 and w % merge == 0
    return Layout(t, h // merge, w // merge) if fits else None


def repeat_beams(grids: list[tuple[Any, int]], runs: Sequence[Run]) -> list[tuple[Any, int]]:
    """The grid of every run where each prompt stands there several times in a row, each time with
    videos of its own; nothing when they do not stand there equally often."""
    times, rest = divmod(len(runs), max(1, len(grids)))
    samples = [sample for sample, _, _ in runs]
    prompts = sorted(set(samples))
    if not grids or not times or rest or len(prompts) % times:
        return []
    out: list[tuple[Any, int]] = []
    start = 0
    for first in range(0, len(prompts), times):
        end = start + samples.count(prompts[first])
        for copy in range(times):
            out += [(grid, video * times + copy) for grid, video in grids[start:end]]
        start = end
    return out


def _projected(n: int, counts: list[int], images: int, tokens: int, video: bool) -> Layout | None:
    """Grid of a run of n, one of the runs `counts` that came of `images` projected images with
    `tokens` each: unchanged, or frames that were pooled, with at most one token behind them. The
    prompts may stand there several times (beams)."""
    if sum(counts) % (images * tokens) == 0:
        return squares(n, tokens)
    if not video or len(set(counts)) > 1:
        return None
    for times in range(1, len(counts) + 1):
        frames, rest = divmod(images * times, len(counts))
        side = math.isqrt(n // frames) if frames else 0
        tail = n - frames * side * side
        if len(counts) % times == rest == 0 and 0 < side * side < tokens and tail <= 1:
            return Layout(frames, side, side, tail)
    return None


def squares(n: int, tile: int) -> Layout | None:
    """n tokens as squares of `tile` tokens."""
    side = math.isqrt(tile)
    fits = tile > 0 and side * side == tile and n % tile == 0
    return Layout(n // tile, side, side) if fits else None


def check_frames(
    runs: Sequence[Run],
    kinds: list[int],
    found: Sequence[tuple[Layout | None, int]],
    grids: Grids,
) -> None:
    """Refuse videos of which it is not known which tokens are which frame."""
    unknown = [
        n
        for (_, _, n), kind, (layout, _) in zip(runs, kinds, found, strict=True)
        if kind and layout is None
    ]
    lost = bool(grids.get("video")) and all(video < 0 for _, video in found)
    owners: dict[tuple[int, int], set[int]] = {}
    for (sample, _, _), kind, (_, video) in zip(runs, kinds, found, strict=True):
        owners.setdefault((kind, video), set()).add(sample)
    torn = any(video >= 0 and len(samples) > 1 for (_, video), samples in owners.items())
    if unknown or lost or torn:
        raise InvalidInput(
            f"a method of this recipe compares frames, but which of the visual tokens are which "
            f"frame is not known: runs of {sorted({n for _, _, n in runs})} placeholders, grids "
            f"{dict(grids) or 'not given'}. Hand the model its own inputs whole (the pixels, and "
            f"video_grid_thw where it takes one), not in pieces and not as ready features; without "
            f"such grids a frame has to be a square of tokens."
        )
