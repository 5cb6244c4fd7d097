"""Tables in terminals of any width: they fit, words stay whole; piped ones are as before."""

from __future__ import annotations

import os

import pytest

from vtc.bench import records
from vtc.commands import cli, tables

HEADER, ROWS = ("name", "what it keeps", "n"), [("one", "the most diverse", "5"), ("b", "x", "12")]


def test_columns_shrink_to_the_room_that_there_is() -> None:
    assert tables.text_table(HEADER, ROWS, room=80) == tables.text_table(HEADER, ROWS)
    assert tables.text_table(HEADER, ROWS, room=18).splitlines() == [
        "name  what it    n",
        "      keeps",
        "----  --------  --",
        "one   the most   5",
        "      diverse",
        "b     x         12",
    ]


def test_rows_become_paragraphs_where_words_do_not_fit() -> None:
    rows = [("", "the most diverse of all tokens", "5"), ("b", "", "12")]
    assert tables.text_table(HEADER, rows, room=10).splitlines() == [
        "-",
        "  what it keeps  the most diverse of",
        "                 all tokens",
        "  n              5",
        "",
        "b",
        "  what it keeps",
        "  n              12",
    ]


@pytest.mark.parametrize("columns", [80, 120, 200])
@pytest.mark.parametrize("words", [["list"], ["list", "--families"], ["show", "fastv"]])
def test_lists_fit_into_a_terminal(
    words: list[str],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables, "terminal", lambda: columns)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    if words[0] == "show":  # prose keeps its lines of 100
        lines = lines[next(i for i, line in enumerate(lines) if line.startswith("parameter")) :]
    longest = max(len(line) for line in lines)
    assert longest <= max(columns, 100 if words[0] == "show" else 0)
    if words == ["list"]:
        assert "https://arxiv.org/abs/2403.06764" in said and "fastv" in said


def test_a_bench_prints_columns_to_a_terminal_and_markdown_to_a_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"case": "dense", "ms": 1.234}, {"case": "random", "ms": None}]
    columns = {"case": "", "ms": ".1f"}
    assert records.table(rows, columns).splitlines()[:2] == ["| case | ms |", "| --- | --- |"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        tables.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((80, 24))
    )
    assert records.table(rows, columns).splitlines() == [
        "case    ms",
        "------  ---",
        "dense   1.2",
        "random",
    ]


def test_no_terminal_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.terminal() is None
    monkeypatch.setattr("sys.stdout", None)
    assert tables.terminal() is None
