"""The `cache` site: what policies evict is what a masked model does not see.

Policies are registered for one test. The reference is a second model with the same weights that
keeps every column: `oracle` recomputes everything, `stepwise` runs it in any way of decoding with
the columns closed that earlier forwards evicted.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers
from support import dense
from support.lookup import Only
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicLayer

import vtc
from vtc import versions
from vtc.context import Context
from vtc.errors import (
    InvalidBudget,
    InvalidRecipe,
    MissingSignal,
    NothingReduced,
    UnsupportedModel,
    UnsupportedSite,
    VtcError,
)
from vtc.plan import Plan
from vtc.reducer import Method, top_k
from vtc.session import Reduction
from vtc.testing import configs, families, maskref, oracle, trace

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
EXACT = 1e-6  # attention rows behind the same layers
CLOSE = 1e-5  # behind layers with another attention function; keys and values of size 1 to 10
STEPS = 6

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")
every_family = pytest.mark.parametrize("name", FAMILIES)
few_families = pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
backends = pytest.mark.parametrize("attn", ["sdpa", "eager"])


# --------------------------------------------------------------------------------------------
# policies


class Policy(Method):
    """Keeps the highest scores; with keep="auto" the deeper the layer, the fewer."""

    sites: ClassVar[frozenset[str]] = frozenset({"cache"})
    default_at: ClassVar[str] = "cache"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def score(self, ctx: Context) -> Tensor:
        """By place alone, another order in every layer."""
        assert ctx.site.layer is not None
        return (ctx.source * 7919 + ctx.site.layer * 31) % 101.0

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        assert ctx.site.kind == "cache" and ctx.site.layer is not None
        if k == ctx.counts:
            share = (0.7, 0.5, 0.3, 0.1)[ctx.site.layer]
            k = tuple(max(1, int(n * share)) for n in ctx.counts)
        return top_k(self.score(ctx), ctx.visual, k)


class ByLast(Policy):
    needs: ClassVar[frozenset[str]] = frozenset({"attn_last"})

    def score(self, ctx: Context) -> Tensor:
        return ctx.signals["attn_last"].mean(1)


class ByText(Policy):
    needs: ClassVar[frozenset[str]] = frozenset({"attn_text"})

    def score(self, ctx: Context) -> Tensor:
        return ctx.signals["attn_text"].sum(1)


class ByKey(Policy):
    """Keys of small norm stay."""

    def score(self, ctx: Context) -> Tensor:
        return -ctx.x.norm(dim=-1)


class Fading(Policy):
    """Half of the columns go after the prompt, two more after every forward."""

    every_step: ClassVar[bool] = True

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        here = zip(ctx.counts, ctx.original, strict=True)
        left = tuple(max(1, n // 2 if n == had else n - 2) for n, had in here)
        return top_k(self.score(ctx), ctx.visual, left)


class FadingByLast(Fading):
    needs: ClassVar[frozenset[str]] = frozenset({"attn_last"})

    def score(self, ctx: Context) -> Tensor:
        return ctx.signals["attn_last"].mean(1)


class Even(Policy):
    """The same places in all layers."""

    def score(self, ctx: Context) -> Tensor:
        return (ctx.source * 37) % 53.0

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        return top_k(self.score(ctx), ctx.visual, k)


class Halves(Even):
    """Layers 0 and 1 share their places, layers 2 and 3 others."""

    def score(self, ctx: Context) -> Tensor:
        assert ctx.site.layer is not None
        return super().score(ctx) * (1 if ctx.site.layer < 2 else -1)


class OnlyFixed(Even):
    budgets: ClassVar[frozenset[str]] = frozenset({"fixed"})


POLICIES = (ByLast, ByText, ByKey)
by_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
any_policy = pytest.mark.parametrize("policy", [ByLast, Policy, Fading], ids=lambda p: p.__name__)
FULL = {"gemma3": [1, 3]}


@contextmanager
def registered(cls: type[Method]) -> Iterator[str]:
    """A name for a policy, gone afterwards."""
    name = "test_cache_policy"
    vtc.register(name)(dataclass(frozen=True)(type(cls.__name__, (cls,), {"__module__": __name__})))
    try:
        yield name
    finally:
        del vtc.REDUCERS._items[name]


@functools.cache
def family(name: str, attn: str = "sdpa", images: tuple[int, ...] | None = None) -> families.Family:
    """The model that sessions attach to."""
    return families.make(name, attn, images_per_row=images)


@functools.cache
def reference(name: str, attn: str = "sdpa") -> families.Family:
    """The same weights, never attached."""
    return families.make(name, attn)


# --------------------------------------------------------------------------------------------
# the reference for any way of decoding


@dataclass
class Log:
    """What every forward of an attached model was fed and decided."""

    session: vtc.Session
    spans: list[tuple[int, int]] = field(default_factory=list)  # original columns
    starts: list[int] = field(default_factory=list)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs["input_ids"], versions.cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.spans.append((past, past + ids.shape[1]))
        self.starts.append(len(self.session.trace))

    def decided(self) -> list[list[Reduction]]:
        """Reductions of each forward."""
        seen, ends = list(self.session.trace), [*self.starts[1:], len(self.session.trace)]
        return [seen[a:b] for a, b in zip(self.starts, ends, strict=True)]

    def visible(self, visual: Tensor) -> list[dict[int, Tensor]]:
        """What each forward still sees at each layer, [B, L]: the work of the forwards before."""
        total = max(end for _, end in self.spans)
        visual = nn.functional.pad(visual, (0, max(0, total - visual.shape[1])))
        always = any(m.every_step for m in self.session.methods)
        now: dict[int, Tensor] = {}
        rows: list[trace.Row] = []
        out = []
        for (start, end), reductions in zip(self.spans, self.decided(), strict=True):
            out.append({layer: mask.clone() for layer, mask in now.items()})
            images = trace.rows_of(visual[:, start:end]) if start not in self._seen(out) else []
            fresh = [(sample, [start + c for c in columns]) for sample, columns in images]
            rows = sorted(rows + fresh, key=lambda row: row[0]) if always else fresh
            for reduction in reductions:
                if reduction.site.startswith("cache."):
                    self._close(now, reduction, rows, visual)
        return out

    def _seen(self, out: list[Any]) -> set[int]:
        """Starts of earlier forwards: what was rolled back is no new image."""
        return {start for start, _ in self.spans[: len(out) - 1]}

    @staticmethod
    def _close(
        now: dict[int, Tensor], reduction: Reduction, rows: list[trace.Row], visual: Tensor
    ) -> None:
        assert [sample for sample, _ in rows] == list(reduction.samples)
        mask = now.setdefault(int(reduction.site.removeprefix("cache.")), torch.ones_like(visual))
        for row, (sample, columns) in enumerate(rows):
            kept = set(reduction.source[row, : reduction.n_out[row]].tolist())
            for place, column in enumerate(columns):
                if place not in kept:
                    mask[sample, column] = False


@contextmanager
def logged(fam: families.Family, recipe: Any, **options: Any) -> Iterator[Log]:
    with vtc.attach(fam.model, recipe, **options) as session:
        log = Log(session)
        handle = fam.model.model.register_forward_pre_hook(log.before, with_kwargs=True)
        try:
            yield log
        finally:
            handle.remove()


@contextmanager
def stepwise(model: nn.Module, steps: Sequence[Mapping[int, Tensor]]) -> Iterator[None]:
    """Forward number f sees, at each layer, the columns `steps[f][layer]` and all new ones."""
    text = oracle.text_model(model)
    layers = {layer for step in steps for layer in step}
    shape = next((mask for step in steps for mask in step.values()), torch.ones(1, 1))
    now = {layer: torch.ones_like(shape) for layer in layers}
    turn = iter(steps)

    def advance(module: nn.Module, args: Any, kwargs: Any) -> None:
        step = next(turn)
        for layer, mask in now.items():
            mask.copy_(step.get(layer, torch.ones_like(mask)))

    handles = [text.register_forward_pre_hook(advance, with_kwargs=True)]
    for layer, mask in now.items():
        hook = maskref._hook(layer, mask, None, None)
        handles.append(text.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
        assert next(turn, None) is None, "fewer forwards than in the session"
    finally:
        for handle in handles:
            handle.remove()


def generate(model: nn.Module, inputs: families.Inputs, **options: Any) -> Any:
    dense.need(model, options)
    options = {"max_new_tokens": STEPS} | options
    torch.manual_seed(5)
    with torch.no_grad():
        return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def worst(a: Any, b: Any) -> float:
    """Largest difference over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


