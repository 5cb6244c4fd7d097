"""`vtc tune`: the cheapest recipe that keeps the answers to the user's own pictures or videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.options import VARIANTS, at_least, budgets, names, output, prepare
from ..commands.leftout import LeftOut
from ..commands.loading import typed
from ..errors import InvalidInput
from . import items

if TYPE_CHECKING:
    from ..bench.records import Record
    from .candidates import Candidate
    from .items import Item
    from .search import Goal, Result
    from .work import Job

#: pictures or videos that are too few to tell much
FEW = 50
EPILOG = """A recipe is loyal when its answers are those of the dense model. Items are split: on one
part a recipe is chosen, on the other (HOLDOUT) the chosen one is measured, because the best of many
candidates looks better on the items that it was chosen on than it is. No picture is in both.

halving  all candidates see START items; a candidate is out when the upper 95 % bound of its loyalty
         is below the goal, and waits when another one whose lower bound is above it costs less; of
         the others at most half of the rung (those that reach the goal, cheapest first, then the
         most loyal) see twice as many items, and so on until all. If nothing reaches the goal in
         the end, those that wait or were cut by half get their turn. Bounds count pictures, not
         the questions about them.
grid     all candidates see all items.

The cheapest one whose loyalty on all items of the first part reaches the goal is written to OUT,
for `vtc.attach(model, "OUT")`. Cheap means few FLOPs of the language model's prefill; equal ones
are told apart by time. Killed and started again with the same command it goes on: what was measured
is in OUT.parts. Candidates may be added and goals changed, what was measured is used again.

Pictures, videos and lines that cannot be used are left out and named at the end.

exit codes: 0 a recipe was written, 1 nothing reaches the goal or the run failed, 2 typed wrongly,
3 a recipe was written, but items were left out

