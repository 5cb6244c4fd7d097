"""Loyalty: how far compressed answers agree with those of the same model without compression.

No labels are needed, so it works on any model and on the user's own pictures and videos. What is
measured is said in `vtc.tune.loyalty`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.leftout import LeftOut
from ..errors import InvalidInput, InvalidRecipe, VtcError
from ..tune import items
from .options import CONTROLS, VARIANTS, at_least, budgets, names, prepare

if TYPE_CHECKING:
    from ..tune.items import Item
    from .quality import Setting
    from .records import Record

#: columns of what is measured
MEASURED: dict[str, Any] = {
    **{"exact": "", "tokens": "", "prefix": ".3f", "kl": "", "first_kl": ".3f"},
    **{"visual_tokens": ".1f", "flops": ".1%", "time": ".2f"},
}
EPILOG = """columns, means over items with standard errors (of pictures, not of questions):
  exact    share of answers that are the same to the last token (greedy decoding)
  tokens   share of positions of the dense answer with the same next token, given what is before
  prefix   share of the dense answer before the first difference
  kl       KL(dense || compressed) of the next token in nats, mean over those positions; first kl:
           of the first one
  flops    of the language model's prefill, over dense, without the methods' own work
  time     over dense, median of batches; on a busy machine see `vtc bench speed` instead
  right    with answers in --questions: share of right ones

Pictures, videos and lines that cannot be used are left out and named at the end (exit code 3).
The dense row is the model run again: what differs there is noise. Random and grid run beside every
method at its sites (--no-baselines: only if named).

