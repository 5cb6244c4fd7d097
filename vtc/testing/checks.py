"""What every method promises on every model, against models that mask instead of dropping.

Each function takes a `Cell` and raises `ContractBroken`, with what was found and what to do."""

from __future__ import annotations

import functools
import random
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor

from ..budget import Keep
from ..recipe import Recipe
from ..session import attach
from . import families, oracle, trace
from .cells import COUNT, Cell
from .errors import require
from .runs import (
    TOLERANCE,
    Run,
    Stop,
    breaking,
    choices,
    family,
    generate,
    gradients,
    layer_inputs,
    loss_of,
    masking,
    newlines,
    reduce,
    reduced,
    reference,
    same,
    state_of,
    tower_choices,
    untouched,
    worst,
)
from .threads import in_threads


def keeping_everything_changes_no_bit(cell: Cell, dtype: torch.dtype = torch.float32) -> None:
    run = reduce(cell, family(cell.family, dtype=dtype), keep=1.0, **cell.merged())
    plain = untouched(cell.family, dtype)
    require(
        bool(run.trace) and all(r.n_out == r.n_in for r in run.trace),
        f"with keep=1.0 tokens went missing: {_counts(run)}.",
    )
    require(
        same(run.logits, plain.logits) and torch.equal(run.tokens, plain.tokens),
        "with keep=1.0 the answer is not bit for bit that of the model without the method.",
    )


def budget_is_exact(cell: Cell) -> None:
    """Plans of a whole generation, by the budget of every step."""
    budgets: dict[str, Keep] = {step.at: step.keep for step in cell.recipe().steps}
    fam = family(cell.family)
    check_budgets(reduced(cell), budgets, fam.visual(), cell.scope, newlines(cell.family))


def number_of_tokens_is_exact(cell: Cell) -> None:
    """The same where keep is a number of tokens."""
    fam = family(cell.family)
    with cell.attach(fam.model, at=cell.site, keep=COUNT) as session, torch.no_grad():
        fam.model(**fam.inputs)
    run = Run((), torch.empty(0), tuple(session.trace))
    check_budgets(run, {cell.site: COUNT}, fam.visual(), cell.scope, newlines(cell.family))


def expected_count(keep: Keep, available: int, original: int, made: int) -> int:
    """Tokens one image keeps: a rounded share of what it had at first, or a number."""
    if keep == "auto":
        require(made <= available, f"{made} tokens are left of {available}.")
        return made
    if isinstance(keep, int):
        return min(keep, available)
    return min(max(1, int(keep * original + 0.5)), available)


def check_budgets(
    run: Run, keep: dict[str, Keep], visual: Tensor, scope: str, newline: Tensor
) -> None:
    """That every reduction keeps what `keep` says for its site, in plans that are in order; columns
    of `newline` [B, L] count in no budget."""
    rows = trace.rows_of(visual, scope)
    tokens = [(~newline[sample, columns]).nonzero()[:, 0].tolist() for sample, columns in rows]
    original = [len(places) for places in tokens]
    left: dict[int, list[int]] = {0: original}  # by the first layer that sees it
    whole: list[int] = []  # units of each tower image before the first step
    acted = {"cache" if r.site.startswith("cache") else r.site for r in run.trace}
    require(
        acted == set(keep), f"steps at {sorted(keep)} acted at {sorted(acted) or 'no site at all'}."
    )
    for reduction in run.trace:
        tower, cache = (reduction.site.startswith(kind) for kind in ("vision", "cache"))
        here = keep["cache" if cache else reduction.site]
        layer = 0 if reduction.site == "projector" else int(reduction.site.partition(".")[2] or 0)
        if tower:
            if reduction.site == next(iter(keep)):  # tower steps come first
                whole = list(reduction.n_in)
            original_here = whole
        else:
            samples = [sample for sample, _ in rows]
            require(list(reduction.samples) == samples, "images were told to other samples.")
            original_here, before = original, left[max(at for at in left if at <= layer)]
            if "vision.1" not in keep:
                require(list(reduction.n_in) == before, f"{reduction.site} saw {reduction.n_in}.")
        numbers = zip(reduction.n_in, original_here, reduction.n_out, strict=True)
        after = [expected_count(here, n, o, made) for n, o, made in numbers]
        require(
            list(reduction.n_out) == after,
            f"keep={here!r} at {reduction.site} means {after} tokens of {list(reduction.n_in)}, "
            f"but {list(reduction.n_out)} were kept: return a plan of exactly k[r] tokens a row.",
        )
        if not tower and not cache:
            left[layer] = after
        for row, n in enumerate(after):  # the plan itself, not what it says about itself
            kept = reduction.source[row, :n].tolist()
            there = range(original_here[row]) if tower else tokens[row]
            require(
                kept == sorted(set(kept)) and set(kept) <= set(there),
                f"row {row} at {reduction.site} keeps the places {kept} of "
                f"{original_here[row]}: each once, ascending, tokens of the row.",
            )


