"""Questions about videos, from a JSONL file: one object a line.

    {"id": "q1", "video": "a/clip.mp4", "question": "what moves left ?", "answer": "ball"}

`id` is the line number where it is missing, or `line 3` where another line has the id 3. `answer`
may be missing, and `options` for multiple choice, whose answer is a text of them, a letter, or a
place counted from 0.
Field names of lmms-eval work too: doc_id, video_path, target, choices. A line that cannot be used
is kept as a `BadLine`, so that it costs an error record and not the run. The file is UTF-8, or what
its first bytes say (UTF-16 and UTF-32, as PowerShell writes)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InvalidQuestions

#: our name of a field -> names that are read
FIELDS = {
    "id": ("id", "doc_id", "question_id"),
    "video": ("video", "video_path"),
    "question": ("question",),
    "answer": ("answer", "target"),
    "options": ("options", "choices"),
}
#: characters of a line, at most: a record repeats what was asked
LONGEST = 2**20
#: lists and objects inside each other in a line, at most
DEEPEST = 100
#: what data sets write where the video stands in a question
_MARKERS = re.compile(r"^\s*(?:<(?:video|image)>\s*)+")


@dataclass(frozen=True)
class Question:
    """One line. `number` counts lines from 1; `key` tells it from all others, and from what the
    same line said before it was changed."""

    number: int
    id: str | int
    video: str
    text: str
    answer: str | int | None = None
    options: tuple[str, ...] = ()
    key: str = field(default="", compare=False)

    @property
    def prompt(self) -> str:
        """The question, with lettered options below it where it has some."""
        if not self.options:
            return self.text
        named = zip(string.ascii_uppercase, self.options, strict=False)
        listed = [f"{letter}. {o}" if _bare(letter, o) == o else o for letter, o in named]
        return "\n".join([self.text, *listed, "Reply with the letter of the right option."])

    def right(self, said: str) -> bool | None:
        """Whether an answer is the one the file gives; None where it gives none."""
        if self.answer is None:
            return None
        if not self.options:
            return _plain(said) == _plain(str(self.answer))
        wanted = self.answer  # counted from 0, as lmms-eval does
        if isinstance(wanted, str):
            wanted = _place(wanted, self.options)
        return wanted is not None and _place(said, self.options) == wanted


@dataclass(frozen=True)
class BadLine:
    """A line that is no question, and why; the fields of `FIELDS` that can be read."""

    number: int
    id: str | int
    error: str
    key: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Questions:
    """All lines in order; `file` is where they stand."""

    lines: tuple[Question | BadLine, ...]
    file: Path | None = None

    @property
    def good(self) -> list[Question]:
        return [line for line in self.lines if isinstance(line, Question)]

    @property
    def bad(self) -> list[BadLine]:
        return [line for line in self.lines if isinstance(line, BadLine)]

    @property
    def name(self) -> str:
        """For messages."""
        return "the questions" if self.file is None else str(self.file)


def read_questions(source: str | Path | Iterable[Mapping[str, Any]]) -> Questions:
    """From a JSONL file, or from objects with the same fields."""
    if isinstance(source, str | Path):
        file, found = Path(source), rows(Path(source))
    else:
        file, found = None, [(i, _flat(dict(row))) for i, row in enumerate(source, 1)]
    lines: list[Question | BadLine] = []
    taken = {str(_id(row)) for _, row in found if _id(row) is not None}
    seen: dict[str, int] = {}
    for number, row in found:
        line = _line(number, row, taken)
        earlier = seen.setdefault(str(line.id), number)
        if isinstance(line, Question) and earlier != number:
            what = f"the id {shown(line.id)} is that of line {earlier}"
            why = f"line {number}: {what}; ids must be unique"
            line = BadLine(number, _free(number, taken), why, line.key, _readable(row))
        lines.append(line)
    asked = Questions(tuple(lines), file)
    if not asked.good:
        why = asked.bad[0].error if asked.bad else "it is empty"
        raise InvalidQuestions(
            f"no question that can be asked in {asked.name}: {why}. Write one JSON object a line, "
            f'such as {{"video": "clip.mp4", "question": "what moves ?"}}.'
        )
    return asked


class Fault(str):
    """Why a line cannot be used, in place of what it holds."""


TOO_DEEP = Fault(f"no JSON that is read: it is nested more than {DEEPEST} deep")


def rows(path: Path) -> list[tuple[int, Any]]:
    """Line number and what the line holds, for lines that are not empty; a `Fault` if no JSON."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidQuestions(f"cannot read questions {str(path)!r}: {error.strerror}.") from error
    encoding = json.detect_encoding(data[:4])
    if encoding not in ("utf-8", "utf-8-sig"):
        try:
            data = data.decode(encoding).encode()
        except UnicodeError as error:
            raise InvalidQuestions(
                f"cannot read questions {str(path)!r}: it begins like {encoding.upper()} and is "
                f"not ({error}). Save it as UTF-8."
            ) from error
    found: list[tuple[int, Any]] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if raw.strip():
            try:
                found.append((number, _flat(json.loads(raw))))
            except RecursionError:
                found.append((number, TOO_DEEP))
            except ValueError as error:  # also bytes that are no UTF-8
                found.append((number, Fault(f"no JSON: {error}")))
    return found


