"""`vtc videoqa`: options, the dry run, exit codes. Heavy imports happen when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.options import at_least, output
from .files import MEMORY, MOST_PIXELS
from .processes import CONNECT

if TYPE_CHECKING:
    from .job import Job
    from .processes import Processes

SOME_ERRORS = 3
#: lines of each kind that a dry run prints
MOST = 20

EPILOG = """examples:
  vtc videoqa --model tiny-llava-video --questions q.jsonl --videos clips/ \\
      --method divprune --keep 0.25 --out answers.jsonl
  vtc videoqa --model org/name --questions q.jsonl --videos clips/ --frames 2fps,max=64 \\
      --recipe configs/divprune_10_merge_mass.yaml --out answers.jsonl --batch-size 16
  vtc videoqa ... --dry-run             # check files and videos, load no model
  vtc videoqa ... --retry-errors        # ask again what ended in an error
  accelerate launch --multi_gpu --num_processes 2 -m vtc videoqa ...

Without GPUs that last command uses two processes on the CPU; `accelerate launch --cpu` starts one
process, whatever number it is given, where there is no mpirun.

A line of questions: {"id": 1, "video": "a.mp4", "question": "...", "answer": "...",
"options": ["...", "..."]}; id, answer, options may be missing; doc_id, video_path, target and
choices are other names for id, video, answer and options. --out gets one record a line, in the
same order, once all are there. Killed and started again with the same command, on as many
processes as you like, it goes on where it was; what it needs for that is in OUT.parts.

exit codes:
  0  every question is answered     1  the run failed          2  typed wrongly
  3  done, but some records are errors
  130, 143  stopped by Ctrl-C or SIGTERM; the same command goes on"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc videoqa` besides those of the model and the method."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--questions", type=Path, required=True, metavar="JSONL", help="one question a line")
    add(
        "--videos", type=Path, required=True, metavar="DIR", help="folder that their paths start in"
    )
    add("--out", type=output, required=True, metavar="JSONL", help="answers, one record a line")
    add(
        "--frames",
        type=frames,
        default="8",
        metavar="F",
        help="8 (over the whole video), 2fps, fps:2,max=64, frames:0,3,7 or seconds:0,1.5 "
        "(default %(default)s)",
    )
    add(
        "--backend",
        choices=("auto", "decord", "pyav"),
        default="auto",
        help="what reads videos; pyav refuses damage that decord paints over (%(default)s)",
    )
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="questions (%(default)s)")
    add("--max-new-tokens", type=at_least(1), default=32, metavar="N", help="(%(default)s)")
    add("--prompt", type=_prompt, metavar="TEXT", help="such as '<video> user {question} "
        "assistant'; default: the processor's chat template")  # fmt: skip
    add("--workers", type=at_least(0), default=2, metavar="N",
        help="processes that read videos ahead; 0: none (%(default)s)")  # fmt: skip
    add("--timeout", type=_seconds, default=60.0, metavar="S",
        help="seconds until a video that cannot be read is given up (%(default)g)")  # fmt: skip
    add("--max-pixels", type=at_least(1), default=MOST_PIXELS, metavar="N",
        help="of a frame; larger ones are an error (%(default)s, 8K)")  # fmt: skip
    add("--decoder-memory", type=_gibibytes, default=MEMORY / 2**30, metavar="GIB",
        help="address space of each process that reads videos (%(default)g)")  # fmt: skip
    add("--connect", type=_seconds, default=CONNECT, metavar="S",
        help="seconds until all processes of a launch must be there (%(default)g)")  # fmt: skip
    add(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="the first N lines only; what is answered already stays",
    )
    add("--dry-run", action="store_true", help="check files and videos without the model, show "
        "the plan")  # fmt: skip
    add("--retry-errors", action="store_true", help="ask again what ended in an error")
    add("--overwrite", action="store_true", help="begin anew where --out holds other answers")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the model")
    add("--device", help="default: the process's own cuda device when there is one, else cpu")


