"""`vtc demo`: the small trained model answers questions, dense and with every method that fits.

A sanity benchmark: one small model, drawn scenes, a few questions. It shows that the library works
and how methods differ, not which one is best for a large model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .. import draw
from ..errors import InvalidInput, VtcError
from ..reducer import Composite, Host, Selector
from ..registry import REDUCERS
from ..session import Reduction, attach
from . import tables
from .describe import describe
from .leftout import LeftOut
from .loading import BadImage, open_image

OUT = Path("out")
PICTURES = Path(__file__).parents[2] / "demos" / "pictures"
BUDGETS, QUICK_BUDGETS = (0.5, 0.25, 0.1), (0.25, 0.1)
QUESTIONS, QUICK_QUESTIONS = 120, 12
EXTRA_SEED = 22  # scenes beyond demos/pictures; training scenes have other seeds
BATCH = 12
SINGLE = 8  # answers printed one by one
PANEL = 132  # pixels of one picture of the sheet

#: simple methods first, then by where they act; unknown ones follow
ORDER = (
    *("random", "grid", "norm", "divprune", "zoo_prune", "visionzip"),
    *("fastv", "dart", "pdrop", "mustdrop"),
)

NOTE = """\
right: exact matches; tokens: visual tokens of one image, stage by stage; prefill: FLOPs of the
language model, which sees all tokens up to the site; ms: time of one answer on one core, in
batches; method ms: what choosing the tokens took of it. This is a sanity benchmark on one small
trained model. The ranks of methods may differ at scale, and at this size choosing tokens can take
longer than dropping them saves."""


@dataclass(frozen=True)
class Item:
    """A question about a picture, and what is right."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Setting:
    """One method at one budget; without a method, the dense model."""

    method: str = ""
    keep: float = 1.0
    merge: bool = False

    @property
    def name(self) -> str:
        return (self.method or "dense") + (" + merge + mass" if self.merge else "")

    @property
    def options(self) -> dict[str, Any]:
        """For `attach`."""
        extra = {"merge": "nearest", "mass": 1.0} if self.merge else {}
        return {"method": self.method, "keep": self.keep, **extra}


@dataclass(frozen=True)
class Result:
    """What one setting answered and what that cost.

    Attributes:
        answers, right: one per question.
        seconds: all questions together; stats: totals of the session, empty when dense.
        first: reductions of the first batch, one per stage.
    """

    setting: Setting
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    seconds: float
    stats: dict[str, Any]
    first: tuple[Reduction, ...]

    @property
    def sites(self) -> list[dict[str, Any]]:
        return self.stats.get("sites", [])

    @property
    def place(self) -> str:
        """The site, or the layers of several: 'decoder.1,2,3'."""
        names = [site["site"].partition(".") for site in self.sites]
        kinds = dict.fromkeys(kind for kind, _, _ in names)
        layers = {kind: ",".join(n for k, _, n in names if k == kind) for kind in kinds}
        return " ".join(f"{kind}.{found}" if found else kind for kind, found in layers.items())


