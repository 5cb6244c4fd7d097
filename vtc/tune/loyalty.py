"""Loyalty of a compressed model to the same model without compression. No labels are needed.

The dense model answers greedily. The compressed one is then given that answer token by token: at
every position its distribution of the next token is compared with the dense one, and its favourite
with the token that stands there. Up to the first difference this is what it would have said itself,
so the answers are the same exactly when there is none. Positions are the tokens of the dense answer
with its end token; distributions are those that `generate` chooses from, so a repetition penalty of
the model is in them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bench.records import Record
from ..errors import InvalidInput
from ..session import Session
from ..video.answer import answer_length, ends_of, wait

#: numbers of one item: the whole answer is the same; share of positions with the same favourite;
#: share of the answer before the first difference; KL(dense || compressed) in nats, mean over
#: positions, and at the first one
MEASURES = ("exact", "tokens", "prefix", "kl", "first_kl")


class NotNumbers(InvalidInput):
    """The model computed NaN or infinities where it should have chosen a word, or its distribution
    is infinitely far from the dense one."""


@dataclass(frozen=True)
class Reference:
    """Dense answers: tokens [B, L], the positions of each row that count, scores L x [B, V]."""

    tokens: Tensor
    lengths: tuple[int, ...]
    scores: list[Tensor]
    seconds: float


class _Watch:
    """Called by `generate` with the scores [B, V] of every step; its own time is not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wait(scores.device)
        started = time.perf_counter()
        if not bool(torch.isfinite(scores.logsumexp(-1)).all()):
            raise NotNumbers(
                "the model computed NaN or infinities for the next word of an answer. Check the "
                "images, or load the model in another --dtype."
            )
        scores = self.step(scores)
        wait(scores.device)
        self.seconds += time.perf_counter() - started
        return scores

    def step(self, scores: Tensor) -> Tensor:
        return scores


class _Keep(_Watch):
    """Keeps all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def step(self, scores: Tensor) -> Tensor:
        self.scores.append(scores)
        return scores


class _Force(_Watch):
    """Compares every step with a reference, and lets nothing but its token be said."""

    def __init__(self, wanted: Reference) -> None:
        super().__init__()
        self.wanted = wanted
        self.same: list[Tensor] = []
        self.kl: list[Tensor] = []

    def step(self, scores: Tensor) -> Tensor:
        at = len(self.same)
        if at == self.wanted.tokens.shape[1]:  # `generate` may run a step ahead on a GPU
            return scores
        token = self.wanted.tokens[:, at]
        self.same.append(scores.argmax(-1) == token)
        self.kl.append(divergence(self.wanted.scores[at], scores))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) [B] in nats, of scores [B, V]; exactly 0 for equal ones."""
    p, q = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


# ---------------------------------------------------------------------- one batch


def reference(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Reference:
    """What the model answers now, greedily; run it without a session."""
    watch = _Keep()
    tokens, seconds = _generate(model, inputs, max_new_tokens, watch)
    return Reference(tokens, _lengths(model, tokens), watch.scores[: tokens.shape[1]], seconds)


def compare(model: Any, inputs: dict[str, Any], wanted: Reference) -> tuple[list[Record], float]:
    """`MEASURES` of every item, and the seconds of the model, as it runs now: in a session."""
    watch = _Force(wanted)
    _, seconds = _generate(model, inputs, wanted.tokens.shape[1], watch)
    same, kl = torch.stack(watch.same, 1).tolist(), torch.stack(watch.kl, 1).tolist()  # [B, L]
    rows = []
    for own, far, n in zip(same, kl, wanted.lengths, strict=True):
        own, far = own[:n], far[:n]
        before = own.index(False) if False in own else n
        if not all(map(math.isfinite, far)):
            raise NotNumbers(
                "the KL of a next word is not finite: the compressed model rules out a word that "
                "the dense one may say. Check for values that overflow in this --dtype."
            )
        numbers = (float(before == n), sum(own) / n, before / n, math.fsum(far) / n, far[0])
        rows.append(dict(zip(MEASURES, numbers, strict=True)))
    return rows, seconds


def outcome(
    model: Any, inputs: dict[str, Any], wanted: Reference, session: Session | None
) -> Record:
    """One batch as plain data: measures of its items, FLOPs and seconds of both models."""
    rows, seconds = compare(model, inputs, wanted)
    stats = {} if session is None else session.stats()
    return {
        "items": rows,
        "seconds": seconds,
        "seconds_dense": wanted.seconds,
        "flops": stats.get("flops"),
        "flops_dense": stats.get("flops_dense"),
        "visual_tokens": stats.get("visual_tokens"),
    }


@torch.inference_mode()
def _generate(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, watch: _Watch
) -> tuple[Tensor, float]:
    """New tokens [B, L] of greedy answers, and seconds."""
    wait(model.device)
    started = time.perf_counter()
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        logits_processor=[watch],
    )
    wait(model.device)
    seconds = time.perf_counter() - started - watch.seconds
    return ids[:, inputs["input_ids"].shape[1] :], seconds


def said(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Tensor:
    """New tokens [B, L] of the answers that the model gives by itself."""
    return _generate(model, inputs, max_new_tokens, _Watch())[0]


def _lengths(model: Any, tokens: Tensor) -> tuple[int, ...]:
    """Tokens of each answer up to its end token, and that one."""
    ends = ends_of(model)
    return tuple(answer_length(row, ends) for row in tokens.tolist())


# ---------------------------------------------------------------------- many batches


def summary(outcomes: Sequence[Record], media: Sequence[Hashable] | None = None) -> Record:
    """One flat record: means over items and their standard errors, FLOPs and time over dense.

    media: of every item the picture or video that it is about, of equal ones the same; by default
        each is about another one. Items about one picture are not independent: `media` of the
        record is the number of different ones.
    The time is the median over batches of their ratios. `flops` is None for the dense model.
    """
    items = [row for one in outcomes for row in one["items"]]
    media = range(len(items)) if media is None else media
    record: Record = {"items": len(items), "media": len(set(media))}
    for name in MEASURES:
        values = [row[name] for row in items]
        record[name] = statistics.fmean(values)
        record[f"{name}_se"] = standard_error(values, media)
    record["time"] = statistics.median(one["seconds"] / one["seconds_dense"] for one in outcomes)
    record["flops"] = record["visual_tokens"] = None
    if outcomes[0]["flops_dense"]:
        record["flops"] = sum(o["flops"] for o in outcomes) / sum(
            o["flops_dense"] for o in outcomes
        )
        weighted = (o["visual_tokens"] * len(o["items"]) for o in outcomes)
        record["visual_tokens"] = math.fsum(weighted) / len(items)
    return record


def standard_error(values: Sequence[float], media: Sequence[Hashable]) -> float | None:
    """Of the mean of values, where those about one picture may be alike; None for one picture.

    With as many values for every picture it is that of the mean of the pictures' means.
    """
    mean, far = statistics.fmean(values), dict.fromkeys(media, 0.0)
    for value, own in zip(values, media, strict=True):
        far[own] += value - mean
    n = len(far)
    if n < 2:
        return None
    return math.sqrt(n / (n - 1) * math.fsum(x * x for x in far.values())) / len(values)


def interval(share: float, n: int, z: float) -> tuple[float, float]:
    """Wilson's interval of a share that was seen on n independent items: as many as there are
    different pictures and videos, however much is asked about each. Numbers between 0 and 1 spread
    no wider than shares do, so it holds for their means too."""
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
