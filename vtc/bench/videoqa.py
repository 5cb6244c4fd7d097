"""Throughput of `vtc videoqa` on one and more processes, dense against methods, and whether its
memory stays flat over a long list of videos.

Every process loads the model once and then answers the same questions in every case, in random
order, round by round; speed-ups are ratios to the dense model of the same round, and their median
is shown. One thread each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, VtcError
from . import records
from .options import at_least, budgets, counts, method_and_params, names, prepare
from .records import Record
from .speed import median_ratio

EPILOG = """columns:
  rate         questions per second of all processes; loading of the model is not in it
  speedup      over dense in the same rounds, on as many processes, and its standard error
  scaling      over one process
  tokens       visual tokens of a question, and those left behind the last step
  decode ms    reading the video (by the readers, beside the model), per question
  encode ms    vision tower; prefill ms: until the first word; words ms: the other words
  shares       of decode and of prefill in the sum of these four

  Then the memory of one process after n videos, in MB: it must not grow.

examples:
  vtc bench videoqa --model tiny-llava-video --questions clips/questions.jsonl --videos clips/
  vtc bench videoqa --model org/name --questions q.jsonl --videos clips/ --methods divprune,fastv \\
      --keep 0.5,0.25 --processes 1,2 --memory 1000
"""
MARKS = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench videoqa`."""
    prepare(parser, "Questions about videos per second, and memory over a long list.", EPILOG)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="zoo name, folder or hub id")
    add("--questions", type=Path, required=True, metavar="JSONL", help="as for `vtc videoqa`")
    add("--videos", type=Path, required=True, metavar="DIR", help="folder of their paths")
    add("--methods", type=names, default="divprune", help="comma separated, parameters as "
        "name:key=value (%(default)s)")  # fmt: skip
    add("--keep", type=budgets, default="0.5,0.25", help="(%(default)s)")
    add("--processes", type=counts, default="1,2", help="(%(default)s)")
    add("--limit", type=at_least(1), default=200, help="questions of a case (%(default)s)")
    add("--rounds", type=at_least(1), default=3, help="(%(default)s)")
    add("--memory", type=at_least(0), default=500, help="videos of the long list (%(default)s)")
    add("--frames", default="8", help="(%(default)s)")
    add("--batch-size", type=at_least(1), default=8, help="(%(default)s)")
    add("--workers", type=at_least(0), default=1, help="readers of a process (%(default)s)")
    add("--max-new-tokens", type=at_least(1), default=8, help="(%(default)s)")
    add("--prompt", help="as for `vtc videoqa`")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the model")
    add("--device", help="default: cuda when there is one, else cpu")
    add("--seed", type=int, default=0, help="of the order (%(default)s)")
    parser.set_defaults(trust_remote_code=False)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when something could not be answered."""
    import torch

    from ..video.questions import read_questions

    asked = read_questions(args.questions).good[: args.limit]
    rows: list[Record] = []
    for processes in args.processes:
        rows += _in_processes(processes, _throughput, args)
    alone = {row["what"]: row["rate"] for row in rows if row["processes"] == 1}
    for row in rows:
        one = alone.get(row["what"])
        row["scaling"] = row["rate"] / one if one else None
    memory = _in_processes(1, _memory, args) if args.memory else []

    print(
        f"\n{args.model}, {len(asked)} questions, batches of {args.batch_size}, one thread each\n"
    )
    print(records.table(rows, COLUMNS))
    if memory:
        print(f"\n{records.table(memory, MEMORY_COLUMNS)}")
    if args.json:
        where = records.environment(torch.float32, args.seed)
        records.write(args.json, [*rows, *memory], where | {"dtype": args.dtype or "default"})
    return 1 if any(row.get("errors") for row in rows) else 0


# ---------------------------------------------------------------------- processes


@dataclasses.dataclass
class _Linked:
    """Processes that this bench has started."""

    rank: int
    size: int
    barrier: Any
    pipes: Any
    device: str | None = None

    def share(self, value: Any) -> Any:
        if self.rank:
            return self.pipes[self.rank - 1][0].recv()
        for _, end in self.pipes:
            end.send(value)
        return value

    def wait(self) -> None:
        self.barrier.wait()


def _in_processes(count: int, job: Callable[..., list[Record]], args: Any) -> list[Record]:
    """What `job` gives in the first of `count` processes."""
    context = multiprocessing.get_context("spawn")
    barrier, pipes = context.Barrier(count), [context.Pipe(False) for _ in range(count - 1)]
    ours, theirs = context.Pipe(False)
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(
                target=_child,
                args=(job, _Linked(rank, count, barrier, pipes), args, folder, theirs),
            )
            for rank in range(count)
        ]
        try:
            for child in children:
                child.start()
            while not ours.poll(0.2):
                if any(child.exitcode for child in children):
                    raise VtcError("a measuring process failed; what it said stands above.")
            rows = ours.recv()
            if isinstance(rows, VtcError):
                raise rows
            for child in children:
                child.join()
            return rows
        finally:
            for child in children:
                child.terminate()
                child.join()


def _child(job: Any, linked: _Linked, args: Any, folder: str, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        rows = job(linked, args, Path(folder))
    except VtcError as error:
        pipe.send(error)
        return
    if linked.rank == 0:
        pipe.send(rows)


# ---------------------------------------------------------------------- throughput


def _cases(args: Any) -> dict[str, dict[str, Any] | None]:
    """Name -> arguments of `attach`; None for the dense model."""
    cases: dict[str, dict[str, Any] | None] = {"dense": None}
    for label in args.methods:
        method, params = method_and_params(label)
        for keep in args.keep:
            cases[f"{label} {keep}"] = {"method": method, "keep": keep, **params}
    return cases


def _throughput(linked: _Linked, args: Any, folder: Path) -> list[Record]:
    """One record per case."""
    from ..commands import loading
    from ..video import run as runs

    model, processor = loading.load_model(args)
    cases, dice = _cases(args), random.Random(args.seed)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    last: dict[str, tuple[Any, list[Record]]] = {}
    for number in range(args.rounds + 1):  # the first one warms up
        order = list(cases)
        dice.shuffle(order)
        for name in order:
            out = folder / f"{number}-{[*cases].index(name)}.jsonl"
            job = _job(args, out, limit=args.limit if number else args.batch_size)
            make = _maker(model, processor, cases[name], args)
            linked.wait()
            summary = runs.run(job, make, linked)
            if number:
                seconds[name].append(summary.seconds)
                if linked.rank == 0:
                    last[name] = (summary, _read(out))
    if linked.rank:
        return []
    return [_row(linked.size, name, seconds, *last[name]) for name in cases]


def _job(args: Any, out: Path, limit: int | None, rows: Any = None, videos: Any = None) -> Any:
    from ..video.job import Job
    from ..video.questions import read_questions
    from ..video.sampling import Sampling

    return Job(
        read_questions(args.questions if rows is None else rows),
        videos or args.videos,
        out,
        sampling=Sampling.parse(args.frames),
        batch_size=args.batch_size,
        workers=args.workers,
        limit=limit,
        progress=False,
    )


def _maker(model: Any, processor: Any, request: Any, args: Any) -> Callable[[], Any]:
    from ..video.run import answering

    options = (args.batch_size, args.max_new_tokens, args.prompt)
    return lambda: answering(model, processor, request, *options)


def _read(out: Path) -> list[Record]:
    import json

    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def _row(
    processes: int, name: str, seconds: dict[str, list[float]], summary: Any, found: list[Record]
) -> Record:
    told = [row["seconds"] for row in found if row["seconds"]]
    if not told:
        raise InvalidInput(f"{name}: no question could be answered: {found[0]['error']}")
    mean = {key: 1e3 * statistics.mean(one[key] for one in told) for key in told[0]}
    whole = mean["decode"] + mean["encode"] + mean["generate"]
    speedup, error = median_ratio(seconds["dense"], seconds[name])
    before, after = (n / len(told) for n in (summary.tokens_before, summary.tokens_after))
    return {
        "processes": processes,
        "what": name,
        "rate": len(found) / statistics.median(seconds[name]),
        "speedup": speedup,
        "error": error,
        "tokens": f"{before:.0f} -> {after:.0f}",
        "right": summary.accuracy,
        "errors": summary.errors,
        "decode_ms": mean["decode"],
        "encode_ms": mean["encode"],
        "prefill_ms": mean["prefill"],
        "words_ms": mean["generate"] - mean["prefill"],
        "decode_share": mean["decode"] / whole,
        "prefill_share": mean["prefill"] / whole,
    }


# ---------------------------------------------------------------------- memory


class _Sampled:
    """An answerer that notes the memory of its process after each group of videos."""

    def __init__(self, inner: Any, found: list[tuple[int, float]]) -> None:
        self.inner, self.found = inner, found

    def answer(self, groups: Sequence[Any]) -> Iterator[Any]:
        try:
            yield from self.inner.answer(groups)
        finally:  # whoever has all answers asks no further
            done = self.found[-1][0] if self.found else 0
            self.found.append((done + len(groups), _resident()))


def _resident() -> float:
    """Memory of this process in MB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        raise VtcError("memory is read from /proc, which this system lacks: --memory 0.") from error
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _memory(linked: _Linked, args: Any, folder: Path) -> list[Record]:
    """Memory of one process after each tenth of a long list of videos."""
    from ..commands import loading
    from ..video import run as runs
    from ..video.questions import read_questions

    asked = read_questions(args.questions).good
    (folder / "clips").mkdir()
    rows = []
    for number in range(args.memory):  # many names for few files
        question = asked[number % len(asked)]
        name = f"{number}{Path(question.video).suffix}"
        (folder / "clips" / name).symlink_to((args.videos / question.video).resolve())
        rows.append({"video": name, "question": question.text})
    model, processor = loading.load_model(args)
    found: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def make() -> Iterator[Any]:
        with _maker(model, processor, None, args)() as answerer:
            yield _Sampled(answerer, found)

    runs.run(_job(args, folder / "out.jsonl", None, rows, folder / "clips"), make, linked)
    if not found:
        raise InvalidInput("none of the videos of the long list could be read.")
    marks = sorted({len(found) * i // MARKS for i in range(1, MARKS + 1)} - {0})
    first = found[marks[0] - 1][1]
    return [
        {"videos": n, "mb": mb, "grown": mb - first}
        for n, mb in (found[mark - 1] for mark in marks)
    ]


COLUMNS: dict[str, Any] = {
    "processes": "",
    "what": "",
    "rate": ".2f",
    "speedup": ".2f",
    "error": ".2f",
    "scaling": ".2f",
    "tokens": "",
    "right": ".1%",
    "errors": "",
    "decode_ms": ".1f",
    "encode_ms": ".1f",
    "prefill_ms": ".1f",
    "words_ms": ".1f",
    "decode_share": ".0%",
    "prefill_share": ".0%",
}
MEMORY_COLUMNS: dict[str, Any] = {"videos": "", "mb": ".0f", "grown": "+.1f"}
