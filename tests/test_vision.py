"""Dropping and merging inside vision towers, beyond what `test_contract.py` asks of every method:
signals, several steps, images that keep different numbers of tokens, ways to run, refusals.

The references are untouched models with the same weights: `towerref` masks units inside their
towers, `oracle` and `maskref` mask columns behind them. Signals are compared with attention weights
computed here from the queries and keys of that masked tower.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo
import transformers
from support import dense
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc import ops
from vtc.adapters.vlm.tower import ENCODINGS
from vtc.plan import Plan
from vtc.reducer import Method, Scorer, top_k
from vtc.session import Reduction
from vtc.testing import configs, families, maskref, oracle, runs, towerref, trace
from vtc.testing.families import Family
from vtc.testing.towerref import TowerReduction

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
STEPS = 3
Inputs = families.Inputs
Mass = float | Mapping[str, float]

#: towers with class token, without, pixel shuffle, pooling, tiles, packed, windows, deepstack
SIGNALLED = (
    "llava",
    "llava_siglip_qwen3",
    "internvl",
    "smolvlm",
    "gemma3",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GRID = ("llava", "llava_siglip_qwen3", "internvl", "idefics3", "gemma3", "llava_next")
CARRIED = frozenset({"attn_cls", "vision_keys", "cls_rank", "tile"})
PREVIOUS = frozenset({"attn_cls", "vision_keys", "token_size"})


# --------------------------------------------------------------------------------------------
# models, methods of these tests, references


@functools.cache
def family(name: str, attn: str = "sdpa") -> Family:
    """The model that sessions attach to."""
    return families.make(name, attn)


@functools.cache
def reference(name: str, attn: str = "sdpa") -> Family:
    """The same weights, never attached."""
    return families.make(name, attn)


class Ragged(Method):
    """Image r of a tower call keeps the share `shares[r]` of its tokens, and so on in turn."""

    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector"})
    budgets: ClassVar[frozenset[str]] = frozenset({"auto"})
    shares: ClassVar[tuple[float, ...]] = (0.75, 0.25, 0.6, 0.5)

    def plan(self, ctx: vtc.Context, k: tuple[int, ...]) -> Plan:
        shares = [self.shares[r % 4] for r in range(len(ctx.counts))]
        n = tuple(max(1, int(s * c)) for s, c in zip(shares, ctx.counts, strict=True))
        return top_k(ops.hash_uniform(ctx.source, ctx.seed), ctx.visual, n)


class Probe(Scorer):
    """Reads every signal it declares and keeps random tokens, others than `random` keeps."""

    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder"})
    seen: ClassVar[dict[str, list[vtc.Context]]] = {}

    def score(self, ctx: vtc.Context) -> Tensor:
        for name in self.needs:
            assert ctx.signals[name] is ctx.signals[name]  # computed once
        self.seen.setdefault(str(ctx.site), []).append(ctx)
        return ops.hash_uniform(ctx.source, 77)


@contextmanager
def registered(name: str, base: type[Any], **attributes: Any) -> Iterator[type[Any]]:
    """A method under a name of its own, gone afterwards."""
    space = {"__annotations__": dict.fromkeys(attributes, "ClassVar[Any]"), "__module__": __name__}
    cls = dataclass(frozen=True)(type("Made", (base,), attributes | space))
    vtc.register(name)(cls)
    try:
        yield cls
    finally:
        del vtc.REDUCERS._items[name]


@pytest.fixture(autouse=True, scope="module")
def ragged() -> Iterator[None]:
    """`test_ragged`, and `test_one_whole`, where the longest image loses nothing."""
    whole = registered("test_one_whole", Ragged, shares=(0.75, 0.25, 1.0, 0.5))
    with registered("test_ragged", Ragged), whole:
        yield


def generate(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    dense.need(model, options)
    torch.manual_seed(5)
    options = {"max_new_tokens": STEPS} | options
    with torch.no_grad():
        return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def worst(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest difference over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def recipe(*steps: vtc.Step | tuple[Any, ...], seed: int = 3) -> vtc.Recipe:
    """(method, site, keep, options) -> a recipe."""
    made = [s if isinstance(s, vtc.Step) else vtc.Step(*s[:3], **dict(*s[3:])) for s in steps]
    return vtc.Recipe(tuple(made), seed)


def strengths(of: vtc.Recipe) -> dict[str, float]:
    return {step.at: step.mass for step in of.steps}


def tower_drops(seen: Sequence[Reduction], mass: Mass) -> list[list[TowerReduction]]:
    sites = [r.site for r in seen if r.site.startswith("vision")]
    drops = trace.tower_reductions(seen, sites.count(sites[0]) if sites else 0, mass)
    for call in drops:
        for i, earlier in enumerate(call[:-1]):
            later = call[i + 1]
            if earlier.bias is not None and later.bias is None:  # the last step decides: off
                call[i + 1] = replace(later, bias=[torch.zeros(len(keep)) for keep in later.keep])
    return drops


@contextmanager
def masking(
    ref: Family, seen: Iterable[Reduction], inputs: Inputs, mass: Mass = 0.0, **pieces: Any
) -> Iterator[trace.Masks]:
    """What the reference has to mask; inside, its vision tower masks too (once)."""
    seen, copies = list(seen), pieces.pop("copies", 1)
    visual = ref.visual(inputs).repeat_interleave(copies, 0)
    drops = tower_drops(seen, mass)
    if not drops:
        yield trace.masks(seen, visual, mass, **pieces)
        return
    everything = torch.ones_like(visual)
    with towerref.masked_tower(ref, drops):
        offsets = pieces.get("offsets", (0,))
        gone = towerref.zero_columns(ref, inputs, offsets).repeat_interleave(copies, 0)
    breaks = towerref.newlines(ref, inputs).repeat_interleave(copies, 0)
    masks = trace.masks(seen, visual, mass, gone=gone, newline=breaks, **pieces)
    assert bool(gone.any())
    masks.keep["projector"] = masks.keep.get("projector", everything) & ~gone
    sites = {r.site for r in seen if r.plan is not None}
    weighed = mass and "projector" not in masks.bias and "projector" not in sites
    if weighed:
        with towerref.masked_tower(ref, drops) as tower:
            bias = tower.bias_columns(inputs)
        masks.bias["projector"] = bias.repeat_interleave(copies, 0)
    for site in sites:  # a step without mass switches the bias of earlier ones off
        if site.startswith(("projector", "decoder")):
            masks.bias.setdefault(trace.stage_of(site), torch.zeros(everything.shape))
    with towerref.masked_tower(ref, drops):
        yield masks


def expected(
    ref: Family, seen: Iterable[Reduction], inputs: Inputs, tokens: Tensor, mass: Mass = 0.0
) -> list[Tensor]:
    """Logits of the oracle for what the session decided."""
    with masking(ref, seen, inputs, mass) as masks:
        return oracle.run(
            ref,
            inputs,
            keep=masks.keep,
            bias=masks.bias,
            mix=masks.mix,
            evict=masks.evict,
            forced=tokens,
        )[0]


def compare(
    name: str | Family, plan: vtc.Recipe, inputs: Inputs | None = None, attn: str = "sdpa"
) -> vtc.Session:
    """Greedy decoding with tokens dropped against the oracle."""
    made = isinstance(name, Family)
    fam, ref = (name, families.make(name.name)) if made else (family(name, attn), reference(name))
    inputs = fam.inputs if inputs is None else inputs
    with vtc.attach(fam.model, plan) as session:
        out = generate(fam.model, inputs)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    wanted = expected(ref, session.trace, inputs, tokens, strengths(plan))
    assert worst(out.logits, wanted) <= TOLERANCE
    return session


# --------------------------------------------------------------------------------------------
# 1: signals


@dataclass
class Segment:
    """One attention call: head mean of the weights [T, N, N], keys [T, N, C], head mean."""

    weights: Tensor
    keys: Tensor


@dataclass
class TowerCall:
    """What one call of the untouched (masking) tower did, units in raster order.

    patches: [U, p] tokens of each unit; rows: [U] row of the projector's output; images: units of
    each image of a packed tower; blocks: attention calls of each block.
    """

    patches: Tensor
    rows: Tensor
    images: list[int]
    blocks: list[list[Segment]]
    given: Tensor = field(default_factory=lambda: torch.empty(0))  # what the projector read

    def values(self, block: int, left: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores [n] and keys [n, C] of the units that are left, one of each per image.

        left: raster numbers of the units that are left in each image.
        """
        segments, tokens = self.blocks[block], self.patches.numel()
        if self.images:  # packed: segments one after another, units in the order of the tower
            numbers = torch.cat([s + n for s, n in zip(self._starts(), left, strict=True)])
            alive = torch.zeros(tokens, dtype=torch.bool)
            alive[self.patches[numbers]] = True
            score, at = torch.zeros(tokens), 0
            for segment in segments:
                n = segment.weights.shape[1]
                here = alive[at : at + n]
                score[at : at + n] = segment.weights[0, here].sum(0) / max(1, int(here.sum()))
                at += n
            assert at == tokens
            keys = torch.cat([s.keys[0] for s in segments])
            flat = [self.patches[s + n] for s, n in zip(self._starts(), left, strict=True)]
            return [score[p].sum(1) for p in flat], [keys[p].mean(1) for p in flat]
        (segment,) = segments
        scores, found = [], []
        for image, numbers in enumerate(left):
            places, weights = self.patches[numbers], segment.weights[image]
            prefix = len(weights) - tokens
            row = weights[0] if prefix else weights[places.flatten()].mean(0)
            scores.append(row[places].sum(1))
            found.append(segment.keys[image][places].mean(1))
        return scores, found

    def _starts(self) -> list[int]:
        return [sum(self.images[:i]) for i in range(len(self.images))]


