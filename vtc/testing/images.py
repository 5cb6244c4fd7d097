"""The images of a prompt and their lines, found from the placeholder mask alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Row = tuple[int, list[int]]  # sample, columns of its visual tokens


def rows_of(visual: Tensor, scope: str = "image") -> list[Row]:
    """The images of a placeholder mask [B, L], in reading order."""
    if scope == "video":
        videos: list[tuple[int, list[int], int]] = []
        for sample, run in rows_of(visual):
            if videos and (videos[-1][0], videos[-1][2]) == (sample, len(run)):
                videos[-1][1].extend(run)
            else:
                videos.append((sample, list(run), len(run)))
        return [(sample, columns) for sample, columns, _ in videos]
    rows: list[Row] = []
    for sample, line in enumerate(visual.tolist()):
        before = False
        for column, here in enumerate(line):
            fresh = here and not before
            if fresh and (scope == "image" or not rows or rows[-1][0] != sample):
                rows.append((sample, []))
            if here:
                rows[-1][1].append(column)
            before = here
    return rows


def line_of(newline: int, newlines: Sequence[int]) -> range:
    """Places of the tokens before one of an image's `newlines` that make up its line: those since
    the one before it, but no more than there are between it and the next."""
    before = [p for p in newlines if p < newline]
    after = [p for p in newlines if p > newline]
    first = before[-1] + 1 if before else 0
    return range(max(first, 2 * newline + 1 - after[0]) if after else first, newline)
