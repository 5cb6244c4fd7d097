"""Which process answers what: all questions of a video go to one process, which reads it once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from .questions import Question


@dataclass(frozen=True)
class Work:
    """The questions of one video."""

    video: str
    questions: tuple[Question, ...]


def by_video(questions: Iterable[Question]) -> list[Work]:
    """Grouped by video, in the order in which videos are first asked about."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(os.path.normpath(question.video), []).append(question)
    return [Work(asked[0].video, tuple(asked)) for asked in groups.values()]


def shard(works: Iterable[Work], processes: int) -> list[list[Work]]:
    """Works of each process: the largest first, each to the process with the fewest questions.

    The same for the same input. Within a process the first order is kept.
    """
    numbered = sorted(enumerate(works), key=lambda pair: (-len(pair[1].questions), pair[0]))
    shares: list[list[tuple[int, Work]]] = [[] for _ in range(processes)]
    load = [0] * processes
    for place, work in numbered:
        process = load.index(min(load))
        load[process] += len(work.questions)
        shares[process].append((place, work))
    return [[work for _, work in sorted(share, key=lambda pair: pair[0])] for share in shares]
