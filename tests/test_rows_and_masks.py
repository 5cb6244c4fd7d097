"""Masks and positions other than one prompt per row, on layers that look at everything, at windows,
at chunks and at a mix of those: equal to the reference, or to each sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import layers
from support.layers import CHUNK, CHUNKED, FULL, KINDS, SLIDING, WINDOW
from torch import Tensor

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import families, oracle, trace
from vtc.testing.runs import TOLERANCE, worst

SITES = ("projector", "decoder.1", "decoder.3")
each_site = pytest.mark.parametrize("at", SITES)
each_kind = pytest.mark.parametrize("kinds", KINDS)
each_attention = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def near(inputs: families.Inputs, kind: str) -> Tensor:
    """[B, L, L] what a causal layer sees of a padded batch."""
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    place = torch.arange(length) - real.long().argmax(1, keepdim=True)  # [B, L]
    query, key = place[:, :, None], place[:, None]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None]
    if kind == SLIDING:
        seen = seen & (key > query - WINDOW)
    if kind == CHUNKED:
        seen = seen & (
            key.div(CHUNK, rounding_mode="floor") == query.div(CHUNK, rounding_mode="floor")
        )
    return seen & real[:, :, None]


def ready(seen: Tensor, form: str) -> Tensor:
    """A mask [B, 1, L, L] as attention functions take it."""
    if form == "bool":
        return seen[:, None]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def check(
    kinds: str, attn: str, at: str, inputs: dict[str, Any], plain: families.Inputs, **options: Any
) -> None:
    """Logits of kept real columns are those of the reference, which masks what was dropped."""
    fam, ref = layers.family(kinds, attn), layers.reference(kinds)
    with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        got = fam.model(**inputs, use_cache=False).logits
    visual = fam.visual(plain)
    masks = trace.masks(session.trace, visual)
    (expected,), _ = oracle.run(ref, plain, keep=masks.keep, steps=1, all_rows=True, **options)
    real = plain.get("attention_mask", torch.ones_like(plain["input_ids"])).bool()
    left = masks.final(visual) & real
    assert int((~masks.final(visual)).sum()) > 8
    assert worst([got[left]], [expected[left]]) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# padding and ready masks


@each_kind
@each_site
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(kinds: str, at: str, side: str) -> None:
    inputs = layers.family(kinds).padded(side)
    check(kinds, "sdpa", at, inputs, inputs)


@each_kind
@each_site
def test_padding_with_eager_attention(kinds: str, at: str) -> None:
    inputs = layers.family(kinds, "eager").inputs
    check(kinds, "eager", at, inputs, inputs)


@pytest.mark.parametrize("kinds", ["full", "sliding-last-full", "chunked-last-full"])
@each_site
@pytest.mark.parametrize("attn, form", [("sdpa", "bool"), ("sdpa", "float"), ("eager", "float")])
def test_a_ready_mask_per_kind_of_layer(kinds: str, at: str, attn: str, form: str) -> None:
    plain = layers.family(kinds, attn).inputs
    per_kind = {kind: ready(near(plain, kind), form) for kind in set(KINDS[kinds])}
    check(kinds, attn, at, plain | {"attention_mask": per_kind}, plain)


@each_site
@pytest.mark.parametrize("attn, form", [("sdpa", "bool"), ("sdpa", "float"), ("eager", "float")])
def test_one_ready_mask_is_kept_as_it_was_made(at: str, attn: str, form: str) -> None:
    """Text before the first image sees itself both ways, and nobody sees column 1."""
    plain = layers.family("sliding-last-full", attn).single(1)
    seen = near(plain, FULL)
    seen[:, :3, :3] = True
    seen[:, 2:, 1] = False
    inputs = plain | {"attention_mask": ready(seen, form)}
    given = {FULL: seen, SLIDING: seen}
    check("sliding-last-full", attn, at, inputs, plain, seen=given)


@each_site
@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_ready_mask_of_the_whole_sequence_in_a_later_forward(at: str, form: str) -> None:
    """It counts original columns: the past that it hides stays hidden, dropped or not."""
    fam, ref = layers.family("full"), layers.reference("full")
    plain, more = fam.single(1), torch.tensor([[7, 8, 9, 10]])
    length = plain["input_ids"].shape[1]
    seen = torch.ones(1, length + 4, length + 4, dtype=torch.bool).tril()
    seen[:, length:, 2:12] = False
    given = ready(seen[:, length:], form)
    with vtc.attach(fam.model, "random", keep=0.5, at=at) as session:
        cache = fam.model(**plain).past_key_values
        got = fam.model(input_ids=more, attention_mask=given, past_key_values=cache).logits
    masks = trace.masks(session.trace, fam.visual(plain))
    keep = {s: torch.nn.functional.pad(k, (0, 4), value=True) for s, k in masks.keep.items()}
    longer = {
        "input_ids": torch.cat([plain["input_ids"], more], 1),
        "pixel_values": plain["pixel_values"],
    }
    (expected,), _ = oracle.run(ref, longer, keep=keep, seen={FULL: seen}, steps=1, all_rows=True)
    assert worst([got], [expected[:, length:]]) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# packed rows


def packed(fam: families.Family, rows: list[int], times: int = 1) -> families.Inputs:
    """Samples one after another in one row, `times` such rows with another sample in front."""
    singles = [fam.single(row) for row in rows]
    lines = [
        (
            torch.cat([x["input_ids"] for x in order], 1),
            torch.cat([torch.arange(x["input_ids"].shape[1]) for x in order])[None],
            torch.cat([x["pixel_values"] for x in order]),
        )
        for order in (singles[i:] + singles[:i] for i in range(times))
    ]
    names = ("input_ids", "position_ids", "pixel_values")
    return {
        name: torch.cat(parts) for name, parts in zip(names, zip(*lines, strict=True), strict=True)
    }


@each_kind
@each_site
@each_attention
def test_packed_samples_do_not_see_one_another(kinds: str, at: str, attn: str) -> None:
    inputs = packed(layers.family(kinds, attn), [0, 1, 0])
    check(kinds, attn, at, inputs, inputs)


@pytest.mark.parametrize("kinds", ["full", "sliding-last-full", "chunked-last-full"])
@pytest.mark.parametrize(
    "method, at, options",
    [
        ("grid", "projector", {"scope": "sample"}),
        ("random", "decoder.1", {"scope": "sample"}),
        ("fastv", "decoder.1", {}),
        ("pdrop", "decoder.2", {}),
        ("dart", "decoder.2", {}),
        ("divprune", "projector", {}),
        ("random", "vision.1", {}),
    ],
)
def test_packed_samples_are_chosen_as_each_alone(
    kinds: str, method: str, at: str, options: dict[str, Any]
) -> None:
    """A method reads the text, the attention and the budget of an image's own sample, also where
    rows keep different numbers of tokens."""
    fam = layers.family(kinds)
    inputs = packed(fam, [0, 1], times=2)
    with vtc.attach(fam.model, method, keep=0.5, at=at, **options) as session:
        got = fam.model(**inputs, use_cache=False).logits
    together = [
        s[:n].tolist() for r in session.trace for s, n in zip(r.source, r.n_out, strict=True)
    ]
    alone, logits = [], []
    for row in (0, 1, 1, 0):
        with vtc.attach(fam.model, method, keep=0.5, at=at, **options) as session:
            logits.append(fam.model(**fam.single(row), use_cache=False).logits[:, -5:])
        alone += [
            s[:n].tolist() for r in session.trace for s, n in zip(r.source, r.n_out, strict=True)
        ]
    assert together == alone
    n, m = (fam.single(row)["input_ids"].shape[1] for row in (0, 1))
    ends = [(0, n), (0, n + m), (1, m), (1, n + m)]
    assert worst([got[b : b + 1, end - 5 : end] for b, end in ends], logits) <= TOLERANCE


@each_site
def test_images_that_touch_across_samples_are_two(at: str) -> None:
    fam = layers.family("full")
    inputs = packed(fam, [0, 0])
    half = inputs["input_ids"].shape[1] // 2
    first = fam.visual(inputs)[0].long().argmax()
    end = int(first) + 16
    keep = torch.cat([torch.arange(end), torch.arange(half + int(first), 2 * half)])
    ids = inputs["input_ids"][:, keep]
    places = torch.cat([torch.arange(end), torch.arange(half - int(first))])[None]
    touching = inputs | {"input_ids": ids, "position_ids": places}
    with vtc.attach(fam.model, "grid", keep=0.5, at=at) as session:
        got = fam.model(**touching, use_cache=False).logits
    assert session.trace[0].n_out == (8, 8)
    alone = {"input_ids": ids[:, end:], "pixel_values": inputs["pixel_values"][1:]}
    with vtc.attach(fam.model, "grid", keep=0.5, at=at):
        expected = fam.model(**alone, use_cache=False).logits
    assert worst([got[:, -5:]], [expected[:, -5:]]) <= TOLERANCE


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_samples_with_positions_on_axes(name: str, at: str) -> None:
    """Positions of the text come first; the axes of the image after them."""
    fam = families.make(name, images_per_row=[1, 1])
    singles = [fam.single(0), fam.single(1)]
    lines = []
    for x in singles:
        axes, _ = fam.model.model.get_rope_index(  # type: ignore[operator]
            x["input_ids"],
            mm_token_type_ids=x["mm_token_type_ids"],
            image_grid_thw=x["image_grid_thw"],
            attention_mask=x["attention_mask"],
        )
        text = torch.arange(x["input_ids"].shape[1])[None, None]
        lines.append(torch.cat([text, axes]))
    inputs = {
        "input_ids": torch.cat([x["input_ids"] for x in singles], 1),
        "position_ids": torch.cat(lines, 2),
        "pixel_values": torch.cat([x["pixel_values"] for x in singles]),
        "image_grid_thw": torch.cat([x["image_grid_thw"] for x in singles]),
    }
    with vtc.attach(fam.model, "grid", keep=0.5, at=at):
        got = fam.model(**inputs, use_cache=False).logits
        alone = [fam.model(**x, use_cache=False).logits[:, -5:] for x in singles]
        n = singles[0]["input_ids"].shape[1]
        assert worst([got[:, n - 5 : n], got[:, -5:]], alone) <= TOLERANCE
        with pytest.raises(UnsupportedModel, match=r"keeps them apart only by position_ids \[4, B"):
            fam.model(**inputs | {"position_ids": inputs["position_ids"][1:]}, use_cache=False)


def test_packed_samples_that_nobody_would_keep_apart_are_refused() -> None:
    fam = layers.make("full")
    inputs = packed(fam, [0, 1])
    with vtc.attach(fam.model, "grid", keep=0.5):
        with pytest.raises(UnsupportedModel, match="only in a forward without a cache.*use_cache"):
            fam.model(**inputs)
        fam.model.config.text_config.use_cache = False
        fam.model(**inputs)
    with (
        vtc.attach(fam.model, "grid", keep=0.5, positions="renumber"),
        pytest.raises(UnsupportedModel, match="'renumber' counts one prompt per row"),
    ):
        fam.model(**inputs, use_cache=False)
    with vtc.attach(fam.model, "grid", keep=1.0):  # nothing is dropped, nothing to refuse
        whole = fam.model(**inputs, use_cache=True).logits
    assert torch.equal(whole, fam.model(**inputs, use_cache=True).logits)


# --------------------------------------------------------------------------------------------
# padding that the model counts


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_keys_are_read_as_without_padding(name: str, attn: str) -> None:
    """A plain forward counts padding into positions, which turn keys: their L1 norms change."""
    fam = families.make(name, attn)

    def chosen(inputs: families.Inputs) -> list[list[int]]:
        with vtc.attach(fam.model, "dart", keep=0.25, at="decoder.2") as session:
            fam.model(**inputs)
        (r,) = session.trace
        return [sorted(s[:n].tolist()) for s, n in zip(r.source, r.n_out, strict=True)]

    alone = chosen(fam.single(0)) + chosen(fam.single(1))
    assert chosen(fam.padded("left")) == alone
    assert chosen(fam.padded("right")) == alone
