"""Answer many questions about many videos, on one or several processes, whatever happens.

    summary = vtc.video.answer_questions(
        model, processor, "questions.jsonl", "clips/", recipe="configs/divprune_25.yaml",
        out="answers.jsonl",
    )

What is wrong with one video or one question is an error in its record. Started again after a crash,
with the same or another number of processes, a run goes on where it was (`journal.py`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import (
    MissingSignal,
    NothingReduced,
    UnsupportedModel,
    UnsupportedSite,
    VtcError,
)
from ..recipe import Recipe
from ..session import attach
from .answer import Answer, Answerer, Group, VideoModel
from .files import MEMORY, MOST_PIXELS
from .job import BLANK, Job, Summary, answer_settings, asked, attach_request
from .journal import Found, Journal, Part
from .pool import Readers, Result
from .processes import Processes, Stop, signals, started
from .questions import BadLine, Question, read_questions
from .sampling import Sampling
from .shards import Work, by_video, shard

#: what is wrong with the model or the recipe, rather than with a video, when nothing works
_HOPELESS = (UnsupportedModel, UnsupportedSite, MissingSignal)
#: how many videos have to fail so before it is not one of them that is to blame
_HOPELESS_VIDEOS = 3
#: nothing can be answered after these
_FATAL = (NothingReduced, getattr(torch, "AcceleratorError", NothingReduced))
#: characters of an error that a record keeps
_WORDS = 2000
#: frames that wait for a batch to be full, at most; they are as large as those of the file
_WAITING_BYTES = 256 * 2**20


def answer_questions(
    model: Any,
    processor: Any,
    questions: str | Path | Iterable[Mapping[str, Any]],
    videos: str | Path,
    *,
    out: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
    frames: Sampling | str | int = 8,
    backend: str = "auto",
    batch_size: int = 8,
    max_new_tokens: int = 32,
    prompt: str | None = None,
    workers: int = 2,
    timeout: float = 60.0,
    limit: int | None = None,
    retry_errors: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    max_pixels: int = MOST_PIXELS,
    memory: int = MEMORY,
) -> Summary:
    """Answer questions about videos and write one JSON record a line to `out`.

    Args:
        model, processor: a vision-language model of transformers that reads videos, and its
            processor.
        questions: a JSONL file (see `vtc.video.questions`) or objects with its fields.
        videos: the folder that the questions' videos are in.
        recipe: what compresses: a recipe (YAML file, object, mapping with `steps`) or a mapping of
            arguments of `vtc.attach`, such as {"method": "divprune", "keep": 0.25}.
        frames: which frames are read, as `vtc.video.Sampling.parse` takes it: 8, "2fps,max=64".
        backend: what reads them, as for `vtc.video.read`: "pyav" refuses damage that "decord", the
            first choice of "auto", paints over.
        prompt: format such as "<video> user {question} assistant", for processors without a chat
            template.
        batch_size: questions that are answered together; fewer where the frames of their videos
            are 256 MB by themselves.
        workers, timeout: processes that read videos ahead (0: none), and after how many seconds
            they give one up.
        limit: the first lines of the file only. Answers of earlier starts to other lines stay.
        retry_errors: ask those questions again that have an error for an answer.
        overwrite: begin anew where `out` holds answers of another run.
        max_pixels: of a frame; a video with larger ones is an error (2^25, 8K).
        memory: bytes of address space for each process that reads videos.

    Under `accelerate launch` every process calls this; the first writes `out` and gets the counts.
    """
    request = attach_request(recipe)
    settings = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        **answer_settings(request, max_new_tokens, prompt),
    }
    job = Job(
        read_questions(questions),
        Path(videos),
        Path(out),
        settings,
        Sampling.parse(frames),
        backend,
        batch_size,
        workers,
        timeout,
        limit,
        retry_errors,
        overwrite,
        progress,
        max_pixels,
        memory,
    )
    return run(
        job, lambda: answering(model, processor, request, batch_size, max_new_tokens, prompt)
    )


@contextmanager
def answering(
    model: Any,
    processor: Any,
    request: Mapping[str, Any] | None,
    batch_size: int,
    max_new_tokens: int,
    prompt: str | None,
) -> Iterator[VideoModel]:
    """The model as an answerer, compressed by one session from the first question to the last."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "prompt": prompt,
    }
    if request is None:
        yield VideoModel(model, processor, **options)
        return
    with attach(model, **request) as session:
        yield VideoModel(model, processor, session, **options)


