"""Right answers of a small trained model against tokens kept and FLOPs spent.

The exams are in `exams`: drawn scenes, still or moving, and one-word answers.

FLOPs and CPU time (over that of the dense model beside it) are those of one question of median
length, alone and with its vision tower.
Methods act at different sites: at equal tokens, dropping inside the language model is dearer than
before it, so compare along the FLOPs, and with the random and grid rows of the same site."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vtc

from ..budget import Keep
from ..commands import outputs
from ..commands.loading import BadInput, answers, source_of
from ..errors import InvalidInput, InvalidRecipe, VtcError
from ..plot import pareto, points, style
from ..recipe import Recipe, Step
from ..session import adapter_for
from . import flops, records
from .exams import Exam, answer, scene_seed, set_exam
from .options import (
    CONTROLS,
    VARIANTS,
    at_least,
    budgets,
    method_and_params,
    names,
    prepare,
)
from .records import Record
from .speed import no_collection

WORDING = "sanity benchmark on a small trained model; ranks may differ at scale"
TIMED = 7  # pairs of runs of one question, dense and compressed
SETTING_COLUMNS: dict[str, Any] = {"method": "", "site": "", "keep": "", "merge": "", "mass": ""}

EPILOG = f"""{WORDING}

Every method runs where its paper puts it (--at: elsewhere); with several sites, keep is what is
left after the last one; methods with thresholds of their own also run with keep=auto. Random and
grid run at every site that a method uses. Scenes and the seeds of methods that draw differ from
seed to seed; shown are means and standard deviations over seeds. "tokens" are visual tokens per
image, mean over the language model's layers: processed, and counted as papers do, after each layer.
What happens in the KV cache after the prefill cannot change these one-word answers.

