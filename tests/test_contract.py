"""What every registered method promises on every model family; a method joins by registration.

The numbers in the headings are those of the design: 1 identity, 2 budget, 3 text, 4 dropping equals
masking, 5 batches, 6 attention backends, 7 determinism, 8 bfloat16, 9 detaching, 10 threads,
12 gradients, 13 recipes.  Each (method, family, site) either keeps all of them or is refused with
the error that `refusal` says; methods that compare frames are tried on the families that differ in
where frames are.  Methods that write new tokens have nothing that
could be masked or kept whole (1, 4 and 12): `test_lookupvit_method` compares them with a tower that
runs on resized tokens, `test_langdc` with a language model that is handed the same embeddings.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support import families, oracle, towerref, trace
from support.threads import in_threads
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.context import Site
from vtc.errors import InvalidInput, MissingSignal, UnsupportedModel, UnsupportedSite
from vtc.reducer import Composite, Host, Rewriter, Selector
from vtc.session import Reduction, adapter_for

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
STEPS = 6  # the prefill and five decode steps
SHARE, COUNT = 0.25, 5

#: one site of each kind; a method's default site replaces the one of its kind
SITES = {"projector": "projector", "decoder": "decoder.1", "vision": "vision.1", "cache": "cache"}
#: families for the contracts that need many forwards; `random` is tried on every family
FEW = ("llava", "qwen2_5_vl", "qwen3_vl")
#: families for methods that compare frames: equal images as frames, images without a grid beside a
#: video that was pooled, a video as a single run, one with text between its frames
FRAMED = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
#: families where scores of the vision tower cannot be told to the visual tokens, and why
NO_TOWER_SCORES = {"mistral3": "several images into one sequence"}
#: families that do not know the grid of an image at the projector
NO_GRID = ("llava_next", "llava_onevision", "mistral3", "molmo2")
#: families whose video tokens are pooled: no projector input belongs to one of them
POOLED = ("llava_onevision", "molmo2")
#: methods that decide themselves how many tokens stay, with parameters that make them act
AUTO: dict[str, dict[str, Any]] = {
    "mustdrop_merge": {"threshold": 0.0},
    "lookupvit": {"grid": (2, 3)},
    "langdc": {"base": (1, 2), "pool": (2, 2), "clip_frames": 2, "max_len": 3},
}
#: parameters of the others without which a budget does not hold everywhere
PARAMS: dict[str, dict[str, Any]] = {"dycoke_cache": {"first": 0}, "dycoke": {"first": 0}}
#: methods that act on what another one did
BEHIND = {"mustdrop_cache": ("random", "decoder.2", {"first": 1})}
#: methods made of several steps
COMPOSITE = {m for m in vtc.REDUCERS if issubclass(vtc.REDUCERS[m], Composite)}
#: methods that write new tokens: no merge and no mass, nothing to mask
WRITING = {m for m in vtc.REDUCERS if issubclass(vtc.REDUCERS[m], Rewriter)}


@dataclass(frozen=True)
class Case:
    """A method on a family; `at=None` means where the method's paper puts it."""

    method: str
    family: str
    at: str | None

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{self.at or 'default'}"

    def options(self, **options: Any) -> dict[str, Any]:
        """Arguments of `vtc.attach`, a quarter of the tokens unless said otherwise."""
        site = {} if self.at is None else {"at": self.at}
        keep: dict[str, Any] = {"keep": "auto"} if self.method in AUTO else {"keep": SHARE}
        return keep | {"seed": 3} | (AUTO | PARAMS).get(self.method, {}) | site | options

    def recipe(self, **options: Any) -> vtc.Recipe:
        """The same as a recipe."""
        given = self.options(**options)
        if self.method not in BEHIND:
            return vtc.Recipe.build(self.method, families.LAYERS, **given, host=HOSTS[self.family])
        method, at, params = BEHIND[self.method]
        first = vtc.Step(method, at, given["keep"], **{k: given[k] for k in MERGED if k in given})
        return vtc.Recipe((first, vtc.Step(self.method, "cache", "auto", params=params)), 3)

    @property
    def merges(self) -> bool:
        """Whether merge and mass are possible."""
        first = self.method in BEHIND or (self.at or vtc.REDUCERS[self.method].default_at)
        return first != "cache" and self.method not in WRITING

    @property
    def scope(self) -> str:
        """What a row is: a method that compares frames gets the images of a prompt as a video."""
        frames = any(vtc.REDUCERS[step.method].frames for step in self.recipe().steps)
        return "video" if frames else "image"

    def merged(self, on: bool = True) -> dict[str, Any]:
        return MERGED if on and self.merges else {}

    def mass(self, merged: bool) -> float:
        """Strength of log(size), the method's own where the test asks for none."""
        return max(step.mass for step in self.recipe(**self.merged(merged)).steps)