def run(
    args: argparse.Namespace,
    request: dict[str, Any] | None,
    load: Callable[[argparse.Namespace], tuple[Any, Any]],
) -> int:
    """Answer. `request`: arguments of `attach`; `load` gives the model and its processor."""
    from .job import Job, answer_settings, attach_request
    from .processes import started
    from .questions import read_questions

    request = attach_request(_whole(request))
    job = Job(
        read_questions(args.questions),
        args.videos,
        args.out,
        {
            "model": args.model,
            "dtype": args.dtype,
            **answer_settings(request, args.max_new_tokens, args.prompt),
        },
        args.frames,
        args.backend,
        args.batch_size,
        args.workers,
        args.timeout,
        args.limit,
        args.retry_errors,
        args.overwrite,
        max_pixels=args.max_pixels,
        memory=int(args.decoder_memory * 2**30),
    )
    processes = started(args.connect)
    if args.dry_run:
        return _dry_run(job, processes)
    from . import run as runs  # seconds of imports, once all processes are there

    args.device = args.device or processes.device

    def make() -> Any:
        model, processor = load(args)
        return runs.answering(
            model, processor, request, args.batch_size, args.max_new_tokens, args.prompt
        )

    summary = runs.run(job, make, processes)
    if summary.stopped:
        name = signal.Signals(summary.stopped).name
        code = 128 + summary.stopped
        print(
            f"vtc: stopped by {name} (exit code {code}); the same command goes on", file=sys.stderr
        )
        return code
    if processes.rank:
        return 0
    print(f"{summary}\nread and answered in {summary.seconds:.1f} s")
    return SOME_ERRORS if summary.errors else 0


def _whole(request: dict[str, Any] | None) -> Any:
    """A recipe file by itself, or arguments of `attach`."""
    return request["method"] if request and isinstance(request["method"], Path) else request


def frames(text: str) -> Any:
    """The option --frames: a `vtc.video.Sampling`."""
    from ..errors import InvalidInput
    from .sampling import Sampling

    try:
        return Sampling.parse(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _prompt(text: str) -> str:
    if text.count("{question}") != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write {{question}} once")
    return text


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r}: give GiB, 1 or more")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds above 0")
    return value


# ---------------------------------------------------------------------- dry run


def _dry_run(job: Job, processes: Processes) -> int:
    """Check what can be checked without the model; say who would answer what."""
    from tqdm import tqdm

    from .journal import Journal
    from .pool import Planners
    from .shards import by_video, shard

    if processes.rank:
        return 0
    job.check_videos()
    journal = Journal(job.out)
    if not job.overwrite:
        journal.check(job.identity())
        job.check_answered(journal.answered())
    found = {} if job.overwrite else journal.found()
    pending = job.pending(found)
    works = by_video(pending)
    lines = dataclasses.replace(job.questions, lines=job.lines)
    wrong = [line.error for line in lines.bad]
    frames = []
    told: dict[str, Any] = {"desc": "probing videos", "unit": "video", "disable": not job.progress}
    with job.readers(Planners) as readers:
        for work in works:
            readers.submit(work, job.videos / work.video)
        for result in tqdm(readers, total=len(works), **told):
            if result.clip is not None:
                frames.append(len(result.clip))
            else:
                asked = len(result.key.questions)
                wrong.append(f"{result.key.video} ({asked} questions): {result.error}")
    print(f"{len(job.lines)} lines: {len(lines.good)} questions, {len(lines.bad)} bad lines")
    print(f"{len(lines.good) - len(pending)} have a record already, {len(pending)} to be asked")
    if frames:
        few, many = min(frames), max(frames)
        each = f"{few}" if few == many else f"{few} to {many}"
        print(f"{len(works)} videos, {each} frames of each")
    for number, share in enumerate(shard(works, processes.size), 1):
        asked = sum(len(work.questions) for work in share)
        print(f"process {number} of {processes.size}: {len(share)} videos, {asked} questions")
        _some([f"{work.video}  {len(work.questions)}" for work in share])
    if wrong:
        print(f"{len(wrong)} would end in errors:")
        _some(wrong)
    print("not checked: whether the model loads, reads videos, and has the sites of the method")
    return SOME_ERRORS if wrong else 0


def _some(lines: list[str]) -> None:
    for line in lines[:MOST]:
        print(f"  {line}")
    if len(lines) > MOST:
        print(f"  and {len(lines) - MOST} more")