def run(model: Any, processor: Any, out: Path, questions: int | None, quick: bool) -> int:
    """Answer, print the tables, write the picture. Returns the exit code."""
    if questions is not None and questions < 1:
        raise InvalidInput(f"{questions} questions: ask at least one.")
    left_out = LeftOut()
    items = load_items(questions or (QUICK_QUESTIONS if quick else QUESTIONS), left_out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker than several for matrices this small, and times repeat
    try:
        results = measure(model, processor, items, settings(model, quick))
    finally:
        torch.set_num_threads(threads)
    scenes = len({id(item.image) for item in items})
    print(f"\n{len(items)} questions about {scenes} pictures, greedy answers\n")
    print(f"{summary(results)}\n\n{NOTE}\n\n{single_answers(results, items)}")
    draw.save(picture(results, items), out / "kept_tokens.png")
    return left_out.tell()


def load_items(count: int, left_out: LeftOut | None = None) -> list[Item]:
    """The questions about demos/pictures, then questions about freshly drawn scenes."""
    from vtc_zoo.shapes import DEMO_SEED

    there = (PICTURES / "questions.jsonl").is_file()
    items = packaged(PICTURES, left_out) if there else drawn(QUICK_QUESTIONS // 2, DEMO_SEED)
    if count > len(items):
        items += drawn(count - len(items), EXTRA_SEED)
    return items[:count]


def packaged(folder: Path, left_out: LeftOut | None = None) -> list[Item]:
    """Questions of a folder that `vtc zoo make-scenes` wrote, about the pictures that can be
    read."""
    left_out = LeftOut() if left_out is None else left_out
    images: dict[str, Image.Image | None] = {}
    items = []
    for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["image"] not in images:
            try:
                images[row["image"]] = open_image(folder / row["image"])
            except BadImage as error:
                images[row["image"]] = None
                left_out.add(row["image"], error)
        image = images[row["image"]]
        if image is not None:
            items.append(Item(image, row["question"], row["answer"]))
    return items


def drawn(scenes: int, seed: int) -> list[Item]:
    """Two questions about each of some new scenes."""
    from vtc_zoo.shapes import test_set

    found = test_set(scenes, 2, seed)
    return [Item(scene.image, q.text, q.answer) for scene, asked in found for q in asked]


def settings(model: Any, quick: bool) -> list[Setting]:
    """Dense, then every method that this model supports at every budget. Methods that are steps of
    another one are left to it; those that need training, or videos, are left out."""
    whole = (REDUCERS[name] for name in REDUCERS if issubclass(REDUCERS[name], Composite))
    steps = {part.method for cls in whole for part in cls().parts(Host(32), None)}
    found = describe(model).methods.items()
    fits = [
        name
        for name, where in found
        if not where.startswith("no")
        and name not in steps
        and not (REDUCERS[name].trained or REDUCERS[name].frames)
        and not issubclass(REDUCERS[name], Selector)
    ]
    fits.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    out = [Setting()]
    budgets = QUICK_BUDGETS if quick else BUDGETS
    for name in fits:
        out += [Setting(name, keep) for keep in budgets]
        if name == "divprune":
            out += [Setting(name, keep, merge=True) for keep in budgets]
    return out


def measure(
    model: Any, processor: Any, items: Sequence[Item], wanted: Sequence[Setting]
) -> list[Result]:
    """Let the model answer everything in every setting; a setting that is refused is named."""
    batches = [encode(processor, items[i : i + BATCH]) for i in range(0, len(items), BATCH)]
    generate(model, processor, batches[0])  # the first run of a process is slow
    results = []
    with tqdm(total=len(wanted) * len(batches), unit="batch") as bar:
        for setting in wanted:
            bar.set_description(f"{setting.name} {setting.keep:.0%}")
            try:
                results.append(answer(model, processor, items, batches, setting, bar))
            except VtcError as error:
                bar.write(f"left out: {setting.name} {setting.keep:.0%}: {error}")
    return results


def answer(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    batches: Sequence[Any],
    setting: Setting,
    bar: Any,
) -> Result:
    """All questions in one setting."""
    answers: list[str] = []
    first: tuple[Reduction, ...] = ()
    seconds, stats = 0.0, dict[str, Any]()
    session = attach(model, **setting.options) if setting.method else None
    with session or nullcontext():
        for inputs in batches:
            started = time.perf_counter()
            answers += generate(model, processor, inputs)
            seconds += time.perf_counter() - started
            if session is not None and not first:
                first = tuple(session.trace)
            bar.update()
        if session is not None:
            stats = session.stats()
    right = tuple(a == item.answer for a, item in zip(answers, items, strict=True))
    return Result(setting, tuple(answers), right, seconds, stats, first)


def encode(processor: Any, items: Sequence[Item]) -> Any:
    """One left-padded batch."""
    from vtc_zoo import prompt

    return processor(
        images=[item.image for item in items],
        text=[prompt(item.question) for item in items],
        padding=True,
        return_tensors="pt",
    )


def generate(model: Any, processor: Any, inputs: Any) -> list[str]:
    """Greedy answers of one batch."""
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def summary(results: Sequence[Result]) -> str:
    """One line per setting."""
    dense = next((r.stats["flops_dense"] for r in results if r.stats), 0.0)
    rows = []
    for r in results:
        n, flops = len(r.answers), r.stats.get("flops", dense)
        seen = [site for site in r.sites if site["site"] != "cache"]  # it counts every layer
        counts = [seen[0]["tokens_in"], *(s["tokens_out"] for s in seen)] if seen else []
        method = f"{1e3 * sum(s['seconds'] for s in r.sites) / n:.2f}" if r.sites else "-"
        rows.append(
            (
                r.setting.name,
                f"{r.setting.keep:.0%}",
                f"{sum(r.right)}/{n}",
                f"{sum(r.right) / n:.1%}",
                r.place or "-",
                " -> ".join(f"{c / n:.0f}" for c in counts) or "all",
                f"{flops / n / 1e6:.0f} MFLOPs" if dense else "-",
                f"{flops / dense:.0%}" if dense else "-",
                f"{1e3 * r.seconds / n:.1f}",
                method,
            )
        )
    header = ("method", "keep", "right", "share", "site", "tokens", "prefill", "of dense", "ms")
    return tables.text_table((*header, "method ms"), rows, room=tables.terminal())


def single_answers(results: Sequence[Result], items: Sequence[Item]) -> str:
    """The first questions, and what was answered at the smallest budget."""
    least = min(r.setting.keep for r in results)
    shown = [r for r in results if not r.setting.method or r.setting.keep == least]
    numbers = range(min(SINGLE, len(items)))
    lines = [f"{i + 1}  {items[i].question}  {items[i].answer}" for i in numbers]
    rows = [
        (r.setting.name, *(r.answers[i] + ("" if r.right[i] else " !") for i in numbers))
        for r in shown
    ]
    numbered = ("", *(str(i + 1) for i in numbers))
    table = tables.text_table(numbered, rows, room=tables.terminal())
    title = f"single answers with {least:.0%} of the tokens (! is wrong)"
    return "\n".join([f"{title}\n", *lines, "", table])


def picture(results: Sequence[Result], items: Sequence[Item]) -> Image.Image:
    """Rows are methods, columns are budgets, for two questions of the first batch."""
    dense, reduced = results[0], [r for r in results if r.first]
    budgets = sorted({r.setting.keep for r in reduced}, reverse=True)
    shown = telling(results, items[:BATCH])
    columns, groups = tuple(f"keep {k:.0%}" for k in budgets), []
    for i in shown:
        whole = items[i].image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)
        told = f"{items[i].question}\nright: {items[i].answer}\nall tokens: {dense.answers[i]}"
        groups.append(draw.Group(draw.Cell(whole, told), columns))
    rows: dict[str, list[draw.Cell | None]] = {}
    for r in reduced:
        detail = "\n+ merge, mass 1" if r.setting.merge else ""
        label = f"{r.setting.method}{detail}\n{r.place}"
        cells = rows.setdefault(label, [])
        cells += [None] * (len(budgets) * len(shown) - len(cells))
        for group, number in enumerate(shown):
            at = group * len(budgets) + budgets.index(r.setting.keep)
            cells[at] = cell(r, items[number].image, number)
    return draw.sheet(
        "The image patches that reach the last layer of the language model",
        groups,
        list(rows.items()),
        "The questions on which the methods differ most; one small model. Not a ranking.",
    )


def cell(result: Result, image: Image.Image, number: int) -> draw.Cell:
    """One question in one setting."""
    left = len(draw.fates(result.first, number)[-1].kept)
    shot = draw.overlay(image, result.first, number, size=PANEL, stages="last", captions=False)
    right = result.right[number]
    said = f"{left} left: {result.answers[number] or '-'}{'' if right else ' (wrong)'}"
    return draw.Cell(shot, said, right)


def telling(results: Sequence[Result], items: Sequence[Item]) -> list[int]:
    """Two questions about different pictures that the dense model answers right and on which the
    methods differ most."""

    def split(number: int) -> tuple[bool, int]:
        hits = sum(r.right[number] for r in results)
        return results[0].right[number], min(hits, len(results) - hits)

    ranked = sorted(range(len(items)), key=split, reverse=True)
    others = [i for i in ranked if items[i].image is not items[ranked[0]].image]
    return [ranked[0], *others[:1]]
