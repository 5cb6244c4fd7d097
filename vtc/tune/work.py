"""Measuring candidates for a search, so that nothing is measured twice, whatever is killed when."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vtc

from ..bench.records import Record
from ..commands.leftout import LeftOut
from ..errors import InvalidInput, VtcError
from ..video.journal import Journal, Part, decode, lines
from . import items, loyalty
from .candidates import Candidate
from .items import Item
from .search import Goal, Result, rungs, search

#: stands for a candidate in the keys of records about items that are left out
GONE = "gone"


class Job:
    """Batches of items, and what was measured on each; a context manager that holds the journal.

    The journal is that of `vtc videoqa`, with one record for each candidate and batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        args: argparse.Namespace,
        found: Mapping[str, Candidate],
        given: Sequence[Item],
        left_out: LeftOut,
    ) -> None:
        self.model, self.processor, self.args, self.found = model, processor, args, found
        self.items, self.left_out = given, left_out
        chosen, held = items.split(given, args.holdout, args.seed)
        first = items.batches(chosen, args.batch_size)
        self.batches = first + items.batches(held, args.batch_size)
        self.choice = len(first)
        self.known: dict[str, Record] = {}
        #: batch -> place of an item that is left out, and why
        self.gone: dict[int, dict[int, str]] = {}
        self._journal = Journal(args.out)
        self._part: Part | None = None
        self.broken: dict[str, str] = {}
        self._warm = False

    def __enter__(self) -> Job:
        same = identity(self.model, self.processor, self.args, self.items)
        self._journal.open(same, self.args.overwrite)
        try:
            self.known = recorded(self._journal)
            self._recall()
            failed = {k: one["error"] for k, one in self.known.items() if "error" in one}
            self.broken = {key.partition(".")[0]: why for key, why in failed.items()}
            self._part = self._journal.part(0)
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._part is not None:
                self._part.close()
        finally:
            self._journal.close()

    def _recall(self) -> None:
        """What earlier starts left out."""
        for batch, items_ in enumerate(self.batches):
            record = self.known.pop(_key(GONE, batch), None)
            if record is not None:
                self.gone[batch] = {int(place): why for place, why in record["gone"].items()}
                for place, why in self.gone[batch].items():
                    self.left_out.add(items_[place].media, why)

    def there(self, batch: int) -> list[Item]:
        """The items of a batch that are not left out."""
        gone = self.gone.get(batch, {})
        return [item for place, item in enumerate(self.batches[batch]) if place not in gone]

    def search(self, goal: Goal) -> Result:
        """Choose on the first part of the items."""
        return search(list(self.found), steps(self.args, self.choice), self.measure, goal)

    def held_out(self, name: str) -> Record | None:
        """What is true of the chosen one on the items that it was not chosen on."""
        there = range(self.choice, len(self.batches))
        self._run([name], there)
        if name in self.broken:
            raise VtcError(
                f"{self.found[name].label} was chosen, but fails on an item that was held out: "
                f"{self.broken[name]} Run the same command again to choose without it."
            )
        return self._summary(name, there) if any(map(self.there, there)) else None

    def measure(self, names: Sequence[str], count: int) -> dict[str, Record]:
        """What is known of candidates on the first `count` batches, after measuring what is not."""
        self._run(names, range(count))
        return {name: self._summary(name, range(count)) for name in names}

    def _summary(self, name: str, batches: range) -> Record:
        if name in self.broken:
            return {"error": self.broken[name]}
        seen = [batch for batch in batches if self.there(batch)]
        if not seen:
            raise InvalidInput(f"no item is left: {self.left_out}")
        media = [one for batch in seen for one in items.contents(self.there(batch))]
        return loyalty.summary([self.known[_key(name, batch)] for batch in seen], media)

    def _run(self, names: Sequence[str], batches: range) -> None:
        """Measure what is not known: every batch is answered once by the dense model, then by all
        candidates."""
        if not names:
            return
        seen = sum(len(self.batches[b]) for b in batches)
        with tqdm(
            total=len(names) * len(batches), desc=f"{len(names)} candidates, {seen} items"
        ) as bar:
            for batch in batches:
                able = [name for name in names if name not in self.broken]
                waiting = [name for name in able if _key(name, batch) not in self.known]
                bar.update(len(names) - len(waiting))
                if waiting and self.there(batch):
                    self._answer(batch, waiting, bar)

    def _answer(self, batch: int, names: Sequence[str], bar: Any) -> None:
        """One batch, dense and by these candidates."""
        model, before = self.model, len(self.left_out)
        places = {id(item): place for place, item in enumerate(self.batches[batch])}
        lost: list[int] = []

        def name_of(item: Item) -> Path:
            lost.append(places[id(item)])
            return item.media

        answered = self.left_out.sound(self.there(batch), self._dense, name_of)
        if lost:
            why = [reason for _, reason in self.left_out.found[before:]]
            self.gone.setdefault(batch, {}).update(zip(lost, why, strict=True))
            self._append(_key(GONE, batch), {"gone": self.gone[batch]})
        if answered is None:
            bar.update(len(names))
            return
        inputs, wanted = answered[1]
        for name in names:
            try:
                with vtc.attach(model, self.found[name].recipe) as session:
                    record = loyalty.outcome(model, inputs, wanted, session)
            except VtcError as error:
                record = {"error": str(error)}
                self.broken[name] = str(error)
            self.known[_key(name, batch)] = record
            self._append(_key(name, batch), record)
            bar.update()

    def _dense(self, some: list[Item]) -> tuple[dict[str, Any], loyalty.Reference]:
        """Inputs of these items, and what the dense model answers."""
        inputs = items.encode(self.model, self.processor, some, self.args.frames)
        if not self._warm:
            loyalty.said(self.model, inputs, 1)  # the first run of a process is slower
            self._warm = True
        return inputs, loyalty.reference(self.model, inputs, self.args.max_new_tokens)

    def _append(self, key: str, record: Record) -> None:
        if self._part is None:
            raise VtcError("a Job measures inside its `with` block only.")
        self._part.append(key, record)
        self._part.flush(force=True)


