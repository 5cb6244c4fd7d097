"""Python blocks of Markdown pages, as a reader runs them: from top to bottom, in one session.

A line above a block may say how it is meant:
    <!-- alone -->           every statement is an example of its own, on what is defined so far
    <!-- not run: why -->    only compiled: it needs weights or a machine that tests do not have
"""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?:<!-- (?P<note>alone|not run: [^\n]+?) -->\n)?```python\n(?P<code>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One block. `note`: how it is meant; `line`: of its first line in the page."""

    code: str
    note: str
    line: int


def pages() -> list[str]:
    """The READMEs and all pages of the site that are files."""
    readmes = ["README.md", "kernels/README.md", "model_zoo/README.md"]
    return [*readmes, *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield Block(found["code"], found["note"] or "", line)


def run(name: str) -> None:
    """Run the blocks of a page; errors show the line of the page."""
    module = types.ModuleType("page")
    sys.modules["page"] = module  # dataclasses of the page look their annotations up here
    seen = module.__dict__
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        tree = ast.parse("\n" * block.line + block.code, name)
        if block.note == "alone":
            for statement in tree.body:
                _example(statement, name, seen)
        elif block.note:
            compile(tree, name, "exec", dont_inherit=True)
        else:
            exec(compile(tree, name, "exec", dont_inherit=True), seen)
    del sys.modules["page"]


def _example(statement: ast.stmt, name: str, seen: dict[str, Any]) -> None:
    """Run one expression; a session that it makes ends at once."""
    if not isinstance(statement, ast.Expr):
        raise TypeError(f"{name}:{statement.lineno}: examples are expressions")
    made = eval(compile(ast.Expression(statement.value), name, "eval", dont_inherit=True), seen)
    if isinstance(made, vtc.Session):
        made.detach()
