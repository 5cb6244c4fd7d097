"""Text models whose layers look in different ways, over several forwards that bring images: chunked
prefill, later turns, beams; and what of chunked attention is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support import layers
from support.layers import CHUNK, KINDS

import vtc
from vtc.errors import UnsupportedModel, UnsupportedSite
from vtc.testing import configs, families, maskref, trace
from vtc.testing.runs import TOLERANCE, worst

MIXED = ("sliding-last-full", "full-first", "chunked", "chunked-last-full")
SITES = ("projector", "decoder.1", "decoder.3")
each_mix = pytest.mark.parametrize("kinds", MIXED)
each_site = pytest.mark.parametrize("at", SITES)
STEPS = 4


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def batch(fam: families.Family) -> families.Inputs:
    """Left-padded; the first row has no image."""
    inputs = fam.inputs
    text = torch.tensor([[0] * (inputs["input_ids"].shape[1] - 7) + [11, 12, 13, 14, 15, 16, 17]])
    return {
        "input_ids": torch.cat([text, inputs["input_ids"]]),
        "attention_mask": torch.cat([(text != 0).long(), inputs["attention_mask"]]),
        "pixel_values": inputs["pixel_values"],
    }


@each_mix
@each_site
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 24}, {"num_beams": 2}, {}])
def test_every_row_of_a_padded_batch(kinds: str, at: str, options: dict[str, Any]) -> None:
    """Equal to masking, also where another row lost tokens before a chunk with images."""
    fam, ref = layers.family(kinds), layers.reference(kinds)
    inputs = batch(fam)
    visual = fam.visual(inputs).repeat_interleave(options.get("num_beams", 1), 0)
    pieces: dict[str, Any] = {}
    if "prefill_chunk_size" in options:
        offsets = range(0, visual.shape[1], 24)
        pieces = {"offsets": offsets, "widths": [24] * len(offsets)}
    with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        got = generate(fam.model, inputs, **options)
    masks = trace.masks(session.trace, visual, **pieces)
    assert int((~masks.final(visual)).sum()) >= 16
    with maskref.masked(ref.model, masks.keep):
        expected = generate(ref.model, inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert worst(got.logits, expected.logits) <= TOLERANCE


@each_mix
@each_site
def test_a_later_turn_with_a_new_image(kinds: str, at: str) -> None:
    """A batch of two chats on one cache; the second image comes to one of them alone."""
    fam, ref = layers.family(kinds), layers.reference(kinds)
    first = batch(fam)
    first = {name: x[:2] if name != "pixel_values" else x[:1] for name, x in first.items()}
    turn = torch.tensor([[20, 21] + [families.IMAGE] * 16 + [22, 23, 24]])
    turn = torch.cat([torch.randint(30, 40, turn.shape), turn])

    def chat(model: Any) -> Any:
        one = generate(model, first)
        ids = torch.cat([one.sequences, turn], 1)
        more = torch.ones(2, ids.shape[1] - first["attention_mask"].shape[1], dtype=torch.long)
        second = {
            "input_ids": ids,
            "attention_mask": torch.cat([first["attention_mask"], more], 1),
            "pixel_values": fam.inputs["pixel_values"][1:2],
            "past_key_values": one.past_key_values,
        }
        return one.logits + generate(model, second).logits, ids

    with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        got, ids = chat(fam.model)
    visual = fam.visual({"input_ids": ids})
    length = first["input_ids"].shape[1] + STEPS - 1  # the last token of a turn is fed in the next
    pieces = {"offsets": [0, length], "widths": [length, ids.shape[1] - length]}
    masks = trace.masks(session.trace, visual, **pieces)
    with maskref.masked(ref.model, masks.keep):
        expected, _ = chat(ref.model)
    assert worst(got, expected) <= TOLERANCE


@pytest.mark.parametrize("kinds", ["chunked", "chunked-last-full"])
@each_site
def test_chunks_count_original_columns(kinds: str, at: str) -> None:
    """A prompt of several chunks, and tokens written after it, in a padded batch and alone."""
    fam, ref = layers.family(kinds), layers.reference(kinds)
    for inputs in (fam.inputs, fam.single(1)):
        assert inputs["input_ids"].shape[1] > 2 * CHUNK
        with vtc.attach(fam.model, "random", keep=0.25, at=at) as session:
            got = generate(fam.model, inputs)
        masks = trace.masks(session.trace, fam.visual(inputs))
        with maskref.masked(ref.model, masks.keep):
            expected = generate(ref.model, inputs)
        assert worst(got.logits, expected.logits) <= TOLERANCE


def test_a_cache_beside_chunks_is_evicted_in_full_layers_alone() -> None:
    fam = layers.family("chunked-last-full")
    with vtc.attach(fam.model, "grid", keep=0.5, at="cache") as session:
        out = generate(fam.model, fam.single(0))
    (reduction,) = session.trace
    assert reduction.site == "cache.3"
    kept = fam.single(0)["input_ids"].shape[1] - 8 + STEPS - 1
    assert out.past_key_values.layers[3].keys.shape[2] == kept


def test_what_chunks_refuse() -> None:
    fam = layers.make("chunked")
    with pytest.raises(UnsupportedSite, match="every layer has a window or chunks, which bound"):
        vtc.attach(fam.model, "grid", keep=0.5, at="cache")
    with (
        vtc.attach(fam.model, "grid", keep=0.5),
        pytest.raises(UnsupportedModel, match="sliding-window or chunked layers cannot hold"),
    ):
        generate(fam.model, fam.inputs, cache_implementation="static")
    with pytest.raises(UnsupportedModel, match="sliding windows or chunks"):
        vtc.attach(fam.model, "grid", keep=0.5, positions="renumber")


def test_queries_scaled_by_their_column_are_refused_where_that_matters() -> None:
    fam = layers.make("chunked-last-full")
    text = fam.model.config.text_config
    text.floor_scale = fam.single(1)["input_ids"].shape[1]
    with vtc.attach(fam.model, "grid", keep=0.5):
        with pytest.raises(UnsupportedModel, match=r"scales queries by the column.*shorten the"):
            generate(fam.model, fam.single(1))
        generate(fam.model, fam.single(0))


def llama4(attn: str, dtype: torch.dtype) -> configs.Recipe:
    """The class that has chunks: 8 x 8 patches, shuffled to 16 tokens."""
    config = transformers.Llama4Config(
        text_config=layers.text_config(KINDS["chunked-last-full"]).to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 7,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
        image_token_index=families.IMAGE,
    )
    model = configs.build(transformers.Llama4ForConditionalGeneration, config, attn, dtype)
    return configs.Recipe(model, configs.fixed(16))


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_llama4(at: str) -> None:
    fam = families.make(llama4)
    ref = families.make(llama4)
    try:
        ref.model(**ref.inputs)
    except AttributeError as error:
        pytest.skip(f"this version of transformers does not run it: {error}")
    with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        got = generate(fam.model, fam.inputs)
    masks = trace.masks(session.trace, fam.visual())
    text = ref.model.language_model.model
    with maskref.masked(_Shell(text), masks.keep):  # type: ignore[arg-type]
        expected = generate(ref.model, ref.inputs)
    assert worst(got.logits, expected.logits) <= TOLERANCE


class _Shell:
    """Where the reference looks for the layers."""

    def __init__(self, text: Any) -> None:
        self.model, self.text_model = self, text