def recorded(journal: Journal) -> dict[str, Record]:
    """All records that were written whole."""
    entries = (decode(line) for part in journal.parts() for _, line in lines(part))
    return {key: record for key, record in filter(None, entries)}


def steps(args: argparse.Namespace, batches: int) -> list[int]:
    """Batches of every rung."""
    if args.search == "grid":
        return [batches]
    return rungs(math.ceil(args.start / args.batch_size), batches)


def plan(
    args: argparse.Namespace, candidates: int, chosen: Sequence[Item], held: Sequence[Item]
) -> str:
    """How many answers a search takes at most, if it does not come back to those that wait."""
    batches = items.batches(chosen, args.batch_size)
    told, total, before, alive = [], 0, 0, candidates
    for step in steps(args, len(batches)):
        seen = sum(map(len, batches[:step]))
        told.append(f"{alive} candidates on {seen} items")
        total += alive * (seen - before)
        before, alive = seen, math.ceil(alive / 2)
    dense = len(chosen) + len(held)  # a rung asks of no batch that the one before has seen
    return (
        f"{args.search}: {', '.join(told)}; at most {total + len(held)} compressed answers, and "
        f"{dense} dense ones"
    )


# ---------------------------------------------------------------------- what a run is about


def identity(model: Any, processor: Any, args: argparse.Namespace, found: Sequence[Item]) -> Record:
    """What has to be the same for measurements to belong together. Candidates and goals may
    change: what they are, with the files that they name, is in `Candidate.name`."""
    import transformers

    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return {
        "model": args.model,
        "config": _hash(repr(sorted(config.items(), key=str)).encode()),
        "weights": _weights(model),
        "processor": _processor(processor),
        "dtype": str(model.dtype),
        "device": str(model.device),
        "attention": _attention(model),
        "data": f"{len(found)} items, {items.fingerprint(found)}",
        "frames": str(args.frames),
        "holdout": args.holdout,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "versions": f"vtc {vtc.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def _weights(model: Any) -> str:
    """Of some values of every parameter."""
    told = []
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        told.append(f"{name} {tuple(value.shape)} {flat[:: len(flat) // 16 + 1].tolist()}")
    return _hash("\n".join(told).encode())


def _processor(processor: Any) -> str:
    """Of its settings, its template and its words."""
    tokenizer = getattr(processor, "tokenizer", None)
    words = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    told = [processor.to_dict(), getattr(processor, "chat_template", None), words]
    return _hash(json.dumps(told, sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> str:
    """What JSON does not know; objects by their class, as their text may hold an address."""
    known = isinstance(value, torch.dtype | Path)
    return str(value) if known else type(value).__qualname__


def _attention(model: Any) -> str:
    """Implementations of the model and of the models within it."""
    configs = (getattr(part, "config", None) for part in model.modules())
    used = {(type(own).__name__, getattr(own, "_attn_implementation", None)) for own in configs}
    return ", ".join(sorted(f"{name} {kind}" for name, kind in used if kind is not None))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _key(name: str, batch: int) -> str:
    return f"{name}.{batch}"
