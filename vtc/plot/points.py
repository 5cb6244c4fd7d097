"""Points of a plot from the records that the benches write: what a setting scores, and its cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidInput

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """A number of a record.

    Attributes:
        label: beside the axis, with its unit. read: the number of a record; KeyError or None where
            it has none. counts: it has a size, so that labels may say M, G or T.
    """

    label: str
    read: Callable[[Record], float | None]
    counts: bool = False


@dataclass(frozen=True)
class Kind:
    """Records of one bench.

    Attributes:
        bench: `vtc bench` that writes them. keys: what all of them have. score: the usual one.
        scores, costs: what can be drawn over what; a field NAME_se is the error of a score NAME.
        panel: fields whose values get panels of their own. ideal: a score can be foretold.
    """

    bench: str
    keys: frozenset[str]
    score: str
    scores: Mapping[str, Axis]
    costs: Mapping[str, Axis]
    panel: tuple[str, ...] = ()
    ideal: bool = False


@dataclass(frozen=True)
class Point:
    """One setting: costs by name, and (mean, spread) of its scores."""

    method: str
    site: str
    options: str
    keep: Any
    source: str
    panel: str
    costs: dict[str, float] = field(default_factory=dict)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def series(self) -> tuple[str, str, str, str]:
        return (self.source, self.method, self.site, self.options)


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name]


def _after(record: Record) -> float:
    """`576 -> 144` -> 144."""
    return float(str(record["tokens"]).rpartition(" ")[2])


RIGHT = Axis("right answers", _field("right"))
EXACT = {
    "exact_match": Axis("right answers, all questions", _field("exact_match")),
    "counting": Axis("right answers, counting", _field("counting")),
    "not_counting": Axis("right answers, all but counting", _field("not_counting")),
}
LOYAL = {
    "exact": Axis("answers equal to the dense model's", _field("exact")),
    "tokens": Axis("answer tokens equal to the dense model's", _field("tokens")),
    "right": RIGHT,
}
SHARES = {
    "flops": Axis("FLOPs, share of the dense model's", _field("flops")),
    "time": Axis("time, share of the dense model's", _field("time")),
    "tokens": Axis("visual tokens per image, mean over layers", _field("visual_tokens")),
}

QUALITY = Kind(
    "quality",
    frozenset({"method", "site", "keep", "merge", "mass", "exact_match", "flops"}),
    "exact_match",
    EXACT,
    {
        "flops": Axis("FLOPs of one question, tower and prefill", _field("flops"), True),
        "time": SHARES["time"],
        "tokens": Axis("visual tokens per image, mean over layers", _field("tokens_processed")),
    },
)
KINDS = (
    QUALITY,
    Kind(
        "loyalty",
        frozenset({"method", "site", "keep", "merge", "mass", "exact", "kl", "flops"}),
        "exact",
        LOYAL,
        SHARES,
    ),
    Kind(
        "videoqa",
        frozenset({"what", "rate", "right", "tokens"}),
        "right",
        {"right": RIGHT},
        {
            "time": Axis("time of one question, ms", lambda r: 1e3 / r["rate"]),
            "tokens": Axis("visual tokens per video", _after),
        },
        panel=("processes",),
    ),
    Kind(
        "speed, dit or vit",
        frozenset({"case", "speedup", "flops_ratio"}),
        "speedup",
        {"speedup": Axis("times as fast as the dense model", _field("speedup"))},
        {"flops": Axis("FLOPs, share of the dense model's", lambda r: 1 / r["flops_ratio"])},
        panel=("model", "pixels", "dtype"),
        ideal=True,
    ),
)


def read(paths: Sequence[Path]) -> tuple[Kind, list[Point]]:
    """Points of one or more files of one kind. Records of several seeds become one point."""
    files = {path: _records(path) for path in paths}
    kinds = {path: _kind(path, records) for path, records in files.items()}
    if len({id(kind) for kind in kinds.values()}) > 1:
        told = ", ".join(f"{path} (vtc bench {kind.bench})" for path, kind in kinds.items())
        raise InvalidInput(f"files of different benches do not share axes: {told}. Plot each.")
    kind = next(iter(kinds.values()))
    points = [
        point
        for path, records in files.items()
        for point in collect(kind, records, str(path), path.stem if len(files) > 1 else "")
    ]
    return kind, points


def collect(kind: Kind, records: Sequence[Record], name: str, source: str = "") -> list[Point]:
    """The points of the records of one file called `name`."""
    own = [
        record
        for record in records
        if (kind.keys <= set(record) or _dense_case(record))
        and "early layers" not in str(record.get("case"))  # half of a limit
    ]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    varied = [f for f in kind.panel if len({str(record.get(f)) for record in own}) > 1]
    for record in own:
        told = ", ".join(f"{f} {record[f]}" if f != "model" else record[f] for f in varied)
        key = (*_setting(record), source, told)
        groups.setdefault(key, []).append(record)
    points = [_point(kind, key, rows, name) for key, rows in groups.items()]
    if all(point.method in ("dense", "limit") for point in points):
        raise InvalidInput(
            f"{name} has no method, only the dense model: run `vtc bench {kind.bench}` with a "
            f"method that this model supports."
        )
    return points


def _records(path: Path) -> list[Record]:
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.strip() else []
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} is no JSON that can be read: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise InvalidInput(f"{path} holds no list of records: {_wanted()}")
    if not found:
        raise InvalidInput(f"{path} is empty: {_wanted()}")
    return found


def _kind(path: Path, records: Sequence[Record]) -> Kind:
    for kind in KINDS:
        if any(kind.keys <= set(record) for record in records):
            return kind
    keys = ", ".join(sorted({key for record in records for key in record})[:12]) or "nothing"
    raise InvalidInput(f"{path} has no score over a cost (its records have: {keys}). {_wanted()}")


def _wanted() -> str:
    names = ", ".join(kind.bench for kind in KINDS)
    return f"give what `vtc bench NAME --json FILE` writes, with one of {names}."


def _dense_case(record: Record) -> bool:
    """The dense row of benches that compare with it: it has no speed-up of its own."""
    return record.get("case") == "dense" and "flops_ratio" in record


def _setting(record: Record) -> tuple[str, str, str, Any]:
    """Method, site, options and budget."""
    if {"method", "site", "keep", "merge", "mass"} <= set(record):
        merge, mass = record["merge"] == "nearest", record["mass"] or 0.0
        options = "+".join(name for name, on in (("merge", merge), ("mass", mass)) if on)
        return record["method"], record["site"] or "", options, record["keep"]
    name = str(record.get("case", record.get("what")))
    kind = name.partition(" ")[0]
    again = "again" if name == "dense again" else ""  # measured twice: the noise
    return kind if kind in ("dense", "limit") else name, "", again, name


def _point(kind: Kind, key: tuple[Any, ...], rows: Sequence[Record], name: str) -> Point:
    method, site, options, keep, source, panel = key
    point = Point(method, site, options, keep, source, panel)
    for cost, axis in kind.costs.items():
        values = [v for row in rows if (v := _number(axis, row, name)) is not None]
        if values:
            point.costs[cost] = statistics.mean(values)
    for score, axis in scores_of(kind, rows[0]).items():
        values = [v for row in rows if (v := _number(axis, row, name)) is not None]
        if method == "dense" and kind.ideal:  # compared with itself
            values = values or [1.0]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            error = _number(Axis(score, _field(f"{score}_se")), rows[0], name)
            point.scores[score] = (statistics.mean(values), spread or error or 0.0)
    return point


def scores_of(kind: Kind, record: Record) -> dict[str, Axis]:
    """The scores of a kind, and question types, which lie between the sums and the tokens."""
    if "not_counting" not in record or "tokens_processed" not in record:
        return dict(kind.scores)
    names = list(record)
    types = names[names.index("not_counting") + 1 : names.index("tokens_processed")]
    return {**kind.scores, **{n: Axis(f"right answers, {n}", _field(n)) for n in types}}


def _number(axis: Axis, record: Record, name: str) -> float | None:
    try:
        value = axis.read(record)
    except (KeyError, ZeroDivisionError):
        return None
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name}: no number for {axis.label!r} in {dict(record)}.") from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{name}: {value!r} is no number for {axis.label!r}.")
    return float(value)