MERGED: dict[str, Any] = {"merge": "nearest", "mass": 1.0}


def places(method: str) -> list[str | None]:
    """The default, and one site of every kind that the default does not cover alone."""
    cls = vtc.REDUCERS[method]
    if method in COMPOSITE or method in BEHIND:
        return [None]
    default = [step.at for step in vtc.Recipe.build(method, families.LAYERS, SHARE).steps]
    sites = SITES | {Site.parse(cls.default_at).kind: cls.default_at}
    found: list[str | None] = [None]
    kinds = sorted(cls.sites - {"dit"})
    found += [sites[kind] for kind in kinds if [sites[kind]] != default]
    return found


def refusal(case: Case) -> tuple[str, type[Exception], str] | None:
    """When a combination is refused ("attach" or "run"), with which error and words."""
    inside = "vision" in vtc.REDUCERS[case.method].sites
    if case.method in COMPOSITE and inside and case.family == "mistral3":
        return "attach", UnsupportedSite, "no site 'vision.1'|no vision blocks"
    tower = vtc.REDUCERS[case.method].sites == {"vision"}
    if case.method in WRITING and tower and HOSTS[case.family].rotary_tower:
        return "attach", UnsupportedModel, "no place of their own in this vision tower"
    if case.method in WRITING and tower and case.family in POOLED:
        return "run", UnsupportedModel, "not of the frames of a video"
    methods = [vtc.REDUCERS[step.method] for step in case.recipe().steps]
    sites = {step.site.kind for step in case.recipe().steps}
    if case.family in POOLED and any("features" in m.needs for m in methods):
        return "run", MissingSignal, "pooled behind the projector|not a square grid"
    words = NO_TOWER_SCORES.get(case.family)
    if "vision" in sites and case.family == "mistral3":
        return "attach", UnsupportedSite, "read more than the tokens"
    if words and ("vision" in sites or any(TOWER & m.needs for m in methods)):
        return "run", MissingSignal, words
    if case.method == "mustdrop_merge" and "projector" in sites and case.family in NO_GRID:
        return "run", InvalidInput, "grid of image 0 is not known"
    if case.method == "langdc" and case.family in NO_GRID:
        return "run", InvalidInput, "grid of image 0 .* is not known here"
    return None


TOWER = {"attn_cls", "vision_keys", "cls_rank", "tile", "features"}


def attach(model: nn.Module, case: Case, **options: Any) -> vtc.Session:
    """A session with this case; refused before anything is touched, or not at all."""
    if case.method in BEHIND:
        return vtc.attach(model, case.recipe(**options))
    return vtc.attach(model, case.method, **case.options(**options))


def host(name: str) -> Host:
    return adapter_for(families.make(name).model).host()


HOSTS = {name: host(name) for name in families.FAMILIES}


#: methods that act on videos alone, behind the block at their site: tests/test_stts.py
SELECTING = {m for m in vtc.REDUCERS if issubclass(vtc.REDUCERS[m], Selector)}
#: methods for diffusion transformers, which have contracts of their own
DIFFUSING = {m for m in vtc.REDUCERS if vtc.REDUCERS[m].sites == {"dit"}}
PLAIN = [m for m in vtc.REDUCERS if m not in SELECTING | DIFFUSING]


def tried(method: str) -> tuple[str, ...]:
    """Families to try it on: all, or those that differ in where the frames of a video are."""
    return FRAMED if vtc.REDUCERS[method].frames else tuple(families.FAMILIES)


ALL = [Case(m, f, at) for m in PLAIN for f in tried(m) for at in places(m)]
REFUSED = [case for case in ALL if refusal(case)]
CASES = [case for case in ALL if not refusal(case)]
CHOOSING = [case for case in CASES if case.method not in WRITING]
SOME = [case for case in CASES if case.family in FEW or case.method == "random"]
over = functools.partial(pytest.mark.parametrize, "case", ids=str)


