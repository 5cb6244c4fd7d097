"""Mistakes that were made once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import vtc
from vtc.errors import InvalidRecipe, UnsupportedModel
from vtc.recipe import Recipe
from vtc.testing import dits, families


def test_hidden_states_before_a_drop_are_left_alone_when_no_sequence_gets_shorter() -> None:
    """A text row as long as the image row keeps the batch as wide as it was."""
    fam = families.make("llava", images_per_row=(0, 1))
    inputs = fam.inputs
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0] = torch.where(ids[0] == families.PAD, 7, ids[0])
    mask[0] = 1
    inputs = inputs | {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        plain = fam.model(**inputs, output_hidden_states=True).hidden_states
        with vtc.attach(fam.model, "random", keep=0.25, at="decoder.2"):
            short = fam.model(**inputs, output_hidden_states=True).hidden_states
    for i in range(3):
        assert torch.equal(short[i], plain[i])
    assert not torch.equal(short[4], plain[4])


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_a_rolled_back_cache_goes_on_at_the_right_position(at: str) -> None:
    fam = families.make("llava")
    inputs = fam.single(0)
    more = torch.tensor([[11, 12]])
    with torch.no_grad(), vtc.attach(fam.model, "random", keep=0.25, at=at):
        straight = fam.model(**inputs, use_cache=True)
        expected = fam.model(input_ids=more[:, :1], past_key_values=straight.past_key_values)
        out = fam.model(**inputs, use_cache=True)
        fam.model(input_ids=more.flip(1), past_key_values=out.past_key_values)
        out.past_key_values.crop(-2)
        again = fam.model(input_ids=more[:, :1], past_key_values=out.past_key_values)
    assert (again.logits - expected.logits).abs().max() <= 1e-5


def test_a_shortened_cache_is_freed_with_its_last_reference() -> None:
    fam = families.make("llava")
    gc.disable()
    try:
        with torch.no_grad(), vtc.attach(fam.model, "random", keep=0.25):
            out = fam.model(**fam.single(0), use_cache=True)
        cache = weakref.ref(out.past_key_values)
        del out
        assert cache() is None
    finally:
        gc.enable()


def test_generate_knows_the_grid_of_qwen_images() -> None:
    fam = families.make("qwen2_5_vl")
    inputs = fam.single(0)
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.25) as session:
        fam.model(**inputs)
        fam.model.generate(**inputs, max_new_tokens=2)
    first, second = session.trace
    assert first.layout == second.layout and first.layout[0] is not None


def test_a_seed_beside_a_recipe_is_refused() -> None:
    fam = families.make("llava")
    recipe = vtc.Recipe((vtc.Step("random", "projector", 0.5),))
    with pytest.raises(InvalidRecipe, match="seed"):
        vtc.attach(fam.model, recipe, seed=7)


def test_flash_attention_with_sliding_windows_is_refused() -> None:
    fam = families.make("gemma3")
    text = fam.model.model.language_model.config
    text._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(UnsupportedModel, match="sliding"):
            vtc.attach(fam.model, "random", keep=0.5)
    finally:
        text._attn_implementation = "sdpa"


@pytest.mark.parametrize("options", [{"at": 2}, {"merge_threshold": 0.5}])
def test_options_that_would_do_nothing_are_refused(options: dict) -> None:
    with pytest.raises(InvalidRecipe, match="at=2|merge_threshold"):
        vtc.attach(families.make("llava").model, "random", keep=0.5, **options)


@pytest.mark.parametrize(
    ("name", "method", "at"),
    [
        ("llava", "tome_merge", "vision.1"),
        ("llava", "mustdrop_merge", "vision.1"),
        ("llava", "framefusion_merge", "decoder.0"),
        ("dit", "pooled", "dit.1"),
        ("dit", "tomesd", "dit.1"),
    ],
)
def test_methods_that_lose_no_token_refuse_merge(name: str, method: str, at: str) -> None:
    if name == "dit":
        model, inputs = dits.make(name), dits.inputs(name)
    else:
        family = families.make(name, images_per_row=(2, 2))
        model, inputs = family.model, family.inputs
    with vtc.attach(model, method, keep=0.6, at=at) as session, torch.no_grad():
        model(**inputs)
    (entry,) = session.trace
    assert entry.plan is not None
    homes = entry.plan.destination()
    for row, n in enumerate(entry.n_in):
        assert (homes[row, :n] >= 0).all() and entry.n_out[row] < n
    assert vtc.REDUCERS[method].merging
    with pytest.raises(InvalidRecipe, match=f"'{method}' merges every token itself: leave merge"):
        vtc.attach(model, method, keep=0.6, at=at, merge="nearest")


@pytest.mark.parametrize("name", ["mustdrop", "framefusion"])
def test_merge_goes_to_the_steps_of_a_method_that_drop(name: str) -> None:
    given = {"merge": "nearest", "merge_threshold": 0.1}
    steps = Recipe.build(name, 28, **given).steps
    merging = {vtc.REDUCERS[step.method].merging for step in steps}
    assert merging == {True, False}
    for step in steps:
        step.build()
        drops = step.site.kind != "cache" and not vtc.REDUCERS[step.method].merging
        assert (step.merge == "nearest") == drops
