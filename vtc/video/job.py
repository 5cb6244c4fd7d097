"""What a run is asked to do, the records that it writes, and what they add up to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, InvalidQuestions, OutputRefused
from ..recipe import Recipe
from ..reducer import Host
from .decode import check_options
from .files import MEMORY, MOST_PIXELS
from .journal import Found, Record
from .pool import Readers
from .questions import BadLine, Question, Questions, shown
from .sampling import Sampling


@dataclass(frozen=True)
class Job:
    """What is to be answered.

    settings: what answers depend on; a run is continued by the same settings only.
    batch_size: questions that are answered together, at most.
    sampling, backend: as `vtc.video.read` takes them.
    workers, timeout: processes that read videos ahead, and their patience in seconds with one.
    max_pixels, memory: of a frame, and bytes for such a process, at most.
    limit: the first lines only; answers of earlier starts to other lines stay.
    retry_errors: ask again what has an error for an answer.
    """

    questions: Questions
    videos: Path
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling(count=8)
    backend: str = "auto"
    batch_size: int = 8
    workers: int = 2
    timeout: float = 60.0
    limit: int | None = None
    retry_errors: bool = False
    overwrite: bool = False
    progress: bool = True
    max_pixels: int = MOST_PIXELS
    memory: int = MEMORY

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name}={value}: give a whole number from 1 on.")
        check_options(self.backend, None, self.max_pixels)
        if not self.videos.is_dir():
            raise InvalidQuestions(f"no such folder of videos: {self.videos}")
        if self.questions.file is not None and self.out.resolve() == self.questions.file.resolve():
            raise OutputRefused(f"{self.out} holds the questions: give another --out.")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise OutputRefused(f"cannot write {self.out}: give a file in a folder that exists.")

    @property
    def lines(self) -> tuple[Question | BadLine, ...]:
        return self.questions.lines[: self.limit]

    def identity(self) -> dict[str, Any]:
        """What has to be the same for answers to belong together."""
        own = {
            "videos": str(self.videos.resolve()),
            "frames": str(self.sampling),
            "backend": self.backend,
        }
        return {**own, **self.settings}

    def check_answered(self, answered: Iterable[str]) -> None:
        """Refuse questions that have lost some that were answered: their answers would be lost too.

        Lines may be added, and lines without an answer changed."""
        lost = set(answered) - {line.key for line in self.questions.lines}
        if lost:
            number = min(int(key.partition("-")[0]) for key in lost)
            raise OutputRefused(
                f"{self.out} holds {len(lost)} answers to lines that have changed or gone since in "
                f"{self.questions.name}, the first of them line {number}. Put them back (bad lines "
                f"may be mended, others added below), give another --out, or --overwrite to begin "
                f"anew."
            )

    def readers(self, kind: type[Readers] = Readers) -> Readers:
        """What reads the videos."""
        return kind(
            self.workers,
            self.sampling,
            self.timeout,
            self.backend,
            None,
            self.max_pixels,
            self.memory,
        )

    def check_videos(self) -> None:
        """One missing video is an error in its records; when all are, the folder is wrong."""
        names = {line.video for line in self.lines if isinstance(line, Question)}
        if names and not any(os.path.exists(self.videos / name) for name in names):
            raise InvalidQuestions(
                f"{self.videos} holds none of the {len(names)} videos that are asked about, such "
                f"as {shown(min(names))}: give the folder that these paths start from."
            )

    def pending(self, found: Mapping[str, Found]) -> list[Question]:
        """Questions without an answer, given the records of earlier starts."""
        return [
            line
            for line in self.lines
            if isinstance(line, Question)
            and (line.key not in found or (self.retry_errors and found[line.key].failed))
        ]


@dataclass
class Summary:
    """What a finished run wrote.

    answered, errors: records of either kind, of this start and earlier ones.
    kept: records among them that are beyond the limit, of earlier starts.
    judged, right: questions whose file says what is right, and how many answers were.
    bad_lines: errors of lines that are no questions, in the file `questions`.
    stopped: number of the signal that ended this run early; then nothing else is counted.
    """

    out: Path
    questions: str = "questions"
    answered: int = 0
    errors: int = 0
    bad_lines: int = 0
    kept: int = 0
    judged: int = 0
    right: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    seconds: float = 0.0
    stopped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; questions that failed count as wrong."""
        return self.right / self.judged if self.judged else None

    def add(self, record: Record, bad: bool = False) -> None:
        """Count one record. `bad`: its line is no question, and is neither right nor wrong."""
        self.bad_lines += bad
        if record["error"] is not None:
            self.errors += 1
            self.reasons[record["error"]] += 1
        else:
            self.answered += 1
            self.tokens_before += record["tokens_before"]
            self.tokens_after += record["tokens_after"]
        if record.get("target") is not None and not bad:
            self.judged += 1
            self.right += record["right"] is True

    def __str__(self) -> str:
        total = self.answered + self.errors
        asked = total - self.bad_lines
        lines = [f"{self.answered} of {asked} questions answered, in {self.out}"]
        if self.kept:
            lines.append(f"{self.kept} of them are beyond the limit, from earlier starts")
        if self.judged:
            lines.append(f"right: {self.right} of {self.judged} ({self.right / self.judged:.1%})")
        if self.answered:
            before, after = self.tokens_before / self.answered, self.tokens_after / self.answered
            lines.append(f"visual tokens per question: {before:.1f} -> {after:.1f}")
        if self.errors:
            reason, times = self.reasons.most_common(1)[0]
            reason = " ".join(reason.split())[:200]
            lines.append(f"{self.errors} errors; {times} of them: {reason}")
        if self.bad_lines:
            lines.append(
                f"bad lines in {self.questions}: {self.bad_lines}; mend them there and run the "
                f"same command again"
            )
        if self.errors > self.bad_lines:
            lines.append("run the same command with --retry-errors to ask failed questions again")
        return "\n".join(lines)