Way = Callable[[families.Family], tuple[list[Tensor], Tensor]]  # logits, tokens


def compare(
    policy: type[Method],
    fam: families.Family,
    ref: families.Family,
    way: Way,
    visual: Tensor,
    before: Sequence[vtc.Step] = (),
) -> Log:
    """The same way of decoding on both models."""
    with registered(policy) as name:
        recipe = vtc.Recipe((*before, vtc.Step(name, "cache", "auto")), 3)
        with logged(fam, recipe) as log:
            logits, tokens = way(fam)
    steps = log.visible(visual)
    assert any(not bool(mask.all()) for mask in steps[-1].values())
    drops = [r for r in log.session.trace if not r.site.startswith("cache")]
    mass = {step.at: step.mass for step in before}
    masks = trace.masks(drops, visual, mass)
    with maskref.masked(ref.model, masks.keep, masks.bias), stepwise(ref.model, steps):
        expected, same = way(ref)
    assert torch.equal(tokens, same)
    assert worst(logits, expected) <= TOLERANCE
    return log


def generating(inputs: families.Inputs, **options: Any) -> Way:
    def way(fam: families.Family) -> tuple[list[Tensor], Tensor]:
        out = generate(fam.model, inputs, **options)
        return list(out.logits), out.sequences

    return way


# --------------------------------------------------------------------------------------------
# greedy decoding against the oracle