def text_is_never_touched(cell: Cell) -> None:
    """Hidden states and positions of text, layer by layer, against the untouched model."""
    fam = family(cell.family)
    visual, valid = fam.visual(), fam.inputs["attention_mask"].bool()
    with torch.no_grad(), layer_inputs(reference(cell.family).model) as plain:
        reference(cell.family).model(**fam.inputs)
    with (
        cell.attach(fam.model) as session,
        layer_inputs(fam.model) as short,
        torch.no_grad(),
    ):
        fam.model(**fam.inputs)
    with masking(reference(cell.family), session.trace, 0.0, fam.inputs, cell.scope) as masks:
        keep = masks.keep
    tower = any(r.site.startswith("vision") for r in session.trace)
    require(
        all(bool((mask | visual).all() & mask[~visual].all()) for mask in keep.values()),
        "text was dropped.",
    )
    first = min(oracle.by_layer(keep, torch.logical_and), default=families.LAYERS)
    for layer, (before, after) in enumerate(zip(plain, short, strict=True)):
        here = {s: m for s, m in keep.items() if s == "projector" or int(s) <= layer}
        left = trace.Masks(keep=here).final(visual) & valid
        width = int(left.sum(1).max()) if layer >= first else before[0].shape[1]
        says = f"layer {layer} got {after[0].shape[1]} columns, expected {width}."
        require(after[0].shape[1] == width, says)
        for sample in range(len(visual)):
            columns = left[sample].nonzero()[:, 0]
            _compare_layer(layer, sample, columns, visual, before, after, first, tower)


def _compare_layer(
    layer: int,
    sample: int,
    columns: Tensor,
    visual: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    first: int,
    tower: bool,
) -> None:
    """One sample's `columns`, in a layer of the untouched and of the attached model."""
    (hidden, table), (kept_hidden, kept_table) = before, after
    text = ~visual[sample, columns]
    got, expected = kept_hidden[sample, -len(columns) :], hidden[sample, columns]
    alike = layer > first or torch.equal(got[text], expected[text])
    require(alike, f"hidden states of text changed before layer {layer}.")
    alike = layer >= first or tower or torch.equal(got, expected)
    require(alike, f"hidden states changed before layer {layer}, where nothing acts yet.")
    wide, narrow = (
        t.expand(*t.shape[:-3], len(visual), *t.shape[-2:]) for t in (table, kept_table)
    )
    positions = narrow[..., sample, -len(columns) :, :]
    alike = torch.equal(positions, wide[..., sample, columns, :])
    require(alike, f"tokens that stay have other positions in layer {layer}.")


def dropping_equals_masking(cell: Cell, attn: str = "sdpa", merged: bool = False) -> None:
    """Prefill and decoding, against a model that keeps all tokens and masks the dropped ones."""
    run = reduced(cell, attn, merged)
    ref = reference(cell.family, attn)
    with masking(ref, run.trace, cell.mass(merged), ref.inputs, cell.scope) as masks:
        acted = bool(masks.keep or masks.evict) or cell.auto
        require(acted, "nothing was dropped.")
        expected, _ = oracle.run(
            ref,
            ref.inputs,
            keep=masks.keep,
            bias=masks.bias,
            mix=masks.mix,
            evict=masks.evict,
            forced=run.tokens,
        )
    if merged and not cell.auto and cell.behind is None and not cell.inside:
        biased = any(bool(bias.any()) for bias in masks.bias.values())
        require(bool(masks.mix) and biased, "merge='nearest', mass=1 merged and weighed nothing.")
    off = worst(run.logits, expected)
    require(
        off <= TOLERANCE,
        f"logits differ by {off:.2g} from those of a model that masks the dropped tokens "
        f"(at most {TOLERANCE:g}): the tokens that were moved are not those that the plan says.",
    )


