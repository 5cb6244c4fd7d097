"""The page of the command line, made of the help of every command."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from unittest import mock

from vtc.commands import cli

WIDTH = "98"  # of the help texts, in characters

INTRO = """\
# Command line

Every command prints this help with `--help`, and its errors say what to do. With `--debug` they
come with a traceback. Whether outputs can be written is asked before a command begins its work.

## Exit codes

They mean the same for every command. `vtc demo --web` is ended by Ctrl-C, in good order (0).

| code | meaning |
|---|---|
"""


def page() -> str:
    """Markdown: one heading and one help text per command."""
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in cli.CODES.items())
    parts = [f"{INTRO}{codes}\n"]
    for words in commands(cli._parser()):
        title = " ".join(("vtc", *words))
        parts.append(f"## {title}\n\n```text\n{help_of(words)}\n```\n")
    return "\n".join(parts)


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """The words of every command and sub-command."""
    yield ()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                for rest in commands(inner):
                    yield (name, *rest)


def help_of(words: tuple[str, ...]) -> str:
    """What `vtc WORDS --help` prints."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=WIDTH), contextlib.redirect_stdout(printed):
        code = cli.main([*words, "--help"])
    if code != cli.OK:
        raise RuntimeError(f"vtc {' '.join(words)} --help ended with {code}")
    return printed.getvalue().strip()
