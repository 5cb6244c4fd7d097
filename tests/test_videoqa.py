"""`vtc videoqa`: questions in, every answer exactly once, whatever is broken or killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import video_models
from support.videoqa import (
    FRAMES,
    Echo,
    Linked,
    Rows,
    answered_by,
    command,
    end,
    fork,
    job_of,
    read_lines,
    some_rows,
    untimed,
    write_clips,
    write_lines,
)

import vtc
import vtc.video
from vtc.bench import videoqa as bench
from vtc.commands import cli
from vtc.errors import (
    InvalidInput,
    InvalidQuestions,
    InvalidVideo,
    MissingSignal,
    NothingReduced,
    OutputRefused,
    UnsupportedModel,
    VtcError,
)
from vtc.video import run as runs
from vtc.video.answer import Answer, Group, VideoModel
from vtc.video.job import BLANK
from vtc.video.journal import Journal, decode, encode, lines
from vtc.video.processes import Alone, signals
from vtc.video.questions import Question, read_questions
from vtc.video.sampling import VideoInfo
from vtc.video.shards import Work, by_video, shard

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos, one of them in a folder and one that is none."""
    return write_clips(tmp_path_factory.mktemp("clips"))


# ---------------------------------------------------------------------- questions


def test_questions_are_read_with_both_sets_of_names(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "question": "what ?"},
        {
            "id": "x",
            "video": "b.mp4",
            "question": "it ?",
            "answer": "b",
            "options": ["r", "b"],
        },
        "",
        {
            "doc_id": 7,
            "video_path": "more/./d.mp4",
            "question": "<video>\n<image> who ?",
            "target": 1,
            "choices": ["me", "you"],
        },
    ]
    got = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert got.lines == (
        Question(1, 1, "a.mp4", "what ?"),
        Question(2, "x", "b.mp4", "it ?", "b", ("r", "b")),
        Question(4, 7, "more/./d.mp4", "who ?", 1, ("me", "you")),
    )
    assert read_questions(rows[:2]).lines == got.lines[:2]
    assert got.lines[2].prompt.splitlines()[:3] == ["who ?", "A. me", "B. you"]
    lettered = Question(1, 1, "a", "who ?", "A", ("A. me", "B. you"))
    assert lettered.prompt.splitlines()[1:3] == ["A. me", "B. you"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"video": "a.mp4", ', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1, 2]", "a JSON object was expected, not list"),
        ({"question": "q"}, "'video' or 'video_path' is missing"),
        ({"video": "", "question": "q"}, "'video' or 'video_path' is ''"),
        ({"video": ["a.mp4"], "question": "q"}, "is ['a.mp4']"),
        ({"video": "a.mp4"}, "'question' is missing"),
        ({"video": "a.mp4", "question": "<video> "}, "the question is empty"),
        ({"video": "../a.mp4", "question": "q"}, "leaves the folder"),
        ({"video": "b/../../a.mp4", "question": "q"}, "leaves the folder"),
        ({"video": "/a.mp4", "question": "q"}, "leaves the folder"),
        ({"video": "a.mp4", "question": "q", "id": [1]}, "id: [1] is neither"),
        ({"video": "a.mp4", "question": "q", "id": "one"}, "is that of line 1"),
        ({"video": "a.mp4", "question": "q", "answer": {}}, "answer {} is neither"),
        ({"video": "a.mp4", "question": "q", "options": "ab"}, "options 'ab' are not a list"),
        ({"video": "a.mp4", "question": "q", "options": ["a"]}, "not a list of 2 to 26"),
        (
            {"video": "a.mp4", "question": "q", "options": ["a", "b"], "answer": 2},
            "answer 2 is no place in 2 options",
        ),
        (
            {"video": "a.mp4", "question": "q", "options": ["red", "blue"], "answer": "green"},
            "answer 'green' is none of the options ['red', 'blue']",
        ),
        (
            {"video": "a.mp4", "question": "q", "options": ["red", "blue"], "answer": "C"},
            "answer 'C' is none of the options",
        ),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_leaves_the_others(
    row: Any, says: str, tmp_path: Path
) -> None:
    good = {"id": "one", "video": "a.mp4", "question": "what ?"}
    got = read_questions(write_lines(tmp_path / "q.jsonl", [good, row]))
    assert [line.number for line in got.good] == [1]
    (bad,) = got.bad
    assert bad.number == 2 and says in bad.error and bad.error.startswith("line 2: ")


def test_ids_that_are_made_up_leave_those_of_the_file_alone(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "question": "one"},
        {"video": "a.mp4", "question": "two", "id": 1},
        {"video": "a.mp4", "question": "three"},
        "no json",
        {"video": "a.mp4", "question": "five", "id": "line 4"},
        {"video": "a.mp4", "question": "six", "id": "4"},
    ]
    got = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert [line.number for line in got.bad] == [4]
    assert [line.id for line in got.lines] == ["line 1", 1, 3, "line 4'", "line 4", "4"]


def test_dots_in_the_name_of_a_folder() -> None:
    row = {"video": "..a/...b/c.mp4", "question": "what ?"}
    assert read_questions([row]).good == [Question(1, 1, "..a/...b/c.mp4", "what ?")]


