"""Runs of `vtc videoqa` for tests: files of questions, an answerer without a model, processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import vtc.video
from support import video_models
from vtc.video import run as runs
from vtc.video.answer import Answer, Group
from vtc.video.job import Job, Summary
from vtc.video.processes import Alone
from vtc.video.questions import Question, read_questions
from vtc.video.sampling import Sampling

Rows = list[dict[str, Any]]
FRAMES = 4


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL; texts go in as they are."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_clips(folder: Path) -> Path:
    """Four videos, one of them in a folder, and one file that is none."""
    (folder / "more").mkdir()
    for seed, name in enumerate(("a.mp4", "b.mp4", "c.mp4", "more/d.mp4")):
        vtc.video.write(folder / name, video_models.frames(seed, 6), fps=4)
    (folder / "bad.mp4").write_bytes(b"this is no video" * 50)
    return folder


class Echo:
    """Answers with the question, after a while; notes in a file what it was asked."""

    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        self.log, self.pause = log, pause

    def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
        for group in groups:
            for question in group.questions:
                time.sleep(self.pause)
                yield question, self.one(group, question)

    def one(self, group: Group, question: Question) -> Answer:
        text = f"{question.text} {len(group.clip)}"
        return Answer(text, 8, 2, {"encode": 0.0, "prefill": 0.0, "generate": 0.0})


def job_of(rows: Any, clips: Path, out: Path, **options: Any) -> Job:
    plain = {"workers": 0, "batch_size": 3, "progress": False, "sampling": Sampling(count=FRAMES)}
    return Job(read_questions(rows), clips, out, **{**plain, **options})


def answered_by(job: runs.Job, answerer: Any, processes: Any = None) -> Summary:
    return runs.run(job, lambda: contextlib.nullcontext(answerer), processes or Alone())


def some_rows(count: int = 14) -> Rows:
    names = ("a.mp4", "b.mp4", "c.mp4", "more/d.mp4")
    return [
        {"id": f"q{i}", "video": names[7 * i // 3 % 4], "question": f"what {i}"}
        for i in range(count)
    ]


def untimed(path: Path) -> list[str]:
    """Lines of an output file without the measured seconds."""
    return [json.dumps({**row, "seconds": None}) for row in read_lines(path)]


class Linked:
    """Processes that a test has forked."""

    device = None

    def __init__(self, rank: int, size: int, barrier: Any, pipes: Any) -> None:
        self.rank, self.size, self.barrier, self.pipes = rank, size, barrier, pipes

    def share(self, value: Any) -> Any:
        if self.rank:
            return self.pipes[self.rank][0].recv()
        for _, end in self.pipes[1:]:
            end.send(value)
        return value

    def wait(self) -> None:
        self.barrier.wait()


def fork(size: int, target: Callable[[Linked], None]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(size)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    linked = [Linked(rank, size, barrier, pipes) for rank in range(size)]
    children = [context.Process(target=target, args=(one,)) for one in linked]
    for child in children:
        child.start()
    return children


def end(children: Sequence[Any]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.join()


def command(saved: str, clips: Path, questions: Path, out: Path, *more: str) -> list[str]:
    return [
        "videoqa",
        *("--model", saved, "--questions", str(questions), "--videos", str(clips)),
        *("--out", str(out), "--frames", str(FRAMES), "--workers", "0", "--max-new-tokens", "3"),
        *more,
    ]
