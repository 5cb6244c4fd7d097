"""`positions="renumber"`: later steps rank by positions as the layers count them, and gaps of
earlier steps close wherever a step says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import InvalidRecipe, UnsupportedModel
from vtc.testing import families, oracle, trace

TOLERANCE = 1e-4


def first_stage(at: str, positions: Any) -> vtc.Step:
    method = "pdrop" if at.startswith("decoder") else "random"
    return vtc.Step(method, at, 24, positions=positions)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("at", ["vision.1", "projector", "decoder.1"])
def test_a_later_stage_ranks_by_what_its_layer_computes(at: str, positions: Any) -> None:
    fam = families.make("llava", "eager")
    columns = trace.rows_of(fam.visual())
    first, seen = first_stage(at, positions), []

    def look(module: object, args: object, output: tuple[Tensor, Tensor]) -> None:
        seen.append(output[1])

    attention: Any = oracle.text_model(fam.model).layers[3].self_attn
    handle = attention.register_forward_hook(look)
    with torch.no_grad(), vtc.attach(fam.model, vtc.Recipe((first,))) as session:
        fam.model(**fam.inputs)
        stage = session.trace[-1]
    handle.remove()
    (weights,) = seen  # what layer 3 computed on what it was given
    second = vtc.Step("pdrop", "decoder.3", 8, positions=positions)
    with torch.no_grad(), vtc.attach(fam.model, vtc.Recipe((first, second))) as session:
        fam.model(**fam.inputs)
        last = session.trace[-1]
    length, whole = weights.shape[-1], fam.inputs["input_ids"].shape[1]
    rows = range(len(columns))
    for row, (sample, place) in zip(rows, columns, strict=True):
        after = [c for r, (s, c) in zip(rows, columns, strict=True) if s == sample and r > row]
        tail = whole - place[-1] - 1 - sum(len(c) - 24 for c in after)
        there = weights[sample, :, -1, length - tail - 24 : length - tail].mean(0)
        picked = there.argsort(descending=True, stable=True)[:8].sort().values
        if at == "vision.1":  # the tower's images are not in the order of the prompt
            assert torch.equal(last.source[row], last.source_in[row, picked])
        else:
            assert torch.equal(last.source[row], stage.source[row, picked])


def rotary_of(fam: families.Family, recipe: vtc.Recipe, layers: range) -> list[Tensor]:
    """Cosine tables that each layer is given for the first sample."""
    seen: list[Tensor] = []

    def look(module: object, args: object, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    with torch.no_grad(), vtc.attach(fam.model, recipe):
        handles = [  # after the hooks of the session
            oracle.text_model(fam.model).layers[i].register_forward_pre_hook(look, with_kwargs=True)
            for i in layers
        ]
        fam.model(**fam.single(0))
        for handle in handles:
            handle.remove()
    return seen


def counted(fam: families.Family, table: Tensor) -> bool:
    """The tables are those of positions 0, 1, 2, ..."""
    text: Any = oracle.text_model(fam.model)
    return torch.equal(table, text.rotary_emb(table, torch.arange(table.shape[1])[None])[0])


@pytest.mark.parametrize("keep", [1.0, 24, "mustdrop_filter"])
@pytest.mark.parametrize("at", ["projector", "decoder.0", "decoder.2"])
@pytest.mark.parametrize("before", ["vision.1", "projector", "decoder.1"])
def test_gaps_close_where_the_step_itself_drops_nothing(before: str, at: str, keep: Any) -> None:
    if before == at or (at, keep) == ("projector", "mustdrop_filter"):
        return
    if before == "decoder.1" and at != "decoder.2":
        return
    if keep == "mustdrop_filter":
        if at == "decoder.0":
            return
        params = {"tau_g": 0.0, "tau_i": 0.0}  # nothing is below these
        last = vtc.Step(keep, at, "auto", positions="renumber", params=params)
    else:
        last = vtc.Step("norm", at, keep, positions="renumber")
    fam = families.make("llava")
    first = int(at[-1]) if at[0] == "d" else 0
    tables = rotary_of(fam, vtc.Recipe((vtc.Step("random", before, 24), last)), range(4))
    whole = fam.single(0)["input_ids"].shape[1]
    for i, table in enumerate(tables):
        assert table.shape[1] < whole or before == "decoder.1"
        assert counted(fam, table) == (i >= first or table.shape[1] == whole)


@pytest.mark.parametrize("at", ["projector", "decoder.0", "decoder.2"])
def test_closed_gaps_give_the_logits_of_the_short_sequence(at: str) -> None:
    """Prefill, decode steps, a second turn and batches, where the step that renumbers keeps all."""
    fam, ref = (families.make("llava", "eager") for _ in range(2))
    before = "vision.1" if at == "projector" else "projector"
    steps = (vtc.Step("random", before, 24), vtc.Step("norm", at, 24, positions="renumber"))
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    text, embed = oracle.text_model(ref.model), ref.model.get_input_embeddings()
    with torch.no_grad(), vtc.attach(fam.model, vtc.Recipe(steps)) as session:
        batch = fam.model.generate(**fam.inputs, **options)
        session.trace.clear()
        inputs = fam.single(0)
        run = fam.model.generate(**inputs, **options)
        kept = session.trace[-1].source_in[0]
        turn = fam.model(**inputs, use_cache=True)
        extra = torch.randint(2, 490, (1, 5), generator=torch.Generator().manual_seed(0))
        more = fam.model(input_ids=extra, past_key_values=turn.past_key_values).logits[:, -1]
    assert torch.equal(batch.sequences[0, -5:], run.sequences[0, -5:])
    if before == "vision.1":
        return  # what is left of the tower is another's test
    seen = fam.visual(inputs)[0]
    left = ~seen
    left[seen.nonzero()[:, 0][kept]] = True
    tokens = run.sequences[:, inputs["input_ids"].shape[1] :]

    def recomputed(ids: Tensor) -> Tensor:
        hidden = torch.cat([oracle.encode(ref.model, inputs).embeds[:, left], embed(ids)], 1)
        gaps = torch.arange(len(left) + ids.shape[1])[torch.cat([left, ids[0] >= 0])]
        n = hidden.shape[1]
        mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        for i, layer in enumerate(text.layers):
            places = torch.arange(n) if i >= int(at[-1]) else gaps
            tables = text.rotary_emb(hidden, places[None])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
        return ref.model.lm_head(text.norm(hidden))[:, -1]

    with torch.no_grad():
        for step, logits in enumerate(run.logits):
            assert (recomputed(tokens[:, :step]) - logits).abs().max() <= TOLERANCE
        assert (recomputed(extra) - more).abs().max() <= TOLERANCE


@pytest.mark.parametrize("prefill", [True, False])
def test_mustdrop_closes_the_gaps_of_its_merge(prefill: bool) -> None:
    """From the first layer on, as the merged tokens of the released code come from the tower."""
    fam = families.make("llava")
    merge = {"threshold": -1.0}
    steps = [vtc.Step("mustdrop_merge", "vision.1", "auto", positions="renumber", params=merge)]
    if prefill:
        params = {"tau_g": 0.0, "tau_i": 0.0}
        steps.append(
            vtc.Step("mustdrop_filter", "decoder.1", "auto", positions="renumber", params=params)
        )
    for table in rotary_of(fam, vtc.Recipe(tuple(steps)), range(4)):
        assert table.shape[1] < fam.single(0)["input_ids"].shape[1] and counted(fam, table)
    with vtc.attach(fam.model, "mustdrop", prefill=prefill, positions="renumber") as session:
        acting = [s.positions for s in session.recipe.steps if s.at != "cache"]
        assert set(acting) == {"renumber"}
        fam.model(**fam.inputs)


def test_where_it_is_refused() -> None:
    with pytest.raises(InvalidRecipe, match=r"at vision.<i>, projector and decoder.<i>"):
        vtc.Step("random", "cache", 0.5, positions="renumber")
    for name in ("qwen2_5_vl", "gemma3"):
        for at in ("vision.1", "projector"):
            with pytest.raises(UnsupportedModel, match="one line of rotary positions"):
                model = families.make(name).model
                vtc.attach(model, "random", keep=0.5, at=at, positions="renumber")