def test_files_without_any_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidQuestions, match=r"cannot read questions .*none.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InvalidQuestions, match=r"no question that can be asked in .*: it is empty"):
        read_questions(write_lines(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(InvalidQuestions, match="line 1: 'question' is missing"):
        read_questions([{"video": "a.mp4"}])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidQuestions, match="begins like UTF-16 and is not .*UTF-8"):
        read_questions(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    ("answer", "options", "said", "right"),
    [
        ("Red", (), "red.", True),
        ("red", (), "red ball", False),
        (3, (), "3", True),
        (None, (), "red", None),
        ("B", ("red", "blue"), "b", True),
        ("B", ("red", "blue"), "(B) red", True),
        ("B", ("red", "blue"), "Blue", True),
        ("blue", ("red", "blue"), "B.", True),
        (1, ("red", "blue"), "B: it is", True),
        (1, ("red", "blue"), "A", False),
        ("B", ("red", "blue"), "both", False),
        ("B", ("red", "blue"), "C", False),
        ("A", ("a cat", "a dog"), "A dog runs", False),
        ("A", ("a cat", "a dog"), "A cat", True),
        ("A", ("a cat", "a dog"), "a dog", False),
        ("A", ("a cat", "a dog"), " a ", True),
        ("blue", ("A. red", "B. blue"), "B", True),
        ("blue", ("A. red", "B. blue"), "Blue.", True),
        ("B. blue", ("A. red", "B. blue"), "b. blue", True),
        ("blue", ("(A) red", "(B) blue"), "A", False),
        ("B", ("A) red", "B) blue"), "red", False),
        (1, ("A: red", "B: blue"), "(b) blue", True),
        ("B", ("B", "A"), "A", False),
        ("A", ("A. b", "B. c"), "B", False),
        ("A", ("A.", "B."), "", False),
    ],
)
def test_right_answers(answer: Any, options: tuple[str, ...], said: str, right: bool) -> None:
    assert Question(1, 1, "a.mp4", "?", answer, options).right(said) is right


def test_shards_keep_videos_whole_and_are_even() -> None:
    counts = {"a": 1, "b": 5, "c": 2, "d": 2, "e": 4, "f": 1}
    asked = [Question(i, i, v, "?") for i, v in enumerate("abcdefbbbbcdeee", 1)]
    works = by_video(asked)
    assert [(w.video, len(w.questions)) for w in works] == list(counts.items())
    shares = shard(works, 3)
    # largest first: b5 -> 0, e4 -> 1, c2 -> 2, d2 -> 2, a1 -> 1 (4, as process 2 has), f1 -> 2
    assert [[w.video for w in share] for share in shares] == [["b"], ["a", "e"], ["c", "d", "f"]]
    assert by_video([asked[0], Question(2, 2, "./a", "?")]) == [
        Work("a", (asked[0], Question(2, 2, "./a", "?")))
    ]
    assert shard(works, 3) == shares and shard(works, 1) == [works]
    assert shard(works[:1], 3) == [works[:1], [], []]


# ---------------------------------------------------------------------- the journal


def test_a_torn_line_is_recognised_wherever_it_is_torn(tmp_path: Path) -> None:
    book = Journal(tmp_path / "out.jsonl")
    assert book.open({}) == 1
    part = book.part(0)
    records: Rows = [{"id": 1, "error": None}, {"id": "zwei\nü\ud800", "error": None}]
    for number, record in enumerate(records, 1):
        part.append(str(number), record)
    part.close()
    (path,) = book.parts()
    whole = path.read_bytes()
    last = whole.index(b"\n") + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        assert set(book.found()) == {"1"}
    for torn in (
        whole.replace(b"zwei", b"zwey"),
        whole[:-4] + b"\0\0\0\0",
        b"\0" * 9 + whole[last:],
    ):
        path.write_bytes(torn)
        assert "2" not in book.found()
    path.write_bytes(whole)
    assert set(book.found()) == {"1", "2"}
    assert [decode(line) for _, line in lines(path)] == list(zip("12", records, strict=True))
    assert decode(encode("3", {})[:-1]) is None and decode(b"\n") is None
    book.close()


def test_an_answer_beats_an_error_and_a_later_error_an_earlier(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    starts: list[Rows] = [
        [{"id": "a", "error": "first"}, {"id": "b", "error": "first"}, {"id": "c", "error": None}],
        [{"id": "a", "error": "later"}, {"id": "b", "error": None}, {"id": "c", "error": "no"}],
    ]
    for records in starts:
        with contextlib.closing(Journal(out)) as book, _part(book) as part:
            for number, record in enumerate(records, 1):
                part.append(str(number), record)
    seen: Rows = []
    book.merge(["3", "1", "2"], lambda key, record: seen.append(record))
    assert read_lines(out) == seen
    assert seen == [starts[0][2], starts[1][0], starts[1][1]]
    assert {n for n, entry in book.found().items() if entry.failed} == {"1"}
    assert {n for n, entry in book.found(starts=2).items() if entry.failed} == {"1", "2"}


@contextlib.contextmanager
def _part(book: Journal, settings: Any = None) -> Iterator[Any]:
    book.open(settings or {})
    with contextlib.closing(book.part(0)) as part:
        yield part


def test_other_settings_and_unknown_files_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    settings = {"model": "m", "recipe": {"steps": ({"at": "projector"},)}}
    with contextlib.closing(Journal(out)) as book, _part(book, settings) as part:
        part.append("1", {"id": 1, "error": None})
    with contextlib.closing(Journal(out)) as book:
        assert book.open(settings) == 2  # tuples come back as lists, and are the same
    with pytest.raises(
        OutputRefused, match=r"another run \(model: was 'm', now 'n'\).*--overwrite"
    ):
        Journal(out).open(settings | {"model": "n"})
    with contextlib.closing(Journal(out)) as book:
        book.open({"model": "n"}, overwrite=True)
        assert book.found() == {} and not book.parts()
        assert book.start == 3  # processes of the starts before are told from those of this one
    with contextlib.closing(Journal(out)) as book:  # a start that answered nothing binds nobody
        book.open({"model": "o"})
        assert book.found() == {}
    with contextlib.closing(Journal(out)) as book, _part(book, {"model": "p"}) as part:
        part.append("1", {"id": 1, "error": "no such video"})
    with contextlib.closing(Journal(out)) as book:
        book.open({"model": "q"})
        assert book.found() == {}
    (tmp_path / "old.jsonl").write_text("{}\n")
    with pytest.raises(OutputRefused, match="is there already, and how it was made is not known"):
        Journal(tmp_path / "old.jsonl").open({})
    with pytest.raises(OutputRefused, match="a process must not outlive its run"):
        Journal(out).join(7)


def test_parts_are_locked_on_file_systems_that_lock_for_writing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock of a file that is open for reading only."""
    out = tmp_path / "out.jsonl"
    with contextlib.closing(Journal(out)) as book, _part(book):
        pass
    original = fcntl.flock

    def flock(file: int, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.closing(Journal(out)) as book, _part(book) as part:
        assert book.start == 2
        book.close()
        with pytest.raises(OutputRefused, match="still writing"):
            Journal(out).open({})
        part.append("1", {"id": 1, "error": None})


def test_one_run_at_a_time_also_after_kill(tmp_path: Path) -> None:
    """The lock ends with its process, and a process that outlives its run is noticed."""
    out = tmp_path / "out.jsonl"
    ready = multiprocessing.get_context("fork").Event()

    def hold(what: str) -> None:
        book = Journal(out)
        book.open({})
        part = book.part(1)
        if what == "part":
            book.close()
        ready.set()
        time.sleep(60)
        part.close()

    for what, says in (
        ("lock", r"another run is writing.*process \d+ on"),
        ("part", "still writing"),
    ):
        child = multiprocessing.get_context("fork").Process(target=hold, args=(what,))
        child.start()
        assert ready.wait(20)
        ready.clear()
        with pytest.raises(OutputRefused, match=says):
            Journal(out).open({})
        child.kill()
        child.join()
        with contextlib.closing(Journal(out)) as book:
            book.open({})


# ---------------------------------------------------------------------- the runner


def test_records_errors_and_retry(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "bad.mp4"):
        (folder / name).write_bytes((clips / name).read_bytes())
    rows = [
        {"video": "b.mp4", "question": "one", "answer": "one 4"},
        {"video": "bad.mp4", "question": "two", "answer": "two 4"},
        "no json",
        {"video": "gone.mp4", "question": "three"},
        {"video": "a.mp4", "question": "four", "answer": "nothing"},
        {"video": "b.mp4", "question": "five", "id": "V"},
    ]
    questions, out = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "out.jsonl"
    summary = answered_by(job_of(questions, folder, out), Echo())
    assert (summary.answered, summary.errors, summary.judged, summary.right) == (3, 3, 3, 1)
    assert (summary.tokens_before, summary.tokens_after) == (24, 6)
    got = read_lines(out)
    assert [row["id"] for row in got] == [1, 2, 3, 4, 5, "V"]
    assert len({tuple(row) for row in got}) == 1  # the same fields in the same order
    first = got[0]
    assert first.pop("seconds").keys() == {"decode", "encode", "prefill", "generate"}
    assert first == {
        "id": 1,
        "doc_id": 1,
        "video": "b.mp4",
        "question": "one",
        "target": "one 4",
        "answer": "one 4",
        "resps": [["one 4"]],
        "filtered_resps": ["one 4"],
        "right": True,
        "tokens_before": 8,
        "tokens_after": 2,
        "error": None,
    }
    assert "bad.mp4" in got[1]["error"] and got[1]["answer"] is None and got[1]["resps"] == []
    assert got[2]["error"].startswith("line 3: no JSON") and "gone.mp4" in got[3]["error"]
    assert "3 errors" in str(summary) and "--retry-errors" in str(summary)

    def never() -> Any:
        raise AssertionError("the model was loaded for nothing")

    again = runs.run(job_of(questions, folder, out), never, Alone())
    assert (again.answered, again.errors) == (3, 3)
    (folder / "bad.mp4").write_bytes((clips / "c.mp4").read_bytes())
    before = out.read_text().splitlines()
    healed = answered_by(job_of(questions, folder, out, retry_errors=True), Echo())
    after = out.read_text().splitlines()
    assert (healed.answered, healed.errors, healed.right) == (4, 2, 2)
    assert [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y] == [1]


def test_limit_and_what_is_already_done(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asked: list[int] = []

    class Listed(Echo):
        def one(self, group: Group, question: Question) -> Answer:
            asked.append(question.number)
            return super().one(group, question)

    assert answered_by(job_of(some_rows(), clips, out, limit=5), Listed()).answered == 5
    assert [row["id"] for row in read_lines(out)] == [f"q{i}" for i in range(5)]
    assert sorted(asked) == [1, 2, 3, 4, 5]
    assert answered_by(job_of(some_rows(), clips, out), Listed()).answered == 14
    assert sorted(asked) == list(range(1, 15))
    whole = out.read_bytes()
    fewer = answered_by(job_of(some_rows(), clips, out, limit=5), Listed())
    assert out.read_bytes() == whole and len(asked) == 14
    assert fewer.kept == 9 and "9 of them are beyond the limit" in str(fewer)


def test_large_frames_do_not_wait_for_a_full_batch(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []

    class Weighed(Echo):
        def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
            sizes.append([group.clip.frames.nbytes for group in groups])
            return super().answer(groups)

    for most, batches in ((1, [1, 1, 1, 1]), (None, [3, 1]), (2**40, [4])):
        if most is None:  # just above two videos
            most = 2 * sizes[0][0] + 1
        sizes.clear()
        monkeypatch.setattr(runs, "_WAITING_BYTES", most)
        job = job_of(some_rows(), clips, tmp_path / "out.jsonl", batch_size=99, overwrite=True)
        assert answered_by(job, Weighed()).answered == 14
        assert [len(batch) for batch in sizes] == batches


def test_every_video_is_read_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    original = runs.Readers.submit
    monkeypatch.setattr(
        runs.Readers,
        "submit",
        lambda self, key, path: (read.update([Path(path).name]), original(self, key, path)),
    )
    answered_by(job_of(some_rows(), clips, tmp_path / "out.jsonl", batch_size=2), Echo())
    assert set(read.values()) == {1} and len(read) == 4


def test_the_culprit_of_a_batch_is_found(clips: Path, tmp_path: Path) -> None:
    """A batch that fails is asked again in smaller ones; answers that were given stay."""
    tried: list[list[int]] = []

    class Picky(Echo):
        def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
            asked = [q for group in groups for q in group.questions]
            tried.append([q.number for q in asked])
            if len(asked) > 3:
                raise torch.OutOfMemoryError("too many")
            for question, answer in super().answer(groups):
                if question.text == "what 8":
                    raise RuntimeError("eight")
                yield question, answer

    out = tmp_path / "out.jsonl"
    summary = answered_by(job_of(some_rows(), clips, out, batch_size=20), Picky())
    rows = read_lines(out)
    nine = rows[8]["video"]
    assert (summary.answered, summary.errors) == (13, 1)
    assert [row["id"] for row in rows if row["error"]] == ["q8"]
    assert rows[8]["error"] == "RuntimeError: eight"
    assert [len(batch) for batch in tried[:1]] == [14] and max(map(len, tried[1:])) <= 4
    again = [number for batch in tried for number in batch if len(batch) <= 3]
    assert Counter(again).keys() == set(range(1, 15))
    assert all(times == 1 for n, times in Counter(again).items() if rows[n - 1]["video"] != nine)


def test_errors_of_the_model_end_the_run_when_nothing_works(clips: Path, tmp_path: Path) -> None:
    class Hopeless(Echo):
        def __init__(self, number: int, error: Exception) -> None:
            super().__init__()
            self.number, self.error = number, error

        def one(self, group: Group, question: Question) -> Answer:
            if question.number == self.number:
                raise self.error
            return super().one(group, question)

    rows = some_rows()
    first = by_video(read_questions(rows).good)[0].questions[0].number
    last = by_video(read_questions(rows).good)[-1].questions[-1].number
    for error, bad, fails in (
        (MissingSignal("no attention here"), first, False),
        (MissingSignal("no attention here"), last, False),
        (NothingReduced("nothing"), last, True),
    ):
        job = job_of(rows, clips, tmp_path / "out.jsonl", overwrite=True)
        if fails:
            with pytest.raises(type(error), match=str(error)):
                answered_by(job, Hopeless(bad, error))
            assert not job.out.exists()
        else:
            assert answered_by(job, Hopeless(bad, error)).errors == 1

    class Lazy(Echo):
        def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
            return iter(())

    with pytest.raises(VtcError, match="were given no answer"):
        answered_by(job, Lazy())


class Blind(Echo):
    """Works on some videos only."""

    def __init__(self, *works_on: str) -> None:
        super().__init__()
        self.works_on = works_on

    def one(self, group: Group, question: Question) -> Answer:
        if question.video not in self.works_on:
            raise UnsupportedModel(f"not {question.video}")
        return super().one(group, question)


@pytest.mark.parametrize("videos", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 20])
def test_a_model_that_works_on_no_video_ends_the_run(
    videos: int, batch_size: int, clips: Path, tmp_path: Path
) -> None:
    names = ("a.mp4", "b.mp4", "c.mp4", "more/d.mp4")[:videos]
    rows = [{"video": name, "question": q} for q in ("one", "two") for name in names]
    job = job_of(rows, clips, tmp_path / "out.jsonl", batch_size=batch_size)
    with pytest.raises(UnsupportedModel, match="not "):
        answered_by(job, Blind())
    assert Journal(job.out).found() == {}  # no video is blamed for it
    assert answered_by(job, Echo()).errors == 0


def test_a_video_that_the_model_cannot_do_never_blocks_a_run(clips: Path, tmp_path: Path) -> None:
    """Not at the beginning, not when it is the last one left, not when it is asked again."""
    names = ("a.mp4", "b.mp4", "./a.mp4", "c.mp4")
    rows = [{"video": name, "question": "what"} for name in names]
    out = tmp_path / "out.jsonl"
    summary = answered_by(job_of(rows, clips, out, batch_size=1), Blind("c.mp4"))
    assert (summary.answered, summary.errors) == (1, 3)
    again = answered_by(job_of(rows, clips, out, retry_errors=True), Blind())
    assert (again.answered, again.errors) == (1, 3)

    late = [rows[3], *rows[:2]]
    job = job_of(late, clips, tmp_path / "late.jsonl")
    with contextlib.closing(Journal(job.out)) as book, _part(book, job.identity()) as part:
        part.append(
            job.lines[0].key, {**BLANK, "answer": "x", "tokens_before": 1, "tokens_after": 1}
        )
    summary = answered_by(job, Blind())
    assert (summary.answered, summary.errors) == (1, 2)


def test_lines_may_be_mended_and_added_but_not_taken_from_under_their_answers(
    clips: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out.jsonl", tmp_path / "q.jsonl"
    good = {"id": 7, "video": "a.mp4", "question": "what", "answer": "one"}
    twice = {"id": 7, "video": "b.mp4", "question": "which", "answer": "two"}
    first = answered_by(job_of(write_lines(file, [good, "no json", twice]), clips, out), Echo())
    assert (first.answered, first.errors, first.bad_lines, first.judged) == (1, 2, 2, 1)
    assert f"bad lines in {file}: 2;" in str(first)
    assert "1 of 1 questions answered" in str(first) and "--retry-errors" not in str(first)
    records = read_lines(out)
    assert [row["id"] for row in records] == [7, 2, 3]
    assert (records[2]["video"], records[2]["question"]) == ("b.mp4", "which")
    assert records[1]["video"] is None and "ids must be unique" in records[2]["error"]

    rows = [good, {"video": "b.mp4", "question": "q"}, twice | {"id": 8}, twice | {"id": 9}]
    counted = Echo()
    whole = answered_by(job_of(write_lines(file, rows), clips, out), counted)
    assert (whole.answered, whole.errors) == (4, 0)
    assert [row["id"] for row in read_lines(out)] == [7, 2, 8, 9]
    assert read_lines(out)[0] == records[0]  # answered once

    before = out.read_bytes()
    for changed in ([good | {"question": "else"}, *rows[1:]], rows[1:], rows[:3]):
        with pytest.raises(OutputRefused, match=r"have changed or gone since in .*q.jsonl.* line"):
            answered_by(job_of(write_lines(file, changed), clips, out), Echo())
    assert out.read_bytes() == before
    assert answered_by(job_of(file, clips, out, overwrite=True), Echo()).answered == 3


def test_wrong_jobs_are_refused_before_anything_is_written(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidQuestions, match="no such folder"):
        job_of(some_rows(), tmp_path / "none", tmp_path / "out.jsonl")
    with pytest.raises(OutputRefused, match="in a folder that exists"):
        job_of(some_rows(), clips, tmp_path / "none" / "out.jsonl")
    questions = write_lines(tmp_path / "q.jsonl", some_rows())
    with pytest.raises(OutputRefused, match="holds the questions"):
        job_of(questions, clips, tmp_path / "." / "q.jsonl", overwrite=True)
    questions.unlink()
    with pytest.raises(InvalidInput, match="batch_size=0"):
        job_of(some_rows(), clips, tmp_path / "out.jsonl", batch_size=0)
    with pytest.raises(InvalidQuestions, match="holds none of the 4 videos"):
        answered_by(job_of(some_rows(), tmp_path, tmp_path / "out.jsonl"), Echo())
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- processes and kills


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are not decoded, which forked processes had better not do."""
    read = staticmethod(lambda path, sampling, *options: clip_of(len(str(path))))
    monkeypatch.setattr(runs.Readers, "_read", read)


def test_killed_at_random_moments_with_changing_numbers_of_processes(
    unread: None, clips: Path, tmp_path: Path
) -> None:
    """kill -9 again and again: every question is answered exactly once, and the file is the one
    of a run that nobody disturbed."""
    questions = write_lines(tmp_path / "q.jsonl", [*some_rows(59), "no json"])
    calm, out = tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    answered_by(job_of(questions, clips, calm), Echo())
    dice = random.Random(5)

    def work(linked: Linked) -> None:
        answered_by(job_of(questions, clips, out), Echo(pause=0.03), linked)

    kills = 0
    while not out.exists():
        children = fork(dice.choice((1, 2, 3)), work)
        patience = 0.05 + 0.2 * dice.random() if kills < 12 else 60.0
        until = time.monotonic() + patience
        while time.monotonic() < until and any(child.is_alive() for child in children):
            time.sleep(0.005)
        kills += any(child.is_alive() for child in children)
        end(children)
    assert kills >= 3
    records = [
        decode(line) for part in Journal(out).parts() for _, line in lines(part) if decode(line)
    ]
    counts = Counter(int(key.partition("-")[0]) for key, _ in records)
    assert counts == {n: 1 for n in range(1, 61)}
    assert untimed(out) == untimed(calm)
    whole = out.read_bytes()
    answered_by(job_of(questions, clips, out), Echo())
    assert out.read_bytes() == whole


@pytest.mark.parametrize("where", ["half", "before", "sync", "merge"])
def test_killed_inside_a_write(
    where: str, unread: None, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a line, before a line, in the first run file, before the final rename."""
    out = tmp_path / "out.jsonl"
    rows = some_rows()
    calls = Counter[str]()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(file: int, data: bytes) -> int:
        calls["write"] += 1
        if calls["write"] == 6:
            if where == "half":
                os_write(file, data[: len(data) // 2])
            die()
        return os_write(file, data)

    def replace(old: Path, new: Path) -> None:
        if where == "sync" or new == out:
            die()
        os_replace(old, new)

    os_write, os_replace = os.write, os.replace
    if where in ("half", "before"):
        monkeypatch.setattr("vtc.video.journal.os.write", write)
    else:
        monkeypatch.setattr("vtc.video.journal.os.replace", replace)
    (child,) = fork(1, lambda linked: (answered_by(job_of(rows, clips, out), Echo()), None)[1])
    child.join()
    assert child.exitcode == -signal.SIGKILL and not out.exists()
    monkeypatch.undo()
    wanted = {"half": 5, "before": 5, "sync": 0, "merge": 14}[where]
    assert len(Journal(out).found()) == wanted
    assert answered_by(job_of(rows, clips, out), Echo()).answered == 14
    assert [row["id"] for row in read_lines(out)] == [row["id"] for row in rows]


def test_a_process_that_dies_leaves_the_work_of_the_others(
    unread: None, clips: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "out.jsonl", some_rows()

    class Frail(Echo):
        def one(self, group: Group, question: Question) -> Answer:
            if frail:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().one(group, question)

    frail = False

    def work(linked: Linked) -> None:
        nonlocal frail
        frail = linked.rank == 1
        answered_by(job_of(rows, clips, out), Frail(), linked)

    children = fork(2, work)
    children[1].join()
    mine, theirs = (
        {q.key for w in share for q in w.questions}
        for share in shard(by_video(read_questions(rows).good), 2)
    )
    until = time.monotonic() + 20
    while set(Journal(out).found()) != mine and time.monotonic() < until:
        time.sleep(0.01)
    end(children)
    assert set(Journal(out).found()) == mine and theirs and not out.exists()
    frail = False
    assert answered_by(job_of(rows, clips, out), Frail()).answered == 14


def test_a_refusal_reaches_every_process(unread: None, clips: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out.jsonl", some_rows()
    answered_by(job_of(rows, clips, out), Echo())

    def work(linked: Linked) -> None:
        with pytest.raises(OutputRefused, match="have changed or gone"):
            answered_by(job_of(rows[1:], clips, out), Echo(), linked)

    children = fork(3, work)
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_behind_the_batch(
    number: signal.Signals, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out.jsonl", signal.getsignal(number)

    class Stopped(Echo):
        def one(self, group: Group, question: Question) -> Answer:
            if question.number == 3:
                os.kill(os.getpid(), number)
            return super().one(group, question)

    stopped = answered_by(job_of(some_rows(), clips, out), Stopped())
    assert stopped.stopped == number and signal.getsignal(number) == before
    assert "stopping behind this batch" in capfd.readouterr().err
    there = Journal(out).found()
    assert (
        read_questions(some_rows()).lines[2].key in there
        and 0 < len(there) < 14
        and not out.exists()
    )
    assert answered_by(job_of(some_rows(), clips, out), Echo()).answered == 14

    class Impatient(Echo):
        def one(self, group: Group, question: Question) -> Answer:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            return super().one(group, question)

    with pytest.raises(KeyboardInterrupt):
        answered_by(job_of(some_rows(), clips, tmp_path / "other.jsonl"), Impatient())
    assert signal.getsignal(number) == before


def test_a_signal_may_come_in_the_middle_of_a_print(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        def write(self, text: str) -> None:
            raise RuntimeError("reentrant call inside a buffered writer")

    monkeypatch.setattr(sys, "stderr", Busy())
    with signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM


def test_what_a_signal_does_to_a_reader_is_no_fault_of_the_video(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = runs.Readers._read

    def killed(path: str, *options: Any) -> Any:
        if path.endswith("b.mp4"):
            os.kill(os.getpid(), signal.SIGTERM)
            raise InvalidVideo(f"cannot read {path}: the decoder crashed (SIGTERM).")
        return read(path, *options)

    monkeypatch.setattr(runs.Readers, "_read", staticmethod(killed))
    out = tmp_path / "out.jsonl"
    assert answered_by(job_of(some_rows(), clips, out), Echo()).stopped == signal.SIGTERM
    assert not any(entry.failed for entry in Journal(out).found().values())
    monkeypatch.undo()
    assert answered_by(job_of(some_rows(), clips, out), Echo()).answered == 14


# ---------------------------------------------------------------------- models


def clip_of(seed: int, height: int = 48, width: int = 64, frames: int = FRAMES) -> Any:
    info = VideoInfo(5 * frames, 10.0, frames / 2, width, height, 0, "test")
    times = tuple(i / 2 for i in range(frames))
    pixels = video_models.frames(seed, frames, height, width)
    return vtc.video.Clip(pixels, times, tuple(range(0, 5 * frames, 5)), info)


GROUPS = [
    Group(
        clip_of(1),
        (
            Question(1, 1, "a", "what moves left"),
            Question(2, 2, "a", "what moves first red w44"),
            Question(3, 3, "a", "blue last"),
        ),
    ),
    Group(clip_of(2), (Question(4, 4, "b", "what moves left"), Question(5, 5, "b", "w77 w99"))),
]
RECIPES: dict[str, Any] = {
    "dense": None,
    "projector": {"method": "divprune", "keep": 0.5},
    "grid": {"method": "grid", "keep": 0.5},
    "tower scores": {"method": "visionzip", "keep": 0.5},
    "decoder": {"method": "fastv", "keep": 0.5},
    "vision": {"method": "random", "keep": 0.5, "at": "vision.1"},
    "vision merge": {"method": "tome_merge", "keep": 0.5, "at": "vision.1", "mass": 1.0},
    "mustdrop": {"method": "mustdrop", "keep": 4},
    "frames": {"method": "evs", "keep": 0.5},
    "rates": {"method": "vidcom2", "keep": 0.5},
    "dycoke": {"method": "dycoke"},
    "framefusion": {"method": "framefusion", "keep": 0.5},
}
#: methods of several stages
OWN_BUDGETS = ("mustdrop", "dycoke", "framefusion")


@pytest.fixture(scope="session")
def loaded() -> dict[str, tuple[Any, Any]]:
    return {
        name: (video_models.model(name), video_models.processor(name))
        for name in video_models.FAMILIES
    }


def alone(
    model: Any, processor: Any, prompt: str, clip: Any, request: Any, words: int = 5
) -> tuple[str, int]:
    """One question in a run of its own: pixels to answer, with a session of its own."""
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    about = {
        "total_num_frames": clip.info.frames,
        "fps": clip.info.fps,
        "frames_indices": list(clip.indices),
    }
    inputs = processor(
        text=prompt,
        videos=[pixels],
        video_metadata=[about],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with vtc.attach(model, **request) if request else contextlib.nullcontext():
        ids = model.generate(**inputs, max_new_tokens=words, do_sample=False)
    visual = torch.isin(inputs["input_ids"], torch.tensor([500, 501])).sum()
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip(), int(visual)


@pytest.mark.parametrize("name", video_models.FAMILIES)
@pytest.mark.parametrize("what", RECIPES)
def test_shared_features_answer_like_runs_of_their_own(
    what: str, name: str, loaded: dict[str, tuple[Any, Any]]
) -> None:
    """Encoded once, in batches that mix videos and split a video's questions."""
    model, processor = loaded[name]
    request = RECIPES[what]
    with runs.answering(model, processor, request, 2, 5, None) as answerer:
        got = list(answerer.answer(GROUPS))
    asked = [(q, group.clip) for group in GROUPS for q in group.questions]
    assert [question for question, _ in got] == [question for question, _ in asked]
    assert len({answer.text for _, answer in got}) > 1
    for (question, clip), (_, answer) in zip(asked, got, strict=True):
        text, visual = alone(model, processor, answerer.text(question), clip, request)
        assert answer.text == text and answer.tokens_before == visual
        if request is None:
            assert answer.tokens_after == visual
        elif what not in OWN_BUDGETS:
            # the newline after a video is in no budget, but of what only the tower shortened
            newline = name == "llava_onevision" and not what.startswith("vision")
            assert answer.tokens_after == (visual - newline + 1) // 2
        assert answer.seconds["generate"] >= answer.seconds["prefill"] > 0


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_trained_scorer_in_the_tower(name: str, loaded: dict[str, Any], tmp_path: Path) -> None:
    """STTS: frames of a video keep different numbers of tokens."""
    model, processor = loaded[name]
    request = {"method": "stts", "keep": 0.5, "at": "vision.2"}
    with vtc.attach(model, **request) as session:
        session.modules["vision.2"].save(tmp_path / "scorer.safetensors")
    request["weights"] = str(tmp_path / "scorer.safetensors")
    with runs.answering(model, processor, request, 2, 4, None) as answerer:
        got = list(answerer.answer(GROUPS))
    clip = {group.questions[0].video: group.clip for group in GROUPS}
    for question, answer in got:
        prompt = answerer.text(question)
        text, visual = alone(model, processor, prompt, clip[question.video], request, 4)
        assert (answer.text, answer.tokens_before) == (text, visual)
        assert answer.tokens_after == (visual + 1) // 2


@pytest.mark.parametrize("name", video_models.FAMILIES)
def test_encoded_once_and_whatever_the_batch(name: str, loaded: dict[str, Any]) -> None:
    model, processor = loaded[name]
    calls: list[int] = []
    tower = getattr(model.base_model, "vision_tower", None) or model.base_model.visual
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        answers = []
        for size in (1, 3, 8):
            calls.clear()
            answerer = VideoModel(model, processor, batch_size=size, max_new_tokens=4)
            answers.append([answer.text for _, answer in answerer.answer(GROUPS)])
            assert len(calls) == len(GROUPS)
    finally:
        handle.remove()
    assert answers[0] == answers[1] == answers[2]


def test_videos_of_other_lengths_share_a_batch(loaded: dict[str, Any]) -> None:
    """Clips of 4 and 2 frames, one of them upright; whose features cannot, do not."""
    for name in video_models.FAMILIES:
        model, processor = loaded[name]
        groups = [GROUPS[0], Group(clip_of(3, 64, 48, 2), (Question(9, 9, "c", "w12 w13"),))]
        for request in (None, {"method": "divprune", "keep": 0.5}):
            with runs.answering(model, processor, request, 8, 4, None) as answerer:
                batched = [answer for _, answer in answerer.answer(groups)]
                single = [answer for group in groups for _, answer in answerer.answer([group])]
            assert [a.text for a in batched] == [a.text for a in single]
            assert [a.tokens_after for a in batched] == [a.tokens_after for a in single]


def test_prompts(loaded: dict[str, Any]) -> None:
    model, processor = loaded["llava_onevision"]
    question = Question(1, 1, "a", "what moves")
    chat = VideoModel(model, processor)
    assert chat.text(question) == "user <video> what moves assistant"
    own = VideoModel(model, processor, prompt="<video> user {question} assistant")
    assert own.text(question) == "<video> user what moves assistant"
    braces = Question(2, 2, "a", "what {is} {this}")
    assert own.text(braces) == "<video> user what {is} {this} assistant"
    for wrong in ("user {question}", "<video> user", "<video> <video> {question}"):
        with pytest.raises(InvalidInput, match="once each"):
            VideoModel(model, processor, prompt=wrong)
    with pytest.raises(InvalidInput, match="holds '<video>'"):
        chat.text(Question(3, 3, "a", "is <video> red"))
    glued = VideoModel(model, processor, prompt="<video>{question}", max_new_tokens=3)
    plain = VideoModel(model, processor, prompt="<video> {question}", max_new_tokens=3)
    assert [a.text for _, a in glued.answer(GROUPS)] == [a.text for _, a in plain.answer(GROUPS)]
    blind = video_models.processor("llava_onevision")
    del blind.video_token
    with pytest.raises(UnsupportedModel, match="it reads no videos"):
        VideoModel(model, blind)


def test_nan_costs_one_video(loaded: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    model, processor = loaded["qwen2_5_vl"]
    black = tmp_path / "black.mp4"
    vtc.video.write(black, 0 * video_models.frames(0, 6), fps=4)
    (tmp_path / "a.mp4").write_bytes((clips / "a.mp4").read_bytes())
    darkest = float((0 - 0.40821073) / 0.27577711)  # a black pixel as the processor makes it

    def poison(module: Any, args: Any, kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["hidden_states"]
        dark = bool((pixels.amax() < darkest + 0.5).all())
        return ((pixels * float("nan"), *args[1:]), kwargs) if dark and args else None

    handle = model.base_model.visual.register_forward_pre_hook(poison, with_kwargs=True)
    rows = [{"video": v, "question": q} for v in ("black.mp4", "a.mp4") for q in ("left", "right")]
    try:
        for recipe in (None, {"method": "divprune", "keep": 0.5}):
            summary = vtc.video.answer_questions(
                model,
                processor,
                rows,
                tmp_path,
                out=tmp_path / "out.jsonl",
                recipe=recipe,
                frames=FRAMES,
                workers=0,
                max_new_tokens=2,
                overwrite=True,
                progress=False,
            )
            got = read_lines(tmp_path / "out.jsonl")
            assert (summary.answered, summary.errors) == (2, 2)
            assert all("NaN" in row["error"] for row in got[:2]) and got[2]["answer"]
    finally:
        handle.remove()


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(video_models.save("llava_onevision", tmp_path_factory.mktemp("model")))


def test_the_command_from_files_to_file(
    saved: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*some_rows(), {"video": "bad.mp4", "question": "what"}, "[]"]
    questions, out = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "out.jsonl"
    call = command(saved, clips, questions, out)
    method = ["--method", "divprune", "--keep", "0.25"]
    assert cli.main([*call, *method, "--dry-run"]) == 3
    plan = capsys.readouterr().out
    assert "16 lines: 15 questions, 1 bad lines" in plan and "15 to be asked" in plan
    assert "process 1 of 1: 5 videos, 15 questions" in plan and "5 videos, 4 frames of each" in plan
    assert "2 would end in errors" in plan and "bad.mp4 (1 questions)" in plan
    assert sorted(tmp_path.iterdir()) == [questions]

    assert cli.main([*call, *method]) == 3
    said = capsys.readouterr().out
    assert "14 of 15 questions answered" in said and "tokens per question: 17.0 -> 4.0" in said
    got = read_lines(out)
    assert [row["id"] for row in got] == [*(f"q{i}" for i in range(14)), 15, 16]
    assert [row["error"] is None for row in got] == [True] * 14 + [False] * 2
    assert {(row["tokens_before"], row["tokens_after"]) for row in got[:14]} == {(17, 4)}

    assert cli.main([*call, *method, "--retry-errors"]) == 3
    capsys.readouterr()
    assert cli.main([*call, *method, "--dry-run"]) == 3  # the bad line stays
    assert "15 have a record already, 0 to be asked" in capsys.readouterr().out
    assert cli.main(call) == 1
    assert "recipe: was {'method': 'divprune', 'keep': 0.25}, now None" in capsys.readouterr().err
    assert cli.main([*call, "--overwrite", "--limit", "3"]) == 0
    assert "3 of 3 questions answered" in capsys.readouterr().out
    assert {row["tokens_after"] for row in read_lines(out)} == {17}


def test_the_command_typed_wrongly(
    saved: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "load_model", None)  # everything is said before the model is loaded
    questions, out = write_lines(tmp_path / "q.jsonl", some_rows()), tmp_path / "out.jsonl"
    call = command(saved, clips, questions, out)
    (tmp_path / "recipe.yaml").write_text("steps: [{method: divprune, at: projector, kepe: 1}]\n")
    for more, says in (
        (["--questions", str(tmp_path / "none")], "cannot read questions"),
        (["--videos", str(tmp_path)], "holds none of the 4 videos"),
        (["--videos", str(tmp_path / "none")], "no such folder"),
        (["--out", str(tmp_path / "none" / "out.jsonl")], "no such folder"),
        (["--model", "no-such-model"], "unknown model"),
        (["--method", "divprun"], "unknown method"),
        (["--method", "divprune", "--keep", "1.5"], "1.5"),
        (["--keep", "0.5"], "keep without a method"),
        (["--recipe", str(tmp_path / "recipe.yaml")], "kepe"),
        (["--prompt", "no place"], "write {question} once"),
        (["--batch-size", "0"], "0 is below 1"),
        (["--timeout", "-1"], "give seconds above 0"),
        (["--frames", "0"], "--frames: count=0"),
    ):
        assert cli.main([*call, *more]) == 2, more
        assert says in capsys.readouterr().err
    assert not out.exists() and not out.with_name("out.jsonl.parts").exists()


def test_the_command_stops_by_signal(
    saved: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = VideoModel.answer

    def answer(self: Any, groups: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, groups)

    monkeypatch.setattr(VideoModel, "answer", answer)
    questions, out = write_lines(tmp_path / "q.jsonl", some_rows()), tmp_path / "out.jsonl"
    assert cli.main(command(saved, clips, questions, out, "--batch-size", "2")) == 143
    assert "stopped by SIGTERM (exit code 143)" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(command(saved, clips, questions, out)) == 0


def test_two_processes_under_accelerate(saved: str, clips: Path, tmp_path: Path) -> None:
    """The same command, launched on two CPU processes, writes what one process writes."""
    questions = write_lines(tmp_path / "q.jsonl", [*some_rows(), "no json"])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert cli.main(command(saved, clips, questions, one)) == 3
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += [
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", "-m", "vtc"]
    done = subprocess.run(
        [*launch, *command(saved, clips, questions, two)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr[-3000:]  # of exit code 3, the launcher makes 1
    assert "14 of 14 questions answered" in done.stdout, done.stdout + done.stderr[-3000:]
    assert untimed(two) == untimed(one)
    parts = Journal(two).parts()
    assert [part.name for part in parts] == ["0001-0000.jsonl", "0001-0001.jsonl"]
    assert all(part.stat().st_size for part in parts)


def test_the_bench_runs_on_any_model_and_clips(
    saved: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def here(count: int, job: Callable[..., Rows], args: Any) -> Rows:
        folder = tmp_path / job.__name__
        folder.mkdir()
        return job(Alone(), args, folder)

    monkeypatch.setattr(bench, "_in_processes", here)
    questions = write_lines(tmp_path / "q.jsonl", some_rows())
    words = ["--model", saved, "--questions", str(questions), "--videos", str(clips)]
    words += [
        "--processes",
        "1",
        "--limit",
        "4",
        "--rounds",
        "1",
        "--memory",
        "6",
        "--workers",
        "0",
    ]
    words += ["--keep", "0.25", "--frames", "4", "--batch-size", "2", "--max-new-tokens", "2"]
    report = tmp_path / "report.json"
    assert cli.main(["bench", "videoqa", *words, "--json", str(report)]) == 0
    told = json.loads(report.read_text())
    dense, pruned = told[:2]
    assert (dense["what"], dense["tokens"], dense["speedup"]) == ("dense", "17 -> 17", 1.0)
    assert (pruned["what"], pruned["tokens"]) == ("divprune 0.25", "17 -> 4")
    assert all(row[key] > 0 for row in told[:2] for key in ("rate", "decode_ms", "encode_ms"))
    assert [row["videos"] for row in told[2:]] == [2, 4, 6]
    assert "| videos | mb | grown |" in capsys.readouterr().out


def test_the_demo(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["x", "--model", saved, "--clips", "2", "--out", str(out)])
    runpy.run_path(str(ROOT / "demos" / "videoqa.py"), run_name="__main__")
    dense, pruned = (
        read_lines(out / "2_clips" / f"{name}.jsonl") for name in ("dense", "divprune_0.25")
    )
    assert [row["id"] for row in dense] == [row["id"] for row in pruned] and len(dense) == 10
    assert {row["tokens_after"] for row in pruned} == {8}