# ---------------------------------------------------------------------- one run


def run(
    job: Job,
    make: Callable[[], AbstractContextManager[Answerer]],
    processes: Processes | None = None,
) -> Summary:
    """Answer what is pending, with the answerer that `make` gives; it is not called for nothing."""
    began, processes = time.perf_counter(), processes or started()
    job.check_videos()
    with closing(Journal(job.out)) as journal:
        _begin(journal, job, processes)
        found = journal.found(journal.start)
        mine = shard(by_video(job.pending(found)), processes.size)[processes.rank]
        with signals() as stop, closing(journal.part(processes.rank)) as part:
            if processes.rank == 0:
                _write_bad_lines(job, found, part)
            if mine:
                with make() as answerer:
                    worker = _Worker(job, answerer, part, stop, processes)
                    worker.answered = any(not entry.failed for entry in found.values())
                    worker.work(mine)
        summary = Summary(job.out, job.questions.name)
        if stop.number:
            summary.stopped = stop.number
            return summary
        processes.wait()
        if processes.rank == 0:
            _merge(job, journal, summary)
        summary.seconds = time.perf_counter() - began
        return summary


def _begin(journal: Journal, job: Job, processes: Processes) -> None:
    """The first process opens the journal; when that is refused, all hear why."""
    start, refused = 0, None
    if processes.rank == 0:
        try:
            start = journal.open(job.identity(), job.overwrite)
            job.check_answered(journal.answered())
        except (VtcError, OSError) as error:
            refused = error
    start, refused = processes.share((start, refused))
    if refused is not None:
        raise refused
    journal.join(start)


def _write_bad_lines(job: Job, found: Mapping[str, Found], part: Part) -> None:
    """Lines that are no question get their error at once."""
    for line in job.lines:
        if isinstance(line, BadLine) and line.key not in found:
            part.append(line.key, {**BLANK, **asked(line), "error": line.error})


def _merge(job: Job, journal: Journal, summary: Summary) -> None:
    found, wanted = journal.found(), {line.key for line in job.lines}
    missing = len(wanted - found.keys())
    if missing:
        raise VtcError(
            f"{missing} questions have no record: a process of this run ended early. Run the same "
            f"command again; what is answered stays."
        )
    order = [line.key for line in job.questions.lines if line.key in found]
    summary.kept = len(order) - len(wanted)
    bad = {line.key for line in job.questions.bad}
    journal.merge(order, lambda key, record: summary.add(record, key in bad))