# --------------------------------------------------------------------------------------------
# runs, remembered: most contracts look at the same ones


@dataclass(frozen=True)
class Run:
    """Greedy decoding of the default batch."""

    logits: tuple[Tensor, ...]  # [B, V] per step
    tokens: Tensor  # [B, STEPS]
    trace: tuple[Reduction, ...]


@functools.cache
def family(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> families.Family:
    return families.make(name, attn, dtype)


@functools.cache
def reference(name: str, attn: str = "sdpa") -> families.Family:
    """The same weights in a model that no session ever touches."""
    return families.make(name, attn)


def generate(model: nn.Module, inputs: families.Inputs, **options: Any) -> Run:
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return Run(out.logits, out.sequences[:, inputs["input_ids"].shape[1] :], ())


def reduce(
    case: Case, fam: families.Family, inputs: families.Inputs | None = None, **options: Any
) -> Run:
    with attach(fam.model, case, **options) as session:
        run = generate(fam.model, fam.inputs if inputs is None else inputs)
    return Run(run.logits, run.tokens, tuple(session.trace))


@functools.cache
def untouched(name: str, dtype: torch.dtype = torch.float32) -> Run:
    fam = families.make(name, dtype=dtype)
    return generate(fam.model, fam.inputs)


@functools.cache
def reduced(case: Case, attn: str = "sdpa", merged: bool = False) -> Run:
    return reduce(case, family(case.family, attn), **case.merged(merged))


def worst(a: tuple[Tensor, ...] | list[Tensor], b: tuple[Tensor, ...] | list[Tensor]) -> float:
    """Largest difference over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


Choice = tuple[str, tuple[tuple[int, ...], ...]]


def choices(run: Run, sample: int | None = None) -> list[Choice]:
    """Site and kept places of every image (of one sample; tower images have none)."""
    return [
        (
            r.site,
            tuple(
                tuple(r.source[row, : r.n_out[row]].tolist())
                for row, owner in enumerate(r.samples)
                if sample is None or owner == sample
            ),
        )
        for r in run.trace
        if sample is None or not r.site.startswith("vision")
    ]


def tower_choices(*runs: Run) -> list[tuple[str, tuple[int, ...]]]:
    """Kept units of all tower images, in an order that does not tell which run they are of."""
    found = (c for run in runs for c in choices(run) if c[0].startswith("vision"))
    return sorted((site, units) for site, images in found for units in images)


@contextmanager
def masking(
    fam: families.Family,
    seen: Iterable[Reduction],
    mass: float,
    inputs: families.Inputs,
    scope: str = "image",
) -> Iterator[trace.Masks]:
    """What the reference has to mask; inside, its vision tower masks too."""
    seen = list(seen)
    sites = [r.site for r in seen if r.site.startswith("vision")]
    if not sites:
        yield trace.masks(seen, fam.visual(inputs), mass=mass, scope=scope)
        return
    calls = sites.count(sites[0])
    drops = trace.tower_reductions(seen, calls, mass=mass)
    everything = torch.ones_like(fam.visual(inputs))
    with towerref.masked_tower(fam, drops):
        gone = towerref.zero_columns(fam, inputs)
    masks = trace.masks(seen, fam.visual(inputs), mass=mass, gone=gone)
    masks.keep["projector"] = masks.keep.get("projector", everything) & ~gone
    if mass and "projector" not in masks.bias:
        with towerref.masked_tower(fam, drops) as tower:
            masks.bias["projector"] = tower.bias_columns(inputs)
    with towerref.masked_tower(fam, drops):
        yield masks


# --------------------------------------------------------------------------------------------
# refusals and the files of the methods


@over(argvalues=REFUSED)
def test_refused_combinations_say_why_and_leave_no_trace(case: Case) -> None:
    fam = families.make(case.family)
    when, error, words = refusal(case) or pytest.fail("not refused")
    generate(fam.model, fam.inputs)
    before = state_of(fam.model)
    with pytest.raises(error, match=words):
        session = attach(fam.model, case)
        assert when == "run", "attach should have refused"
        with session:
            generate(fam.model, fam.inputs)
    assert state_of(fam.model) == before


def test_every_method_runs_somewhere() -> None:
    assert {case.method for case in CASES} == set(PLAIN)
    assert {case.family for case in CASES} == set(families.FAMILIES)


@pytest.mark.parametrize("method", vtc.REDUCERS)
def test_method_files_are_short_and_cited(method: str) -> None:
    cls = vtc.REDUCERS[method]
    module = sys.modules[cls.__module__]
    source = inspect.getsource(module)
    assert len(source.splitlines()) <= 150
    assert source.count("@register(") == 1
    assert Path(inspect.getfile(cls)).stem == method
    cited = re.compile(r"arxiv\.org/abs/\d{4}\.\d{4,5}")
    if cls.paper == "baseline":
        assert cls.default_at
    else:
        assert cited.search(cls.paper)
        assert cited.search(module.__doc__ or "")
    assert re.search(r"arxiv\.org/abs|[Bb]aseline|floor", module.__doc__ or "")


# --------------------------------------------------------------------------------------------
# 1, 2, 3: identity, budget, text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@over(argvalues=CHOOSING)
def test_keeping_everything_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    run = reduce(case, family(case.family, dtype=dtype), keep=1.0, **case.merged())
    plain = untouched(case.family, dtype)
    assert run.trace and all(r.n_out == r.n_in for r in run.trace)
    assert same(run.logits, plain.logits)
    assert torch.equal(run.tokens, plain.tokens)


def expected_count(keep: float | int | str, available: int, original: int, made: int) -> int:
    """Tokens one image keeps: a rounded share of what it had at first, or a number."""
    if keep == "auto":
        assert made <= available
        return made
    if isinstance(keep, int):
        return min(keep, available)
    return min(max(1, int(keep * original + 0.5)), available)


def check_budgets(run: Run, keep: dict[str, Any], visual: Tensor, scope: str = "image") -> None:
    rows = trace.rows_of(visual, scope)
    original = [len(columns) for _, columns in rows]
    left: dict[int, list[int]] = {0: original}  # by the first layer that sees it
    whole: list[int] = []  # units of each tower image before the first step
    assert {
        r.site.partition(".")[0] if r.site.startswith("cache") else r.site for r in run.trace
    } == set(keep)
    for reduction in run.trace:
        tower, cache = (reduction.site.startswith(kind) for kind in ("vision", "cache"))
        here = keep["cache" if cache else reduction.site]
        layer = 0 if reduction.site == "projector" else int(reduction.site.partition(".")[2] or 0)
        if tower:
            if reduction.site == next(iter(keep)):  # tower steps come first
                whole = list(reduction.n_in)
            original_here = whole
        else:
            assert list(reduction.samples) == [sample for sample, _ in rows]
            original_here, before = original, left[max(at for at in left if at <= layer)]
            if "vision.1" not in keep:
                assert list(reduction.n_in) == before
        numbers = zip(reduction.n_in, original_here, reduction.n_out, strict=True)
        after = [expected_count(here, n, o, made) for n, o, made in numbers]
        assert list(reduction.n_out) == after
        if not tower and not cache:
            left[layer] = after
        for row, n in enumerate(after):  # the plan itself, not what it says about itself
            kept = reduction.source[row, :n].tolist()
            assert len(set(kept)) == n
            assert kept == sorted(kept)
            assert kept[0] >= 0 and kept[-1] < original_here[row]


@over(argvalues=CASES)
def test_budget_is_exact(case: Case) -> None:
    budgets = {step.at: step.keep for step in case.recipe().steps}
    check_budgets(reduced(case), budgets, family(case.family).visual(), case.scope)


COUNTED = [
    case
    for case in CASES
    if case.method not in {*AUTO, *BEHIND, *COMPOSITE}
    and (case.at or len(places(case.method)) == 1)
]


@over(argvalues=COUNTED)
def test_number_of_tokens_is_exact(case: Case) -> None:
    at = case.at or vtc.REDUCERS[case.method].default_at
    fam = family(case.family)
    case = Case(case.method, case.family, at)
    with attach(fam.model, case, keep=COUNT) as session:
        fam.model(**fam.inputs)
    run = Run((), torch.empty(0), tuple(session.trace))
    check_budgets(run, {at: COUNT}, fam.visual(), case.scope)


@contextmanager
def layer_inputs(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Hidden states [B, K, C] and rotary table [..., B, K, D] that each decoder layer receives."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tables = kwargs["position_embeddings"]
        seen.append((hidden, tables if torch.is_tensor(tables) else torch.cat(tables, -1)))

    layers = oracle.text_model(model).layers
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@over(argvalues=CASES)
def test_text_is_never_touched(case: Case) -> None:
    fam = family(case.family)
    visual, valid = fam.visual(), fam.inputs["attention_mask"].bool()
    with torch.no_grad(), layer_inputs(reference(case.family).model) as plain:
        reference(case.family).model(**fam.inputs)
    with (
        attach(fam.model, case) as session,
        layer_inputs(fam.model) as short,
        torch.no_grad(),
    ):
        fam.model(**fam.inputs)
    with masking(reference(case.family), session.trace, 0.0, fam.inputs, case.scope) as masks:
        keep = masks.keep
    tower = any(r.site.startswith("vision") for r in session.trace)
    assert all(bool((mask | visual).all() & mask[~visual].all()) for mask in keep.values())
    first = min(oracle._by_layer(keep, torch.logical_and), default=families.LAYERS)
    for layer, ((hidden, table), (kept_hidden, kept_table)) in enumerate(
        zip(plain, short, strict=True)
    ):
        here = {s: m for s, m in keep.items() if s == "projector" or int(s) <= layer}
        left = trace.Masks(keep=here).final(visual) & valid
        width = int(left.sum(1).max())
        assert kept_hidden.shape[1] == (width if layer >= first else hidden.shape[1])
        for sample in range(len(visual)):
            columns = left[sample].nonzero()[:, 0]
            text = ~visual[sample, columns]
            got = kept_hidden[sample, -len(columns) :]
            expected = hidden[sample, columns]
            if layer <= first:
                assert torch.equal(got[text], expected[text])
            if layer < first and not tower:
                assert torch.equal(got, expected)
            wide = table.expand(*table.shape[:-3], len(visual), *table.shape[-2:])
            narrow = kept_table.expand(*table.shape[:-3], len(visual), *kept_table.shape[-2:])
            positions = narrow[..., sample, -len(columns) :, :]
            assert torch.equal(positions, wide[..., sample, columns, :])


# --------------------------------------------------------------------------------------------
# 4: dropping equals masking


MERGING = [
    (case, merged) for case in CASES for merged in (False, True) if case.merges or not merged
]
both = functools.partial(
    pytest.mark.parametrize,
    "case,merged",
    ids=lambda x: str(x) if isinstance(x, Case) else ["plain", "merged"][x],
)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@both(argvalues=[pair for pair in MERGING if pair[0] in CHOOSING])
def test_dropping_equals_masking(case: Case, attn: str, merged: bool) -> None:
    run = reduced(case, attn, merged)
    ref = reference(case.family, attn)
    with masking(ref, run.trace, case.mass(merged), ref.inputs, case.scope) as masks:
        assert masks.keep or masks.evict or case.method in AUTO
        expected, _ = oracle.run(
            ref,
            ref.inputs,
            keep=masks.keep,
            bias=masks.bias,
            mix=masks.mix,
            evict=masks.evict,
            forced=run.tokens,
        )
    inside = all(step.site.kind == "vision" for step in case.recipe().steps)
    if merged and case.method not in {*AUTO, *BEHIND} and not inside:
        assert masks.mix and any(bool(bias.any()) for bias in masks.bias.values())
    assert worst(run.logits, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# 5, 6, 7, 8: the same answer however it is computed


@over(argvalues=CASES)
def test_sample_alone_equals_sample_in_batch(case: Case) -> None:
    together, singles = reduced(case), []
    for sample in range(2):
        fam = family(case.family)
        alone = reduce(case, fam, fam.single(sample))
        singles.append(alone)
        assert choices(alone, 0) == choices(together, sample)
        pair = [x[sample : sample + 1] for x in together.logits]
        assert worst(alone.logits, pair) <= TOLERANCE
    assert tower_choices(*singles) == tower_choices(together)


@both(argvalues=MERGING)
def test_eager_equals_sdpa(case: Case, merged: bool) -> None:
    sdpa, eager = reduced(case, "sdpa", merged), reduced(case, "eager", merged)
    assert choices(sdpa) == choices(eager)
    assert torch.equal(sdpa.tokens, eager.tokens)
    assert worst(sdpa.logits, eager.logits) <= TOLERANCE


@over(argvalues=CASES)
def test_same_seed_same_plan_and_global_generators_untouched(case: Case) -> None:
    fam = family(case.family)
    first = reduced(case)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    again = reduce(case, fam)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == numpy.random.get_state()[1]).all()
    assert choices(again) == choices(first)
    assert same(again.logits, first.logits)


def test_another_seed_draws_other_tokens() -> None:
    case = Case("random", "llava", "projector")
    other = reduce(case, family("llava"), seed=4)
    assert choices(other) != choices(reduced(case))
    assert [r.n_out for r in other.trace] == [r.n_out for r in reduced(case).trace]


@both(argvalues=MERGING)
def test_bfloat16_runs(case: Case, merged: bool) -> None:
    fam = family(case.family, dtype=torch.bfloat16)
    run = reduce(case, fam, **case.merged(merged))
    assert all(bool(x.isfinite().all()) for x in run.logits)
    if case.method not in AUTO:  # thresholds may be passed or not by a rounding
        assert all(r.n_out == s.n_out for r, s in zip(run.trace, reduced(case).trace, strict=True))
    assert {p.dtype for p in fam.model.parameters()} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------
# 9: detaching


State = dict[str, Any]


def state_of(model: nn.Module) -> State:
    """All that a session could leave behind: hooks, attributes, classes, attention functions."""
    modules = {
        name: (
            type(module),
            sorted(vars(module)),
            {k: list(v.values()) for k, v in vars(module).items() if k.endswith("_hooks")},
            {k: list(v) for k, v in vars(module).items() if "_hooks_with" in k},
        )
        for name, module in model.named_modules()
    }
    configs = {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    mapping = ALL_ATTENTION_FUNCTIONS
    functions = dict(mapping._local_mapping), dict(mapping._global_mapping), set(vars(mapping))
    return {"modules": modules, "configs": configs, "functions": functions}


class Stop(Exception):
    """Raised by a test in the middle of a forward."""


def fail_at(layer: nn.Module) -> Callable[[], None]:
    def stop(*_: Any) -> None:
        raise Stop

    return layer.register_forward_pre_hook(stop).remove


@over(argvalues=SOME)
def test_detach_restores_the_model(case: Case) -> None:
    fam = family(case.family)
    plain = untouched(case.family)
    generate(fam.model, fam.inputs)  # transformers installs some hooks of its own at first use
    before = state_of(fam.model)
    options = case.merged()

    with attach(fam.model, case, **options):
        assert state_of(fam.model) != before
        generate(fam.model, fam.inputs)
    assert state_of(fam.model) == before

    with pytest.raises(Stop), attach(fam.model, case, **options):
        generate(fam.model, fam.inputs)
        raise Stop
    assert state_of(fam.model) == before

    remove = fail_at(oracle.text_model(fam.model).layers[-1])
    with pytest.raises(Stop), attach(fam.model, case, **options):
        generate(fam.model, fam.inputs)
    remove()
    assert state_of(fam.model) == before

    after = generate(fam.model, fam.inputs)
    assert same(after.logits, plain.logits)
    assert torch.equal(after.tokens, plain.tokens)


@over(argvalues=SOME)
def test_session_survives_an_exception_inside_forward(case: Case) -> None:
    fam = family(case.family)
    expected = reduced(case)
    for broken in (0, families.LAYERS - 1):
        with attach(fam.model, case) as session:
            remove = fail_at(oracle.text_model(fam.model).layers[broken])
            with pytest.raises(Stop):
                generate(fam.model, fam.inputs)
            remove()
            session.trace.clear()
            again = generate(fam.model, fam.inputs)
        assert same(again.logits, expected.logits)


# --------------------------------------------------------------------------------------------
# 10: threads


@over(argvalues=SOME)
def test_two_threads_equal_two_sequential_runs(case: Case) -> None:
    fam = family(case.family)
    prompts = [fam.single(0), fam.single(1), fam.inputs]
    with attach(fam.model, case, **case.merged()) as session:
        sequential = [generate(fam.model, prompt) for prompt in prompts]
        reductions = len(session.trace)
        jobs = [functools.partial(generate, fam.model, prompt) for prompt in prompts]
        parallel = in_threads(jobs)
        assert len(session.trace) == 2 * reductions
    for one, other in zip(sequential, parallel, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert same(one.logits, other.logits)


@pytest.mark.parametrize("method", PLAIN)
def test_sessions_on_two_models_end_in_any_order(method: str) -> None:
    before = state_of(family("llava").model)["functions"]
    other = "internvl" if method in WRITING else "qwen2_5_vl"
    cases = [Case(method, name, None) for name in ("llava", other)]
    sessions = [attach(family(c.family).model, c, **c.merged()) for c in cases]
    generate(family("llava").model, family("llava").inputs)
    sessions[0].detach()
    late = generate(family(other).model, family(other).inputs)
    sessions[1].detach()
    assert same(late.logits, reduced(cases[1], "sdpa", True).logits)
    assert state_of(family("llava").model)["functions"] == before


# --------------------------------------------------------------------------------------------
# 12: gradients


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, grads, strict=True) if g is not None}


def loss_of(logits: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; a dropped column speaks with the one before it."""
    columns = torch.arange(labels.shape[1]).expand_as(left)
    source = torch.where(left, columns, 0).cummax(1).values  # last kept column up to here
    logits = logits.gather(1, source[..., None].expand_as(logits))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@both(argvalues=[pair for pair in MERGING if pair[0] in SOME and pair[0] in CHOOSING])
def test_loss_and_gradients_equal_those_of_masking(case: Case, merged: bool) -> None:
    fam, ref = family(case.family), reference(case.family)
    inputs = fam.labelled()
    starts = inputs["attention_mask"].argmax(1, keepdim=True)
    inputs["labels"].scatter_(1, starts, -100)  # padding would have to predict the first token
    with attach(fam.model, case, **case.merged(merged)) as session:
        out = fam.model(**inputs)
        got = gradients(fam.model, out.loss)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    with masking(ref, session.trace, case.mass(merged), fam.inputs, case.scope) as masks:
        (logits,), _ = oracle.run(
            ref,
            fam.inputs,
            keep=masks.keep,
            bias=masks.bias,
            mix=masks.mix,
            steps=1,
            all_rows=True,
            grad=True,
        )
    left = masks.final(fam.visual()) & fam.inputs["attention_mask"].bool()
    loss = loss_of(logits, inputs["labels"], left)
    assert abs(loss.item() - out.loss.item()) <= TOLERANCE
    expected = gradients(ref.model, loss)
    flat = torch.cat([g.flatten() for g in expected.values()])
    scale = flat.abs().max().item()
    vision = [n for n in got if "vision" in n or "visual" in n]
    assert any(bool(got[n].any()) for n in vision)
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max().item() <= TOLERANCE * max(1.0, scale), name


# --------------------------------------------------------------------------------------------
# 13: recipes


@pytest.mark.parametrize("method", PLAIN)
def test_recipe_goes_through_yaml_and_back(method: str, tmp_path: Path) -> None:
    more = {"merge": "nearest", "merge_threshold": 0.25, "mass": 0.5, "scope": "sample"}
    for at in places(method):
        case = Case(method, "llava", at)
        for options in ({}, more if case.merges and method not in BEHIND else {}):
            options = dict(options)
            inside = (at or vtc.REDUCERS[method].default_at).startswith("vision")
            if inside and method not in COMPOSITE:
                options.pop("scope", None)  # the tower knows no prompts
            recipe = case.recipe(seed=7, **options)
            path = tmp_path / "recipe.yaml"
            text = recipe.dump(path)
            assert path.read_text() == text
            for source in (text, path, str(path), recipe.to_dict()):
                assert vtc.Recipe.load(source) == recipe


@pytest.mark.parametrize("method", PLAIN)
def test_recipe_file_acts_like_the_arguments(method: str, tmp_path: Path) -> None:
    case = Case(method, "llava", None)
    fam = family("llava")
    path = tmp_path / "recipe.yaml"
    case.recipe().dump(path)
    with vtc.attach(fam.model, path) as session:
        run = generate(fam.model, fam.inputs)
    assert choices(Run(run.logits, run.tokens, tuple(session.trace))) == choices(reduced(case))
    assert same(run.logits, reduced(case).logits)