examples:
  vtc zoo make-scenes --out scenes --n 100                        # or your own pictures
  vtc bench loyalty --model tiny-llava-shapes --images scenes --questions scenes/questions.jsonl \\
      --methods divprune,fastv --keep 0.5,0.25
  vtc bench loyalty --model org/name --images photos/ --methods divprune --keep 0.25 --json l.json
  vtc bench loyalty --model org/name --videos clips/ --prompt "What happens ?" --recipe mine.yaml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench loyalty`."""
    prepare(parser, "Agreement with the answers of the dense model; no labels needed.", EPILOG)
    items.configure(parser)
    add = parser.add_argument
    add("--methods", type=names, default=[], help="comma separated, parameters as name:key=value")
    add("--recipe", type=Path, nargs="+", default=[], metavar="YAML", help="recipes, too")
    add("--keep", type=budgets, default="0.5,0.25,0.1", dest="budgets", metavar="K",
        help="budgets of the methods (%(default)s)")  # fmt: skip
    add("--at", type=names, help="sites instead of the methods' own, comma separated")
    add("--merge-mass", choices=tuple(VARIANTS), default="off", help="rows with merge='nearest' "
        "and mass=1; full: also one without the other (%(default)s)")  # fmt: skip
    add("--baselines", action=argparse.BooleanOptionalAction, default=True,
        help="random and grid beside every method (%(default)s)")  # fmt: skip
    add("--seed", type=at_least(0), default=0, help="of methods that draw (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a setting failed while it ran."""
    import vtc

    from ..commands.loading import load_model
    from . import quality, records

    left_out = LeftOut()
    found = items.given(args, left_out)
    if not args.methods and not args.recipe:
        raise InvalidRecipe("nothing to compare with the dense model: give --methods or --recipe.")
    recipes = [(path.name, vtc.Recipe.load(path)) for path in args.recipe]
    found = items.readable(found, left_out)
    model, processor = load_model(args)
    settings, refused = planned(model, args, recipes)
    rows, failed = measure(model, processor, settings, found, args, left_out)
    seen, length = rows[0]["items"], rows[0]["positions"]
    told = f"{args.model}, {seen} items, dense answers of {length:.1f} tokens"
    columns = {**quality.SETTING_COLUMNS, **MEASURED, "right": ".3f"}
    print(f"\n{told}\n\n{records.table(shown(rows), columns)}")
    for reason in (*refused, *failed):
        print(f"\nnot run: {reason}")
    if args.json:
        where = records.environment(model.dtype, args.seed) | {"model": args.model}
        records.write(args.json, rows, where)
    code = left_out.tell()
    return 1 if failed else code


def planned(
    model: Any, args: argparse.Namespace, recipes: Sequence[tuple[str, Any]]
) -> tuple[list[Setting], list[str]]:
    """The dense model, methods at their budgets and recipes, and why others are refused."""
    import vtc

    from . import quality

    settings, refused = quality.plan(model, args) if args.methods else ([quality.dense()], [])
    if not args.baselines:
        named = {method.partition(":")[0] for method in args.methods}
        others = [name for name in CONTROLS if name not in named]
        settings = [s for s in settings if s.fields["method"] not in others]
    for name, recipe in recipes:
        with vtc.attach(model, recipe):
            pass  # what does not fit shows before the work
        settings.append(quality.Setting(recipe, {**dict.fromkeys(quality.SETTING_COLUMNS),
            "method": name, "site": "+".join(step.at for step in recipe.steps)}))  # fmt: skip
    if len(settings) == 1:
        raise VtcError(f"nothing fits this model: {'; '.join(refused)}")
    return settings, refused


def measure(
    model: Any,
    processor: Any,
    settings: Sequence[Setting],
    found: Sequence[Item],
    args: argparse.Namespace,
    left_out: LeftOut,
) -> tuple[list[Record], list[str]]:
    """One record per setting, and why some could not run. Batch by batch: the dense distributions
    of no more than one batch are held. Items that the dense model cannot answer are left out."""
    from tqdm import tqdm

    from ..tune import loyalty

    def dense(some: list[Item]) -> tuple[dict[str, Any], Any]:
        inputs = items.encode(model, processor, some, args.frames)
        if not done:
            loyalty.said(model, inputs, 1)  # the first run of a process is slower
        return inputs, loyalty.reference(model, inputs, args.max_new_tokens)

    done: list[list[Item]] = []
    got: list[list[Record]] = [[] for _ in settings]
    failed: dict[int, str] = {}
    parts = items.batches(found, args.batch_size)
    with tqdm(total=len(parts) * len(settings), desc="loyalty", mininterval=2) as bar:
        for whole in parts:
            answered = left_out.sound(whole, dense, lambda item: item.media)
            if answered is None:
                bar.update(len(settings))
                continue
            part, (inputs, wanted) = answered
            done.append(part)
            for number, setting in enumerate(settings):
                bar.update()
                if number in failed:
                    continue
                try:
                    with setting.attach(model, args.seed) as session:
                        one = loyalty.outcome(model, inputs, wanted, session)
                        one["right"] = list(right(model, processor, part, inputs, wanted, one))
                except VtcError as error:
                    if setting.recipe is None:
                        raise VtcError(
                            f"the dense model, run again, cannot be measured, and nothing can be "
                            f"compared with it: {error}"
                        ) from error
                    failed[number] = f"{label(setting.fields)}: {error}"
                    continue
                got[number].append(one | {"lengths": wanted.lengths})
    if not done:
        raise InvalidInput(f"no item is left: {left_out}")
    media = [one for part in done for one in items.contents(part)]
    ran = [number for number in range(len(settings)) if number not in failed]
    return [row(settings[i], got[i], media) for i in ran], list(failed.values())


def right(
    model: Any,
    processor: Any,
    part: Sequence[Item],
    inputs: dict[str, Any],
    wanted: Any,
    one: Record,
) -> Iterator[bool]:
    """Whether answers are right, of items whose file says what is. Where all are those of the dense
    model they are known, else the model answers once more by itself."""
    from ..tune import loyalty

    if all(item.right("") is None for item in part):
        return
    tokens = wanted.tokens
    if not all(row["exact"] for row in one["items"]):
        tokens = loyalty.said(model, inputs, tokens.shape[1])
    texts = processor.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
    for item, text in zip(part, texts, strict=True):
        known = item.right(text)
        if known is not None:
            yield known


def row(setting: Setting, outcomes: Sequence[Record], media: Sequence[bytes]) -> Record:
    """One flat record of a setting; media: what every item is about."""
    from ..tune.loyalty import summary

    lengths = [n for one in outcomes for n in one["lengths"]]
    judged = [ok for one in outcomes for ok in one["right"]]
    return {
        **setting.fields,
        **summary(outcomes, media),
        "positions": sum(lengths) / len(lengths),
        "right": sum(judged) / len(judged) if judged else None,
        **({"flops": 1.0} if setting.recipe is None else {}),
    }


def label(fields: Record) -> str:
    """`divprune at projector keep=0.25 merge mass=1`."""
    words = [fields["method"], f"at {fields['site']}"]
    words += [f"keep={fields['keep']}"] * (fields["keep"] is not None)
    words += ["merge"] * (fields["merge"] == "nearest")
    words += [f"mass={fields['mass']:g}"] * bool(fields["mass"])
    return " ".join(words)


def shown(rows: Sequence[Record]) -> list[Record]:
    """For a table: measures with their standard errors as text."""

    def spread(value: float, error: float | None) -> str:
        return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"

    return [
        row | {name: spread(row[name], row[f"{name}_se"]) for name in ("exact", "tokens", "kl")}
        for row in rows
    ]