# ---------------------------------------------------------------------- what compresses


def answer_settings(
    request: Mapping[str, Any] | None, max_new_tokens: int, prompt: str | None
) -> dict[str, Any]:
    """What answers depend on besides model, videos and questions, as plain data."""
    recipe: Any = None
    if request is not None:
        whole = request["method"]
        recipe = whole.to_dict() if isinstance(whole, Recipe) else {**request}
    return {"recipe": recipe, "max_new_tokens": max_new_tokens, "prompt": prompt}


def attach_request(recipe: Any) -> dict[str, Any] | None:
    """Arguments of `attach`, checked as far as that goes without a model."""
    if recipe is None:
        return None
    if isinstance(recipe, Recipe):
        return {"method": recipe}
    if not isinstance(recipe, Mapping) or "steps" in recipe:
        return {"method": Recipe.load(recipe)}
    request = dict(recipe)
    if not isinstance(request.get("method"), str):
        return {"method": Recipe.load(recipe)}  # says what a recipe looks like
    Recipe.build(**request, depth=32, host=Host(32))
    return request


# ---------------------------------------------------------------------- records

#: every record has these fields, in this order
BLANK: Record = {
    "id": None,
    "doc_id": None,
    "video": None,
    "question": None,
    "target": None,
    "answer": None,
    "resps": [],
    "filtered_resps": [],
    "right": None,
    "tokens_before": None,
    "tokens_after": None,
    "seconds": None,
    "error": None,
}


def asked(question: Question | BadLine) -> Record:
    """The fields of a record that say what was asked, as far as it could be read."""
    if isinstance(question, BadLine):
        given = question.given.get
        return {
            "id": question.id,
            "doc_id": question.id,
            "video": given("video"),
            "question": given("question"),
            "target": given("answer"),
        }
    return {
        "id": question.id,
        "doc_id": question.id,
        "video": question.video,
        "question": question.text,
        "target": question.answer,
    }