@backends
@by_policy
@every_family
def test_policies_equal_the_oracle(name: str, policy: type[Method], attn: str) -> None:
    fam, ref = family(name, attn), reference(name, attn)
    with registered(policy) as method, vtc.attach(fam.model, method, keep="auto") as session:
        out = generate(fam.model, fam.inputs)
    masks = trace.masks(session.trace, fam.visual())
    layers = FULL.get(name, [0, 1, 2, 3])
    assert [r.site for r in session.trace] == [f"cache.{i}" for i in layers]
    assert sorted(masks.evict) == layers
    expected, tokens = oracle.run(ref, ref.inputs, evict=masks.evict, steps=STEPS)
    assert torch.equal(out.sequences[:, fam.inputs["input_ids"].shape[1] :], tokens)
    assert worst(out.logits, expected) <= TOLERANCE


def three_dimensional(log: Log, visual: Tensor) -> dict[int, Tensor]:
    """Masks of the oracle, [B, steps, L]: token t is fed in forward t + 1."""
    steps = log.visible(visual)[1:]
    length = visual.shape[1]
    out = {i: torch.stack([step[i][:, :length] for step in steps], 1) for i in steps[0]}
    return {i: torch.cat([mask, mask[:, -1:]], 1) for i, mask in out.items()}


@backends
@pytest.mark.parametrize("policy", [Fading, FadingByLast], ids=lambda p: p.__name__)
@every_family
def test_evicting_at_every_step_equals_the_oracle(
    name: str, policy: type[Method], attn: str
) -> None:
    fam, ref = family(name, attn), reference(name, attn)
    with registered(policy) as method, logged(fam, method, keep="auto") as log:
        out = generate(fam.model, fam.inputs)
    layers = FULL.get(name, [0, 1, 2, 3])
    assert len(log.session.trace) == STEPS * len(layers)
    evict = three_dimensional(log, fam.visual())
    images = {sample: len(columns) for sample, columns in trace.rows_of(fam.visual())}
    for mask in evict.values():
        left = (mask & fam.visual()[:, None])[0].sum(-1).tolist()
        assert left[:-1] == [max(1, images[0] // 2 - 2 * t) for t in range(STEPS - 1)]
    expected, tokens = oracle.run(ref, ref.inputs, evict=evict, steps=STEPS)
    assert torch.equal(out.sequences[:, fam.inputs["input_ids"].shape[1] :], tokens)
    assert worst(out.logits, expected) <= TOLERANCE


@backends
@pytest.mark.parametrize("policy", [ByText, Fading], ids=lambda p: p.__name__)
@few_families
def test_together_with_drops_and_mass(name: str, policy: type[Method], attn: str) -> None:
    fam, ref = family(name, attn), reference(name, attn)
    with registered(policy) as method:
        steps = (
            vtc.Step("random", "projector", 0.7, mass=1.0),
            vtc.Step("random", "decoder.2", 0.4, mass=1.0),
            vtc.Step(method, "cache", "auto"),
        )
        with logged(fam, vtc.Recipe(steps, 3)) as log:
            out = generate(fam.model, fam.inputs)
    drops = [r for r in log.session.trace if not r.site.startswith("cache")]
    masks = trace.masks(drops, fam.visual(), 1.0)
    assert set(masks.keep) == set(masks.bias) == {"projector", 2}
    expected, tokens = oracle.run(
        ref,
        ref.inputs,
        keep=masks.keep,
        bias=masks.bias,
        evict=three_dimensional(log, fam.visual()),
        steps=STEPS,
    )
    assert torch.equal(out.sequences[:, fam.inputs["input_ids"].shape[1] :], tokens)
    assert worst(out.logits, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# other ways to decode


@any_policy
@every_family
def test_beams(name: str, policy: type[Method]) -> None:
    fam, ref = family(name), reference(name)
    visual = fam.visual().repeat_interleave(3, 0)
    log = compare(policy, fam, ref, generating(fam.inputs, num_beams=3), visual)
    for step in log.visible(visual):
        for mask in step.values():
            assert torch.equal(mask[0::3], mask[1::3]) and torch.equal(mask[0::3], mask[2::3])


@every_family
def test_beams_equal_the_masked_model(name: str) -> None:
    fam, ref = family(name), reference(name)
    with registered(ByLast) as method, vtc.attach(fam.model, method, keep=0.2) as session:
        got = generate(fam.model, fam.inputs, num_beams=3)
    visual = fam.visual().repeat_interleave(3, 0)
    masks = trace.masks(session.trace, visual)
    with maskref.masked(ref.model, evict=masks.evict):
        expected = generate(ref.model, fam.inputs, num_beams=3)
    assert torch.equal(got.sequences, expected.sequences)
    assert worst(got.logits, expected.logits) <= TOLERANCE


@any_policy
@few_families
def test_sampling_several_sequences(name: str, policy: type[Method]) -> None:
    fam, ref = family(name), reference(name)
    way = generating(fam.inputs, do_sample=True, num_return_sequences=3)
    compare(policy, fam, ref, way, fam.visual().repeat_interleave(3, 0))


@any_policy
@every_family
def test_prompt_lookup_rolls_the_cache_back(name: str, policy: type[Method]) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.single(1)
    only = LogitsProcessorList([Only(inputs, fam.visual(inputs))])
    way = generating(inputs, prompt_lookup_num_tokens=4, max_new_tokens=16, logits_processor=only)
    log = compare(policy, fam, ref, way, fam.visual(inputs))
    pairs = zip(log.spans[1:], log.spans[:-1], strict=True)
    assert any(start < before for (start, _), (_, before) in pairs)


@pytest.mark.parametrize("before", ["projector", "decoder.2"])
@any_policy
@few_families
def test_drops_before_in_beams(name: str, policy: type[Method], before: str) -> None:
    fam, ref = family(name), reference(name)
    drop = vtc.Step("random", before, 0.5, mass=1.0)
    visual = fam.visual().repeat_interleave(3, 0)
    compare(policy, fam, ref, generating(fam.inputs, num_beams=3), visual, [drop])


@any_policy
@pytest.mark.parametrize("chunk", [20, 70])
@every_family
def test_chunked_prefill(name: str, chunk: int, policy: type[Method]) -> None:
    """Later chunks do not see what was evicted behind earlier ones."""
    fam, ref = family(name), reference(name)
    inputs = fam.single(1) if chunk == 20 else fam.inputs
    way = generating(inputs, prefill_chunk_size=chunk)
    compare(policy, fam, ref, way, fam.visual(inputs))


@any_policy
@pytest.mark.parametrize("images", [(0, 1, 3, 2), (3, 0), (1, 1, 1)], ids=str)
@few_families
def test_rows_with_no_to_three_images(
    name: str, images: tuple[int, ...], policy: type[Method]
) -> None:
    fam = family(name, images=images)
    compare(policy, fam, reference(name), generating(fam.inputs), fam.visual())


def some_tokens(batch: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 490, (batch, n), generator=torch.Generator().manual_seed(seed))


def append(fam: families.Family, inputs: families.Inputs, tokens: Tensor) -> families.Inputs:
    """Inputs whose prompt goes on with `tokens` [B, n]; without pixels."""
    more = torch.ones_like(tokens)
    out = {
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], more], 1),
    }
    if fam.recipe.types is not None:
        types = inputs[fam.recipe.types]
        fresh = fam.visual({"input_ids": tokens}).long() if fam.recipe.typed else 0 * more
        out[fam.recipe.types] = torch.cat([types, fresh], 1)
    return out


