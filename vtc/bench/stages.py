"""Where a method of several stages spends its time: prefill with the vision tower, and decoding.

Random weights, one thread, process CPU time; every round runs every case once in random order,
right beside what it is compared with, and ratios are taken within a round. Probes are what a case
costs more than the same steps with random choices: attention rows, tower scores and rankings, taps
and hooks included."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import vtc

from ..recipe import Recipe
from ..session import adapter_for
from ..versions import cache_argument, cache_in
from . import flops, records, synthetic
from .options import at_least, counts, method_and_params, names, prepare
from .records import Record
from .speed import median_ratio, no_collection

METHODS = "mustdrop,mustdrop_merge,mustdrop_filter,divprune,zoo_prune:mode=jacobian,zoo_prune"

EPILOG = """columns:
  prefill ms    median process CPU time from pixels to the next token
  / dense       over the unmodified model's
  probes        what the case costs more than the same steps with random choices, over the prefill
                of the unmodified language model alone (features ready-made)
  flops share   FLOPs of choosing, over those of that prefill
  decode ms     one decoding step; KV MB what the cache holds then

  Below each case its sites, with the time inside them over that prefill.

examples:
  vtc bench stages
  vtc bench stages --methods mustdrop,mustdrop:vision=false --keep 64,192 --layers 24
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench stages`."""
    prepare(parser, "Time of every stage, on a LLaVA of CLIP-L and Qwen2-0.5B shape.", EPILOG)
    add = parser.add_argument
    add("--methods", type=names, default=METHODS, help="comma separated, parameters as "
        "name:key=value (%(default)s)")  # fmt: skip
    add("--keep", type=counts, default="64", help="visual tokens kept (%(default)s)")
    add("--layers", type=at_least(4), default=24, help="of the decoder (%(default)s)")
    add("--tower-layers", type=at_least(3), default=6, help="of the tower; 24 in full")
    add("--visual", type=at_least(9), default=576, help="visual tokens (%(default)s)")
    add("--text", type=at_least(5), default=64, help="text tokens (%(default)s)")
    add("--steps", type=at_least(1), default=8, help="decoding steps (%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeats", type=at_least(1), default=11, help="rounds (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, inputs and order (%(default)s)")


@dataclass
class Case:
    """One thing to time; `control` does the same steps with random choices."""

    name: str
    inputs: dict[str, Any]
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    recipe: Recipe | None = None
    control: str | None = None
    prefill: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    sites: dict[str, list[float]] = field(default_factory=dict)
    megabytes: float = 0.0
    flops: int = 0


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    tower = dataclasses.replace(synthetic.CLIP_LARGE, layers=args.tower_layers)
    shape = synthetic.Shape(layers=args.layers)
    model = synthetic.llava(shape, args.visual, dtype, args.seed, tower=tower)
    cases = build(model, args)
    dice = random.Random(args.seed)
    order = list(cases.values())
    for case in order:
        case.flops = measured_flops(model, case)
    with tqdm(total=(args.repeats + 1) * len(order), desc="stages", mininterval=2) as bar:
        for number in range(args.repeats + 1):
            dice.shuffle(order)
            for case in order:
                pair = [case] if case.control is None else [case, cases[case.control]]
                dice.shuffle(pair)
                for one in pair:
                    seconds, spent, decode = once(model, one, args.steps)
                    if number and one is case:
                        case.prefill.append(seconds)
                        case.decode.append(decode)
                        for site, share in spent.items():
                            case.sites.setdefault(site, []).append(share)
                    elif number:
                        case.beside.append(seconds)
                bar.update()
    rows = summarise(cases)
    print(
        f"\n{args.tower_layers} tower and {args.layers} decoder layers, {args.visual} visual + "
        f"{args.text} text tokens, {args.dtype}, one thread, median of {args.repeats} rounds\n\n"
        f"{records.table(rows, COLUMNS)}"
    )
    if args.json:
        records.write(args.json, rows, records.environment(dtype, args.seed))
    return 0


def build(model: Any, args: argparse.Namespace) -> dict[str, Case]:
    """The unmodified model with and without its tower, every method, and its control."""
    adapter = adapter_for(model)
    pixels = synthetic.picture(model, args.visual, args.text, args.seed)
    ready = synthetic.prompt(model, args.visual, args.text, args.seed)
    cases = {"dense": Case("dense", pixels), "language model": Case("language model", ready)}
    for keep in args.keep:
        for label in args.methods:
            name, params = method_and_params(label)
            budget = keep if "fixed" in vtc.REDUCERS[name].budgets else "auto"
            if name == "mustdrop_merge":  # a budget of its own: merging ends at the windows
                budget = "auto"
            options = {"seed": args.seed, "host": adapter.host(), **params}
            recipe = Recipe.build(name, adapter.depth, budget, **options)
            control = drawn(model, recipe, pixels)
            at = "+".join(step.at for step in control.steps)
            other = f"random at {at}, {keep}"
            cases.setdefault(other, Case(other, pixels, session(model, control), control))
            title = f"{label} {budget}"
            cases[title] = Case(title, pixels, session(model, recipe), recipe, other)
    return cases


def session(model: Any, recipe: Recipe) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: vtc.attach(model, recipe)


def drawn(model: Any, recipe: Recipe, inputs: dict[str, Any]) -> Recipe:
    """The same steps with random choices, as many tokens as the recipe really kept."""
    with vtc.attach(model, recipe) as attached, torch.inference_mode():
        synthetic.prefill(model, inputs)
    left = {r.site: r.n_out[0] for r in attached.trace}
    steps = [s for s in recipe.steps if s.site.kind != "cache"]
    kept = (dataclasses.replace(s, method="random", keep=left[s.at], params={}) for s in steps)
    return Recipe(tuple(kept))


def once(model: Any, case: Case, steps: int) -> tuple[float, dict[str, float], float]:
    """Seconds of one prefill, of its sites, and of a decoding step."""
    spent: dict[str, float] = {}
    with case.enter() as attached, no_collection(), torch.inference_mode():
        warm(model, case)
        if isinstance(attached, vtc.Session):
            watch(attached, spent)
        started = time.process_time()
        out = model(**case.inputs, logits_to_keep=1, use_cache=True)
        prefill = time.process_time() - started
        cache, token = cache_in(out), out.logits[:, -1:].argmax(-1)
        at = case.inputs["input_ids"].shape[1]
        started = time.process_time()
        for step in range(steps):
            place = torch.full((1, 1), at + step)
            named = cache_argument(model.forward, cache)
            out = model(input_ids=token, position_ids=place, logits_to_keep=1, **named)
        decode = (time.process_time() - started) / steps
    case.megabytes = sum(t.nbytes for x in cache.layers for t in (x.keys, x.values)) / 1e6
    return prefill, spent, decode


def warm(model: Any, case: Case) -> None:
    """What a session prepares once per weights is not part of a prefill."""
    steps = () if case.recipe is None else case.recipe.steps
    if any("projector" in vtc.REDUCERS[step.method].needs for step in steps):
        synthetic.prefill(model, case.inputs)


def watch(attached: vtc.Session, spent: dict[str, float]) -> None:
    """Add up the time inside every site: signals, choice and checks."""
    inner = attached.reduce

    def timed(number: int, *args: Any) -> Any:
        started = time.process_time()
        try:
            return inner(number, *args)
        finally:
            site = attached.recipe.steps[number].at
            spent[site] = spent.get(site, 0.0) + time.process_time() - started

    attached.reduce = timed  # type: ignore[method-assign]


def measured_flops(model: Any, case: Case) -> int:
    with case.enter(), torch.inference_mode():
        warm(model, case)
        return flops.measure(model, lambda: synthetic.prefill(model, case.inputs)).total


def summarise(cases: dict[str, Case]) -> list[Record]:
    """One record per case, and one per site below it."""
    dense, alone = cases["dense"], cases["language model"]
    rows: list[Record] = []
    for case in cases.values():
        row: Record = {
            "case": case.name,
            "prefill_ms": 1e3 * statistics.median(case.prefill),
            "over_dense": median_ratio(case.prefill, dense.prefill)[0],
            "flops_over_dense": case.flops / dense.flops,
            "decode_ms": 1e3 * statistics.median(case.decode),
            "KV_MB": case.megabytes,
        }
        if case.control is not None:
            extra = [a - b for a, b in zip(case.prefill, case.beside, strict=True)]
            row["probes"], row["error"] = median_ratio(extra, alone.prefill)
            row["flops_share"] = (case.flops - cases[case.control].flops) / alone.flops
        rows.append(row)
        for site, seconds in case.sites.items():
            share = median_ratio(seconds, alone.prefill)[0]
            rows.append({"case": f"  {site}", "site_share": share})
    return rows


COLUMNS: dict[str, Any] = {
    "case": "",
    "prefill_ms": ".1f",
    "over_dense": ".3f",
    "flops_over_dense": ".3f",
    "probes": ".2%",
    "error": ".2%",
    "flops_share": ".2%",
    "site_share": ".2%",
    "decode_ms": ".2f",
    "KV_MB": ".2f",
}