def _flat(row: Any) -> Any:
    """The row; `TOO_DEEP` where it is nested so deep that writing it down would fail."""
    level = [row]
    for _ in range(DEEPEST + 1):
        level = [value for value in level if isinstance(value, Mapping | list | tuple)]
        if not level:
            return row
        inner = (one.values() if isinstance(one, Mapping) else one for one in level)
        level = [value for values in inner for value in values]
    return TOO_DEEP


def _id(row: Any) -> str | int | None:
    """The id that a line gives; None where it gives none that can be used."""
    given = _first(row, FIELDS["id"]) if isinstance(row, Mapping) else None
    return given if isinstance(given, str | int) and not isinstance(given, bool) else None


def _free(number: int, taken: Container[str]) -> str | int:
    """An id for a line that gives none."""
    if str(number) not in taken:
        return number
    name = f"line {number}"
    while name in taken:
        name += "'"
    return name


def _line(number: int, row: Any, taken: Container[str]) -> Question | BadLine:
    """A question, or what is wrong with it. `taken`: ids that lines of the file give."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    given, key = _id(row), f"{number}-{digest[:16]}"
    id_ = _free(number, taken) if given is None else given
    if len(text) > LONGEST:
        what = f"it has {len(text)} characters: at most {LONGEST} are read"
        return BadLine(number, _free(number, taken), f"line {number}: {what}", key)
    if not isinstance(row, Mapping):
        fault = isinstance(row, Fault)
        what = row if fault else f"a JSON object was expected, not {_kind(row)}"
        return BadLine(number, id_, f"line {number}: {what}", key)
    got = {key: _first(row, names) for key, names in FIELDS.items()}
    if given is None and got["id"] is not None:
        wrong = f"id: {shown(got['id'])} is neither text nor a number"
    else:
        wrong = _wrong(got)
    if wrong:
        return BadLine(number, id_, f"line {number}: {wrong}", key, _readable(row))
    asked, options = _MARKERS.sub("", got["question"]), tuple(got["options"] or ())
    return Question(number, id_, got["video"], asked, got["answer"], options, key)


def _readable(row: Mapping[str, Any]) -> dict[str, str]:
    """What a bad line says all the same, for its record."""
    got = {name: _first(row, FIELDS[name]) for name in ("video", "question", "answer")}
    return {name: value for name, value in got.items() if isinstance(value, str)}


def _wrong(got: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a line, or None."""
    for key in ("video", "question"):
        value = got[key]
        if not isinstance(value, str) or not value.strip():
            names = " or ".join(map(repr, FIELDS[key]))
            given = "is missing" if value is None else f"is {shown(value)}"
            return f"{names} {given}: give a text that is not empty"
    path = PurePosixPath(got["video"].replace("\\", "/"))
    if path.is_absolute() or os.path.normpath(path).split("/")[0] == "..":
        return f"video {shown(got['video'])} leaves the folder of videos: give a path inside it"
    if not _MARKERS.sub("", got["question"]).strip():
        return "the question is empty"
    if isinstance(got["answer"], bool) or not isinstance(got["answer"], str | int | None):
        return f"answer {shown(got['answer'])} is neither text nor a number"
    return _wrong_options(got["options"], got["answer"])


def _wrong_options(options: Any, answer: Any) -> str | None:
    if options is None:
        return None
    listed = isinstance(options, Sequence) and not isinstance(options, str)
    most = len(string.ascii_uppercase)
    if not listed or not 2 <= len(options) <= most or not all(isinstance(o, str) for o in options):
        return f"options {shown(options)} are not a list of 2 to {most} texts"
    if isinstance(answer, int) and not 0 <= answer < len(options):
        return f"answer {shown(answer)} is no place in {len(options)} options, counted from 0"
    if isinstance(answer, str) and _place(answer, options) is None:
        which = f"answer {shown(answer)} is none of the options {shown(list(options))}"
        return f"{which}: give its text or letter"
    return None


def _place(said: str, options: Sequence[str]) -> int | None:
    """Which option is meant: by its text, by a letter as in `B`, `(b)`, `B. it`, or by its text
    without the letter before it."""
    texts = [_plain(option) for option in options]
    bare = [_plain(_bare(*pair)) for pair in zip(string.ascii_uppercase, options, strict=False)]
    meant = _plain(said)
    if meant in texts:
        return texts.index(meant)
    letter = re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", said)
    place = string.ascii_uppercase.index(letter[1].upper()) if letter else len(texts)
    if place < len(texts):
        return place
    return bare.index(meant) if meant in bare else None


def _bare(letter: str, option: str) -> str:
    """The option without its own letter before it, as in `B. blue`, `(B) blue`, `B: blue`."""
    return re.sub(rf"^\s*\(?{letter}[).:]\s*(?=\S)", "", option)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _plain(text: str) -> str:
    """Case, outer blanks and a final stop do not count."""
    return " ".join(text.casefold().strip().rstrip(".").split())


def shown(value: Any, most: int = 200) -> str:
    """A value for a message, which is not to carry megabytes."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
