"""Memory of a method on many tokens, and of the attention bias that `mass` adds.

Peaks are exact: every allocation of torch's allocator is recorded, scratch space inside operations
included. What a BLAS library allocates for itself does not pass through it and is not seen."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from tqdm import tqdm

import vtc

from .. import ops
from ..context import Context, Layout, Site
from ..errors import MissingSignal
from ..plan import Plan
from ..reducer import Composite
from . import records, synthetic
from .options import at_least, names, prepare
from .records import Record

BOUND = 2.0  # peak extra memory over the tokens' own bytes

EPILOG = """The first table: memory beyond the tokens themselves, at the highest point, while a
method selects K of N tokens. The second: the largest single allocation of an unpadded
prefill with mass=1, which must be smaller than the smallest attention mask, L x L bytes; eager
attention, which stores the whole map, is there for comparison.

examples:
  vtc bench memory                      # DivPrune takes some minutes at this size
  vtc bench memory --n 4000 --k 400 --methods divprune --json memory.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench memory`."""
    prepare(parser, "Peak memory of selecting K of N tokens, and of attention with mass.", EPILOG)
    add = parser.add_argument
    add("--n", type=at_least(1), default=50_000, help="tokens (%(default)s)")
    add("--k", type=at_least(1), help="tokens that stay (default: a tenth)")
    add("--width", type=at_least(1), default=1024, help="of a token, float32 (%(default)s)")
    add("--methods", type=names, help="comma separated (default: all that need no signals)")
    add("--seed", type=int, default=0, help="of the tokens (%(default)s)")


def reads(name: str) -> str:
    """What a method needs besides tokens; empty when it works on them alone."""
    cls = vtc.REDUCERS[name]
    if cls.frames or cls.trained or issubclass(cls, Composite):
        return "videos, weights or a recipe"
    if cls.needs or cls.default_at != "projector":
        return ", ".join(sorted(cls.needs)) or "token grids"
    return ""


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a bound is broken."""
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr
    k = min(args.k or max(1, args.n // 10), args.n)
    methods = args.methods or [m for m in vtc.REDUCERS if not reads(m)]
    for name in methods:
        if reads(name):
            raise MissingSignal(
                f"{name!r} reads {reads(name)} from a model; only methods that work on tokens "
                f"alone can be measured here."
            )
    selections = list(select(args.n, k, args.width, methods, args.seed))
    attentions = list(attention(args.seed))

    print(f"\n{k} of {args.n} tokens of width {args.width}, float32\n")
    print(records.table(selections, SELECTION_COLUMNS))
    print(f"\n{records.table(attentions, ATTENTION_COLUMNS)}")
    rows = [*selections, *attentions]
    if args.json:
        records.write(args.json, rows, records.environment(torch.float32, args.seed))
    return 1 if any(row["passed"] is False for row in rows) else 0


class Allocations:
    """Bytes held at once at the highest point beyond those held before, and the largest single
    allocation. Filled in when the recording ends."""

    peak = 0
    largest = 0


@contextmanager
def recorded() -> Iterator[Allocations]:
    """Record every allocation that torch operations make on the CPU."""
    out, held = Allocations(), 0
    log: Any = profile(profile_memory=True, use_kineto=False)
    with log:
        yield out
    events = [event for event in log.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        out.peak = max(out.peak, held)
        out.largest = max(out.largest, event.nbytes())


# ---------------------------------------------------------------------- selecting tokens


def context(n: int, width: int, seed: int) -> Context:
    """One row of random tokens, made by hand as a caller without a model would."""
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    x = torch.empty(1, n, width).normal_(generator=torch.Generator().manual_seed(seed))
    return Context(
        x=x,
        visual=torch.ones(1, n, dtype=torch.bool),
        counts=(n,),
        original=(n,),
        source=torch.arange(n)[None],
        layout=(Layout(1, height, n // height),),
        site=Site.parse("projector"),
        seed=seed,
    )


def select(n: int, k: int, width: int, methods: Sequence[str], seed: int) -> Iterator[Record]:
    """A record of every method, and of merging dropped tokens into kept ones."""
    ctx = context(n, width, seed)
    plan = Plan((torch.arange(k) * n // k)[None], n)
    works = {name: partial(vtc.REDUCERS[name]().plan, ctx, (k,)) for name in methods}
    works["merge=nearest"] = partial(merge, plan, ctx)
    own = ctx.x.numel() * ctx.x.element_size()
    with tqdm(works.items(), desc="memory") as bar:
        for name, work in bar:
            bar.set_postfix_str(name)
            with torch.inference_mode(), recorded() as found:
                work()
            yield {
                "what": name,
                "n": n,
                "k": k,
                "width": width,
                "tokens_mb": own / 1e6,
                "extra_mb": found.peak / 1e6,
                "ratio": found.peak / own,
                "most": BOUND,
                "passed": found.peak <= BOUND * own,
            }


def merge(plan: Plan, ctx: Context) -> Tensor:
    """What `merge="nearest"` adds: find the nearest kept token of every other one, and average."""
    return ops.apply(ops.absorb(plan, ctx.x, ctx.visual, None, -1.0, average=True), ctx.x)


# ---------------------------------------------------------------------- attention with mass


def attention(seed: int) -> Iterator[Record]:
    """Largest allocation of an unpadded prefill with mass=1, against a mask of one byte a pair."""
    shape = synthetic.Shape(3, hidden=64, intermediate=64, heads=1, kv_heads=1, vocabulary=64)
    visual, text, keep = 1600, 64, 1440  # longer than the blocks of fused attention
    length = keep + text
    runs = (("sdpa", "projector"), ("sdpa", "decoder.1"), ("eager", "projector"))
    for implementation, at in runs:
        model = synthetic.llava(shape, visual, torch.float32, seed, implementation)
        inputs = synthetic.prompt(model, visual, text, seed)
        with (
            torch.inference_mode(),
            vtc.attach(model, "random", keep=keep, at=at, mass=1.0),
            recorded() as found,
        ):
            synthetic.prefill(model, inputs)
        bounded = implementation != "eager"  # eager attention stores the map: for comparison
        yield {
            "what": f"mass=1 at {at}, {implementation}",
            "length": length,
            "largest_kb": found.largest / 1e3,
            "mask_kb": length**2 / 1e3,
            "passed": found.largest < length**2 if bounded else None,
        }


SELECTION_COLUMNS: dict[str, Any] = {
    "what": "",
    "tokens_mb": ".1f",
    "extra_mb": ".1f",
    "ratio": ".2f",
    "most": ".0f",
    "passed": records.verdict,
}
ATTENTION_COLUMNS: dict[str, Any] = {
    "what": "",
    "length": "",
    "largest_kb": ".0f",
    "mask_kb": ".0f",
    "passed": records.verdict,
}
