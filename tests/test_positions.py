"""`positions="renumber"`: kept tokens are counted anew, as code does that drops before the model
sees positions."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import vtc
from vtc.errors import InvalidRecipe, UnsupportedModel
from vtc.testing import families, oracle, trace

STEPS, TOLERANCE = 6, 1e-4


def generate(fam: families.Family, inputs: families.Inputs):
    with torch.no_grad():
        return fam.model.generate(
            **inputs, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
        )


def recomputed(fam: families.Family, drops: dict[int, Tensor], tokens: Tensor) -> list[Tensor]:
    """One prompt, no cache: from layer i on only the columns of drops[i], counted from 0."""
    model, text = fam.model, oracle.text_model(fam.model)
    embeds = oracle.encode(model, fam.inputs).embeds
    out = []
    with torch.no_grad(), oracle.eager(text):
        for step in range(tokens.shape[1]):
            new = model.get_input_embeddings()(tokens[:, :step])
            hidden = torch.cat([embeds, new], 1)
            left = torch.ones(hidden.shape[1], dtype=torch.bool)
            for i, layer in enumerate(text.layers):
                if i in drops:
                    now = torch.cat([drops[i], torch.ones(step, dtype=torch.bool)])
                    hidden, left = hidden[:, now[left]], left & now
                n = hidden.shape[1]
                mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
                tables = text.rotary_emb(hidden, torch.arange(n)[None])
                hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
            out.append(model.lm_head(text.norm(hidden))[:, -1])
    return out


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("sites", [["projector"], ["decoder.1"], ["decoder.1", "decoder.3"]])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_kept_tokens_are_counted_without_gaps(name: str, sites: list[str], attn: str) -> None:
    fam, ref = (families.make(name, attn, row=1) for _ in range(2))
    keep = [0.5, 0.25]
    steps = tuple(
        vtc.Step("random", at, k, positions="renumber") for at, k in zip(sites, keep, strict=False)
    )
    with vtc.attach(fam.model, vtc.Recipe(steps, 3)) as session:
        run = generate(fam, fam.inputs)
    masks = trace.masks(session.trace, fam.visual())
    drops = {0 if at == "projector" else int(at): mask[0] for at, mask in masks.keep.items()}
    tokens = run.sequences[:, fam.inputs["input_ids"].shape[1] :]
    expected = recomputed(ref, drops, tokens)
    for got, wanted in zip(run.logits, expected, strict=True):
        assert (got - wanted).abs().max() <= TOLERANCE
    with vtc.attach(
        fam.model, vtc.Recipe(tuple(vtc.Step("random", s.at, s.keep) for s in steps), 3)
    ):
        original = generate(fam, fam.inputs)
    assert (original.logits[0] - run.logits[0]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
@pytest.mark.parametrize("at", ["projector", "decoder.2"])
def test_batches_beams_and_no_cache(at: str, options: dict[str, object]) -> None:
    fam = families.make("llava")
    more = {"max_new_tokens": STEPS, **options}
    with vtc.attach(fam.model, "random", keep=0.3, at=at, positions="renumber"):
        together = fam.model.generate(**fam.inputs, **more)
        for row in range(2):
            alone = fam.model.generate(**fam.single(row), **more)
            assert torch.equal(alone[0, -STEPS:], together[row, -STEPS:])


@pytest.mark.parametrize("at", ["projector", "decoder.2"])
def test_second_turn_and_hand_written_loop(at: str) -> None:
    """What follows a finished cache equals one long prompt."""
    fam = families.make("llava", row=0)
    extra = torch.randint(2, 490, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.3, at=at, positions="renumber"):
        first = fam.model(**fam.inputs, use_cache=True)
        second = fam.model(input_ids=extra, past_key_values=first.past_key_values)
        ids = torch.cat([fam.inputs["input_ids"], extra], 1)
        long = fam.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = fam.model(**long)
    assert (second.logits[:, -1] - whole.logits[:, -1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_a_chunk_that_ends_in_dropped_tokens(at: str) -> None:
    """The prompt in two forwards, cut right behind the image, gives what one forward gives."""
    fam = families.make("llava", row=0)
    columns = trace.rows_of(fam.visual())[0][1]
    options = {"keep": 0.25, "at": at, "positions": "renumber", "seed": 2}
    with vtc.attach(fam.model, "random", **options) as session:
        whole = generate(fam, fam.inputs)
        last = session.trace[-1].source[0, -1]
        cut = fam.model.generate(
            **fam.inputs,
            max_new_tokens=STEPS,
            prefill_chunk_size=columns[-1] + 1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert last < len(columns) - 1  # the image really ends in dropped tokens
    for a, b in zip(whole.logits, cut.logits, strict=True):
        assert (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("first", ["vision.1", "projector", "decoder.1"])
def test_gaps_of_earlier_steps_are_closed_too(first: str) -> None:
    fam, seen = families.make("llava"), []

    def look(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    layer = oracle.text_model(fam.model).layers[2]
    last = vtc.Step("norm", "decoder.2", 0.3, positions="renumber")
    recipe = vtc.Recipe((vtc.Step("random", first, 0.5), last))
    with vtc.attach(fam.model, recipe), torch.no_grad():
        handle = layer.register_forward_pre_hook(look, with_kwargs=True)  # behind the session's
        fam.model(**fam.single(0))
        handle.remove()
    length = seen[0].shape[1]
    assert length < fam.single(0)["input_ids"].shape[1] / 2
    plain = oracle.text_model(fam.model).rotary_emb(seen[0], torch.arange(length)[None])[0]
    assert torch.equal(seen[0], plain)


def test_refusals() -> None:
    with pytest.raises(InvalidRecipe, match="image encoder alone"):
        timm_model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=2)
        vtc.attach(timm_model, "random", keep=0.5, at="vision.1", positions="renumber")
    for name in ("qwen2_5_vl", "gemma3"):
        with pytest.raises(UnsupportedModel, match="one line of rotary positions"):
            vtc.attach(families.make(name).model, "random", keep=0.5, positions="renumber")