@dataclass
class Truth:
    """All calls of the tower in one encoding, and which unit each visual column shows.

    number: [B, L] unit, counted over all images of all calls in raster order; -1 elsewhere.
    """

    calls: list[TowerCall]
    number: Tensor


def truth(
    ref: Family, inputs: Inputs, drops: Sequence[Sequence[TowerReduction]] | None = None
) -> Truth:
    """Encode with an untouched model whose tower masks `drops`; attention weights from q and k."""
    tower, blocks, projector = towerref.parts(ref.model)
    owner = {m: i for i, b in enumerate(blocks) for m in b.modules()}
    calls: list[TowerCall] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        out = sdpa(module, query, key, value, mask, **kwargs)
        if module in owner:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            logits = query @ key.transpose(2, 3) * scale
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            elif mask is not None:
                logits = logits + mask
            weights = logits.softmax(-1)
            assert ((weights @ value).transpose(1, 2) - out[0]).abs().max() < 1e-4
            calls[-1].blocks[owner[module]].append(Segment(weights.mean(1), key.mean(1)))
        return out

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(TowerCall(torch.empty(0), torch.empty(0), [], [[] for _ in blocks]))

    def number(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        call = calls[-1]
        call.given = args[0]
        n = sum(s.weights.shape[1] for s in call.blocks[0])
        call.patches, call.rows = seen.tables(n)
        if seen.packed:
            call.images = [int(g.prod()) // seen.side**2 for g in seen.grid]
        rows = out[None] if seen.packed else out
        new = torch.zeros_like(rows)
        new[..., 1:3] = 1  # a newline token has no two equal channels
        base = sum(len(c.patches) * len(c.blocks[0][0].weights) for c in calls[:-1])
        images, units = rows.shape[0], len(call.rows)
        numbers = torch.arange(images * units).reshape(images, units) + base
        new[:, rows.shape[1] - units + call.rows, 0] = numbers.to(new.dtype)
        return new.view_as(out)

    if drops is None:
        drops = [[] for _ in range(4)]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    handles = []
    try:
        with towerref.masked_tower(ref, drops) as seen, torch.no_grad():
            handles.append(tower.register_forward_pre_hook(start, with_kwargs=True))
            handles.append(projector.register_forward_hook(number))
            embeds = oracle.encode(ref.model, inputs).embeds
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for handle in handles:
            handle.remove()
    made = ref.visual(inputs) & (embeds[..., 1] == embeds[..., 2]) & (embeds[..., 1] != 0)
    where = embeds[..., 0] / embeds[..., 1].where(made, torch.ones(()))
    return Truth(calls, torch.where(made, where.round().long(), -1))


def look(
    fam: Family, plan: vtc.Recipe, needs: Mapping[str, frozenset[str]]
) -> tuple[dict[str, list[vtc.Context]], list[Reduction]]:
    """Contexts of the steps named `look_<i>` per site in one forward, and the trace.

    needs: method name -> signals it asks for.
    """
    seen: dict[str, list[vtc.Context]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, asked in needs.items():
            stack.enter_context(registered(name, Probe, needs=asked, seen=seen))
        with vtc.attach(fam.model, plan) as session:
            fam.model(**fam.inputs)
    return seen, list(session.trace)


def lefts(seen: Sequence[Reduction], site: str | None) -> list[list[Tensor]]:
    """Raster numbers of the units of every image of every call that reach `site` (None: leave)."""
    sites = sorted({r.site for r in seen if r.site.startswith("vision")})
    if site is None:
        turns = [r for r in seen if r.site == sites[-1]]
        return [[r.source[i, :n] for i, n in enumerate(r.n_out)] for r in turns]
    turns = [r for r in seen if r.site == site]
    return [[r.source_in[i, :n] for i, n in enumerate(r.n_in)] for r in turns]


def near(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} {tuple(wanted.shape)}"
    error = (found - wanted).abs().max().item() if found.numel() else 0.0
    assert error <= tolerance, f"{what}: {error:.1e}"


MERGED: dict[str, Any] = {"merge": "nearest", "mass": 1.0}
EARLIER: dict[str, list[tuple[Any, ...]]] = {
    "whole": [],
    "dropped": [("random", "vision.1", 0.6)],
    "ragged": [("test_ragged", "vision.1", "auto", MERGED)],
    "one whole": [("test_one_whole", "vision.1", "auto", MERGED)],
}


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("name", SIGNALLED)
def test_signals_inside_the_tower(name: str, earlier: str) -> None:
    """What the block before the site did; after an earlier step only over what it left."""
    fam, ref = family(name), reference(name)
    steps = [*EARLIER[earlier], ("look_1", "vision.2", 0.2)]
    seen, ran = look(fam, recipe(*steps), {"look_1": PREVIOUS})
    before = [r for r in ran if r.site == "vision.1"]
    drops = (
        tower_drops(before, 1.0 if earlier in ("ragged", "one whole") else 0.0) if before else None
    )
    found = truth(ref, fam.inputs, drops)
    left = lefts(ran, "vision.2")
    assert len(seen["vision.2"]) == len(found.calls) == len(left)
    for turn, (ctx, call, numbers) in enumerate(
        zip(seen["vision.2"], found.calls, left, strict=True)
    ):
        scores, keys = call.values(1, numbers)
        assert len(ctx.counts) == len(scores)
        assert ctx.layout[0] is not None and ctx.layout[0].n == ctx.original[0]
        for r, n in enumerate(ctx.counts):
            assert n == len(numbers[r])
            near(ctx.signals["attn_cls"][r, :n], scores[r], "attn_cls")
            near(ctx.signals["vision_keys"][r, :n], keys[r], "vision_keys", 1e-4)
            size, made = torch.ones(n), before[turn].plan if before else None
            if made is not None and made.size is not None:
                size = made.size[r, :n]
            assert torch.equal(ctx.signals["token_size"][r, :n], size)


FEATURE = {"llava": 2, "llava_siglip_qwen3": 2, "llava_next": 2}  # vision_feature_layer=-2
READER = {"llava": 3, "llava_siglip_qwen3": 3, "llava_next": 3}


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("name", SIGNALLED)
def test_signals_behind_the_tower(name: str, earlier: str) -> None:
    """Each visual column shows what the tower knew of the unit that became it."""
    fam, ref = family(name), reference(name)
    needs = {"look_1": CARRIED | {"features", "projector"}, "look_2": CARRIED}
    steps = [*EARLIER[earlier], ("look_1", "projector", 0.4), ("look_2", "decoder.2", 0.1)]
    seen, ran = look(fam, recipe(*steps), needs)
    first = [r for r in ran if r.site.startswith("vision")]
    mass = 1.0 if earlier in ("ragged", "one whole") else 0.0
    found = truth(ref, fam.inputs, tower_drops(first, mass) if first else None)
    left = lefts(ran, None) if first else _everything(found)
    score, key, rank, tile, alive = _tables(name, found, left)
    lines = trace.rows_of(fam.visual())
    for site in ("projector", "decoder.2"):
        (ctx,) = seen[site]
        for r, (sample, columns) in enumerate(lines):
            n = ctx.counts[r]
            here = torch.tensor(columns)[ctx.source[r, :n]]
            number = found.number[sample, here]
            known = number >= 0
            assert bool(known.all()) and bool(alive[number[known]].all())
            for what, table in (
                ("attn_cls", score),
                ("vision_keys", key),
                ("cls_rank", rank),
                ("tile", tile),
            ):
                got = ctx.signals[what][r, :n]
                wanted = table[number]
                near(got.to(wanted.dtype), wanted, f"{what} at {site}", 1e-4)
    _check_features(fam, seen["projector"][0], found, lines)


def _everything(found: Truth) -> list[list[Tensor]]:
    out = []
    for call in found.calls:
        tiles = call.images or [len(call.patches)] * len(call.blocks[0][0].weights)
        out.append([torch.arange(n) for n in tiles])
    return out


def _tables(
    name: str, found: Truth, left: list[list[Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, keys, rank, tile of every unit (of all calls), and which ones are left."""
    parts: list[tuple[Tensor, ...]] = []
    base = 0
    for call, numbers in zip(found.calls, left, strict=True):
        feature, reader = FEATURE.get(name, 3), READER.get(name, 3)
        scores, keys = call.values(feature, numbers)
        ranking, _ = call.values(reader, numbers)
        tiles = call.images or [len(call.patches)] * len(numbers)
        for i, (units, mine) in enumerate(zip(tiles, numbers, strict=True)):
            n = len(mine)
            above = (ranking[i][None] > ranking[i][:, None]).sum(1)
            same = (ranking[i][None] == ranking[i][:, None]).tril(-1).sum(1)  # ties: lowest first
            score, key = torch.zeros(units), torch.zeros(units, keys[i].shape[1])
            rank, alive = torch.ones(units).double(), torch.zeros(units, dtype=torch.bool)
            score[mine], key[mine], alive[mine] = scores[i], keys[i], True
            rank[mine] = (above + same).double() / n
            parts.append((score, key, rank, torch.full((units,), float(base + i)), alive))
        base += len(tiles)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _check_features(fam: Family, ctx: vtc.Context, found: Truth, lines: list[trace.Row]) -> None:
    project: Any = ctx.signals["projector"]
    module = towerref.parts(fam.model)[2]
    for r, (sample, columns) in enumerate(lines):
        n = ctx.counts[r]
        here = torch.tensor(columns)[ctx.source[r, :n]]
        known = found.number[sample, here] >= 0
        features, x = ctx.signals["features"][r, :n], ctx.x[r, :n]
        assert not features[~known].any()
        with torch.no_grad():
            near(project(features[known]), x[known], "projector(features)")
            if fam.name in ("llava", "llava_siglip_qwen3", "internvl", "llava_next"):
                near(module(features[known]), x[known], "the model's own projector")
            elif fam.name in PACKED:
                width = fam.model.config.vision_config.hidden_size
                width = features.shape[1] // 4 if fam.name == "qwen2_vl" else width
                patches = features[known].reshape(-1, width)
                near(module(patches), x[known], "the model's own merger")


def test_ranks_of_equal_scores_go_to_the_lowest_place() -> None:
    """Without queries the block that reads the features looks at every token alike."""
    fam = families.make("llava")
    attention = towerref.parts(fam.model)[1][READER["llava"]].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
    plan = recipe(("random", "vision.1", 0.5), ("look_1", "projector", 0.25))
    seen, ran = look(fam, plan, {"look_1": frozenset({"cls_rank", "attn_cls"})})
    (ctx,) = seen["projector"]
    assert ctx.counts == (32, 32, 32)
    wanted = (torch.arange(32) / 32).expand(3, -1)
    near(ctx.signals["cls_rank"].float(), wanted, "cls_rank", 1e-6)
    assert float(ctx.signals["attn_cls"].std()) > 1e-4  # that of the block before: not alike


def test_scores_of_a_tower_that_reports_its_attention() -> None:
    """The reference of these tests against `output_attentions`, and eager against sdpa."""
    eager = reference("llava", "eager").model.model.vision_tower
    with torch.no_grad():
        reported = eager(family("llava").inputs["pixel_values"], output_attentions=True).attentions
    found = truth(reference("llava"), family("llava").inputs)
    for i, call in enumerate(found.calls[0].blocks):
        near(call[0].weights, reported[i].mean(1), f"block {i}")
    for attn in ("sdpa", "eager"):
        plan = recipe(("look_1", "vision.1", 0.5))
        seen, _ = look(family("llava", attn), plan, {"look_1": PREVIOUS})
        near(
            seen["vision.1"][0].signals["attn_cls"],
            reported[0].mean(1)[:, 0, 1:],
            f"attn_cls with {attn}",
        )


def test_token_sizes_inside_and_behind_the_tower() -> None:
    """What merged units stand for is seen by the next step inside, at the projector and behind."""
    fam = family("internvl")
    needs = {"look_1": frozenset({"token_size"}), "look_2": frozenset({"token_size"})}
    plan = recipe(
        ("divprune", "vision.1", 8, {"merge": "nearest"}),
        ("look_1", "vision.2", 5, {"merge": "nearest"}),
        ("look_2", "projector", 3, {"merge": "nearest"}),
        ("look_2", "decoder.1", 2),
    )
    seen, ran = look(fam, plan, needs)
    for before, site in enumerate(("vision.2", "projector", "decoder.1")):
        size = seen[site][0].signals["token_size"]
        made = ran[before].plan
        assert made is not None and torch.equal(size, made.size)
        assert size.sum(1).tolist() == [16.0] * 3
        assert float(size.max()) > 1


# --------------------------------------------------------------------------------------------
# 2: several steps


SEVERAL: dict[str, list[tuple[Any, ...]]] = {
    "two inside": [("random", "vision.1", 0.6), ("divprune", "vision.2", 0.3)],
    "first block": [("random", "vision.0", 0.6), ("norm", "vision.1", 0.3)],
    "one of each": [
        ("random", "vision.1", 0.75),
        ("divprune", "vision.2", 0.6),
        ("norm", "projector", 0.45),
        ("fastv", "decoder.2", 0.3),
        ("random", "cache", 0.1),
    ],
    "merged inside": [("divprune", "vision.1", 0.6, MERGED), ("random", "vision.2", 0.3, MERGED)],
    "mass off again": [
        ("divprune", "vision.1", 0.6, MERGED),
        ("random", "vision.2", 0.3, {"merge": "nearest"}),
    ],
    "mass twice": [
        ("divprune", "vision.1", 0.6, MERGED),
        ("divprune", "projector", 0.3, {"merge": "nearest", "mass": 0.5}),
    ],
    "mass inside only": [("divprune", "vision.1", 0.6, MERGED), ("norm", "projector", 0.3)],
    "mass behind only": [
        ("divprune", "vision.1", 0.6, {"merge": "nearest"}),
        ("norm", "projector", 0.4, {"mass": 1.0}),
        ("random", "decoder.1", 0.2),
    ],
}


@pytest.mark.parametrize("steps", SEVERAL)
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "vipllava"]
)
def test_several_steps(name: str, steps: str) -> None:
    session = compare(name, recipe(*SEVERAL[steps]))
    fam = family(name)
    tokens = fam.visual() & ~towerref.newlines(reference(name), fam.inputs)
    rows = [int(tokens[s, columns].sum()) for s, columns in trace.rows_of(fam.visual())]
    for reduction in session.trace:
        plan = reduction.plan
        assert plan is not None and reduction.n_out != reduction.n_in
        if all(step.merge == "nearest" for step in session.recipe.steps):  # nothing is lost
            tower = reduction.site.startswith("vision")
            whole = [grid.n for grid in reduction.layout if grid] if tower else rows
            assert plan.size is not None
            assert abs(float((plan.size * plan.slots).sum()) - sum(whole)) < 1e-2


# --------------------------------------------------------------------------------------------
# 3: images that keep different numbers of tokens


@pytest.mark.parametrize("method", ["test_ragged", "test_one_whole"])
@pytest.mark.parametrize("options", [{}, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize(
    "name,attn",
    [(n, "sdpa") for n in (*GRID, *PACKED, "paligemma", "vipllava", "glm4v")]
    + [(n, "eager") for n in ("llava", "internvl", "idefics3", "qwen2_5_vl")],
)
def test_images_that_keep_different_numbers(
    name: str, options: dict[str, Any], attn: str, method: str
) -> None:
    plan = recipe((method, "vision.1", "auto", options), ("random", "decoder.2", 0.1))
    session = compare(name, plan, attn=attn)
    shares = {o / n for r in session.trace for o, n in zip(r.n_out, r.n_in, strict=True)}
    assert len(shares) > 2


@pytest.mark.parametrize("name", [*GRID, *PACKED])
def test_two_ragged_steps(name: str) -> None:
    """The image that lost most in the first step loses most again."""
    compare(
        name,
        recipe(
            ("test_ragged", "vision.1", "auto", MERGED),
            ("test_ragged", "vision.2", "auto", {"mass": 0.5}),
            ("test_ragged", "projector", "auto", MERGED),
        ),
    )


@pytest.mark.parametrize("mass", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "llava_next", "qwen2_5_vl"])
def test_windows_that_look_alike_to_different_degrees(name: str, mass: float) -> None:
    """MustDrop with a threshold between the similarities that its windows have; the first one at
    which images keep different numbers."""
    fam = family(name)
    for threshold in torch.linspace(-0.2, 0.6, 17).tolist():
        step = vtc.Step(
            "mustdrop_merge",
            "vision.1",
            "auto",
            mass=mass,
            params={"threshold": threshold, "window": 2},
        )
        with vtc.attach(fam.model, step) as session, torch.no_grad():
            fam.model(**fam.inputs)
        counts = {n for r in session.trace for n in r.n_out}
        if len(counts) > 1 and all(r.plan is not None for r in session.trace):
            break
    else:
        pytest.fail("no threshold tells the images apart")
    compare(name, vtc.Recipe((step,), 3))


# --------------------------------------------------------------------------------------------
# 4: ways to run

CHUNK = 48  # cuts through images
RUNS = ("llava", "llava_next", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl")
INSIDE = recipe(("random", "vision.1", 0.4))
WITH_MASS = recipe(("divprune", "vision.1", 0.4, MERGED))
BEHIND = recipe(("random", "vision.1", 0.5), ("fastv", "decoder.1", 0.25))
PLANS = {"inside": INSIDE, "mass": WITH_MASS, "behind": BEHIND}
every_plan = pytest.mark.parametrize("plan", PLANS)
every_run = pytest.mark.parametrize("name", RUNS)


def check(got: Any, wanted: Any) -> None:
    assert torch.equal(got.sequences, wanted.sequences)
    assert worst(got.logits, wanted.logits) <= TOLERANCE


def compare_mode(name: str, plan: vtc.Recipe, inputs: Inputs, **options: Any) -> vtc.Session:
    """`generate` in some mode against the same mode with everything masked."""
    fam, ref = family(name), reference(name)
    with vtc.attach(fam.model, plan) as session:
        got = generate(fam.model, inputs, **options)
    pieces = {"copies": max(options.get(o, 1) for o in ("num_beams", "num_return_sequences"))}
    if "prefill_chunk_size" in options:
        offsets = range(0, inputs["input_ids"].shape[1], CHUNK)
        pieces |= {"offsets": offsets, "widths": [CHUNK] * len(offsets)}
    with (
        masking(ref, session.trace, inputs, strengths(plan), **pieces) as masks,
        maskref.masked(ref.model, masks.keep, masks.bias),
    ):
        check(got, generate(ref.model, inputs, **options))
    return session


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 4, "max_new_tokens": 8},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", ["mass", "behind"])
@every_run
def test_generation_modes(name: str, plan: str, mode: str) -> None:
    fam = family(name)
    if mode == "static" and name == "gemma3":
        with (
            pytest.raises(vtc.errors.UnsupportedModel, match="StaticCache"),
            vtc.attach(fam.model, PLANS[plan]),
        ):
            generate(fam.model, fam.inputs, **MODES[mode])
        return
    inputs = fam.single(1) if mode == "lookup" else fam.inputs
    compare_mode(name, PLANS[plan], inputs, **MODES[mode])


@pytest.mark.parametrize("plan", ["inside", "mass", "behind", "few", "projector"])
@every_run
def test_chunked_prefill(name: str, plan: str) -> None:
    """Chunks cut through images, and with few tokens some chunks have none of an image left."""
    few = recipe(("random", "vision.1", 2))
    projector = recipe(("random", "vision.1", 0.5), ("random", "projector", 1))
    made = PLANS | {"few": few, "projector": projector}
    for inputs in (family(name).inputs, family(name).single(1)):
        compare_mode(name, made[plan], inputs, prefill_chunk_size=CHUNK)


def test_mass_in_a_chunk_that_lost_nothing() -> None:
    """A later chunk whose tokens all stay but stand for others."""
    fam, ref = family("llava"), reference("llava")
    inputs = fam.single(0)
    columns = trace.rows_of(fam.visual(inputs))[0][1]
    border = CHUNK - columns[0]  # first unit of the second chunk
    tried = 0
    for unit in range(border):

        def plan(self: Any, ctx: vtc.Context, k: tuple[int, ...], unit: int = unit) -> Plan:
            return Plan.from_mask(ctx.visual & (ctx.source != unit), k)

        sites = frozenset({"vision"})
        with registered("all_but_one", Method, sites=sites, plan=plan):
            made = recipe(("all_but_one", "vision.1", 63, {"mass": 1.0}))
            with vtc.attach(fam.model, made) as session:
                got = generate(fam.model, inputs, prefill_chunk_size=CHUNK)
        size = session.trace[0].plan.size
        if bool((size[0, border - 1 :] == 1).all()):
            continue  # it was absorbed by a unit of the first chunk
        tried += 1
        with (
            masking(ref, session.trace, inputs, 1.0) as masks,
            maskref.masked(ref.model, masks.keep, masks.bias),
        ):
            check(got, generate(ref.model, inputs, prefill_chunk_size=CHUNK))
        break
    assert tried


@every_plan
@every_run
def test_forwards_that_recompute_everything(name: str, plan: str) -> None:
    """Images are encoded once, and every forward drops and weighs the same tokens."""
    fam, ref = family(name), reference(name)
    with vtc.attach(fam.model, PLANS[plan]) as session:
        got = generate(fam.model, fam.inputs, use_cache=False)
    tokens = got.sequences[:, fam.inputs["input_ids"].shape[1] :]
    inside = [r for r in session.trace if r.site.startswith("vision")]
    assert len(inside) == len({r.site for r in inside}) * (2 if name in PACKED else 1)
    decoder = [r for r in session.trace if not r.site.startswith("vision")]
    for step in range(STEPS):
        seen = inside + decoder[step : step + 1]
        wanted = expected(ref, seen, fam.inputs, tokens[:, : step + 1], strengths(PLANS[plan]))
        assert worst([got.logits[step]], [wanted[step]]) <= TOLERANCE


def two_turns(fam: Family, inputs: Inputs, second: Tensor, **new: Tensor) -> tuple[Any, Any]:
    first = generate(fam.model, inputs)
    ids = torch.cat([first.sequences, second], 1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if fam.recipe.types is not None:
        longer[fam.recipe.types] = fam.visual(longer).long()
    return first, generate(fam.model, longer | new, past_key_values=first.past_key_values)


@pytest.mark.parametrize("plan", ["inside", "mass", "projector"])
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_second_turn_with_a_new_image(name: str, plan: str) -> None:
    fam, ref = family(name), reference(name)
    both = recipe(("random", "vision.1", 0.5), ("random", "projector", 0.25))
    made = (PLANS | {"projector": both})[plan]
    image = fam.recipe.image(0, torch.Generator().manual_seed(8))
    text = torch.arange(20, 24)
    second = torch.cat([text, image.ids, text])[None]
    inputs = fam.single(1)
    with vtc.attach(fam.model, made) as session:
        got = two_turns(fam, inputs, second, **image.payload)
    length = inputs["input_ids"].shape[1]
    ids = got[1].sequences[:, : length + STEPS + second.shape[1]]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["pixel_values"] = torch.cat([inputs["pixel_values"], image.payload["pixel_values"]])
    if fam.recipe.types is not None:
        whole[fam.recipe.types] = fam.visual(whole).long()
    cut = length + STEPS - 1  # the last token of the first turn is not in the cache yet
    mass = strengths(made)
    pieces = {"offsets": [0, cut], "widths": [cut, ids.shape[1] - cut]}
    seen = list(session.trace)
    calls = tower_drops(seen, mass)
    masks = trace.masks(seen, fam.visual(whole), mass, **pieces)
    drops = [
        [
            replace(
                a,
                keep=[*a.keep, *b.keep],
                mix=None if a.mix is None else [*a.mix, *(b.mix or ())],
                bias=None if a.bias is None else [*a.bias, *(b.bias or ())],
            )
            for a, b in zip(*calls, strict=True)
        ]
    ]
    with towerref.masked_tower(ref, drops):
        gone = towerref.zero_columns(ref, whole)
    masks.keep["projector"] = masks.keep.get("projector", torch.ones_like(gone)) & ~gone
    if any(mass.values()):
        with towerref.masked_tower(ref, drops) as tower:
            masks.bias["projector"] = tower.bias_columns(whole)
    with towerref.masked_tower(ref, calls), maskref.masked(ref.model, masks.keep, masks.bias):
        wanted = two_turns(ref, inputs, second, **image.payload)
    check(got[0], wanted[0])
    check(got[1], wanted[1])


PIXELS = ("pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw")


def encoded(fam: Family, inputs: Inputs) -> dict[str, Any]:
    """Inputs with features in the place of pixels, as `generate` encodes them."""
    names = {"image": ("pixel_values", "image_grid_thw", "image_sizes")}
    names["video"] = ("pixel_values_videos", "video_grid_thw")
    out: dict[str, Any] = {}
    for kind, asked in names.items():
        if asked[0] in inputs:
            encode = getattr(fam.model, f"get_{kind}_features")
            with torch.no_grad():
                out[kind] = encode(**{n: inputs[n] for n in asked if n in inputs}, return_dict=True)
    text = {k: v for k, v in inputs.items() if k not in PIXELS[:2]}
    return text | {"mm_encoder_outputs": out}


@every_plan
@every_run
def test_features_encoded_ahead(name: str, plan: str) -> None:
    fam, ref = family(name), reference(name)
    with vtc.attach(fam.model, PLANS[plan]) as session:
        inputs = encoded(fam, fam.inputs)
        got = generate(fam.model, inputs)
    tokens = got.sequences[:, fam.inputs["input_ids"].shape[1] :]
    wanted = expected(ref, session.trace, fam.inputs, tokens, strengths(PLANS[plan]))
    assert worst(got.logits, wanted) <= TOLERANCE


@every_run
def test_several_forwards_from_features_encoded_ahead(name: str) -> None:
    """Zero rows say what was dropped, and sizes are remembered until the tower runs again."""
    fam, ref = family(name), reference(name)
    for plan in (INSIDE, WITH_MASS):
        with vtc.attach(fam.model, plan) as session:
            inputs = encoded(fam, fam.inputs)
            got = [generate(fam.model, inputs) for _ in range(3)]
        tokens = got[0].sequences[:, fam.inputs["input_ids"].shape[1] :]
        wanted = expected(ref, session.trace, fam.inputs, tokens, strengths(plan))
        for out in got:
            assert worst(out.logits, wanted) <= TOLERANCE


def test_features_encoded_before_the_session() -> None:
    """Nothing was dropped from them, and that is not kept secret."""
    fam = family("llava")
    inputs = encoded(fam, fam.inputs)
    with pytest.raises(vtc.errors.NothingReduced, match="vision.1"), vtc.attach(fam.model, INSIDE):
        generate(fam.model, inputs)


def test_features_encoded_in_an_earlier_session() -> None:
    """Left over from a session that tapped nothing; the next one needs scores of its own images."""
    fam = families.make("llava")
    scores = vtc.Step("visionzip", "projector", 9)
    with vtc.attach(fam.model, scores):
        wanted = generate(fam.model, fam.inputs)
    with vtc.attach(fam.model, INSIDE, strict=False):
        encoded(fam, fam.inputs)
    with vtc.attach(fam.model, scores):
        check(generate(fam.model, fam.inputs), wanted)


@pytest.mark.parametrize("plan", ["inside", "mass"])
def test_many_images_encoded_one_by_one(plan: str) -> None:
    """More calls of the tower than a conversation has images, then one forward with all."""
    fam = families.make("internvl", images_per_row=(5, 6))
    ref = families.make("internvl", images_per_row=(5, 6))
    pixels = fam.inputs["pixel_values"]
    with vtc.attach(fam.model, PLANS[plan]) as session, torch.no_grad():
        features = [fam.model.get_image_features(p[None], return_dict=True) for p in pixels]
        whole = features[0]
        whole.pooler_output = torch.cat([f.pooler_output for f in features])
        text = {k: v for k, v in fam.inputs.items() if k != "pixel_values"}
        got = fam.model(**text, mm_encoder_outputs={"image": whole}).logits[:, -1]
    calls = tower_drops(list(session.trace), strengths(PLANS[plan]))
    assert len(calls) == len(pixels) == 11
    (layer,) = {r.layer for call in calls for r in call}
    joined = {
        what: [getattr(c[0], what)[0] for c in calls]
        for what in ("keep", "mix", "bias")
        if getattr(calls[0][0], what) is not None
    }
    drops = [[TowerReduction(layer, **joined)]]
    with towerref.masked_tower(ref, drops):
        keep = {"projector": ~towerref.zero_columns(ref, fam.inputs)}
    with towerref.masked_tower(ref, drops) as tower:
        bias = {"projector": tower.bias_columns(fam.inputs)}
    with towerref.masked_tower(ref, drops):
        wanted, _ = oracle.run(ref, fam.inputs, keep=keep, bias=bias, steps=1)
    assert worst([got], wanted) <= TOLERANCE


@every_plan
@every_run
def test_hand_written_loop(name: str, plan: str) -> None:
    fam, ref = family(name), reference(name)
    fed = torch.randint(2, 490, (2, 4), generator=torch.Generator().manual_seed(1))
    mask = fam.inputs["attention_mask"]
    with vtc.attach(fam.model, PLANS[plan]) as session, torch.no_grad():
        out = fam.model(**fam.inputs, use_cache=True)
        got, cache = [out.logits[:, -1]], out.past_key_values
        for i in range(3):
            longer = torch.cat([mask, mask.new_ones(2, i + 1)], 1)
            out = fam.model(
                input_ids=fed[:, i : i + 1], attention_mask=longer, past_key_values=cache
            )
            got.append(out.logits[:, -1])
    wanted = expected(ref, session.trace, fam.inputs, fed, strengths(PLANS[plan]))
    assert worst(got, wanted) <= TOLERANCE


TWICE = recipe(("random", "vision.1", 0.6), ("random", "vision.2", 0.3))
RAGGED = recipe(("test_ragged", "vision.1", "auto"))
ONE_WHOLE = recipe(("test_one_whole", "vision.1", "auto"))


@pytest.mark.parametrize(
    "plan", [INSIDE, TWICE, RAGGED, ONE_WHOLE], ids=["once", "twice", "ragged", "one whole"]
)
@pytest.mark.parametrize("name", ["llava", "llava_siglip_qwen3", "gemma3", "internvl"])
def test_hidden_states_of_the_tower_are_whole_grids(name: str, plan: vtc.Recipe) -> None:
    """As the untouched tower computes them; zero at patches that were dropped by then."""
    fam, ref = family(name), reference(name)
    pixels = fam.inputs["pixel_values"]
    tower, blocks, _ = towerref.parts(fam.model)
    with vtc.attach(fam.model, plan, strict=False) as session, torch.no_grad():
        got = tower(pixels, output_hidden_states=True)
    drops = tower_drops(list(session.trace), 0.0)
    whole = towerref.parts(ref.model)[0]
    with towerref.masked_tower(ref, drops) as seen, torch.no_grad():
        wanted = whole(pixels, output_hidden_states=True)
        patches = seen.call.patches
    assert len(got.hidden_states) == len(blocks) + 1
    assert got.last_hidden_state.shape == wanted.last_hidden_state.shape
    for i, (mine, theirs) in enumerate(zip(got.hidden_states, wanted.hidden_states, strict=True)):
        assert mine.shape == theirs.shape, f"hidden_states[{i}]"
        alive = torch.ones(len(pixels), len(patches), dtype=torch.bool)
        for drop in drops[0]:
            if i > drop.layer:  # hidden_states[i] enters block i
                alive &= torch.stack(list(drop.keep))
        left = torch.ones(mine.shape[:2], dtype=torch.bool)
        left[:, patches] = alive[..., None].expand(-1, -1, patches.shape[1])
        near(mine[left], theirs[left], f"hidden_states[{i}]", TOLERANCE)
        assert not mine[~left].any()


def loss_of(logits: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; a dropped column speaks with the one before it."""
    columns = torch.arange(labels.shape[1]).expand_as(left)
    source = torch.where(left, columns, 0).cummax(1).values
    logits = logits.gather(1, source[..., None].expand_as(logits))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("plan", [TWICE, WITH_MASS, RAGGED], ids=["twice", "mass", "ragged"])
@every_run
def test_labels_and_gradients(name: str, plan: vtc.Recipe) -> None:
    """Right padding; gradients of the tower's first block go through what was dropped later."""
    fam, ref = families.make(name), families.make(name)
    inputs = fam.labelled(fam.padded("right"))
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    with vtc.attach(fam.model, plan) as session:
        out = fam.model(**inputs)
        out.loss.backward()
    with masking(ref, session.trace, plain, strengths(plan)) as masks:
        (logits,), _ = oracle.run(
            ref, plain, keep=masks.keep, bias=masks.bias, steps=1, all_rows=True, grad=True
        )
        left = masks.final(fam.visual(plain)) & plain["attention_mask"].bool()
        loss = loss_of(logits, inputs["labels"], left)
        loss.backward()
    assert abs(out.loss.item() - loss.item()) <= TOLERANCE
    assert out.logits.shape[:2] == inputs["labels"].shape
    mine, theirs = (dict(f.model.named_parameters()) for f in (fam, ref))
    scale = max(1.0, *(p.grad.abs().max().item() for p in theirs.values() if p.grad is not None))
    first = [n for n in mine if any(f".{n2}.0." in n for n2 in ("layers", "layer", "blocks"))]
    first = [n for n in first if "vision" in n or "visual" in n]
    assert first and any(bool(mine[n].grad.any()) for n in first if mine[n].grad is not None)
    for n, p in mine.items():
        if p.grad is not None and theirs[n].grad is not None:
            near(p.grad, theirs[n].grad, n, TOLERANCE * scale)


def gradients(fam: Family, inputs: Inputs) -> tuple[float, dict[str, Tensor]]:
    fam.model.zero_grad()
    loss = fam.model(**inputs).loss
    loss.backward()
    named = fam.model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


CHECKED = {"twice": TWICE, "mass": WITH_MASS, "ragged": RAGGED, "behind": BEHIND}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("plan", CHECKED)
@every_run
def test_gradient_checkpointing_in_the_tower(name: str, plan: str, reentrant: bool) -> None:
    fam = families.make(name)
    dense.need_checkpointing(fam.model)
    inputs = fam.labelled()
    fam.model.train()
    blocks = towerref.parts(fam.model)[1]
    with vtc.attach(fam.model, CHECKED[plan], strict=False) as session:
        loss, wanted = gradients(fam, inputs)
        reductions = len(session.trace)
        fam.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert blocks[0].gradient_checkpointing
        if name in ("internvl", "gemma3") and plan in ("mass", "ragged"):
            with pytest.raises(vtc.errors.UnsupportedModel, match="gets no keyword arguments"):
                gradients(fam, inputs)
            return
        again, got = gradients(fam, inputs)
        assert len(session.trace) == 2 * reductions  # decided once, not again in the backward
    assert abs(loss - again) <= 1e-6
    assert got.keys() == wanted.keys()
    scale = max(1.0, *(g.abs().max().item() for g in wanted.values()))
    for parameter, gradient in wanted.items():
        near(got[parameter], gradient, parameter, 1e-6 * scale)


# --------------------------------------------------------------------------------------------
# 5: odd batches, refusals


@pytest.mark.parametrize("images", [(0, 1, 3), (3, 0), (2,)], ids=str)
@pytest.mark.parametrize("plan", ["mass", "behind"])
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "qwen3_vl", "idefics3", "smolvlm"])
def test_rows_with_no_to_three_images(name: str, plan: str, images: tuple[int, ...]) -> None:
    """Idefics3 and SmolVLM pad the images of a row with zeros and leave those out."""
    if name == "llava_next" and plan == "mass" and images == (0, 1, 3):
        images = (0, 1, 1)  # the others have padded tiles: see test_picture_edges.py
    fam, ref = (families.make(name, images_per_row=images) for _ in range(2))
    with vtc.attach(fam.model, PLANS[plan]) as session:
        out = generate(fam.model, fam.inputs)
    assert sum(len(r.n_in) for r in session.trace if r.site == "vision.1") >= sum(images)
    tokens = out.sequences[:, fam.inputs["input_ids"].shape[1] :]
    wanted = expected(ref, session.trace, fam.inputs, tokens, strengths(PLANS[plan]))
    assert worst(out.logits, wanted) <= TOLERANCE


@pytest.mark.parametrize("plan", [*PLANS.values(), RAGGED], ids=[*PLANS, "ragged"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_images_that_do_not_fill_their_frame(
    name: str, attn: str, plan: vtc.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pixel_attention_mask` hides patches from each other; the tower gets a mask of its own."""
    fam, ref = family(name, attn), reference(name)
    pixels = fam.inputs["pixel_values"]
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[-2:], dtype=torch.bool)
    mask[0, 0, 35:] = False
    mask[1, 1, :, 28:] = False
    with vtc.attach(fam.model, plan) as session:
        out = generate(fam.model, fam.inputs | {"pixel_attention_mask": mask})
    cls = type(ref.model.model)
    plain = cls.get_image_features

    def masked(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, pixel_values, mask, **kwargs)

    tokens = out.sequences[:, fam.inputs["input_ids"].shape[1] :]
    unmasked = expected(ref, session.trace, fam.inputs, tokens, strengths(plan))
    monkeypatch.setattr(cls, "get_image_features", masked)
    wanted = expected(ref, session.trace, fam.inputs, tokens, strengths(plan))
    assert worst(wanted, unmasked) > 1e-3
    assert worst(out.logits, wanted) <= TOLERANCE


class LastFrame(Method):
    """Images keep half of their tokens, videos those of the last frame."""

    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    budgets: ClassVar[frozenset[str]] = frozenset({"auto"})

    def plan(self, ctx: vtc.Context, k: tuple[int, ...]) -> Plan:
        keep = ctx.visual.clone()
        for r, grid in enumerate(ctx.layout):
            assert grid is not None
            first = grid.n // 2 if grid.frames == 1 else grid.n - grid.height * grid.width
            keep[r] &= ctx.source[r] >= first
        return Plan.from_mask(keep)


@pytest.mark.parametrize("options", [{}, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("name", PACKED)
def test_frames_that_lose_every_token(name: str, options: dict[str, Any]) -> None:
    """Empty segments vanish inside; Qwen3-VL writes frames as runs of their own, now empty."""
    with registered("last_frame", LastFrame):
        session = compare(name, recipe(("last_frame", "vision.1", "auto", options)))
    video = session.trace[1]
    grid = video.layout[0]
    assert grid is not None and video.n_out == (grid.height * grid.width,)


@pytest.mark.parametrize("options", [{}, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("method", ["norm", "random", "divprune", "test_ragged"])
def test_videos_of_llava_onevision(method: str, options: dict[str, Any]) -> None:
    """A row is a whole video, pooled 2 x 2 behind the projector; its frames keep different numbers
    of tokens."""
    keep = "auto" if method == "test_ragged" else 0.5
    session = compare("llava_onevision", recipe((method, "vision.1", keep, options)))
    images, video = session.trace
    assert set(images.n_in) == {16} and video.n_in == (16,) and video.layout[0].frames == 4


def test_two_drops_inside_the_tower_on_a_video() -> None:
    plan = recipe(("norm", "vision.1", 0.75), ("random", "vision.3", 0.5))
    session = compare("llava_onevision", plan)
    assert session.trace[-1].n_in == (12,) and session.trace[-1].n_out == (8,)


def test_images_of_llava_onevision_alone() -> None:
    fam, ref = (families.make("llava_onevision", images_per_row=(1, 2)) for _ in range(2))
    for plan in (INSIDE, WITH_MASS, RAGGED):
        with vtc.attach(fam.model, plan) as session:
            out = generate(fam.model, fam.inputs)
        tokens = out.sequences[:, fam.inputs["input_ids"].shape[1] :]
        wanted = expected(ref, session.trace, fam.inputs, tokens, strengths(plan))
        assert worst(out.logits, wanted) <= TOLERANCE


def test_class_token_among_the_features() -> None:
    """It is no unit: refused when the projector has run, rather than dropped by accident."""
    fam = families.make("llava")
    fam.model.config.vision_feature_select_strategy = "full"
    with (
        pytest.raises(vtc.errors.UnsupportedModel, match="192 groups .* became 195 projected"),
        vtc.attach(fam.model, INSIDE),
    ):
        fam.model(pixel_values=fam.inputs["pixel_values"], input_ids=torch.full((3, 65), 500))


def test_one_budget_for_all_images_of_a_prompt_is_not_ignored() -> None:
    """A tower does not know which prompt an image belongs to: refused, or one budget indeed."""
    fam = family("llava")
    try:
        session = vtc.attach(fam.model, "norm", keep=40, at="vision.1", scope="sample")
    except vtc.errors.VtcError:
        return
    with session, torch.no_grad():
        fam.model(**fam.inputs)
    assert sum(session.trace[0].n_out) == 80  # two prompts


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "qwen2_5_vl"])
def test_the_model_without_a_head_and_prompts_given_as_embeddings(name: str) -> None:
    fam = family(name)
    with vtc.attach(fam.model, WITH_MASS), torch.no_grad():
        wanted = fam.model(**fam.inputs, output_hidden_states=True).hidden_states[-1]
    with vtc.attach(fam.model.model, WITH_MASS), torch.inference_mode():
        got = fam.model.model(**fam.inputs).last_hidden_state
    near(got, wanted, "base model")
    if name in PACKED:
        return  # positions are counted from the ids
    embeds = fam.model.get_input_embeddings()(fam.inputs["input_ids"])
    inputs = {k: v for k, v in fam.inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with vtc.attach(fam.model, WITH_MASS), torch.no_grad():
        near(fam.model(**inputs, output_hidden_states=True).hidden_states[-1], wanted, "embeddings")


REFUSED: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "mistral3": ("mistral3", ("random", "vision.1", 0.5), vtc.errors.UnsupportedSite, "read more"),
    "behind the features": (
        "llava",
        ("random", "vision.3", 0.5),
        vtc.errors.UnsupportedSite,
        "reads what leaves block 2 of the tower",
    ),
    "no such block": (
        "qwen3_vl",
        ("random", "vision.99", 0.5),
        vtc.errors.UnsupportedSite,
        "no site 'vision.99'",
    ),
    "nothing before block 0": (
        "llava",
        ("asking", "vision.0", 0.5),
        vtc.errors.MissingSignal,
        "from vision.1 on",
    ),
    "auto": ("llava", ("random", "vision.1", "auto"), vtc.errors.InvalidBudget, "keep='auto'"),
    "fixed": ("llava", ("test_ragged", "vision.1", 4), vtc.errors.InvalidBudget, "it takes"),
    "elsewhere": (
        "llava",
        ("fastv", "vision.1", 0.5),
        vtc.errors.UnsupportedSite,
        "not at 'vision.1'",
    ),
}


def state_of(model: nn.Module) -> Any:
    """All that a session could leave behind, with whole configurations."""
    return runs.state_of(model), [
        m.config.to_dict() for m in model.modules() if hasattr(m, "config")
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_touched(case: str) -> None:
    name, step, error, words = REFUSED[case]
    fam = families.make(name)
    before = state_of(fam.model)
    asking = registered("asking", Probe, needs=PREVIOUS, seen={})
    with asking, pytest.raises(error, match=words):
        vtc.attach(fam.model, recipe(step))
    assert state_of(fam.model) == before


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -3, "some", True])
def test_wrong_budgets(keep: Any) -> None:
    with pytest.raises(vtc.errors.VtcError, match="keep"):
        vtc.attach(family("llava").model, "random", keep=keep, at="vision.1")


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(name: str, bad: float) -> None:
    fam = family(name)
    inputs = fam.inputs | {"pixel_values": fam.inputs["pixel_values"].clone()}
    inputs["pixel_values"][0, 0] = bad
    with (
        pytest.raises(vtc.errors.InvalidInput, match="vision.1: the visual tokens contain NaN"),
        vtc.attach(fam.model, INSIDE),
    ):
        generate(fam.model, inputs)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_prompts_without_images(name: str) -> None:
    fam = families.make(name, images_per_row=(0, 0))
    plain = generate(fam.model, fam.inputs)
    with (
        pytest.raises(vtc.errors.NothingReduced, match="vision.1"),
        vtc.attach(fam.model, WITH_MASS),
    ):
        generate(fam.model, fam.inputs)
    with vtc.attach(fam.model, WITH_MASS, strict=False):
        got = generate(fam.model, fam.inputs)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


# --------------------------------------------------------------------------------------------
# 6: no trace


class Stop(Exception):
    """Raised in the middle of a forward."""


def fail_at(module: nn.Module) -> Any:
    def stop(*_: Any) -> None:
        raise Stop

    return module.register_forward_pre_hook(stop)


@pytest.mark.parametrize("where", ["tower", "projector", "language model"])
@pytest.mark.parametrize("plan", ["mass", "ragged"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_exceptions_leave_no_trace(name: str, plan: str, where: str) -> None:
    """Neither on the model, nor in the session, which goes on as if nothing had happened."""
    fam, made = families.make(name), (PLANS | {"ragged": RAGGED})[plan]
    plain = generate(fam.model, fam.inputs)
    before = state_of(fam.model)
    with vtc.attach(fam.model, made):
        wanted = generate(fam.model, fam.single(1))
    _, blocks, projector = towerref.parts(fam.model)
    layers = oracle.text_model(fam.model).layers
    broken = {"tower": blocks[2], "projector": projector, "language model": layers[1]}[where]
    handle = fail_at(broken)
    with pytest.raises(Stop), vtc.attach(fam.model, made):
        generate(fam.model, fam.inputs)
    handle.remove()
    assert state_of(fam.model) == before
    after = generate(fam.model, fam.inputs)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))
    with vtc.attach(fam.model, made):
        handle = fail_at(broken)
        with pytest.raises(Stop):
            generate(fam.model, fam.inputs)
        handle.remove()
        again = generate(fam.model, fam.single(1))
    assert all(torch.equal(a, b) for a, b in zip(again.logits, wanted.logits, strict=True))
    assert state_of(fam.model) == before


# --------------------------------------------------------------------------------------------
# 7: threads, two models


@pytest.mark.parametrize("plan", ["mass", "ragged", "signals"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_two_threads_with_different_images(name: str, plan: str) -> None:
    fam = family(name)
    signals = recipe(("random", "vision.1", 0.5), ("visionzip", "projector", 7))
    made = (PLANS | {"ragged": RAGGED, "signals": signals})[plan]
    prompts = [fam.single(0), fam.single(1), fam.inputs]
    with vtc.attach(fam.model, made), ThreadPoolExecutor(3) as pool:
        alone = [generate(fam.model, p) for p in prompts]
        for _ in range(2):
            together = list(pool.map(lambda p: generate(fam.model, p), prompts))
            for one, other in zip(alone, together, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize("at_once", ["encode both first", "one encodes while the other answers"])
@pytest.mark.parametrize("plan", ["inside", "mass", "signals"])
def test_two_sessions_on_two_models(plan: str, at_once: str) -> None:
    """Features of one model are not taken for those of the other."""
    signals = recipe(("random", "vision.1", 0.5), ("visionzip", "projector", 3))
    made = (PLANS | {"signals": signals})[plan]
    one, two = families.make("llava"), families.make("gemma3")
    with vtc.attach(one.model, made):
        wanted_one = generate(one.model, encoded(one, one.inputs))
    with vtc.attach(two.model, made):
        wanted_two = generate(two.model, encoded(two, two.inputs))
    with vtc.attach(one.model, made), vtc.attach(two.model, made):
        first = encoded(one, one.inputs)
        second = encoded(two, two.inputs)
        got_one = generate(one.model, first)
        if at_once == "one encodes while the other answers":
            second = encoded(two, two.inputs)
        got_two = generate(two.model, second)
    check(got_one, wanted_one)
    check(got_two, wanted_two)


def test_features_that_were_encoded_but_never_used() -> None:
    """An encoding left over from another model, with another width, harms nobody."""
    one = family("llava")
    config = one.model.config
    narrow = type(config)(
        vision_config=configs.clip(),
        text_config=transformers.LlamaConfig(**families.TEXT | {"hidden_size": 32}),
        image_token_index=families.IMAGE,
    )
    other = configs.build(type(one.model), narrow, "sdpa", torch.float32)
    with vtc.attach(one.model, WITH_MASS):
        wanted = generate(one.model, one.inputs)
    with vtc.attach(other, WITH_MASS, strict=False), torch.no_grad():
        other.get_image_features(one.inputs["pixel_values"], return_dict=True)
    with vtc.attach(one.model, WITH_MASS):
        check(generate(one.model, one.inputs), wanted)


# --------------------------------------------------------------------------------------------
# 8: torch.compile


def test_compiled_model() -> None:
    """No graph break, and what the model computes uncompiled; it runs once before, as in
    `test_compile.py`."""
    fam = families.make("llava", row=0)
    inputs: dict[str, Any] = {**fam.inputs, "use_cache": False}
    made = recipe(
        ("divprune", "vision.1", 0.6, MERGED),
        ("random", "vision.2", 0.4, {"mass": 1.0}),
        ("visionzip", "projector", 0.2),
    )
    torch._dynamo.reset()
    counters.clear()
    try:
        with (
            torch._dynamo.config.patch(capture_scalar_outputs=True),
            torch.no_grad(),
            vtc.attach(fam.model, made),
        ):
            wanted = fam.model(**inputs).logits
            got = torch.compile(fam.model, backend="eager")(**inputs).logits
        breaks = dict(counters["graph_break"])
    finally:
        torch._dynamo.reset()
        counters.clear()
    assert breaks == {}
    near(got, wanted, "logits")


def test_sizes_of_a_merge_in_the_tower_weigh_in_a_later_step() -> None:
    """`mustdrop_merge` says what its tokens stand for, whoever asks."""
    fam, seen = family("llava"), []

    def plan(self: Any, ctx: vtc.Context, k: tuple[int, ...]) -> Plan:
        seen.append(ctx.signals["token_size"])
        return Plan.from_mask(ctx.visual & (ctx.source >= 0) & (ctx.visual.cumsum(1) <= k[0]), k)

    with registered("looks", Method, sites=frozenset({"projector"}), plan=plan):
        steps = (
            vtc.Step("mustdrop_merge", "vision.1", "auto", params={"threshold": -1.0, "window": 2}),
            vtc.Step("looks", "projector", 8, mass=1.0),
        )
        with vtc.attach(fam.model, vtc.Recipe(steps)), torch.no_grad():
            fam.model(**fam.inputs)
    assert bool((seen[0] == 4).all())


def test_other_threads_do_not_keep_a_finished_session() -> None:
    fam = family("llava")
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with vtc.attach(fam.model, "visionzip", keep=0.5):
                pool.submit(fam.model.model.get_image_features, fam.inputs["pixel_values"]).result()
        kept = pool.submit(ENCODINGS.get).result()
    assert len(kept) <= 1 and all(e.owner() is None or e.owner().closed for e in kept)


def test_a_text_forward_between_two_images_forgets_nothing() -> None:
    fam, ref = family("llava"), reference("llava")
    text = {"input_ids": torch.arange(2, 9)[None]}
    inputs = dict(fam.inputs)
    pixels = inputs.pop("pixel_values")
    with vtc.attach(fam.model, "visionzip", keep=0.25) as session, torch.no_grad():
        parts = []
        for image in pixels:
            parts += fam.model.model.get_image_features(image[None]).pooler_output
            fam.model(**text)
        given = BaseModelOutputWithPooling(pooler_output=parts)
        fam.model(**inputs, mm_encoder_outputs={"image": given})
    with vtc.attach(ref.model, "visionzip", keep=0.25) as other, torch.no_grad():
        ref.model(**fam.inputs)
    assert torch.equal(session.trace[-1].source, other.trace[-1].source)