examples:
  vtc bench quality --plot quality.png --json quality.json      # some minutes
  vtc bench quality --methods divprune,fastv --budgets 0.25,0.1 --merge-mass full
  vtc bench quality --methods divprune --at projector,decoder.2 --scenes 100 --seeds 1
  vtc bench quality --methods zoo_prune,zoo_prune:diversity=false,mustdrop:vision=false
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench quality`."""
    prepare(parser, "Exact match by question type, for every method and budget.", EPILOG)
    add = parser.add_argument
    add("--model", default="tiny-llava-shapes", help="zoo model or folder (%(default)s)")
    add("--methods", type=names, default="all", help="comma separated, parameters as "
        "name:key=value (%(default)s)")  # fmt: skip
    add("--budgets", type=budgets, default="0.5,0.25,0.1,0.05", help="keep (%(default)s)")
    add("--at", type=names, help="sites instead of the methods' own, comma separated")
    add("--merge-mass", choices=tuple(VARIANTS), default="both", help="rows with merge='nearest' "
        "and mass=1; full: also one without the other (%(default)s)")  # fmt: skip
    add("--scenes", type=at_least(1), default=300, help="per seed (%(default)s)")
    add("--questions", type=at_least(1), default=2, help="per scene (%(default)s)")
    add("--seeds", type=at_least(1), default=3, help="how many (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="the first one (%(default)s)")
    add("--batch", type=at_least(1), default=64, help="questions at once (%(default)s)")
    add("--plot", type=outputs.picture(style.FORMATS), metavar="FILE", help="also draw exact match "
        "over FLOPs")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A method at its sites and one budget; the dense model without a recipe."""

    recipe: Recipe | None
    fields: Record
    refused: list[str] = field(default_factory=list)

    def attach(self, model: Any, seed: int) -> AbstractContextManager[Any]:
        if self.recipe is None:
            return nullcontext()
        return vtc.attach(model, dataclasses.replace(self.recipe, seed=seed))

    @property
    def reads_tower(self) -> bool:
        """The tower has to run, because a step acts inside, asks what it knows or wants frames."""
        from ..adapters.vlm.tower import TOWER_SIGNALS

        steps = () if self.recipe is None else self.recipe.steps
        methods = [vtc.REDUCERS[step.method] for step in steps]
        needs = frozenset().union(*(method.needs for method in methods))
        inside = any(step.site.kind == "vision" for step in steps)
        return inside or bool(needs & TOWER_SIGNALS) or any(m.frames for m in methods)


def dense() -> Setting:
    """The model as it is."""
    fields = {"method": "dense", "site": "", "keep": 1.0, "merge": None, "mass": None}
    return Setting(None, fields)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.plot:
        style.pyplot()  # a missing matplotlib is reported before the work
    torch.set_num_threads(1)
    model, processor = load(args.model)
    settings, refused = plan(model, args)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = list(measure(model, processor, settings, seeds, args))
    shown = summarise(rows)

    asked = rows[0]["questions"]
    print(f"\n{args.model}, {args.seeds} x {asked} questions: {WORDING}\n")
    print(records.table(shown, COLUMNS))
    print(f"\nexact match by question type\n\n{records.table(shown, type_columns(rows[0]))}")
    late = (
        f"{s.fields['method']} keep={s.fields['keep']}: {r}" for s in settings for r in s.refused
    )
    for reason in (*refused, *late):
        print(f"\nnot run: {reason}")
    if args.json:
        records.write(args.json, rows, records.environment(model.dtype, args.seed))
    if args.plot:
        draw(rows, args.plot)
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A model of the zoo, or a folder like it, with its processor."""
    import vtc_zoo

    source = Path(source_of(name))
    answers(name)
    if not source.is_dir():
        raise BadInput(f"{name!r} is no model of the zoo, nor a folder like one.")
    try:
        model, processor = vtc_zoo.load_folder(source)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot load {name!r}: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise BadInput(
            f"{name!r} answers no questions: this exam is for models such as tiny-llava-shapes."
        )
    return model, processor


# ---------------------------------------------------------------------- what to run


def plan(model: Any, args: argparse.Namespace) -> tuple[list[Setting], list[str]]:
    """Every setting that the model accepts, and why others are refused."""
    methods = list(vtc.REDUCERS) if args.methods == ["all"] else args.methods
    adapter = adapter_for(model)
    settings = [dense()]
    refused: dict[str, None] = {}
    taken: set[tuple[Any, ...]] = set()

    def add(label: str, recipe: Recipe, keep: Keep) -> None:
        step = recipe.steps[0]
        site = "+".join(s.at for s in recipe.steps)
        key = (label, site, keep, step.merge, step.mass)
        if key in taken:
            return
        taken.add(key)
        with vtc.attach(model, recipe):
            pass
        settings.append(Setting(recipe, dict(zip(SETTING_COLUMNS, key, strict=True))))

    for keep in [*args.budgets, *[k for k in ("auto",) if k not in args.budgets]]:
        for merge, mass in VARIANTS[args.merge_mass]:
            own: list[Recipe] = []
            for label in dict.fromkeys((*CONTROLS, *methods)):
                name, params = method_and_params(label)
                if keep == "auto" and "auto" not in vtc.REDUCERS[name].budgets:
                    continue
                for at in args.at or [None]:
                    try:
                        options = {"merge": merge, "mass": mass, "host": adapter.host(), **params}
                        recipe = Recipe.build(name, adapter.depth, keep, at, **options)
                        _check_trained(recipe)
                        add(label, recipe, keep)
                        own.append(recipe)
                    except VtcError as error:
                        reason = str(error)
                        refused[reason if name in reason else f"{name}: {reason}"] = None
            for steps in filter(None, map(comparable, own)):
                for control in CONTROLS:
                    parts = (dataclasses.replace(s, method=control, params={}) for s in steps)
                    add(control, Recipe(tuple(parts)), keep)
    return settings, list(refused)


def _check_trained(recipe: Recipe) -> None:
    """A number of a method whose weights were never trained would say nothing about it."""
    for step in recipe.steps:
        method = step.build()
        if method.trained and getattr(method, "weights", None) is None:
            raise InvalidRecipe(
                f"{step.method} is nothing without trained weights: {step.method}:weights=FILE."
            )


def comparable(recipe: Recipe) -> list[Step]:
    """The steps that random and grid can take over: those with a fixed budget."""
    return [s for s in recipe.steps if s.keep != "auto" and s.site.kind != "cache"]


# ---------------------------------------------------------------------- the exam


def cost(model: Any, exam: Exam, setting: Setting, seed: int) -> tuple[flops.Flops, float]:
    """FLOPs, and CPU time over that of the dense model beside it, of the question in the middle
    (they are sorted by length), alone and from its pixels."""
    middle = exam.batches[len(exam.batches) // 2]
    one = middle.one(len(middle.types) // 2)

    def ask() -> float:
        started = time.process_time()
        answer(model, exam, one, pixels=True)
        return time.process_time() - started

    with setting.attach(model, seed):
        spent = flops.measure(model, ask)
    shares = []
    with no_collection():
        for _ in range(TIMED):
            with setting.attach(model, seed):
                seconds = ask()
            shares.append(seconds / ask())
    return spent, statistics.median(shares)


def measure(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    args: argparse.Namespace,
) -> Iterator[Record]:
    """One record per setting and seed."""
    known: dict[int, tuple[flops.Flops, float]] = {}
    with tqdm(total=len(seeds) * len(settings), desc="quality", mininterval=2) as bar:
        for seed in seeds:
            exam = set_exam(model, processor, seed, args.scenes, args.questions, args.batch)
            counts = exam.subject.counts
            others = frozenset(exam.subject.types) - counts
            for number, setting in enumerate(settings):
                bar.update()
                if setting.refused:
                    continue
                right, asked = Counter[str](), Counter[str]()
                try:
                    with setting.attach(model, seed) as session:
                        for batch in exam.batches:
                            told = answer(model, exam, batch, setting.reads_tower) == batch.answers
                            asked.update(batch.types)
                            right.update(
                                t for t, ok in zip(batch.types, told.tolist(), strict=True) if ok
                            )
                    if number not in known:
                        known[number] = cost(model, exam, setting, seed)
                except VtcError as error:  # a budget that cannot be reached shows when it runs
                    if setting.recipe is None:  # nothing could be compared with anything
                        raise
                    setting.refused.append(str(error))
                    continue
                stats = session.stats() if session is not None else {}
                spent, share_of_time = known[number]
                yield {
                    **setting.fields,
                    "seed": seed,
                    "scene_seed": scene_seed(seed),
                    "questions": asked.total(),
                    "exact_match": share(right, asked, lambda _: True),
                    "counting": share(right, asked, counts.__contains__),
                    "not_counting": share(right, asked, others.__contains__),
                    **{kind: share(right, asked, kind.__eq__) for kind in exam.subject.types},
                    "tokens_processed": stats.get("visual_tokens"),
                    "tokens_counted": stats.get("visual_tokens_leaving"),
                    "flops": spent.total,
                    "flops_tower": spent.tower,
                    "flops_language_model": spent.language_model,
                    "time": share_of_time,
                }


def share(right: Counter[str], asked: Counter[str], chosen: Callable[[str], bool]) -> float | None:
    """Right answers among the questions of the chosen types; None when there were none."""
    total = sum(n for kind, n in asked.items() if chosen(kind))
    return sum(n for kind, n in right.items() if chosen(kind)) / total if total else None


# ---------------------------------------------------------------------- showing


def summarise(rows: Sequence[Record]) -> list[Record]:
    """One record per setting, site by site and method by method.

    Exact matches become (mean, standard deviation) over seeds.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        key = tuple(row[name] for name in SETTING_COLUMNS)
        groups.setdefault(key, []).append(row)
    scores = ("exact_match", "counting", "not_counting", *types_in(rows[0]))
    out = []
    for group in groups.values():
        record = dict(group[0])
        for name in ("tokens_processed", "tokens_counted"):
            seen = [row[name] for row in group if row[name] is not None]
            record[name] = statistics.mean(seen) if seen else None
        for score in scores:
            values = [row[score] for row in group if row[score] is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            record[score] = (statistics.mean(values), spread) if values else None
        out.append(record)
    methods, sites = ({row[name]: None for row in rows} for name in ("method", "site"))
    places = [{name: at for at, name in enumerate(found)} for found in (sites, methods)]

    def place(row: Record) -> tuple[Any, ...]:
        variant = (row["merge"] == "nearest", row["mass"] or 0.0)
        return places[0][row["site"]], places[1][row["method"]], variant, -row["flops"]

    return sorted(out, key=place)


def draw(rows: Sequence[Record], path: Path) -> None:
    """Exact match over FLOPs, all questions and counting; `vtc plot pareto` draws more."""
    kind = points.QUALITY
    found = points.collect(kind, rows, "the records of this run")
    scores = [s for s in ("exact_match", "counting") if any(s in p.scores for p in found)]
    pareto.draw(kind, found, ["flops"], scores, path, WORDING)


def with_spread(value: tuple[float, float]) -> str:
    return f"{value[0]:.3f} ±{value[1]:.3f}" if value[1] else f"{value[0]:.3f}"


COLUMNS: dict[str, Any] = {
    **SETTING_COLUMNS,
    "tokens_processed": ".1f",
    "tokens_counted": ".1f",
    "flops": lambda value: f"{value / 1e6:.0f} M",
    "flops_language_model": lambda value: f"{value / 1e6:.0f} M",
    "time": ".2f",
    "exact_match": with_spread,
    "counting": with_spread,
    "not_counting": with_spread,
}


def types_in(row: Record) -> list[str]:
    """Question types: what stands between the sums and the tokens in a record."""
    names = list(row)
    return names[names.index("not_counting") + 1 : names.index("tokens_processed")]


def type_columns(row: Record) -> dict[str, Any]:
    return SETTING_COLUMNS | {kind: lambda value: f"{value[0]:.3f}" for kind in types_in(row)}
