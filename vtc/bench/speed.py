"""Prefill time against two bounds: the dense model, and the same unmodified model given only the
tokens that stay.

Random weights, one thread, process CPU time. Every round runs every case once, in random order,
and right beside each case what it is compared with; ratios are taken within a round and their
median is shown. So a busy machine slows both sides; `dense again` tells what noise is left."""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import vtc

from ..errors import VtcError
from . import flops, records, synthetic
from .options import at_least, counts, names, prepare
from .records import Record

METHODS = "random,grid,divprune,fastv"
DEPTH = 2
DEEP = f"decoder.{DEPTH}"
#: promises: T / T(limit) - 1, a session that keeps all, a last-row attention signal, DivPrune's
#: own time; the last three as shares of the dense prefill
LIMIT, KEEP_ALL, SIGNAL, DIVPRUNE = 0.05, 0.03, 0.03, 0.05

EPILOG = f"""columns:
  ms            median process CPU time of one prefill (features ready-made, no vision tower)
  speedup       T(dense) / T(case)
  flops ratio   FLOPs(dense) / FLOPs(case), both measured
  limit ratio   T(case) / T(limit). The limit is the unmodified model given only the kept tokens;
                for {DEEP} it is composed of unmodified runs: {DEPTH} layers with all tokens, plus
                all layers minus {DEPTH} layers with the kept tokens
  error         standard error of that median
  method share  time inside the method, signals included, over the dense prefill
  decide share  the same, plus checks and merging: everything up to the finished plan

examples:
  vtc bench speed
  vtc bench speed --quick
  vtc bench speed --methods random,dart --keep 64 --repeats 41 --json speed.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench speed`."""
    prepare(
        parser, "Prefill CPU time of a LLaVA shaped like Qwen2-0.5B, with random weights.", EPILOG
    )
    add = parser.add_argument
    add("--methods", type=names, default=METHODS, help="comma separated (%(default)s)")
    add("--keep", type=counts, default="64,144,192", help="visual tokens kept (%(default)s)")
    add(
        "--layers",
        type=at_least(DEPTH + 1),
        default=6,
        help="of the decoder; 24 in full (%(default)s)",
    )
    add("--heads", type=at_least(1), default=14, help="of 64 channels (%(default)s)")
    add("--visual", type=at_least(2), default=576, help="visual tokens (%(default)s)")
    add("--text", type=at_least(5), default=64, help="text tokens (%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeats", type=at_least(1), default=21, help="rounds (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, inputs and order (%(default)s)")
    add("--quick", action="store_true", help="3 layers, first budget, 5 rounds: a rough look")


@dataclass
class Case:
    """One thing to time. `enter` prepares it, off the clock; `seconds` has one entry per round.

    `reference` runs beside it in every round, its times are in `beside`.
    """

    name: str
    inputs: dict[str, Any]
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    reference: Case | None = None
    fields: Record = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    decide: list[float] = field(default_factory=list)


