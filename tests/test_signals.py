"""Signals against the attention weights that the same model reports in eager mode.

A probe method asks for every signal, keeps what it saw, and drops half of the tokens. A dense
model with the same weights gives the references: the weights of the eager attention function, and
the keys and queries it is called with. Signals never need either.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.adapters.attention import eager_function
from vtc.adapters.vlm.signals import PREVIOUS_LAYER_SIGNALS, SEQUENCE_SIGNALS
from vtc.errors import MissingSignal, NothingReduced
from vtc.plan import Plan
from vtc.reducer import Method
from vtc.testing import families, trace
from vtc.testing.families import Family

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
LAYER = 2  # an even layer; the layer before it is a full-attention layer in gemma3
EXACT = 1e-6  # attention rows
CLOSE = 1e-5  # keys and hidden states of size 1 to 10


class Probe(Method):
    """Reads every signal it declares and keeps the first half of each row."""

    sites: ClassVar[frozenset[str]] = frozenset({"projector", "decoder"})
    needs: ClassVar[frozenset[str]] = frozenset()
    seen: ClassVar[list[vtc.Context]] = []

    def plan(self, ctx: vtc.Context, k: tuple[int, ...]) -> Plan:
        self.seen.append(ctx)
        for name in self.needs:
            assert ctx.signals[name] is ctx.signals[name]  # computed once
        slot = torch.arange(ctx.visual.shape[1])
        return Plan.from_mask(slot < torch.tensor(k)[:, None], k)


@contextmanager
def probe(needs: frozenset[str]) -> Iterator[type[Probe]]:
    """The probe under a name of its own, gone afterwards."""
    space = {
        "needs": needs,
        "seen": [],
        "__annotations__": {"needs": "ClassVar[Any]", "seen": "ClassVar[Any]"},
        "__module__": __name__,
    }
    cls = dataclass(frozen=True)(type("Asking", (Probe,), space))
    vtc.register("test_signals_probe")(cls)
    try:
        yield cls
    finally:
        del vtc.REDUCERS._items["test_signals_probe"]


def ask(family: Family, at: str, needs: frozenset[str], inputs: Any = None) -> vtc.Context:
    """The context that a method with these needs gets at `at` in one forward."""
    with (
        probe(needs) as cls,
        vtc.attach(family.model, "test_signals_probe", keep=0.5, at=at),
        torch.no_grad(),
    ):
        family.model(**(family.inputs if inputs is None else inputs))
    (ctx,) = cls.seen
    return ctx


@dataclass
class Reference:
    """What the dense eager model computes, everything for the whole sequence.

    attentions: [B, H, L, L] per layer; hidden: [B, L, D] at the input of every layer;
    queries, keys: [B, L, H * D] per decoder layer, heads side by side, at positions that leave out
    padding: a plain forward of some families counts it.
    """

    attentions: list[Tensor]
    hidden: list[Tensor]
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


@functools.cache
def made(name: str, attn: str) -> Family:
    return families.make(name, attn)


def additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """The mask of any implementation as numbers to add; none means causal."""
    if mask is None:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)


@functools.cache
def reference(name: str, attn: str) -> Reference:
    """From a second instance with the same weights. With `sdpa` its layers run with `sdpa`, so
    that a layer starts from the same rounding; the weights are those of the eager function."""
    family = families.make(name, attn)
    layers = family.model.model.language_model.layers
    decoder = {layer.self_attn: i for i, layer in enumerate(layers)}
    empty = [torch.empty(0)] * len(layers)
    out = Reference(list(empty), [], list(empty), list(empty))
    base = None if attn == "eager" else ALL_ATTENTION_FUNCTIONS[attn]

    def spy(module: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        query, key, value, *rest = args
        mask = rest[0] if rest else attention_mask
        eager = eager_function(module)
        if module in decoder:
            i = decoder[module]
            out.queries[i] = query.transpose(1, 2).flatten(2)
            out.keys[i] = key.transpose(1, 2).flatten(2)
            if out.attentions[i].numel() == 0:
                weights = eager(module, query, key, value, additive(mask, query), **kwargs)[1]
                out.attentions[i] = weights
        return (base or eager)(module, query, key, value, mask, **kwargs)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        out.hidden.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    ALL_ATTENTION_FUNCTIONS[attn] = spy
    try:
        with torch.no_grad():
            result = family.model(**family.inputs, output_attentions=attn == "eager")
            hidden = list(out.hidden)
            if not hasattr(family.model.model, "rope_deltas"):
                places = (family.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                family.model(**family.inputs, position_ids=places)
            out.hidden = hidden
    finally:
        del ALL_ATTENTION_FUNCTIONS[attn]
        for handle in handles:
            handle.remove()
    if attn == "eager":
        for mine, reported in zip(out.attentions, result.attentions, strict=True):
            assert torch.equal(mine, reported)
        out.attentions = list(result.attentions)
    return out


def last_columns(family: Family) -> list[int]:
    """Column of the last real token of each sample."""
    mask = family.inputs["attention_mask"]
    return [int(row.nonzero().max()) for row in mask]


def text_columns(family: Family) -> list[list[int]]:
    """Columns of the text behind the last image of each sample."""
    visual, mask = family.visual(), family.inputs["attention_mask"].bool()
    columns = []
    for seen, real in zip(visual, mask, strict=True):
        start = int(seen.nonzero().max()) + 1
        columns.append([c for c in range(start, len(seen)) if real[c]])
    return columns


def assert_rows(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}"
    error = float((found - wanted).abs().max())
    assert error < tolerance, f"{what}: {error:.1e}"


BACKENDS = pytest.mark.parametrize("attn", ["sdpa", "eager"])
FAMILIES = pytest.mark.parametrize("name", NAMES)


@BACKENDS
@FAMILIES
def test_signals_of_the_layer_before(name: str, attn: str):
    family, truth = made(name, attn), reference(name, attn)
    ctx = ask(family, f"decoder.{LAYER}", PREVIOUS_LAYER_SIGNALS)
    signals, previous = ctx.signals, LAYER - 1
    last, text = last_columns(family), text_columns(family)
    rows = trace.rows_of(family.visual())
    assert ctx.counts == tuple(len(columns) for _, columns in rows)
    assert signals["queries"].shape == (len(rows), max(ctx.counts), truth.queries[0].shape[-1])
    assert torch.equal(ctx.visual.sum(1), torch.tensor(ctx.counts))
    for r, (sample, columns) in enumerate(rows):
        attention, n = truth.attentions[previous][sample], len(columns)
        assert_rows(
            signals["attn_last"][r, :, :n], attention[:, last[sample], columns], EXACT, "attn_last"
        )
        t = len(text[sample])
        assert_rows(
            signals["attn_text"][r, :t, :n],
            attention[:, text[sample]][:, :, columns].mean(0),
            EXACT,
            "attn_text",
        )
        assert not signals["attn_text"][r, t:].any()
        for what, states in (("keys", truth.keys), ("queries", truth.queries)):
            wanted = states[previous][sample, columns]
            assert_rows(signals[what][r, :n], wanted, CLOSE, what)
        wanted = truth.keys[previous][sample, text[sample]]
        assert_rows(signals["text_keys"][r, :t], wanted, CLOSE, "text_keys")


@BACKENDS
@FAMILIES
def test_attention_of_the_layer_about_to_run(name: str, attn: str):
    family, truth = made(name, attn), reference(name, attn)
    windows = name == "gemma3"  # its even layers have one: see below
    for layer in (1, 3) if windows else (1, LAYER):
        ctx = ask(family, f"decoder.{layer}", frozenset({"attn_ahead"}))
        last = last_columns(family)
        for r, (sample, columns) in enumerate(trace.rows_of(family.visual())):
            assert_rows(
                ctx.signals["attn_ahead"][r, :, : len(columns)],
                truth.attentions[layer][sample][:, last[sample], columns],
                EXACT,
                "attn_ahead",
            )


def test_attention_of_a_window_layer_before():
    family, truth = made("gemma3", "sdpa"), reference("gemma3", "sdpa")
    ctx = ask(family, f"decoder.{LAYER + 1}", frozenset({"attn_last"}))
    last, hidden = last_columns(family), 0
    for r, (sample, columns) in enumerate(trace.rows_of(family.visual())):
        wanted = truth.attentions[LAYER][sample][:, last[sample], columns]
        hidden += int((wanted == 0).sum())
        assert_rows(ctx.signals["attn_last"][r, :, : len(columns)], wanted, EXACT, "attn_last")
    assert hidden, "the window hides no visual token: nothing was tried"


def test_attention_ahead_of_a_window_layer():
    """What the layer about to run will really see: nothing outside its window."""
    family, truth = made("gemma3", "sdpa"), reference("gemma3", "sdpa")
    ctx = ask(family, f"decoder.{LAYER}", frozenset({"attn_ahead"}))
    last = last_columns(family)
    for r, (sample, columns) in enumerate(trace.rows_of(family.visual())):
        wanted = truth.attentions[LAYER][sample][:, last[sample], columns]
        found = ctx.signals["attn_ahead"][r, :, : len(columns)]
        assert_rows(found, wanted, EXACT, "attn_ahead")


@BACKENDS
@FAMILIES
def test_signals_of_the_sequence(name: str, attn: str):
    family, truth = made(name, attn), reference(name, attn)
    ctx = ask(family, f"decoder.{LAYER}", SEQUENCE_SIGNALS)
    signals, text = ctx.signals, text_columns(family)
    norm = family.model.model.language_model.norm
    for r, (sample, columns) in enumerate(trace.rows_of(family.visual())):
        hidden, n, t = truth.hidden[LAYER][sample], len(columns), len(text[sample])
        assert signals["text_mask"][r].tolist() == [True] * t + [False] * (
            signals["text_mask"].shape[1] - t
        )
        assert signals["token_size"][r].tolist() == [1.0] * n + [0.0] * (ctx.x.shape[1] - n)
        with torch.no_grad():
            wanted = {
                "text": hidden[text[sample]],
                "text_normed": norm(hidden[text[sample]]),
                "normed": norm(hidden[columns]),
            }
        assert_rows(ctx.x[r, :n], hidden[columns], CLOSE, "x")
        for what, value in wanted.items():
            count = n if what == "normed" else t
            assert_rows(signals[what][r, :count], value, CLOSE, what)


def test_token_sizes_after_merging():
    family = made("llava", "sdpa")
    with probe(frozenset({"token_size"})) as cls:
        recipe = vtc.Recipe(
            (
                vtc.Step("divprune", "projector", 16, merge="nearest"),
                vtc.Step("test_signals_probe", "decoder.1", 4),
            )
        )
        with vtc.attach(family.model, recipe) as session, torch.no_grad():
            family.model(**family.inputs)
        sizes = cls.seen[0].signals["token_size"]
    assert torch.equal(sizes, session.trace[0].plan.size)
    assert sizes.sum(1).tolist() == [64.0] * 3 and bool((sizes >= 1).all())


def test_scores_of_the_clip_tower():
    family = made("llava", "sdpa")
    ctx = ask(family, "projector", frozenset({"attn_cls", "vision_keys"}))
    tower = made("llava", "eager").model.model.vision_tower
    layers = [m for m in tower.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    chosen = len(layers) - 2  # vision_feature_layer=-2: hidden_states[-2] leaves the third of four
    keys: list[Tensor] = []
    handle = layers[chosen].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: keys.append(output)
    )
    with torch.no_grad():
        result = tower(family.inputs["pixel_values"], output_attentions=True)
    handle.remove()
    attention = result.attentions[chosen][:, :, 0, 1:].mean(1)  # the class token's row
    assert_rows(ctx.signals["attn_cls"], attention, EXACT, "attn_cls")
    heads = keys[0][:, 1:].unflatten(-1, (tower.config.num_attention_heads, -1))
    assert_rows(ctx.signals["vision_keys"], heads.mean(2), 1e-5, "vision_keys")


def test_scores_of_a_tower_without_class_token():
    """Qwen: what a token receives in the last full-attention layer, summed over merged patches."""
    family = families.make("qwen3_vl", row=0)
    ctx = ask(family, "projector", frozenset({"attn_cls", "vision_keys"}))
    visual = families.make("qwen3_vl", "eager", row=0).model.model.visual
    maps: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = eager_function(module)(module, query, key, *args, **kwargs)
        maps.append(out[1])
        return out

    ALL_ATTENTION_FUNCTIONS["eager"] = spy
    try:
        with torch.no_grad():
            visual(family.inputs["pixel_values"], family.inputs["image_grid_thw"])
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
    received = maps[-1][0].mean(0).mean(0)  # [patches]
    wanted = received.unflatten(0, (-1, 4)).sum(1)
    assert_rows(ctx.signals["attn_cls"][0], wanted, EXACT, "attn_cls")


def test_signals_that_are_not_offered():
    family = made("llava", "sdpa")
    with probe(PREVIOUS_LAYER_SIGNALS), pytest.raises(MissingSignal, match="decoder.1 on"):
        vtc.attach(family.model, "test_signals_probe", keep=0.5, at="decoder.0")
    with probe(frozenset({"features"})), pytest.raises(MissingSignal, match="at the projector"):
        vtc.attach(family.model, "test_signals_probe", keep=0.5, at="decoder.1")


def test_a_probe_that_never_ran_is_noticed():
    """The tests above cannot pass because nothing happened."""
    family = made("llava", "sdpa")
    text = {"input_ids": torch.arange(2, 9)[None]}
    with pytest.raises(NothingReduced):
        ask(family, "decoder.1", frozenset({"attn_last"}), text)
    assert "test_signals_probe" not in vtc.REDUCERS
