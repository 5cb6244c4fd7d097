"""Results as flat records: one dictionary of named plain values per measurement."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..commands import tables
from ..commands.outputs import writing

Record = dict[str, Any]


def environment(dtype: torch.dtype, seed: int) -> Record:
    """Where a number came from; part of every record that is written."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def _cpu() -> str:
    """Model name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write(path: str | Path, records: Sequence[Record], where: Mapping[str, Any]) -> None:
    """Write a JSON list; every record carries the environment `where` (its own fields win)."""
    rows = ",\n".join(json.dumps({**where, **record}) for record in records)
    with writing(path):
        Path(path).write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def read(path: str | Path) -> list[Record]:
    """Records of a file that `write` made."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def table(records: Sequence[Record], columns: Mapping[str, str | Callable[[Any], str]]) -> str:
    """For standard output: aligned columns in a terminal, Markdown where it goes to a file or pipe.

    `columns` maps a field to its format (".1%") or to a function of its value. A missing value, or
    None, leaves its cell empty; underscores in titles become spaces.
    """

    def cell(value: Any, form: str | Callable[[Any], str]) -> str:
        if value is None:
            return ""
        return form(value) if callable(form) else format(value, form)

    header = [title.replace("_", " ") for title in columns]
    rows = [[cell(record.get(key), form) for key, form in columns.items()] for record in records]
    room = tables.terminal()
    if room is not None:
        return tables.text_table(header, rows, room=room)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(columns), *rows])


def verdict(passed: bool) -> str:
    """For a PASS/FAIL column."""
    return "PASS" if passed else "FAIL"
