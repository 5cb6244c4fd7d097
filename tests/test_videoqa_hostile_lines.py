"""Lines of questions that no honest tool writes cost one error record each, and a small one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.videoqa import Echo, answered_by, job_of, read_lines, write_clips

from vtc.errors import InvalidQuestions, InvalidVideo
from vtc.tune import items
from vtc.video import probe
from vtc.video.questions import DEEPEST, LONGEST, read_questions

GOOD = {"id": "good", "video": "a.mp4", "question": "what ?"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def nested(levels: int) -> str:
    return f'{{"video": "a.mp4", "question": "q", "more": {"[" * levels}1{"]" * levels}}}'


def asked(**more: Any) -> str:
    return json.dumps({"video": "a.mp4", "question": "q", **more})


TOO_LONG = f"characters: at most {LONGEST} are read"
HUGE = "x" * 10**7
LINES = {  # the line, and what its record says
    "a long name": (asked(video="n" * 300 + ".mp4"), "File name too long"),
    "a long path": (asked(video="n/" * 3000 + "a.mp4"), "File name too long"),
    "a zero byte": (asked(video="a\0.mp4"), "null byte"),
    "half a pair": (asked(video="a\ud800.mp4"), "surrogates not allowed"),
    "nested 991 deep": (nested(990), f"nested more than {DEEPEST} deep"),
    "nested too deep for a parser": (nested(100_000), f"nested more than {DEEPEST} deep"),
    "a number of 5,000 digits": ('{"video": "a.mp4", "answer": %s}' % ("9" * 5000), "no JSON"),
    "10 MB of question": (asked(question=HUGE), TOO_LONG),
    "10 MB of options": (asked(options=[HUGE, 1]), TOO_LONG),
    "500 KB of answer": (
        asked(options=["a", "b"], answer="x" * 500_000),
        "... (500002 characters) is none of the options",
    ),
    "a long way out": (asked(video="../" + "n" * 900_000), "leaves the folder of videos"),
}


def test_each_costs_one_record(clips: Path, tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    texts = [text for text, _ in LINES.values()]
    questions.write_text("\n".join([*texts, json.dumps(GOOD)]), encoding="utf-8")
    done = answered_by(job_of(questions, clips, out), Echo())
    assert (done.answered, done.errors) == (1, len(LINES))
    records = read_lines(out)
    assert [bool(record["error"]) for record in records] == [True] * len(LINES) + [False]
    for name, (_, says), record in zip(LINES, LINES.values(), records, strict=False):
        assert says in record["error"] and len(record["error"]) < 2100, name
        assert len(json.dumps(record)) < LONGEST + 5000, name
    assert len(str(done)) < 2000


def test_a_record_keeps_both_ends_of_a_long_error(clips: Path, tmp_path: Path) -> None:
    class Talkative(Echo):
        def one(self, group: Any, question: Any) -> Any:
            raise ValueError("x" * 10**7)

    answered_by(job_of([GOOD], clips, tmp_path / "out.jsonl"), Talkative())
    (record,) = read_lines(tmp_path / "out.jsonl")
    whole = f"ValueError: {'x' * 10**7}"
    assert record["error"] == f"{whole[:1000]} ... ({len(whole)} characters) ... {whole[-1000:]}"


def test_rows_from_python_are_bounded_too() -> None:
    deep: dict[str, Any] = {}
    deep["self"] = deep
    got = read_questions([GOOD, deep, {**GOOD, "id": 2, "question": "q" * (LONGEST + 1)}])
    assert [line.id for line in got.good] == ["good"]
    assert f"more than {DEEPEST} deep" in got.bad[0].error
    assert f"at most {LONGEST} are read" in got.bad[1].error
    level = {**GOOD, "more": json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))}
    assert read_questions([level]).good


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_as_powershell_writes_it(encoding: str, clips: Path, tmp_path: Path) -> None:
    """`>` writes UTF-16 with a mark and two characters at line ends."""
    path = tmp_path / "q.jsonl"
    rows = [GOOD, {"id": 2, "video": "b.mp4", "question": "où ?"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\r\n".join([*lines, "no json", ""]).encode(encoding))
    got = read_questions(path)
    assert [line.text for line in got.good] == ["what ?", "où ?"]
    assert [line.number for line in got.bad] == [3]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    read = items.read_questions(path, [clips])
    assert [item.prompt for item in read] == ["what ?", "où ?"]


def test_what_only_looks_like_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xff\xfe" + b"\x00\xd8" * 3)
    with pytest.raises(InvalidQuestions, match="begins like UTF-16 and is not .* Save it as UTF-8"):
        read_questions(path)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "a\ud800"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidVideo, match="cannot open .*(too long|null byte|surrogates)"):
        probe(tmp_path / name)