class Watch:
    """Sums the process CPU time of the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        return timed


class Timed:
    """A method whose `plan` is timed; everything else is the method's own."""

    def __init__(self, method: Any, watch: Watch) -> None:
        self._method, self.plan = method, watch(method.plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    budgets = args.keep
    if args.quick:
        args.layers, args.repeats, budgets = DEPTH + 1, 5, budgets[:1]
    width = 64 * args.heads
    shape = synthetic.Shape(
        layers=args.layers,
        hidden=width,
        intermediate=width * 38 // 7,
        heads=args.heads,
        kv_heads=2 - args.heads % 2,
    )
    dtype = getattr(torch, args.dtype)
    model = synthetic.llava(shape, args.visual, dtype, args.seed)
    cases, refused = build(model, args, budgets)

    def forward(case: Case) -> Any:
        return synthetic.prefill(model, case.inputs)

    for case in cases.values():
        with case.enter():
            case.fields["flops"] = flops.measure(model, partial(forward, case)).total
    measure(cases, forward, args.repeats, args.seed)
    rows, judged = summarise(cases), promises(cases, args.visual)

    print(
        f"\n{args.layers} layers of width {width}, {args.visual} visual + {args.text} text "
        f"tokens, {args.dtype}, one thread, median of {args.repeats} rounds\n\n"
        f"{records.table(rows, COLUMNS)}\n\n{records.table(judged, PROMISE_COLUMNS)}"
    )
    for reason in refused:
        print(f"\nnot run: {reason}")
    if args.json:
        records.write(args.json, [*rows, *judged], records.environment(dtype, args.seed))
    return 0


def build(
    model: Any, args: argparse.Namespace, budgets: Sequence[int]
) -> tuple[dict[str, Case], list[str]]:
    """All cases by name, and why some are left out."""
    full = synthetic.prompt(model, args.visual, args.text, args.seed)
    cases: dict[str, Case] = {}
    refused: list[str] = []

    def early() -> AbstractContextManager[Any]:
        return synthetic.first_layers(model, DEPTH)

    def add(name: str, *parts: Any, **fields: Any) -> Case:
        case = cases[name] = Case(name, *parts, fields={"case": name, **fields})
        return case

    def attached(method: str, at: str, keep: int, beside: Case | None, **options: Any) -> None:
        everything = keep == args.visual
        name = f"{method} {at} {'all' if everything else keep}{' +merge +mass' if options else ''}"

        def enter() -> AbstractContextManager[Any]:
            return vtc.attach(model, method, keep=keep, at=at, seed=args.seed, **options)

        vtc.REDUCERS[method]  # an unknown name is a mistake, not a refusal
        try:
            enter().__exit__(None, None, None)
        except VtcError as error:
            refused.append(str(error))
            return
        options = {"merge": "none", "mass": 0.0, **options}
        add(name, full, enter, beside, method=method, site=at, keep=keep, **options)

    methods = args.methods
    dense = add("dense", full)
    add("dense again", full, nullcontext, dense)
    add("dense, early layers", full, early)
    for keep in budgets:
        short = synthetic.prompt(model, keep, args.text, args.seed)
        limit = add(f"limit {keep}", short, keep=keep)
        add(f"limit {keep}, early layers", short, early, keep=keep)
        for method in methods:
            attached(method, "projector", keep, limit)
        attached("random", "projector", keep, limit, merge="nearest", mass=1.0)
        attached("random", DEEP, keep, None)
        plain = cases[f"random {DEEP} {keep}"]
        for method in methods:
            if method != "random":
                attached(method, DEEP, keep, plain if reads_last_row(method) else None)
        attached("random", DEEP, keep, None, merge="nearest", mass=1.0)
    for method, at in (("random", "projector"), ("random", DEEP)):
        attached(method, at, args.visual, dense)
    for method in filter(reads_last_row, methods):
        attached(method, DEEP, args.visual, dense)
    return cases, list(dict.fromkeys(refused))


def reads_last_row(method: str) -> bool:
    return method in vtc.REDUCERS and "attn_last" in vtc.REDUCERS[method].needs


def measure(
    cases: Mapping[str, Case], forward: Callable[[Case], Any], rounds: int, seed: int
) -> None:
    """Fill in times. The first round warms up and is forgotten."""
    order, dice = list(cases.values()), random.Random(seed)
    total = (rounds + 1) * len(order)
    with torch.inference_mode(), tqdm(total=total, desc="speed", mininterval=2) as bar:
        for number in range(rounds + 1):
            dice.shuffle(order)
            for case in order:
                pair = [case] if case.reference is None else [case, case.reference]
                dice.shuffle(pair)
                for one in pair:
                    times = timed(one, forward)
                    if number and one is case:
                        case.seconds.append(times[0])
                        case.method.append(times[1])
                        case.decide.append(times[2])
                    elif number:
                        case.beside.append(times[0])
                bar.update()


def timed(case: Case, forward: Callable[[Case], Any]) -> tuple[float, float, float]:
    """CPU seconds of one forward, of the method in it, and of everything up to its plan."""
    method, decide = Watch(), Watch()
    with case.enter() as session, no_collection():
        if isinstance(session, vtc.Session):
            session.methods = tuple(Timed(m, method) for m in session.methods)
            session.reduce = decide(session.reduce)  # type: ignore[method-assign]
        started = time.process_time()
        forward(case)
        seconds = time.process_time() - started
    return seconds, method.seconds, decide.seconds


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summarise(cases: dict[str, Case]) -> list[Record]:
    """One record per case."""
    dense = cases["dense"]
    rows = []
    for case in cases.values():
        row = {**case.fields, "ms": 1e3 * statistics.median(case.seconds)}
        row["speedup"] = median_ratio(dense.seconds, case.seconds)[0]
        row["flops_ratio"] = dense.fields["flops"] / case.fields["flops"]
        limit = limit_of(case, cases)
        if limit is not None:
            row["limit_ratio"], row["error"] = median_ratio(case.seconds, limit)
        if "method" in case.fields:
            row["method_share"] = median_ratio(case.method, dense.seconds)[0]
            row["decide_share"] = median_ratio(case.decide, dense.seconds)[0]
        rows.append(row)
    return rows


def limit_of(case: Case, cases: dict[str, Case]) -> list[float] | None:
    """Seconds of the unmodified model on the kept tokens, round by round."""
    whole = cases.get(f"limit {case.fields.get('keep')}")
    if case.fields.get("site") != DEEP or whole is None:
        return case.beside or None
    early, skipped = cases["dense, early layers"], cases[f"{whole.name}, early layers"]
    parts = zip(early.seconds, whole.seconds, skipped.seconds, strict=True)
    return [a + b - c for a, b, c in parts]


def median_ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and its standard error (from the median deviation)."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    middle = statistics.median(ratios)
    deviation = statistics.median(abs(r - middle) for r in ratios)
    return middle, 1.86 * deviation / len(ratios) ** 0.5


def promises(cases: dict[str, Case], visual: int) -> list[Record]:
    """What the library promises, and what was measured."""
    dense = cases["dense"].seconds
    rows = []
    for case in cases.values():
        f = case.fields
        if "method" not in f or f["mass"]:
            continue
        at_projector, everything = f["site"] == "projector", f["keep"] == visual
        if everything:
            what = "a session that keeps all tokens costs at most"
            rows.append((what, case, over(case.seconds, case.beside), KEEP_ALL))
        elif at_projector and f["method"] in ("random", "grid"):
            what = "T is above T(limit) by at most"
            rows.append((what, case, over(case.seconds, case.beside), LIMIT))
        if at_projector and not everything and f["method"] == "divprune":
            what = "time of the method over dense prefill"
            rows.append((what, case, median_ratio(case.method, dense), DIVPRUNE))
        if not everything and reads_last_row(f["method"]):
            what = "last-row attention over dense prefill"
            extra = [a - b for a, b in zip(case.seconds, case.beside, strict=True)]
            rows.append((what, case, median_ratio(extra, dense), SIGNAL))
    return [
        {
            "promise": what,
            "case": case.name,
            "value": value,
            "error": error,
            "most": most,
            "passed": value <= most,
        }
        for what, case, (value, error), most in rows
    ]


def over(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """How much longer, as a share of the reference."""
    value, error = median_ratio(seconds, reference)
    return value - 1, error


COLUMNS: dict[str, Any] = {
    "case": "",
    "ms": ".1f",
    "speedup": ".2f",
    "flops_ratio": ".2f",
    "limit_ratio": ".3f",
    "error": ".3f",
    "method_share": ".1%",
    "decide_share": ".1%",
}
PROMISE_COLUMNS: dict[str, Any] = {
    "promise": "",
    "case": "",
    "most": ".0%",
    "value": ".1%",
    "error": ".1%",
    "passed": records.verdict,
}
