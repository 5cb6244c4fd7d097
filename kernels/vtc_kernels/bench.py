"""Time the operators beside the eager formulations that they replace, and beside a plain copy.

Every time is measured in the run that prints it; nothing is extrapolated. On a CPU: processor
time of one thread. On a GPU: events, with the L2 cache flushed before every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from .cases import CASES, Case, chosen
from .report import Row, plain

FAILED, USAGE = 1, 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: seconds that one measurement on a CPU lasts at least
SLICE = 0.01
#: a target is missed when it is exceeded by more than this
NOISE = 1.05
#: bytes written between runs on a GPU: more than an L2 cache holds
FLUSH = 256 << 20

_EPILOG = """examples:
  python -m vtc_kernels.bench
  python -m vtc_kernels.bench --cases gather merge --rounds 31
  python -m vtc_kernels.bench --device cuda --dtype bfloat16 --json > times.json
A CPU runs every case with its production shapes, which takes a few minutes. Targets are ratios to
a copy, to the eager formulation, or both (at most 1); a busy machine may miss them.
exit codes: 0 done, 1 a target was missed, 2 it cannot run"""


@dataclass(frozen=True)
class Times:
    """Median seconds of one call. copy: of the yardstick, a copy of `copied` bytes into
    new memory."""

    case: str
    ours: float
    eager: float
    copy: float
    copied: int
    bound: int


def calls(case: Case, device: str, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """What is timed: ours, eager, copy; and the bytes of the copy and of the bound."""
    tensors, other = case.tensors(device, dtype), case.tensors(device, dtype)
    copied = case.copied(tensors)
    source = torch.ones(copied, dtype=torch.uint8, device=device)  # zeros may share one page
    timed = {
        "ours": lambda: case.ours(tensors),
        "eager": lambda: case.eager(other),  # its own tensors: a cache is compacted in place
        "copy": lambda: source.clone(),  # into new memory, as ours and eager write theirs
    }
    return timed, copied, case.bound(tensors)


def on_cpu(case: Case, dtype: torch.dtype, rounds: int) -> Times:
    """Processor time, one thread, the three calls in turn."""
    timed, copied, bound = calls(case, "cpu", dtype)
    repeats = {name: _repeats(call) for name, call in timed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            result = call()  # held until the next one is made, as results in use are
            start = time.process_time()
            for _ in range(repeats[name]):
                result = call()
            seconds[name].append((time.process_time() - start) / repeats[name])
            del result
    return Times(case.key, **{n: median(s) for n, s in seconds.items()}, copied=copied, bound=bound)


def _repeats(call: Callable[[], Any]) -> int:
    """Calls that fill a slice of time; the first one warms up."""
    call()
    start = time.process_time()
    call()
    return max(1, round(SLICE / max(time.process_time() - start, 1e-6)))


def on_cuda(case: Case, dtype: torch.dtype, rounds: int) -> Times:
    """Events around every call, the L2 cache flushed before it."""
    timed, copied, bound = calls(case, "cuda", dtype)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for call in timed.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in timed.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return Times(case.key, **{n: median(s) for n, s in seconds.items()}, copied=copied, bound=bound)


def missed(case: Case, times: Times) -> list[str]:
    """Targets that were not met."""
    out = []
    if case.most is not None and times.ours > case.most * NOISE * times.copy:
        out.append(f"ours/copy <= {case.most:g}")
    if times.ours > case.most_eager * NOISE * times.eager:
        out.append(f"ours/eager <= {case.most_eager:g}")
    return out


def cpu_rows(measured: Sequence[tuple[Case, Times]]) -> Iterator[Row]:
    """The table of a CPU."""
    yield ("case", "target", "us ours", "us eager", "ours/copy", "eager/copy", "ours/eager", "")
    for case, t in measured:
        targets = [] if case.most is None else [f"copy {case.most:g}"]
        targets += [] if case.most_eager == 1 else [f"eager {case.most_eager:g}"]
        yield (
            case.key,
            ", ".join(targets) or "-",
            f"{t.ours * 1e6:.0f}",
            f"{t.eager * 1e6:.0f}",
            f"{t.ours / t.copy:.2f}",
            f"{t.eager / t.copy:.2f}",
            f"{t.ours / t.eager:.3f}",
            "MISSED " + ", ".join(missed(case, t)) if missed(case, t) else "",
        )


def cuda_rows(measured: Sequence[tuple[Case, Times]]) -> Iterator[Row]:
    """The table of a GPU: bandwidth is compulsory bytes over time, its peak the best copy here."""
    peak = max(2 * t.copied / t.copy for _, t in measured)
    yield ("case", "us ours", "us eager", "GB/s ours", "of copy", "ours/eager", "")
    for case, t in measured:
        slow = t.ours > NOISE * t.eager
        yield (
            case.key,
            f"{t.ours * 1e6:.1f}",
            f"{t.eager * 1e6:.1f}",
            f"{t.bound / t.ours / 1e9:.0f}",
            f"{t.bound / t.ours / peak:.0%}",
            f"{t.ours / t.eager:.3f}",
            "MISSED ours/eager <= 1" if slow else "",
        )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vtc_kernels.bench",
        description="Time every operator beside the eager formulation that it replaces and beside "
        "a copy. CPU: processor time of one thread; CUDA: events.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the rows")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="keys, operators or names; * works",
    )
    parser.add_argument("--rounds", type=int, default=11, help="measurements per call, at least 1")
    parser.add_argument("--json", action="store_true", help="seconds as JSON instead of a table")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Measure and print. 0: done, 1: a target of a CPU was missed, 2: it cannot run."""
    args = _arguments(words)
    problem = ""
    if args.device == "cuda" and not torch.cuda.is_available():
        problem = "--device cuda: this machine has no GPU that torch can use. Try --device cpu."
    if args.rounds < 1:
        problem = f"--rounds {args.rounds}: at least one measurement per call is needed."
    try:
        picked = chosen(args.cases, cases)
    except ValueError as error:
        problem = str(error)
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        return USAGE
    run = on_cuda if args.device == "cuda" else on_cpu
    slow = [case.key for case in picked if args.device == "cpu" and not case.on_cpu]
    picked = [case for case in picked if case.key not in slow]
    measured, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), tqdm(picked, desc="bench", unit="case") as bar:
            for case in bar:
                bar.set_postfix_str(case.key)
                measured.append((case, run(case, DTYPES[args.dtype], args.rounds)))
    finally:
        torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread"
    if args.json:
        head = {"device": name, "dtype": args.dtype, "rounds": args.rounds}
        print(json.dumps({**head, "times": [asdict(t) for _, t in measured]}, indent=1))
        return 0
    print(f"{name}, {args.dtype}, median of {args.rounds}; torch {torch.__version__}")
    late = [case.key for case, t in measured if args.device == "cpu" and missed(case, t)]
    if measured:
        rows = list((cuda_rows if args.device == "cuda" else cpu_rows)(measured))
        print(plain(rows, 1))
    if slow:
        print(f"Not timed, for they take minutes on a CPU: {', '.join(slow)}")
    return FAILED if late else 0


if __name__ == "__main__":
    sys.exit(main())