examples:
  vtc zoo make-scenes --out scenes --n 100
  vtc tune --model tiny-llava-shapes --images scenes --questions scenes/questions.jsonl \\
      --loyalty 0.9 --methods grid,divprune --out recipe.yaml
  vtc tune --model org/name --images photos/ --loyalty 0.95 --out recipe.yaml --dry-run
  vtc tune --model org/name --images photos/ --loyalty 0.9 --measure tokens --kl 0.05 \\
      --search grid --methods divprune,fastv --at projector,decoder.2 --out recipe.yaml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc tune`."""
    prepare(parser, "Find the cheapest recipe that keeps the model's answers.", EPILOG)
    items.configure(parser)
    add = parser.add_argument
    add("--loyalty", type=float, required=True, metavar="L", help="least share that stays the same")
    add("--measure", choices=("exact", "tokens", "prefix"), default="exact", help="of what: whole "
        "answers, next tokens, or answers before the first difference (%(default)s)")  # fmt: skip
    add("--kl", type=float, metavar="NATS", help="most KL of the next token, too")
    add("--out", type=output, required=True, metavar="YAML", help="the recipe")
    add("--search", choices=("halving", "grid"), default="halving", help="(%(default)s)")
    add("--start", type=at_least(1), default=16, metavar="N", help="items of the first rung of "
        "halving (%(default)s)")  # fmt: skip
    add("--methods", type=names, default=[], help="comma separated, parameters as name:key=value "
        "(default: all without weights that act at the projector or in the language model; with "
        "--recipe: none)")  # fmt: skip
    add("--recipe", type=Path, nargs="+", default=[], metavar="YAML", help="more candidates")
    add("--at", "--sites", type=names, help="sites instead of the methods' own, comma separated")
    add("--budgets", type=budgets, default="0.75,0.5,0.35,0.25,0.15,0.1", help="(%(default)s)")
    add("--merge-mass", choices=tuple(VARIANTS), default="both", help="candidates with "
        "merge='nearest' and mass=1 (%(default)s)")  # fmt: skip
    add("--holdout", type=float, default=0.3, metavar="SHARE", help="of the items (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of the split, and of methods that draw "
        "(%(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="show candidates and runs, without weights")
    add("--overwrite", action="store_true", help="begin anew where --out holds something else")


def run(args: argparse.Namespace) -> int:
    """Search, print and write."""
    goal = _checked(args)
    left_out = LeftOut()
    found = items.readable(items.given(args, left_out), left_out)
    with typed():
        chosen, held = items.split(found, args.holdout, args.seed)
    if args.dry_run:
        return _dry_run(args, chosen, held) or left_out.tell()
    code = _tune(args, goal, found, left_out)
    return code or left_out.tell()


def _checked(args: argparse.Namespace) -> Goal:
    """The goal, if the options make sense."""
    from ..commands.loading import UsageError
    from .search import Goal

    if not 0 <= args.holdout < 1:
        raise UsageError(f"holdout={args.holdout}: give a share from 0 on, below 1.")
    if args.out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {args.out}: give a name that ends in .yaml, as recipes do.")
    try:
        return Goal(args.loyalty, args.measure, args.kl)
    except InvalidInput as error:
        raise UsageError(str(error)) from error


def _dry_run(args: argparse.Namespace, chosen: list[Item], held: list[Item]) -> int:
    from ..bench import records
    from ..commands.loading import model_structure
    from . import candidates
    from .work import plan

    found, refused = candidates.planned(model_structure(args), args, _has_videos(chosen + held))
    print(records.table([c.fields for c in found.values()], candidates.COLUMNS))
    for reason in refused:
        print(f"not a candidate: {reason}")
    print(f"\n{len(found)} candidates; {len(chosen)} items to choose on, {len(held)} held out")
    print(plan(args, len(found), chosen, held))
    return 0


def _tune(args: argparse.Namespace, goal: Goal, given: list[Item], left_out: LeftOut) -> int:
    from ..bench import records
    from ..commands.loading import load_model
    from . import candidates
    from .work import Job

    model, processor = load_model(args)
    found, refused = candidates.planned(model, args, _has_videos(given))
    for reason in refused:
        print(f"not a candidate: {reason}")
    with Job(model, processor, args, found, given, left_out) as job:
        if job.known:
            print(f"going on: {len(job.known)} batches of an earlier start are in {args.out}.parts")
        result = job.search(goal)
        seen = None if result.best is None else job.held_out(result.best)
    _show(result, found, goal)
    if args.json:
        rows = [one.fields | {"part": "chosen on"} | result.records[name]
                for name, one in found.items() if name in result.records]  # fmt: skip
        if result.best and seen:
            rows.append(found[result.best].fields | {"part": "held out"} | seen)
        where = records.environment(model.dtype, args.seed) | {"model": args.model}
        records.write(args.json, rows, where)
    if result.best is None:
        print(f"\n{_nothing(result, found, goal)}\nWhat was measured stays in {args.out}.parts.")
        return 1
    _write(args.out, job, result.best, result, goal, seen)
    return 0


def _has_videos(found: list[Item]) -> bool:
    return any(item.kind == "video" for item in found)


# ---------------------------------------------------------------------- telling


def _show(result: Result, found: dict[str, Candidate], goal: Goal) -> None:
    """The front, and what could not run."""
    from ..bench import loyalty, records
    from .candidates import COLUMNS

    for name, why in result.broken.items():
        print(f"not run: {found[name].label}: {why}")
    front = [
        {"": "chosen" if name == result.best else "", **found[name].fields, **result.records[name]}
        for name in result.front(goal.measure)
    ]
    print(f"\n{len(result.records)} candidates ran; the front of those that saw most items\n")
    columns = {"": "", **COLUMNS, **loyalty.MEASURED, "items": ""}
    print(records.table(loyalty.shown(front), columns))


def _nothing(result: Result, found: dict[str, Candidate], goal: Goal) -> str:
    if not result.records:
        return "no candidate could run."
    records = result.records
    keys = ("items", goal.measure)
    name = max(records, key=lambda n: (*(records[n][key] for key in keys), -records[n]["kl"]))
    return (
        f"nothing reaches {goal}, and no recipe was written. The most loyal was "
        f"{found[name].label}: {_told(records[name], goal)}. Lower the goal, or give larger "
        f"--budgets, other --methods, --measure tokens."
    )


def _write(out: Path, job: Job, name: str, result: Result, goal: Goal, seen: Record | None) -> None:
    """The recipe, below what was measured of it."""
    import vtc

    from ..video.disk import write_whole

    best = result.records[name]
    lines = [
        f"Found by `vtc tune` {vtc.__version__}: {goal}",
        f"model: {job.args.model}; the cheapest of {len(job.found)} candidates ({job.args.search})",
        f"chosen on:   {_told(best, goal)}",
        f"held out:    {_told(seen, goal) if seen else 'nothing (--holdout 0)'}",
        "FLOPs and time are shares of the dense model's; the interval is one of 95 %.",
    ]
    if best["time"] >= 1:
        lines.append("It is no quicker than the dense model here: see `vtc bench speed`.")
    if seen is None:
        lines.append("The best of many on the same items looks better there than it is.")
    elif not goal.meets(seen):
        lines.append("Held-out items miss the goal: take more items, or ask for more loyalty.")
    if seen and seen["media"] < FEW:
        few = f"{seen['media']} held-out pictures or videos are few"
        lines.append(f"{few}: see how wide the interval is.")
    text = "".join(f"# {line}\n" for line in lines)
    write_whole(out, (text + job.found[name].recipe.dump()).encode())
    print(f"\n{out}:\n\n{out.read_text(encoding='utf-8')}")


def _told(record: Record, goal: Goal) -> str:
    """`exact 0.967 (0.886 to 0.991), ...`."""
    from .loyalty import interval

    low, high = interval(record[goal.measure], record["media"], 1.96)
    others = [name for name in ("exact", "tokens") if name != goal.measure]
    words = [f"{goal.measure} {record[goal.measure]:.3f} ({low:.3f} to {high:.3f})"]
    words += [f"{name} {record[name]:.3f}" for name in others]
    words += [f"KL {record['kl']:.4f} nats", f"FLOPs {record['flops']:.1%}"]
    words += [f"time {record['time']:.2f}", f"{record['items']} items"]
    if record["media"] < record["items"]:
        words[-1] += f" about {record['media']} pictures or videos"
    return ", ".join(words)
