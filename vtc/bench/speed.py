"""Prefill time against two bounds: the dense model, and the same unmodified model given only the
tokens that stay.

Random weights, one thread, process CPU time. Every round runs every case once, in random order;
ratios are taken within a round and their median is shown, so a busy machine slows both sides."""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import vtc

from ..errors import VtcError
from . import flops, records, synthetic
from .records import Record

METHODS = "random,grid,divprune,fastv"
DEEP = 2  # the in-LLM site is the input of this layer
LIMIT, KEEP_ALL, SIGNAL, DIVPRUNE = 1.05, 0.03, 0.03, 0.05

EPILOG = """examples:
  vtc bench speed
  vtc bench speed --quick
  vtc bench speed --methods random,dart --keep 64 --repeats 41 --json speed.json

columns:
  ms          median process CPU time of one prefill (features ready-made, no vision tower)
  x dense     T(dense) / T(case), how many times faster
  x FLOPs     the same ratio of measured FLOPs
  x limit     T(case) / T(limit). The limit is the unmodified model given only the kept tokens; for
              decoder.2 it is put together from three unmodified runs: two layers with all tokens,
              plus all layers with the kept tokens, minus two layers with the kept tokens
  method      time inside the method (its signals included), as a share of the dense prefill
  decide      the same plus checks and merging: everything up to the finished plan
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench speed`."""
    parser.description = "Prefill CPU time of a Qwen2-0.5B-shaped LLaVA with random weights."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--methods", default=METHODS, help="names, comma separated (%(default)s)")
    parser.add_argument(
        "--keep", default="64,144,192", help="visual tokens that stay (%(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (%(default)s)")
    parser.add_argument("--visual", type=int, default=576, help="visual tokens (%(default)s)")
    parser.add_argument("--text", type=int, default=64, help="text tokens (%(default)s)")
    parser.add_argument("--hidden", type=int, default=896, help="width, times 64 (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=21, help="rounds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights, inputs and order of cases")
    parser.add_argument("--quick", action="store_true", help="3 layers, one budget, 5 rounds")
    records.add_json(parser)


@dataclass
class Case:
    """One thing to time. `enter` prepares it, outside the clock."""

    name: str
    inputs: dict[str, Any]
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    fields: Record = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    decide: list[float] = field(default_factory=list)


class Watch:
    """Sums the process CPU time of calls."""

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
    """Measure, print the table; 1 when a target is missed."""
    torch.set_num_threads(1)
    if args.quick:
        args.layers, args.repeats, args.keep = 3, 5, args.keep.split(",")[0]
    if args.layers <= DEEP:
        raise SystemExit(f"--layers {args.layers}: the site decoder.{DEEP} needs more layers.")
    budgets = [int(k) for k in args.keep.split(",")]
    methods = args.methods.split(",")
    shape = synthetic.Shape(
        layers=args.layers,
        hidden=args.hidden,
        intermediate=args.hidden * 38 // 7,
        heads=args.hidden // 64,
        kv_heads=2 if args.hidden % 128 == 0 else 1,
    )
    dtype = getattr(torch, args.dtype)
    model = synthetic.llava(shape, args.visual, dtype, args.seed)
    cases, refused = build(model, args, methods, budgets)
    measure(model, cases, args.repeats, args.seed)
    rows = summarise(cases)
    checks = targets(cases, rows, args.visual)

    print(
        f"\n{args.layers} layers of width {args.hidden}, {args.visual} visual + {args.text} text "
    )
    print(f"tokens, {args.dtype}, one thread, median of {args.repeats} rounds\n")
    print(records.table(rows, COLUMNS))
    print(f"\n{records.table(checks, TARGET_COLUMNS)}")
    for reason in refused:
        print(f"\nnot run: {reason}")
    if args.json:
        records.write(args.json, [*rows, *checks], records.environment(dtype, args.seed))
    return 0 if all(check["passed"] for check in checks) else 1


def build(
    model: Any, args: argparse.Namespace, methods: Sequence[str], budgets: Sequence[int]
) -> tuple[dict[str, Case], list[str]]:
    """All cases by name, and why some were left out."""
    full = synthetic.prompt(model, args.visual, args.text, args.seed)
    cases: dict[str, Case] = {}
    refused: list[str] = []

    def add(name: str, inputs: Any = full, enter: Any = nullcontext, **fields: Any) -> None:
        cases[name] = Case(name, inputs, enter, {"case": name, **fields})

    def first_layers() -> AbstractContextManager[Any]:
        return synthetic.first_layers(model, DEEP)

    def attached(method: str, at: str, keep: float | int, **options: Any) -> None:
        merged = " +merge +mass" if options else ""
        name = f"{method} {at} {'all' if keep == 1.0 else keep}{merged}"

        def enter() -> AbstractContextManager[Any]:
            return vtc.attach(model, method, keep=keep, at=at, seed=args.seed, **options)

        try:
            with torch.inference_mode(), enter():
                pass
        except VtcError as error:
            refused.append(f"{name}: {error}")
            return
        fields = {"merge": "none", "mass": 0.0, **options}
        tokens = None if keep == 1.0 else keep
        add(name, full, enter, method=method, site=at, keep=tokens or args.visual, **fields)

    add("dense")
    add("dense again")
    add(f"dense, {DEEP} layers", full, first_layers)
    deep = f"decoder.{DEEP}"
    for keep in budgets:
        short = synthetic.prompt(model, keep, args.text, args.seed)
        add(f"limit {keep}", short, keep=keep)
        add(f"limit {keep}, {DEEP} layers", short, first_layers, keep=keep)
        for at in ("projector", deep):
            for method in methods:
                attached(method, at, keep)
            attached("random", at, keep, merge="nearest", mass=1.0)
    attached("random", "projector", 1.0)
    attached("random", deep, 1.0)
    for method in methods:
        if method in vtc.REDUCERS and "attn_last" in vtc.REDUCERS[method].needs:
            attached(method, deep, 1.0)
    return cases, refused


def measure(model: Any, cases: dict[str, Case], rounds: int, seed: int) -> None:
    """Fill in times and FLOPs. The first round warms up and is forgotten."""
    order, dice = list(cases.values()), random.Random(seed)
    for case in order:
        with case.enter():
            case.fields["flops"] = flops.measure(
                model, lambda case=case: synthetic.prefill(model, case.inputs)
            ).total
    with (
        torch.inference_mode(),
        tqdm(total=(rounds + 1) * len(order), desc="speed", mininterval=2) as bar,
    ):
        for number in range(rounds + 1):
            dice.shuffle(order)
            for case in order:
                once(model, case, keep=number > 0)
                bar.update()


def once(model: Any, case: Case, keep: bool) -> None:
    """One timed prefill."""
    method, decide = Watch(), Watch()
    with case.enter() as session, quiet():
        if isinstance(session, vtc.Session):
            session.methods = tuple(Timed(m, method) for m in session.methods)
            session.reduce = decide(session.reduce)  # type: ignore[method-assign]
        started = time.process_time()
        synthetic.prefill(model, case.inputs)
        seconds = time.process_time() - started
    if keep:
        case.seconds.append(seconds)
        case.method.append(method.seconds)
        case.decide.append(decide.seconds)


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection on the clock."""
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summarise(cases: dict[str, Case]) -> list[Record]:
    """Medians and ratios of medians-per-round, one record per case."""
    dense = cases["dense"]
    rows = []
    for case in cases.values():
        row = {**case.fields, "ms": 1e3 * statistics.median(case.seconds)}
        row["speedup"] = ratio(dense.seconds, case.seconds)
        row["flops_ratio"] = dense.fields["flops"] / case.fields["flops"]
        bound = limit_of(case, cases)
        if bound is not None:
            row["limit_ratio"] = ratio(case.seconds, bound)
        if "method" in case.fields:
            row["method_share"] = ratio(case.method, dense.seconds)
            row["decide_share"] = ratio(case.decide, dense.seconds)
        rows.append(row)
    return rows


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def limit_of(case: Case, cases: dict[str, Case]) -> list[float] | None:
    """Time per round of the unmodified model on the kept tokens; None where that has no meaning."""
    if "method" not in case.fields:
        return None
    whole = cases.get(f"limit {case.fields['keep']}")
    if whole is None:  # nothing is dropped
        return cases["dense"].seconds
    if case.fields["site"] == "projector":
        return whole.seconds
    early, late = cases[f"dense, {DEEP} layers"], cases[f"{whole.name}, {DEEP} layers"]
    parts = zip(early.seconds, whole.seconds, late.seconds, strict=True)
    return [a + b - c for a, b, c in parts]


def targets(cases: dict[str, Case], rows: Sequence[Record], visual: int) -> list[Record]:
    """What the library promises, each with what was measured."""
    out: list[Record] = []

    def promise(what: str, value: float, most: float) -> None:
        out.append({"target": what, "value": value, "most": most, "passed": value <= most})

    dense = cases["dense"].seconds
    for row in rows:
        name, kept, plain = row["case"], row.get("keep"), row.get("mass") == 0.0
        if "method" not in row:
            continue
        if kept == visual:
            promise(
                f"cost of an attached session that keeps all: {name}",
                row["limit_ratio"] - 1,
                KEEP_ALL,
            )
        elif row["site"] == "projector" and row["method"] in ("random", "grid") and plain:
            promise(f"T / T(limit) - 1: {name}", row["limit_ratio"] - 1, LIMIT - 1)
        if row["method"] == "divprune" and row["site"] == "projector" and plain:
            promise(f"time of the method / dense prefill: {name}", row["method_share"], DIVPRUNE)
        twin = cases.get(f"random decoder.{DEEP} {kept}")
        reads = "attn_last" in vtc.REDUCERS[row["method"]].needs
        if reads and twin is not None and kept != visual:
            case = cases[name]
            extra = [a - b for a, b in zip(case.seconds, twin.seconds, strict=True)]
            promise(f"last-row attention / dense prefill: {name}", ratio(extra, dense), SIGNAL)
    return out


COLUMNS: dict[str, Any] = {
    "case": "",
    "ms": ".1f",
    "speedup": lambda v: f"x{v:.2f}",
    "flops_ratio": lambda v: f"x{v:.2f}",
    "limit_ratio": ".3f",
    "method_share": ".1%",
    "decide_share": ".1%",
}
TARGET_COLUMNS: dict[str, Any] = {
    "target": "",
    "value": ".1%",
    "most": ".0%",
    "passed": records.verdict,
}