def sample_alone_equals_sample_in_batch(cell: Cell) -> None:
    """Every sample without its neighbours and without padding."""
    together, singles = reduced(cell), []
    for sample in range(2):
        fam = family(cell.family)
        alone = reduce(cell, fam, fam.single(sample))
        singles.append(alone)
        require(
            choices(alone, 0) == choices(together, sample),
            f"sample {sample} keeps other tokens in a padded batch than alone: a row may not "
            f"depend on other rows, on padding (ctx.visual False) or on earlier calls.",
        )
        off = worst(alone.logits, [x[sample : sample + 1] for x in together.logits])
        says = f"logits of sample {sample} alone and in a padded batch differ by {off:.2g}."
        require(off <= TOLERANCE, says)
    says = "images keep other tokens inside the tower in a padded batch than alone."
    require(tower_choices(*singles) == tower_choices(together), says)


def eager_equals_sdpa(cell: Cell, merged: bool = False) -> None:
    sdpa, eager = reduced(cell, "sdpa", merged), reduced(cell, "eager", merged)
    says = "eager and sdpa attention lead to other plans or other tokens."
    require(choices(sdpa) == choices(eager) and torch.equal(sdpa.tokens, eager.tokens), says)
    off = worst(sdpa.logits, eager.logits)
    require(off <= TOLERANCE, f"logits with eager and with sdpa attention differ by {off:.2g}.")


def same_seed_same_plan_and_global_generators_untouched(cell: Cell) -> None:
    first = reduced(cell)
    before = global_generators()
    again = reduce(cell, family(cell.family))
    require(
        global_generators() == before,
        "the global random state moved: draw with vtc.ops.hash_uniform(ctx.source, ctx.seed).",
    )
    require(
        choices(again) == choices(first) and same(again.logits, first.logits),
        "the same model, input and seed gave another answer the second time.",
    )


def global_generators() -> tuple[Any, ...]:
    """State of the generators of torch, Python and numpy."""
    state: Any = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tobytes(), state[2:]


def bfloat16_runs(cell: Cell, merged: bool = False) -> None:
    fam = family(cell.family, dtype=torch.bfloat16)
    run = reduce(cell, fam, **cell.merged(merged))
    require(all(bool(x.isfinite().all()) for x in run.logits), "bfloat16 logits are not finite.")
    if not cell.auto:  # thresholds may be passed or not by a rounding
        says = f"bfloat16 keeps {_counts(run)}, float32 {_counts(reduced(cell))}."
        require(_counts(run) == _counts(reduced(cell)), says)
    dtypes = {p.dtype for p in fam.model.parameters()}
    require(dtypes == {torch.bfloat16}, f"parameters of the model became {dtypes}.")


def detaching_restores_the_model(cell: Cell) -> None:
    """Also when the session, or the forward inside it, ends by an exception."""
    fam = family(cell.family)
    plain = untouched(cell.family)
    generate(fam.model, fam.inputs)  # transformers installs some hooks of its own at first use
    before = state_of(fam.model)
    options = cell.merged()

    def restored(when: str) -> None:
        says = f"hooks, attributes or attention functions are left on the model {when}."
        require(state_of(fam.model) == before, says)

    with cell.attach(fam.model, **options):
        require(state_of(fam.model) != before, "attaching changed nothing.")
        generate(fam.model, fam.inputs)
    restored("after a session")
    with suppress(Stop), cell.attach(fam.model, **options):
        generate(fam.model, fam.inputs)
        raise Stop
    restored("after an exception in a session")
    with breaking(oracle.text_model(fam.model).layers[-1]), cell.attach(fam.model, **options):
        generate(fam.model, fam.inputs)
    restored("after an exception in a forward")
    after = generate(fam.model, fam.inputs)
    alike = same(after.logits, plain.logits) and torch.equal(after.tokens, plain.tokens)
    require(alike, "after detaching, the model answers differently.")