def two_turns(inputs: families.Inputs, second: Tensor, **new: Tensor) -> Way:
    """Greedy, then more text on the same cache."""

    def way(fam: families.Family) -> tuple[list[Tensor], Tensor]:
        first = generate(fam.model, inputs)
        length = inputs["input_ids"].shape[1]
        longer = append(fam, inputs, torch.cat([first.sequences[:, length:], second], 1))
        again = generate(fam.model, longer | new, past_key_values=first.past_key_values)
        return [*first.logits, *again.logits], again.sequences

    return way


@pytest.mark.parametrize("rows", ["batch", "alone"])
@any_policy
@every_family
def test_two_turns_on_one_cache(name: str, policy: type[Method], rows: str) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    second = some_tokens(len(inputs["input_ids"]), 5)
    compare(policy, fam, ref, two_turns(inputs, second), fam.visual(inputs))


@any_policy
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_image_in_the_second_turn(name: str, policy: type[Method]) -> None:
    fam, ref = family(name), reference(name)
    image = fam.recipe.image(0, torch.Generator().manual_seed(8))
    second = torch.cat([some_tokens(1, 3)[0], image.ids, some_tokens(1, 4)[0]])[None]
    inputs = fam.single(1)
    first = fam.visual(inputs)
    between = torch.zeros(1, STEPS, dtype=torch.bool)
    visual = torch.cat([first, between, fam.visual({"input_ids": second})], 1)
    compare(policy, fam, ref, two_turns(inputs, second, **image.payload), visual)


@any_policy
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_image_after_a_turn_of_text(name: str, policy: type[Method]) -> None:
    """Nothing was evicted before; the padded first turn must stay hidden."""
    fam, ref = family(name), reference(name)
    ids = some_tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if fam.recipe.types is not None:
        inputs[fam.recipe.types] = torch.zeros_like(ids)
    images = [fam.recipe.image(i, torch.Generator().manual_seed(i)) for i in range(2)]
    text = some_tokens(2, 4, 5)
    second = torch.stack([torch.cat([i.ids, t]) for i, t in zip(images, text, strict=True)])
    pixels = torch.cat([image.payload["pixel_values"] for image in images])
    blank = torch.zeros(2, 7 + STEPS, dtype=torch.bool)
    visual = torch.cat([blank, fam.visual({"input_ids": second})], 1)
    compare(policy, fam, ref, two_turns(inputs, second, pixel_values=pixels), visual)


