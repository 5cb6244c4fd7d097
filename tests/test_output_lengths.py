"""Outputs at the length of what was given, on every path: `generate` and `forward`, hidden states,
router logits, towers called alone; attention maps are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import families, maskref, runs, trace

SITES = ["projector", "decoder.1", "vision.1"]
REFUSED = "attention maps of shortened sequences.*without output_attentions"


def generate(model: Any, inputs: families.Inputs, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **options)


def speaker(left: Tensor) -> Tensor:
    """[B, L] the column that speaks for each: the last one up to here that was kept."""
    columns = torch.arange(left.shape[1]).expand_as(left)
    return torch.where(left, columns, 0).cummax(1).values


def spread(x: Tensor, left: Tensor) -> Tensor:
    return x.gather(1, speaker(left)[..., None].expand_as(x))


@pytest.mark.parametrize("at", SITES)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_generate_returns_the_hidden_states_of_forward(name: str, at: str) -> None:
    fam = runs.family(name)
    with torch.no_grad(), vtc.attach(fam.model, "random", keep=0.5, at=at):
        plain = fam.model(**fam.inputs, output_hidden_states=True, logits_to_keep=1)
        out = generate(fam.model, fam.inputs, output_hidden_states=True, output_scores=True)
    assert {h.shape[1] for h in plain.hidden_states} == {fam.inputs["input_ids"].shape[1]}
    assert len(out.hidden_states[0]) == families.LAYERS + 1
    real = fam.inputs["attention_mask"].bool()
    for mine, theirs in zip(out.hidden_states[0], plain.hidden_states, strict=True):
        assert mine.shape == theirs.shape
        assert runs.worst([mine[real]], [theirs[real]]) <= runs.TOLERANCE
    for step in out.hidden_states[1:]:
        assert {h.shape[1] for h in step} == {1}
    assert runs.worst([out.scores[0]], [plain.logits[:, -1]]) <= runs.TOLERANCE


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_a_dropped_row_of_generate_repeats_the_kept_one_before_it(at: str) -> None:
    fam, ref = runs.family("llava"), runs.reference("llava")
    visual, valid = fam.visual(), fam.inputs["attention_mask"].bool()
    with torch.no_grad(), vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        out = generate(fam.model, fam.inputs, output_hidden_states=True)
    masks = trace.masks(session.trace, visual)
    with torch.no_grad(), maskref.masked(ref.model, masks.keep, masks.bias):
        expected = ref.model(**fam.inputs, output_hidden_states=True).hidden_states
    left = masks.final(visual) & valid
    first = 0 if at == "projector" else 2  # the first entry that leaves a shortened layer
    for i, (mine, theirs) in enumerate(zip(out.hidden_states[0], expected, strict=True)):
        wanted = spread(theirs, left) if i >= first else theirs
        assert runs.worst([mine[valid]], [wanted[valid]]) <= runs.TOLERANCE


@pytest.mark.parametrize("at", SITES)
def test_hidden_states_chosen_by_index_keep_their_length(at: str) -> None:
    fam = runs.family("llava")
    with torch.no_grad(), vtc.attach(fam.model, "norm", keep=0.5, at=at):
        every = fam.model(**fam.inputs, output_hidden_states=True).hidden_states
        chosen = fam.model(**fam.inputs, output_hidden_states=[-2]).hidden_states
    assert [x is None for x in chosen] == [True, True, True, False, True]
    assert torch.equal(chosen[-2], every[-2])


def test_tuples_hold_what_names_hold() -> None:
    fam = runs.family("llava")
    with torch.no_grad(), vtc.attach(fam.model, "norm", keep=0.5, at="decoder.1"):
        named = fam.model(**fam.inputs, output_hidden_states=True)
        bare = fam.model(**fam.inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(bare[0], named.logits)
    states = next(x for x in bare if isinstance(x, tuple))
    assert all(torch.equal(a, b) for a, b in zip(states, named.hidden_states, strict=True))


def test_a_language_model_that_returns_a_nameless_heap_is_refused() -> None:
    from vtc.adapters.vlm.masks import restore

    x, index = torch.zeros(1, 2, 4), torch.tensor([[0, 2]])
    drops = [(-1, index, torch.ones_like(index, dtype=torch.bool))]
    assert restore((x, "cache"), drops, 3, 4)[0].shape == (1, 3, 4)
    with pytest.raises(UnsupportedModel, match=r"returned a tuple.*return_dict=True"):
        restore((x, (x, x)), drops, 3, 4)


# --------------------------------------------------------------------------------------------
# attention maps


def eager(name: str = "llava") -> families.Family:
    return families.make(name, attn="eager", row=0)


@pytest.mark.parametrize("at", ["projector", "decoder.1", "vision.1"])
def test_attention_maps_of_a_shortened_sequence_are_refused(at: str) -> None:
    fam = eager()
    with torch.no_grad(), vtc.attach(fam.model, "norm", keep=0.5, at=at):
        with pytest.raises(UnsupportedModel, match=REFUSED):
            fam.model(**fam.inputs, output_attentions=True)
        with pytest.raises(UnsupportedModel, match=REFUSED):
            generate(fam.model, fam.inputs, output_attentions=True)
        text = fam.model.config.get_text_config()
        text.output_attentions = True
        with pytest.raises(UnsupportedModel, match=REFUSED):
            fam.model(**fam.inputs)
        text.output_attentions = False
        assert fam.model(**fam.inputs).logits.shape[1] == fam.inputs["input_ids"].shape[1]


def test_attention_maps_of_later_steps_on_a_shortened_cache_are_refused() -> None:
    """Also where the prefill itself was whole, as at the site `cache`."""
    fam, more = eager(), torch.tensor([[11]])
    for method, at in (("norm", "decoder.1"), ("grid", "cache")):
        with torch.no_grad(), vtc.attach(fam.model, method, keep=0.5, at=at):
            out = fam.model(**fam.inputs, use_cache=True)
            with pytest.raises(UnsupportedModel, match=REFUSED):
                fam.model(
                    input_ids=more, past_key_values=out.past_key_values, output_attentions=True
                )


@pytest.mark.parametrize("at", ["projector", "decoder.1", "vision.1"])
def test_attention_maps_of_a_whole_sequence_are_handed_out(at: str) -> None:
    fam = eager()
    with torch.no_grad():
        plain = fam.model(**fam.inputs, output_attentions=True).attentions
        with vtc.attach(fam.model, "norm", keep=1.0, at=at):
            whole = fam.model(**fam.inputs, output_attentions=True).attentions
    assert len(whole) == families.LAYERS
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


def test_maps_of_a_row_without_images_beside_a_shortened_one_are_refused() -> None:
    """The batch stays as wide as it was; its columns do not stay where they were."""
    fam = families.make("llava", attn="eager", images_per_row=(0, 1))
    ids, mask = fam.inputs["input_ids"].clone(), fam.inputs["attention_mask"].clone()
    ids[0], mask[0] = torch.where(ids[0] == families.PAD, 7, ids[0]), 1
    inputs = fam.inputs | {"input_ids": ids, "attention_mask": mask}
    with (
        torch.no_grad(),
        vtc.attach(fam.model, "norm", keep=0.5),
        pytest.raises(UnsupportedModel, match=REFUSED),
    ):
        fam.model(**inputs, output_attentions=True)


def test_attention_maps_of_a_shortened_tower_are_refused() -> None:
    for name in ("llava", "qwen2_5_vl"):
        fam = eager(name)
        inputs = {k: v for k, v in fam.inputs.items() if k in ("pixel_values", "image_grid_thw")}
        with (
            torch.no_grad(),
            vtc.attach(fam.model, "norm", keep=0.5, at="vision.1"),
            pytest.raises(UnsupportedModel, match=REFUSED),
        ):
            fam.model.model.get_image_features(**inputs, output_attentions=True)


# --------------------------------------------------------------------------------------------
# experts, and towers called alone


@pytest.mark.parametrize("at", ["projector", "decoder.2"])
def test_router_logits_keep_their_length(at: str) -> None:
    """The balancing loss of experts reads them beside the mask of the prompt."""
    fam, ref = runs.family("qwen3_vl_moe"), runs.reference("qwen3_vl_moe")
    inputs, visual, valid = fam.inputs, fam.visual(), fam.inputs["attention_mask"].bool()
    b, length = inputs["input_ids"].shape
    with torch.no_grad(), vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        got = fam.model(**inputs, output_router_logits=True)
    masks = trace.masks(session.trace, visual)
    with torch.no_grad(), maskref.masked(ref.model, masks.keep, masks.bias):
        expected = ref.model(**inputs, output_router_logits=True).router_logits
    left = masks.final(visual) & valid
    wanted = []
    for i, (mine, theirs) in enumerate(zip(got.router_logits, expected, strict=True)):
        assert mine.shape == theirs.shape == (b * length, 4)
        whole = theirs.view(b, length, -1)
        whole = spread(whole, left) if at == "projector" or i >= 2 else whole
        assert runs.worst([mine.view(b, length, -1)[valid]], [whole[valid]]) <= runs.TOLERANCE
        wanted.append(whole.flatten(0, 1))
    config = fam.model.config.text_config
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    loss = load_balancing_loss_func(
        tuple(wanted), config.num_experts, config.num_experts_per_tok, inputs["attention_mask"]
    )
    assert abs(got.aux_loss - loss) <= 1e-5


def test_router_logits_of_layers_that_cannot_be_told_are_refused() -> None:
    from vtc.adapters.vlm.masks import restore

    index = torch.tensor([[0, 2]])
    filled = torch.ones_like(index, dtype=torch.bool)
    logits = (torch.ones(2, 4),)
    output = SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 4), router_logits=logits)
    with pytest.raises(UnsupportedModel, match=r"1 of 2 layers returned router logits.*projector"):
        restore(output, [(1, index, filled)], 3, 2)
    assert restore(output, [(-1, index, filled)], 3, 2).router_logits[0].shape == (3, 4)


def test_a_packed_tower_returns_every_patch() -> None:
    fam = runs.family("qwen2_5_vl")
    pixels, grid = fam.inputs["pixel_values"], fam.inputs["image_grid_thw"]
    with torch.no_grad():
        plain = fam.model.model.visual(pixels, grid, output_hidden_states=True)
        with vtc.attach(fam.model, "norm", keep=0.5, at="vision.2"):
            short = fam.model.model.visual(pixels, grid, output_hidden_states=True)
    assert short.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [x.shape for x in short.hidden_states] == [x.shape for x in plain.hidden_states]
    for i in range(3):  # up to what enters block 2
        assert torch.equal(short.hidden_states[i], plain.hidden_states[i])
    groups = short.hidden_states[3].view(len(pixels) // 4, -1)
    assert groups.any(-1).sum() == len(groups) / 2
    assert torch.equal(short.hidden_states[3].any(-1), short.last_hidden_state.any(-1))
