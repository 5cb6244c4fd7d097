"""What every kernel saves in launches and bytes, and what the compiler made of it.

Bytes are counted, not measured: those of the eager formulation operation by operation, those of
the kernels by formulas that tests prove. The figures of the compiler come from gate.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .cases import CASES, Case, chosen
from .gate import TARGETS, read_baseline
from .traffic import Line, count

FAILED, USAGE = 1, 2
#: every table marks what is beyond this, with its reason
LIMIT = 1.10
Row = tuple[str, ...]

_TRAFFIC: Row = (
    "case",
    "launches eager",
    "ours",
    "MB eager",
    "MB ours",
    "MB bound",
    "eager / bound",
    "ours / bound",
)
_EPILOG = """examples:
  python -m vtc_kernels.report
  python -m vtc_kernels.report --cases gather 'merge/*'
  python -m vtc_kernels.report --markdown > table.md
exit codes: 0 every case is within its limit, 1 one is not, 2 the command was typed wrongly"""


def traffic_rows(lines: Sequence[Line]) -> tuple[list[Row], list[str]]:
    """The table of bytes, and a note for every case that may exceed, or exceeds, the limit."""
    rows, notes = [_TRAFFIC], []
    for line in lines:
        mark = ""
        if line.case.limit > LIMIT:
            notes.append(
                f"{line.case.key}: {line.case.reason} (its own limit is {line.case.limit:g})."
            )
            mark = f" [{len(notes)}]"
        megabytes = (f"{n / 1e6:.2f}" for n in (line.eager, line.ours, line.bound))
        rows.append(
            (
                line.case.key,
                str(line.eager_launches),
                str(line.launches),
                *megabytes,
                f"{line.saved:.2f}",
                f"{line.ratio:.3f}{mark}",
            )
        )
    return rows, notes


def compiler_rows(cases: Sequence[Case]) -> list[Row]:
    """Registers, and bytes of the widest load / store, per kernel and target."""
    figures = read_baseline()["figures"]
    targets = [target for target in TARGETS if target in figures]
    rows: list[Row] = [("case", "kernel", *targets, "matrix instruction")]
    for case in cases:
        names = dict.fromkeys(n for t in targets for n in figures[t].get(case.key, {}))
        for name in names:
            found = [figures[target].get(case.key, {}).get(name) for target in targets]
            cells = [_cell(f) for f in found]
            matrix = dict.fromkeys(f["matrix"] for f in found if f and f["matrix"])
            rows.append((case.key, name, *cells, ", ".join(matrix) or "-"))
    return rows


def _cell(f: dict[str, Any] | None) -> str:
    if f is None:
        return "-"
    spills = f", {f['spills']} spills" if f["spills"] else ""
    return f"{f['registers']}{spills}, {f['load']}/{f['store']}"


def plain(rows: Sequence[Row], left: int) -> str:
    """Columns of text; the first `left` ones are words."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(w) if i < left else word.rjust(w)
            for i, (word, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Row], left: int) -> str:
    """The same as a table of Markdown."""
    line = ["---" if i < left else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], line, *rows[1:]))


def main(words: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Print the tables. 0: all cases within their limits."""
    parser = argparse.ArgumentParser(
        prog="python -m vtc_kernels.report",
        description="Launches and bytes of every case: the eager formulation, our kernels, and "
        f"the least possible. Ours may move {LIMIT:.2f} of that, or what a case states with a "
        "reason. Then what the compiler made of every kernel, from gate.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="keys, operators or names; * works",
    )
    parser.add_argument("--markdown", action="store_true", help="tables of Markdown")
    args = parser.parse_args(words)
    try:
        picked = chosen(args.cases, cases)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return USAGE
    table = markdown if args.markdown else plain
    lines = [count(case) for case in picked]
    rows, notes = traffic_rows(lines)
    print(table(rows, 1))
    if notes:
        print(f"\nBeyond {LIMIT:.2f}, and why:")
        print("\n".join(f"[{i}] {note}" for i, note in enumerate(notes, 1)))
    print("\nRegisters per lane, spills where there are any, bytes of the widest load / store:\n")
    print(table(compiler_rows(picked), 2))
    missed = [line for line in lines if not line.within]
    for line in missed:
        print(
            f"report: {line.case.key} moves {line.ratio:.3f} of its compulsory bytes, at most "
            f"{line.case.limit:.2f} are allowed. Make the kernel move less, or give the case a "
            f"limit of its own with the reason in cases.py.",
            file=sys.stderr,
        )
    return FAILED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