class _Worker:
    """One process: reads its videos ahead, asks, writes records."""

    def __init__(
        self, job: Job, answerer: Answerer, part: Part, stop: Stop, processes: Processes
    ) -> None:
        self.job, self.answerer, self.part, self.stop = job, answerer, part, stop
        self.processes = processes
        self.answered = False  # any question, in this start or an earlier one
        self.errors = 0
        self.doubtful: dict[str, list[tuple[Question, Exception]]] = {}

    def work(self, works: Sequence[Work]) -> None:
        """Answer all questions about these videos."""
        job, size = self.job, self.processes.size
        total = sum(len(work.questions) for work in works)
        name = "videoqa" if size == 1 else f"videoqa, process {self.processes.rank + 1} of {size}"
        quiet = self.processes.rank > 0 or not job.progress
        with (
            tqdm(total=total, desc=name, unit="question", disable=quiet) as self.bar,
            job.readers(Readers) as readers,
        ):
            for work in works:
                readers.submit(work, job.videos / work.video)
            waiting: list[Result] = []
            for result in readers:
                if result.clip is not None:
                    waiting.append(result)
                elif result.error is not None and not self.stop.number:
                    # what ends this process may have hit the reader too
                    self.fail(result.key.questions, result.error)
                if _enough(waiting, job.batch_size):
                    self.ask(waiting)
                    waiting = []
                if self.stop.number:
                    return
            self.ask(waiting)
            if not self.stop.number:
                self.settle(len(works))

    def ask(self, results: Sequence[Result]) -> None:
        """Answer the questions about some videos; where that fails, one by one."""
        if not results or self.stop.number:
            return
        read = {
            q.number: r.seconds / len(r.key.questions) for r in results for q in r.key.questions
        }
        groups = [Group(result.clip, result.key.questions) for result in results]
        self.attempt(groups, read)
        self.part.flush()

    def attempt(self, groups: Sequence[Group], read: Mapping[int, float]) -> None:
        """`read`: question number -> its share of the seconds of reading the video."""
        left = {question.number: question for group in groups for question in group.questions}
        answers = iter(self.answerer.answer(groups))
        failed: Exception | None = None
        while left and failed is None:
            try:
                question, answer = next(answers)
            except StopIteration:
                raise VtcError(f"{len(left)} questions were given no answer.") from None
            except Exception as error:
                failed = error
            else:
                del left[question.number]
                self.note(question, answer, read[question.number])
        if failed is None:
            return
        if isinstance(failed, _FATAL):
            raise failed
        del answers
        failed.__traceback__ = failed.__context__ = None  # their frames hold tensors
        if isinstance(failed, torch.OutOfMemoryError) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(left) == 1:
            (question,) = left.values()
            if isinstance(failed, _HOPELESS) and not self.answered:
                self.doubt(question, failed)
            else:
                self.fail([question], failed)
            return
        for part in _smaller(groups, left):
            if self.stop.number:
                return
            self.attempt([part], read)

    def note(self, question: Question, answer: Answer, read: float) -> None:
        """Write an answer."""
        seconds = {"decode": read, **answer.seconds}
        record = {
            **BLANK,
            **asked(question),
            "answer": answer.text,
            "resps": [[answer.text]],
            "filtered_resps": [answer.text],
            "right": question.right(answer.text),
            "tokens_before": answer.tokens_before,
            "tokens_after": answer.tokens_after,
            "seconds": {key: round(value, 6) for key, value in seconds.items()},
        }
        self.part.append(question.key, record)
        self.answered = True
        self.bar.update()

    def doubt(self, question: Question, error: Exception) -> None:
        """Keep an error back until it is known whether the video or the model is to blame."""
        self.doubtful.setdefault(os.path.normpath(question.video), []).append((question, error))
        if len(self.doubtful) == _HOPELESS_VIDEOS:
            raise error

    def settle(self, videos: int) -> None:
        """Write the errors that were kept back, unless every one of so many videos has some."""
        kept = [pair for pairs in self.doubtful.values() for pair in pairs]
        if kept and len(self.doubtful) == videos and not self.answered:
            raise kept[0][1]
        for question, error in kept:
            self.fail([question], error)

    def fail(self, questions: Iterable[Question], error: Exception) -> None:
        """Write an error for each of these questions."""
        kind = "" if isinstance(error, VtcError) else f"{type(error).__name__}: "
        why = f"{kind}{error}"
        if len(why) > _WORDS:
            half = _WORDS // 2  # the cause is often said last
            why = f"{why[:half]} ... ({len(why)} characters) ... {why[-half:]}"
        for question in questions:
            record = {**BLANK, **asked(question), "error": why}
            self.part.append(question.key, record)
            self.errors += 1
            self.bar.update()
        self.bar.set_postfix(errors=self.errors)


def _enough(waiting: Sequence[Result], batch_size: int) -> bool:
    """Whether these are a batch, by their questions or by the memory that their frames take."""
    held = sum(result.clip.frames.nbytes for result in waiting if result.clip is not None)
    return held >= _WAITING_BYTES or sum(len(r.key.questions) for r in waiting) >= batch_size


def _smaller(groups: Sequence[Group], left: Mapping[int, Question]) -> Iterator[Group]:
    """Every video alone, or every question of the only video."""
    for group in groups:
        some = tuple(q for q in group.questions if q.number in left)
        if len(groups) > 1 and some:
            yield Group(group.clip, some)
        elif some:
            yield from (Group(group.clip, (question,)) for question in some)