def sessions_survive_an_exception_inside_forward(cell: Cell) -> None:
    fam = family(cell.family)
    expected = reduced(cell)
    for broken in (0, families.LAYERS - 1):
        with cell.attach(fam.model) as session:
            with breaking(oracle.text_model(fam.model).layers[broken]):
                generate(fam.model, fam.inputs)
            session.trace.clear()
            again = generate(fam.model, fam.inputs)
        says = "a forward that broke off changes the next one: a method may keep no state."
        require(same(again.logits, expected.logits), says)


def two_threads_equal_two_sequential_runs(cell: Cell) -> None:
    fam = family(cell.family)
    prompts = [fam.single(0), fam.single(1), fam.inputs]
    with cell.attach(fam.model, **cell.merged()) as session:
        sequential = [generate(fam.model, prompt) for prompt in prompts]
        reductions = len(session.trace)
        jobs = [functools.partial(generate, fam.model, prompt) for prompt in prompts]
        parallel = in_threads(jobs)
        says = f"{len(session.trace) - reductions} reductions in threads, {reductions} before."
        require(len(session.trace) == 2 * reductions, says)
    for one, other in zip(sequential, parallel, strict=True):
        alike = torch.equal(one.tokens, other.tokens) and same(one.logits, other.logits)
        require(alike, "answers of threads differ from those one after the other.")


def loss_and_gradients_equal_those_of_masking(cell: Cell, merged: bool = False) -> None:
    fam, ref = family(cell.family), reference(cell.family)
    inputs = fam.labelled()
    starts = inputs["attention_mask"].argmax(1, keepdim=True)
    inputs["labels"].scatter_(1, starts, -100)  # padding would have to predict the first token
    with cell.attach(fam.model, **cell.merged(merged)) as session:
        out: Any = fam.model(**inputs)
        got = gradients(fam.model, out.loss)
    require(out.logits.shape[:2] == inputs["input_ids"].shape, "logits are not as many as tokens.")
    with masking(ref, session.trace, cell.mass(merged), fam.inputs, cell.scope) as masks:
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
    off = abs(loss.item() - out.loss.item())
    require(off <= TOLERANCE, f"the loss differs by {off:.2g} from that of masking.")
    expected = gradients(ref.model, loss)
    scale = max(1.0, max(g.abs().max().item() for g in expected.values()))
    vision = [n for n in got if "vision" in n or "visual" in n]
    require(any(bool(got[n].any()) for n in vision), "no gradient reaches the vision tower.")
    for name, gradient in expected.items():
        off = (got[name] - gradient).abs().max().item()
        says = f"the gradient of {name} differs by {off:.2g} from that of masking."
        require(off <= TOLERANCE * scale, says)


def recipe_goes_through_yaml_and_back(cell: Cell, **options: Any) -> None:
    recipe = cell.recipe(**options)
    text = recipe.dump()
    for source in (text, recipe.to_dict()):
        says = f"a recipe comes back from YAML as another one:\n{text}"
        require(Recipe.load(source) == recipe, says)


def recipe_acts_like_the_arguments(cell: Cell) -> None:
    fam = family(cell.family)
    with attach(fam.model, Recipe.load(cell.recipe().dump())) as session:
        run = generate(fam.model, fam.inputs)
    made = choices(Run(run.logits, run.tokens, tuple(session.trace)))
    alike = made == choices(reduced(cell)) and same(run.logits, reduced(cell).logits)
    require(alike, "a recipe read from YAML acts unlike the arguments it was made of.")


def _counts(run: Run) -> list[tuple[str, tuple[int, ...]]]:
    """Tokens that stay, by site."""
    return [(r.site, r.n_out) for r in run.trace]
