"""Families with a part that others lack: right, or refused at attach with the true reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from support import odd_families

import vtc
from vtc.errors import UnsupportedModel, UnsupportedSite
from vtc.testing import families, maskref, runs
from vtc.testing.configs import TEXT


@cache
def granite() -> tuple[families.Family, families.Family]:
    """The model under test, and the same weights for the reference."""
    return odd_families.granite(), odd_families.granite()


SHALLOW: dict[str, Callable[[], families.Family]] = {
    "all through windows": odd_families.shallow_windows,
    "one block sees the whole": lambda: odd_families.shallow_windows([1, 7]),
    "exaone4_5": odd_families.exaone,
}


@pytest.mark.parametrize("name", SHALLOW)
def test_a_tower_with_fewer_blocks_than_its_config_names(name: str) -> None:
    """`fullatt_block_indexes` of a shallow tower still holds those of the released one."""
    fam, ref = SHALLOW[name](), SHALLOW[name]()
    for at in ("projector", "vision.1", "decoder.1"):
        with vtc.attach(fam.model, "grid", keep=0.5, at=at) as session:
            got = runs.generate(fam.model, fam.inputs)
        with (
            runs.masking(ref, session.trace, 0.0, fam.inputs) as masks,
            maskref.masked(ref.model, masks.keep, masks.bias),
        ):
            wanted = runs.generate(ref.model, fam.inputs)
        assert runs.worst(got.logits, wanted.logits) <= runs.TOLERANCE
    with vtc.attach(fam.model, "visionzip", keep=0.5) as session:
        runs.generate(fam.model, fam.inputs)
    assert all(n == m // 2 for r in session.trace for n, m in zip(r.n_out, r.n_in, strict=True))


def test_the_block_that_sees_the_whole_image_is_where_the_language_model_reads() -> None:
    fam = odd_families.shallow_windows([1, 7])
    with pytest.raises(UnsupportedSite, match=r"reads what leaves block 1 of the tower"):
        vtc.attach(fam.model, "norm", keep=0.5, at="vision.2")


@pytest.mark.parametrize("kind", ["minimax_m3_sparse", "indexed_attention", "hybrid_sliding"])
def test_layers_of_an_unknown_kind_are_refused_by_name(kind: str) -> None:
    fam = families.make("llava")
    text = fam.model.config.get_text_config()
    text.layer_types = ["full_attention", kind] * (families.LAYERS // 2)
    words = f"layers of full or sliding attention, or recurrent ones .what {kind} does with tokens"
    with pytest.raises(UnsupportedModel, match=words):
        vtc.attach(fam.model, "grid", keep=0.5)


def test_the_sparse_layers_of_minimax_are_refused_before_anything_runs() -> None:
    """Their indexer takes positions for places in the cache."""
    text = transformers.MiniMaxM3VLTextConfig(
        **TEXT,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        index_head_dim=16,
        index_n_heads=2,
        index_block_size=8,
        index_topk_blocks=2,
        layer_types=["full_attention", "minimax_m3_sparse"] * 2,
    )
    fam = odd_families.llava_on(text)
    before = runs.state_of(fam.model)
    with pytest.raises(UnsupportedModel, match="what minimax_m3_sparse does with tokens"):
        vtc.attach(fam.model, "grid", keep=0.5)
    assert runs.state_of(fam.model) == before


@pytest.mark.parametrize("first", ["conv", "full_attention"])
def test_mass_beside_recurrent_layers_is_refused_at_attach(first: str) -> None:
    """Whichever kind comes first: only attention can weigh."""
    kinds = ["conv", "full_attention"] if first == "conv" else ["full_attention", "conv"]
    text = transformers.Lfm2Config(**TEXT, layer_types=kinds * 2, block_auto_adjust_ff_dim=False)
    fam = odd_families.llava_on(text)
    with pytest.raises(UnsupportedModel, match=r"mass.*recurrent layers \(conv\).*Use mass=0"):
        vtc.attach(fam.model, "norm", keep=0.5, at="projector", merge="nearest", mass=1.0)
    with pytest.raises(UnsupportedSite, match=r"recurrent layers \(conv\) have no per-token state"):
        vtc.attach(fam.model, "norm", keep=0.5, at="decoder.1")
    told = str(vtc.describe(fam.model))
    assert "attn_last" in told and "do not pass keyword arguments" not in told
    with torch.no_grad(), vtc.attach(fam.model, "norm", keep=0.5, merge="nearest"):
        assert bool(fam.model(**fam.inputs).logits.isfinite().all())


def test_an_encoder_decoder_is_called_one() -> None:
    with torch.device("meta"):
        model = transformers.Florence2ForConditionalGeneration(transformers.Florence2Config())
    with pytest.raises(UnsupportedModel, match="decoder-only.*this one is encoder-decoder"):
        vtc.attach(model, "grid", keep=0.5)


@pytest.mark.parametrize("at", ["projector", "decoder.0", "decoder.1", "decoder.3"])
@pytest.mark.parametrize("method", ["random", "divprune", "norm"])
def test_features_that_a_language_model_adds_inside_follow_what_is_dropped(
    method: str, at: str
) -> None:
    """Granite 4 Vision calls them and their mask by other names than Qwen3-VL."""
    fam, ref = granite()
    with vtc.attach(fam.model, method, keep=0.5, at=at) as session:
        got = runs.generate(fam.model, fam.inputs)
    with (
        runs.masking(ref, session.trace, 0.0, fam.inputs) as masks,
        maskref.masked(ref.model, masks.keep, masks.bias),
    ):
        wanted = runs.generate(ref.model, fam.inputs)
    assert runs.worst(got.logits, wanted.logits) <= runs.TOLERANCE


def test_methods_see_the_features_of_tokens_that_enter_as_zeros() -> None:
    """So a choice by content before the first layer is the one that layer 0 would see."""
    fam, _ = granite()
    kept = []
    for at in ("projector", "decoder.0"):
        with torch.no_grad(), vtc.attach(fam.model, "norm", keep=0.25, at=at) as session:
            fam.model(**fam.inputs)
        (seen,) = session.trace
        kept.append([seen.source[row, :n].tolist() for row, n in enumerate(seen.n_out)])
    assert kept[0] == kept[1] != [list(range(len(row))) for row in kept[0]]


def test_tokens_that_enter_as_zeros_are_not_merged_before_they_are_there() -> None:
    fam, _ = granite()
    with (
        torch.no_grad(),
        vtc.attach(fam.model, "norm", keep=0.5, at="projector", merge="nearest"),
        pytest.raises(UnsupportedModel, match=r"deepstack_features.*cannot be merged.*decoder\.0"),
    ):
        fam.model(**fam.inputs)


def test_features_without_a_mask_of_their_tokens_are_refused() -> None:
    from vtc.adapters.vlm.deepstack import Deepstack

    given = {"inputs_embeds": torch.zeros(1, 3, 4), "deepstack_visual_embeds": [torch.zeros(2, 4)]}
    with pytest.raises(UnsupportedModel, match="deepstack_visual_embeds, but no mask"):
        Deepstack.among(given)


def test_what_else_a_language_model_is_told_of_every_token_follows_what_is_dropped() -> None:
    """ERNIE 4.5 VL sends text and visual tokens to experts of their own, by an argument."""
    fam, ref = odd_families.ernie(), odd_families.ernie()
    for at in ("projector", "decoder.0", "decoder.2"):
        with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
            got = runs.generate(fam.model, fam.inputs)
        with (
            runs.masking(ref, session.trace, 0.0, fam.inputs) as masks,
            maskref.masked(ref.model, masks.keep, masks.bias),
        ):
            wanted = runs.generate(ref.model, fam.inputs)
        assert runs.worst(got.logits, wanted.logits) <= runs.TOLERANCE