@pytest.mark.parametrize("policy", [ByText, Fading], ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_one_budget_for_all_images_of_a_prompt(
    name: str, policy: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    fam, ref = family(name), reference(name)
    with registered(policy) as method, logged(fam, method, keep="auto", scope="sample") as log:
        out = generate(fam.model, fam.inputs)
    assert log.session.trace[0].samples == (0, 1)
    monkeypatch.setattr(trace, "rows_of", functools.partial(trace.rows_of, scope="sample"))
    evict = three_dimensional(log, fam.visual())
    expected, _ = oracle.run(ref, ref.inputs, evict=evict, steps=STEPS)
    assert worst(out.logits, expected) <= TOLERANCE


def _windowed(window: int, attn: str, dtype: torch.dtype) -> families.Recipe:
    """LLaVA whose text layers all see the last columns only; the config names no layer types."""
    text = transformers.MistralConfig(**families.TEXT, head_dim=16, sliding_window=window)
    config = transformers.LlavaConfig(
        vision_config=configs.clip(), text_config=text, image_token_index=families.IMAGE
    )
    model = transformers.LlavaForConditionalGeneration
    return families.Recipe(configs.build(model, config, attn, dtype), configs.fixed(64))


@any_policy
@pytest.mark.parametrize("window", [24, 4096])
def test_models_with_windows_alone_are_right_or_refused(
    window: int, policy: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sliding layers keep their window, so nothing may be evicted, or the site is not there."""
    monkeypatch.setitem(families.FAMILIES, "windowed", functools.partial(_windowed, window))
    fam, ref = families.make("windowed"), families.make("windowed")
    with registered(policy) as method:
        try:
            with logged(fam, method, keep="auto") as log:
                got = generate(fam.model, fam.inputs)
        except VtcError:
            return
    steps = log.visible(fam.visual())
    with stepwise(ref.model, steps):
        expected = generate(ref.model, fam.inputs)
    assert worst(got.logits, expected.logits) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# hand-written loops


@dataclass
class Chat:
    """One cache that is fed token by token."""

    model: nn.Module
    inputs: families.Inputs
    masked: bool = True
    cache: Any = None
    fed: int = 0
    positions: Tensor | None = None  # of the prompt, passed on; None leaves them to the model

    def start(self) -> Tensor:
        """[B, L, V] logits of the prompt."""
        inputs = dict(self.inputs)
        if not self.masked:
            del inputs["attention_mask"]
        if self.positions is not None:
            inputs["position_ids"] = self.positions
        with torch.no_grad():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits

    def step(self, tokens: Tensor) -> Tensor:
        """Feed tokens [B, n] -> their logits [B, n, V]."""
        more: dict[str, Tensor] = {}
        if self.positions is not None:
            steps = torch.arange(1, tokens.shape[1] + 1) + self.fed
            more["position_ids"] = self.positions[..., -1:] + steps
        self.fed += tokens.shape[1]
        if self.masked:
            mask = self.inputs["attention_mask"]
            more["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self.fed)], 1)
        with torch.no_grad():
            out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **more)
        return out.logits


def chatting(fam: families.Family, inputs: families.Inputs, masked: bool = True) -> Chat:
    """Attached models count positions themselves. Untouched ones with multimodal positions cannot
    when they see a mask for the whole sequence (transformers 5.23): they are told."""
    attached = bool(fam.model.model._forward_pre_hooks)
    told = hasattr(fam.model.model, "rope_deltas") and not attached
    positions = oracle.encode(fam.model, inputs).positions.detach() if told else None
    return Chat(fam.model, inputs, masked, positions=positions)


def loop(inputs: families.Inputs, fed: Tensor, masked: bool = True) -> Way:
    def way(fam: families.Family) -> tuple[list[Tensor], Tensor]:
        chat = chatting(fam, inputs, masked)
        out = [chat.start()]
        out += [chat.step(fed[:, i : i + 1]) for i in range(fed.shape[1] - 2)]
        out.append(chat.step(fed[:, -2:]))  # two tokens at once
        assert chat.cache.get_seq_length() == inputs["input_ids"].shape[1] + fed.shape[1]
        valid = inputs["attention_mask"].bool()
        return [out[0][valid], *out[1:]], fed

    return way


@pytest.mark.parametrize("rows", ["left", "right", "alone", "no mask"])
@any_policy
@every_family
def test_hand_written_loop(name: str, policy: type[Method], rows: str) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.padded(rows) if rows in ("left", "right") else fam.single(1)
    way = loop(inputs, some_tokens(len(inputs["input_ids"]), 6), rows != "no mask")
    compare(policy, fam, ref, way, fam.visual(inputs))


@any_policy
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gemma3"])
def test_cache_can_be_cut_back(name: str, policy: type[Method]) -> None:
    fam, ref = family(name), reference(name)
    fed, other = some_tokens(2, 5), some_tokens(2, 5, 2)

    def way(fam: families.Family) -> tuple[list[Tensor], Tensor]:
        chat = chatting(fam, fam.inputs)
        chat.start()
        for i in range(5):
            chat.step(fed[:, i : i + 1])
        chat.cache.crop(-3)
        chat.fed -= 3
        assert chat.cache.get_seq_length() == fam.inputs["input_ids"].shape[1] + 2
        return [chat.step(other[:, i : i + 1]) for i in (2, 3, 4)], other

    compare(policy, fam, ref, way, fam.visual())


@any_policy
def test_sliding_layers_in_a_cache_that_keeps_everything(policy: type[Method]) -> None:
    """A cache made without a configuration has no windows; the layers still do."""
    fam, ref = family("gemma3"), reference("gemma3")
    fed = some_tokens(2, 4)

    def way(fam: families.Family) -> tuple[list[Tensor], Tensor]:
        chat = chatting(fam, fam.inputs)
        chat.cache = DynamicCache()
        return [chat.start()[:, -1], *(chat.step(fed[:, i : i + 1]) for i in range(4))], fed

    compare(policy, fam, ref, way, fam.visual())


@any_policy
@few_families
def test_copy_of_a_cache_goes_its_own_way(name: str, policy: type[Method]) -> None:
    """Two continuations of one prompt equal two chats that never met."""
    fam = family(name)
    fed, other = some_tokens(2, 4), some_tokens(2, 4, 2)
    with registered(policy) as method, vtc.attach(fam.model, method, keep="auto"):
        chat = Chat(fam.model, fam.inputs)
        chat.start()
        chat.step(fed[:, :1])
        twin = replace_cache(chat, copy.deepcopy(chat.cache))
        assert twin.cache._vtc_state is not chat.cache._vtc_state
        own = [chat.step(fed[:, i : i + 1]) for i in (1, 2, 3)]
        others = [twin.step(other[:, i : i + 1]) for i in (1, 2, 3)]
        expected = []
        for tokens in (fed, other):
            alone = Chat(fam.model, fam.inputs)
            alone.start()
            alone.step(fed[:, :1])
            expected.append([alone.step(tokens[:, i : i + 1]) for i in (1, 2, 3)])
    assert worst(own, expected[0]) == 0 and worst(others, expected[1]) == 0


def replace_cache(chat: Chat, cache: Any) -> Chat:
    return Chat(chat.model, chat.inputs, chat.masked, cache, chat.fed)


@any_policy
@few_families
def test_rows_of_a_cache_can_change_places(name: str, policy: type[Method]) -> None:
    fam, swap, fed = family(name), torch.tensor([1, 0]), some_tokens(2, 4)
    with registered(policy) as method, vtc.attach(fam.model, method, keep="auto"):
        plain, chat = Chat(fam.model, fam.inputs), Chat(fam.model, fam.inputs)
        for one in (plain, chat):
            one.start()
            one.step(fed[:, :1])
        chat.cache.reorder_cache(swap)
        text = ("input_ids", "attention_mask")
        chat.inputs = {k: fam.inputs[k][swap] for k in text}
        expected = [plain.step(fed[:, i : i + 1]) for i in (1, 2, 3)]
        got = [chat.step(fed[swap, i : i + 1])[swap] for i in (1, 2, 3)]
    assert worst(got, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# signals


class Probe(Policy):
    """Keeps everything and remembers every context."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"keys", "values", "survivors", "attn_last", "attn_text"}
    )
    seen: ClassVar[list[dict[str, Any]]] = []

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        found = {name: ctx.signals[name].clone() for name in self.needs}
        self.seen.append(found | {"x": ctx.x.clone(), "site": ctx.site, "counts": ctx.counts})
        return Plan.from_mask(ctx.visual)


class SteadyProbe(Probe):
    every_step: ClassVar[bool] = True


def states(cache: Any, layer: int, kind: str) -> Tensor:
    """[B, L, C] keys or values, heads side by side."""
    return getattr(cache.layers[layer], kind).transpose(1, 2).flatten(2)


def check_signals(
    seen: dict[str, Any],
    ref: families.Family,
    out: Any,
    text: list[list[int]],
    last: list[int],
    exact: float,
) -> None:
    layer = seen["site"].layer
    attention = out.attentions[layer]
    for row, (sample, columns) in enumerate(trace.rows_of(ref.visual())):
        n, behind = len(columns), text[sample]
        assert seen["counts"][row] == n
        for kind in ("keys", "values"):
            wanted = states(out.past_key_values, layer, kind)[sample, columns]
            assert (seen[kind][row, :n] - wanted).abs().max() <= CLOSE
        assert torch.equal(seen["x"], seen["keys"])
        wanted = attention[sample, :, last[sample]][:, columns]
        assert (seen["attn_last"][row, :, :n] - wanted).abs().max() <= exact
        wanted = attention[sample].mean(0)[behind][:, columns]
        found = seen["attn_text"][row, :, :n]
        found = found[found.any(-1)]  # rows of absent text are 0
        assert found.shape == wanted.shape and (found - wanted).abs().max() <= exact
        assert seen["survivors"][row].sum() == n


@backends
@every_family
def test_signals_are_those_of_an_untouched_eager_model(name: str, attn: str) -> None:
    fam, ref = family(name, attn), reference(name, "eager")
    Probe.seen.clear()
    with (
        registered(Probe) as method,
        vtc.attach(fam.model, method, keep="auto"),
        torch.no_grad(),
    ):
        fam.model(**fam.inputs)
        out = ref.model(**ref.inputs, use_cache=True, output_attentions=True)
    text, visual = [], ref.visual()
    for seen, real in zip(visual, ref.inputs["attention_mask"].bool(), strict=True):
        start = int(seen.nonzero().max()) + 1
        text.append([c for c in range(start, len(seen)) if real[c]])
    last = [visual.shape[1] - 1] * len(visual)
    assert [s["site"].layer for s in Probe.seen] == FULL.get(name, [0, 1, 2, 3])
    for seen in Probe.seen:
        check_signals(seen, ref, out, text, last, EXACT if attn == "eager" else CLOSE)


@backends
@few_families
def test_signals_of_decode_steps(name: str, attn: str) -> None:
    fam, ref = family(name, attn), reference(name, "eager")
    fed = some_tokens(2, 2)
    Probe.seen.clear()
    with registered(SteadyProbe) as method, vtc.attach(fam.model, method, keep="auto"):
        chat = Chat(fam.model, fam.inputs)
        chat.start()
        Probe.seen.clear()
        chat.step(fed[:, :1])
        chat.step(fed[:, 1:])
    dense = chatting(ref, ref.inputs)
    dense.start()
    dense.step(fed[:, :1])
    mask = torch.cat([ref.inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    more = {} if dense.positions is None else {"position_ids": dense.positions[..., -1:] + 2}
    with torch.no_grad():
        out = ref.model(
            **more,
            input_ids=fed[:, 1:],
            attention_mask=mask,
            past_key_values=dense.cache,
            output_attentions=True,
        )
    layers = FULL.get(name, [0, 1, 2, 3])
    assert len(Probe.seen) == 2 * len(layers)
    for seen in Probe.seen[len(layers) :]:
        check_signals(seen, ref, out, [[0], [0]], [0, 0], EXACT if attn == "eager" else CLOSE)


@every_family
def test_survivors_are_what_the_last_drop_kept(name: str) -> None:
    fam = family(name)
    Probe.seen.clear()
    with registered(Probe) as method:
        steps = (
            vtc.Step("random", "projector", 0.8),
            vtc.Step("random", "decoder.2", 0.3),
            vtc.Step(method, "cache", "auto"),
        )
        with vtc.attach(fam.model, vtc.Recipe(steps, 3)) as session, torch.no_grad():
            fam.model(**fam.inputs)
    final = session.trace[1]
    assert final.site == "decoder.2"
    for seen, entry in zip(Probe.seen, list(session.trace)[2:], strict=True):
        for row, n in enumerate(entry.n_in):
            kept = set(final.source[row, : final.n_out[row]].tolist())
            places = entry.source_in[row, :n].tolist()
            assert seen["survivors"][row, :n].tolist() == [p in kept for p in places]
            assert not seen["survivors"][row, n:].any()
            assert set(places) >= kept and (n > len(kept)) == (seen["site"].layer < 2)


# --------------------------------------------------------------------------------------------
# the cache itself


def after_prefill(fam: families.Family, inputs: families.Inputs, policy: type[Method], keep: Any):
    with (
        registered(policy) as method,
        vtc.attach(fam.model, method, keep=keep) as session,
        torch.no_grad(),
    ):
        out = fam.model(**inputs, use_cache=True)
    return out, session


@every_family
def test_layers_shrink_to_lengths_of_their_own(name: str) -> None:
    fam = family(name)
    inputs = fam.single(1)
    out, session = after_prefill(fam, inputs, ByKey, "auto")
    with torch.no_grad():
        dense = reference(name).model(**inputs, use_cache=True)
    length = inputs["input_ids"].shape[1]
    text = length - int(fam.visual(inputs).sum())
    evicted = {int(r.site.removeprefix("cache.")): sum(r.n_out) for r in session.trace}
    assert len(set(evicted.values())) == len(evicted) == len(FULL.get(name, range(4)))
    for i, layer in enumerate(out.past_key_values.layers):
        full = dense.past_key_values.layers[i].keys.shape
        wanted = text + evicted[i] if i in evicted else full[2]
        assert layer.keys.shape == layer.values.shape == (*full[:2], wanted, full[3])
        if i in evicted:
            held = layer.keys.untyped_storage().nbytes()
            assert held == layer.keys.numel() * layer.keys.element_size()
        assert out.past_key_values.get_seq_length(i) == length


@pytest.mark.parametrize(("policy", "stages"), [(Even, 1), (Halves, 2), (Policy, 4)])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_layers_with_equal_columns_share_a_stage(
    name: str, policy: type[Method], stages: int
) -> None:
    fam = family(name)
    keep = "auto" if policy is Policy else 0.3
    out, _ = after_prefill(fam, fam.inputs, policy, keep)
    assert len(out.past_key_values._vtc_state.stages) == stages


@every_family
def test_keeping_everything_changes_no_bit(name: str) -> None:
    fam = family(name)
    plain = generate(fam.model, fam.inputs)
    with registered(ByLast) as method, vtc.attach(fam.model, method, keep=1.0) as session:
        got = generate(fam.model, fam.inputs)
    assert session.trace and all(r.n_in == r.n_out for r in session.trace)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))
    assert not hasattr(got.past_key_values, "_vtc_state")


@every_family
def test_prompt_logits_change_no_bit(name: str) -> None:
    fam = family(name)
    out, _ = after_prefill(fam, fam.inputs, ByKey, 0.1)
    with torch.no_grad():
        assert torch.equal(out.logits, fam.model(**fam.inputs).logits)


@any_policy
@few_families
def test_bf16(name: str, policy: type[Method]) -> None:
    fam = families.make(name, dtype=torch.bfloat16)
    plain = generate(fam.model, fam.inputs)
    with registered(policy) as method, vtc.attach(fam.model, method, keep="auto") as session:
        got = generate(fam.model, fam.inputs)
    assert torch.equal(got.logits[0], plain.logits[0])
    assert all(bool(logits.isfinite().all()) for logits in got.logits)
    assert any(not torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))
    layers = {int(r.site.removeprefix("cache.")): r for r in session.trace}
    for i, layer in enumerate(got.past_key_values.layers):
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        if i in layers:
            assert layer.keys.shape[2] < plain.past_key_values.layers[i].keys.shape[2]


def test_nothing_is_left_behind() -> None:
    fam = family("llava")
    before = generate(fam.model, fam.inputs)
    with registered(Fading) as method, vtc.attach(fam.model, method, keep="auto"):
        generate(fam.model, fam.inputs)
    assert "test_cache_policy" not in vtc.REDUCERS
    oracle.refuse_hooks(fam.model, oracle.text_model(fam.model))
    after = generate(fam.model, fam.inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


# --------------------------------------------------------------------------------------------
# refusals


class Counting(DynamicLayer):
    """Holds its latest column as a tensor only, as quantising layers do."""

    total = 0

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().update(key, value, *args, **kwargs)
        self.total += key.shape[2]
        self.keys, self.values = self.keys[:, :, -1:], self.values[:, :, -1:]
        return out

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.total


def test_caches_that_cannot_shrink() -> None:
    fam = family("llava")
    config = fam.model.config.get_text_config()
    quantised = DynamicCache()
    quantised.layers = [Counting() for _ in range(4)]
    cases = [
        (StaticCache(config=config, max_cache_len=300), "StaticLayer has buffers of a fixed size"),
        (quantised, "Counting does not keep its columns as plain tensors alone"),
    ]
    with registered(ByLast) as method:
        for cache, words in cases:
            with (
                pytest.raises(UnsupportedModel, match=f"{words}.*use the default cache"),
                vtc.attach(fam.model, method, keep=0.5),
                torch.no_grad(),
            ):
                fam.model(**fam.inputs, past_key_values=cache, use_cache=True)
        with (
            pytest.raises(UnsupportedModel, match="needs a KV cache.*use_cache=True"),
            vtc.attach(fam.model, method, keep=0.5),
        ):
            generate(fam.model, fam.inputs, use_cache=False)


def test_options_that_make_no_sense_here() -> None:
    model = family("llava").model
    with registered(OnlyFixed) as method:
        for wrong in ({"mass": 1.0}, {"merge": "nearest"}):
            with pytest.raises(InvalidRecipe, match="not at the site 'cache'"):
                vtc.attach(model, method, keep=0.5, at="cache", **wrong)
        with pytest.raises(InvalidBudget, match=r"keep='auto', but it takes keep=0\.25"):
            vtc.attach(model, method, keep="auto")
        with pytest.raises(UnsupportedSite, match=r"works at cache, not at 'decoder\.2'"):
            vtc.attach(model, method, keep=0.5, at="decoder.2")
    with pytest.raises(UnsupportedSite, match="not at 'cache'"):
        vtc.attach(model, "fastv", keep=0.5, at="cache")
    with pytest.raises(UnsupportedSite, match=r"not a site: 'cache\.2'"):
        vtc.attach(model, "fastv", keep=0.5, at="cache.2")

    class Ahead(Policy):
        needs: ClassVar[frozenset[str]] = frozenset({"attn_ahead"})

    with registered(Ahead) as method, pytest.raises(MissingSignal, match="attn_ahead"):
        vtc.attach(model, method, keep=0.5)


@any_policy
def test_prompts_without_any_image(policy: type[Method]) -> None:
    fam = family("llava")
    inputs = {"input_ids": some_tokens(2, 9), "attention_mask": torch.ones(2, 9).long()}
    plain = generate(fam.model, inputs)
    with registered(policy) as method:
        with (
            pytest.raises(NothingReduced, match="nothing was reduced at cache"),
            vtc.attach(fam.model, method, keep="auto"),
        ):
            generate(fam.model, inputs)
        with vtc.attach(fam.model, method, keep="auto", strict=False):
            got = generate(fam.model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


@dataclass(frozen=True)
class ByTower(Method):
    """Keeps what the CLS token looked at, in every layer."""

    paper: ClassVar[str] = "test"
    sites: ClassVar[frozenset[str]] = frozenset({"cache"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_cls"})
    default_at: ClassVar[str] = "cache"

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        return top_k(ctx.signals["attn_cls"], ctx.visual, k)


@pytest.mark.parametrize("before", [(), (vtc.Step("random", "decoder.2", 0.5),)])
def test_tower_scores_reach_every_layer_of_the_cache(before: tuple[vtc.Step, ...]) -> None:
    fam = families.make("llava")
    with registered(ByTower) as name:
        recipe = vtc.Recipe((*before, vtc.Step(name, "cache", 0.25)))
        with vtc.attach(fam.model, recipe) as session, torch.no_grad():
            fam.model(**fam.inputs, use_cache=True)
    layers = [r for r in session.trace if r.site.startswith("cache")]
    assert [r.site for r in layers] == [f"cache.{i}" for i in range(families.LAYERS)]
    assert all(r.n_out == (16, 16, 16) for r in layers)
    if not before:
        assert all(torch.equal(r.source, layers[0].source) for r in layers)
