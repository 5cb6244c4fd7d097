"""Every kind of KV cache that transformers has, at every place where tokens are dropped: exact, or
refused by name. And caches made anew from the tensors of a shortened one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as cached
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import odd_families
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DFlashCache,
    DynamicIndexedLayer,
    DynamicLayer,
    Fp8QuantizedLayer,
    MtpCache,
    QuantizedLayer,
)

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import families, runs

EXACT = None
STEPS = 4
SITES = ["vision.1", "projector", "decoder.1", "cache"]


class GroupWise(QuantizedLayer):
    """As the layers of the backends quanto and hqq, without loss."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


class PerTensor(Fp8QuantizedLayer):
    """As the layers of the backend fp8, without loss."""

    def _quantize(self, tensor: Tensor, scale: Any = None) -> tuple[Tensor, float]:
        return tensor, 1.0

    def _dequantize(self, qtensor: tuple[Tensor, float]) -> Tensor:
        return qtensor[0]


class Offloaded(DynamicCache):
    """As an offloaded cache, without the streams of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.offloading = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        if self.layers[layer_idx].is_initialized:
            self.layers[layer_idx].prefetch()
        out = self.layers[layer_idx].update(key_states, value_states)
        self.layers[layer_idx].offload()
        return out


@cached
def hybrid() -> families.Family:
    return odd_families.short_convolutions()


def llava() -> families.Family:
    return runs.family("llava")


def gemma3() -> families.Family:
    return runs.family("gemma3")


def layers_of(kind: Callable[[], Any]) -> Callable[[Any], Cache]:
    return lambda config: Cache(layers=[kind() for _ in range(families.LAYERS)])


def static(config: Any) -> StaticCache:
    return StaticCache(config=config, max_cache_len=300)


FIXED = "StaticLayer has buffers of a fixed size, so dropping columns saves nothing: use the def"
RING = "StaticCache with sliding-window or chunked layers cannot hold a short.*default cache"
NO_LAYERS = "EncoderDecoderCache has no layers: use a DynamicCache"
STATELESS = r"recurrent layers \(conv\) have no per-token state to drop"
OWN = "Cache has a get_query_offset of its own.*use a DynamicCache"
INDEX = "DynamicIndexedLayer keeps an index that counts original columns"
QUANTISED = "keeps its columns quantised, not as plain tensors: use the default cache"

#: family, cache, and what becomes of every site
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], list[str | None]]] = {
    "dynamic": (llava, lambda config: DynamicCache(), [EXACT] * 4),
    "dynamic for a config": (llava, lambda config: DynamicCache(config=config), [EXACT] * 4),
    "static": (llava, static, [EXACT, EXACT, EXACT, FIXED]),
    "quantised by groups": (llava, layers_of(lambda: GroupWise(residual_length=3)), [
        EXACT, EXACT, EXACT, f"GroupWise {QUANTISED}",
    ]),
    "quantised per tensor": (llava, layers_of(PerTensor), [
        EXACT, EXACT, EXACT, f"PerTensor {QUANTISED}",
    ]),
    "offloaded": (llava, lambda config: Offloaded(), [
        EXACT, EXACT, EXACT, "Offloaded is offloaded.*use the default cache",
    ]),
    "sliding": (gemma3, lambda config: DynamicCache(config=config), [EXACT] * 4),
    "sliding static": (gemma3, static, [RING, RING, RING, FIXED]),
    "hybrid": (hybrid, lambda config: DynamicCache(config=config), [
        EXACT, EXACT, STATELESS, STATELESS,
    ]),
    "hybrid static": (hybrid, static, [EXACT, EXACT, STATELESS, STATELESS]),
    "encoder-decoder": (
        llava, lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()), [NO_LAYERS] * 4,
    ),
    "indexed": (llava, layers_of(DynamicIndexedLayer), [
        INDEX, INDEX, INDEX, "DynamicIndexedLayer does not keep its columns as plain tensors alone",
    ]),
    "drafts": (llava, lambda config: MtpCache(), [f"Mtp{OWN}"] * 4),
    "block drafts": (llava, lambda config: DFlashCache(), [f"DFlash{OWN}"] * 4),
}  # fmt: skip


def generate(fam: families.Family, **options: Any) -> Any:
    return fam.model.generate(
        **fam.inputs,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def test_the_table_has_every_kind_of_layer() -> None:
    """What transformers adds has to be looked at."""
    from transformers import cache_utils

    known = {
        *("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"),
        *("LinearAttentionLayer", "DummyLayer"),
        *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
    }
    assert {kind.__name__ for kind in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values()} <= known
    caches = {
        name
        for name, kind in vars(cache_utils).items()
        if isinstance(kind, type) and issubclass(kind, Cache)
    }
    assert caches == {
        *("Cache", "DynamicCache", "StaticCache", "QuantizedCache", "EncoderDecoderCache"),
        *("MtpCache", "DFlashCache", "SlidingWindowCache"),
    }


@pytest.mark.parametrize("at", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_exact_or_refused_by_name(kind: str, at: str) -> None:
    make, new, fates = KINDS[kind]
    fam, words = make(), fates[SITES.index(at)]
    config = fam.model.config.get_text_config()
    if words is not None:
        with (
            torch.no_grad(),
            pytest.raises((UnsupportedModel, vtc.errors.UnsupportedSite), match=words),
            vtc.attach(fam.model, "grid", keep=0.5, at=at),
        ):
            fam.model(**fam.inputs, past_key_values=new(config), use_cache=True)
        return
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.5, at=at) as session:
        got = generate(fam, past_key_values=new(config))
        assert any(sum(r.n_out) < sum(r.n_in) for r in session.trace)
        plain = {"use_cache": True} if at == "cache" else {"use_cache": False}
        wanted = generate(fam, **plain)
    assert runs.worst(got.logits, wanted.logits) <= runs.TOLERANCE


@pytest.mark.parametrize("at", SITES)
@pytest.mark.parametrize("kind", ["static", "quantised by groups", "offloaded", "sliding static"])
def test_nothing_is_refused_where_nothing_is_dropped(kind: str, at: str) -> None:
    make, new, _ = KINDS[kind]
    fam = make()
    config = fam.model.config.get_text_config()
    dense = generate(fam, past_key_values=new(config)).logits
    with (
        torch.no_grad(),
        vtc.attach(fam.model, "norm" if at != "cache" else "grid", keep=1.0, at=at),
    ):
        whole = generate(fam, past_key_values=new(config)).logits
    assert runs.same(whole, dense)


def test_a_real_quantised_cache_is_refused_by_name_at_the_site_cache() -> None:
    fam = llava()
    quantised = QuantizedCache("fp8", fam.model.config)
    with (
        vtc.attach(fam.model, "grid", keep=0.5, at="cache"),
        pytest.raises(UnsupportedModel, match=f"Fp8QuantizedLayer {QUANTISED}"),
    ):
        generate(fam, past_key_values=quantised)


# --------------------------------------------------------------------------------------------
# made anew

ANEW = "it was made anew from the tensors of another cache.*copy.deepcopy"


def anew(cache: Any) -> DynamicCache:
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


@contextmanager
def filled(at: str, fam: families.Family | None = None) -> Iterator[tuple[families.Family, Any]]:
    fam = fam or families.make("llava", row=0)
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.5, at=at):
        yield fam, fam.model(**fam.inputs, use_cache=True).past_key_values


@pytest.mark.parametrize("at", SITES)
def test_a_cache_made_anew_is_refused(at: str) -> None:
    with filled(at) as (fam, pre):
        more = torch.tensor([[7, 8, 9]])
        ids = torch.cat([fam.inputs["input_ids"], more], 1)
        right = fam.model(input_ids=more, past_key_values=copy.deepcopy(pre)).logits
        with pytest.raises(UnsupportedModel, match=ANEW):
            fam.model.generate(input_ids=ids, past_key_values=anew(pre), max_new_tokens=2)
        with pytest.raises(UnsupportedModel, match=ANEW):
            fam.model(input_ids=more, past_key_values=anew(pre))
        half = DynamicCache([(x.keys.half(), x.values.half()) for x in pre.layers])
        with pytest.raises(UnsupportedModel, match=ANEW):  # as it comes back from a file
            fam.model(input_ids=more, past_key_values=half)
        assert torch.equal(fam.model(input_ids=more, past_key_values=pre).logits, right)


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_rows_of_several_caches_put_together_are_refused(at: str) -> None:
    """One whole row is no excuse; and what was filled first may be gone."""
    fam = families.make("llava", images_per_row=(1, 1))
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.5, at=at):
        pair = [
            fam.model(**fam.batch([row]), use_cache=True).past_key_values.layers for row in (0, 1)
        ]
        rows = []
        for a, b in zip(*pair, strict=True):
            width = min(a.keys.shape[2], b.keys.shape[2])
            keys, values = (a.keys, b.keys), (a.values, b.values)
            rows.append(tuple(torch.cat([t[:, :, :width] for t in x]) for x in (keys, values)))
        joint = DynamicCache(rows)
        del pair
        with pytest.raises(UnsupportedModel, match=ANEW):
            fam.model(input_ids=torch.tensor([[7], [8]]), past_key_values=joint)


def test_layers_of_unequal_length_and_masks_that_are_too_wide_tell_it_as_well() -> None:
    """Where another session, or another process, had filled it."""
    more = torch.tensor([[7, 8, 9]])
    for at in ("decoder.1", "projector"):
        with filled(at) as (fam, pre):
            tensors, length = anew(pre), fam.inputs["input_ids"].shape[1]
        mask = torch.ones(1, length + 3, dtype=torch.long)
        with filled(at, fam), pytest.raises(UnsupportedModel, match=ANEW):
            fam.model(input_ids=more, past_key_values=tensors, attention_mask=mask)


def test_whole_caches_from_elsewhere_are_used_as_they_are() -> None:
    fam = families.make("llava", row=0)
    more = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        dense = fam.model(**fam.inputs, use_cache=True).past_key_values
        wanted = fam.model(input_ids=more, past_key_values=copy.deepcopy(dense)).logits
        text = {"input_ids": torch.tensor([[3, 4, 5]])}
        talk = fam.model(**text, use_cache=True).past_key_values
        answer = fam.model(input_ids=more, past_key_values=anew(talk)).logits
        with vtc.attach(fam.model, "grid", keep=0.5):
            fam.model(**fam.inputs, use_cache=True)
            assert torch.equal(
                fam.model(input_ids=more, past_key_values=anew(dense)).logits, wanted
            )
            new = fam.model(**text, use_cache=True).past_key_values
            assert torch.equal(fam.model(input_ids=more, past_key_values=anew(new)).logits, answer)


def test_a_cache_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding on text waits for nothing."""
    from vtc.adapters.vlm import cache_kinds

    looked: list[Any] = []
    inside = cache_kinds.Print.inside
    monkeypatch.setattr(
        cache_kinds.Print, "inside", lambda self, cache: looked.append(cache) or inside(self, cache)
    )
    fam = families.make("llava", row=0)
    with torch.no_grad(), vtc.attach(fam.model, "grid", keep=0.5):
        fam.model.generate(**fam.inputs, max_new_tokens=4)
        fam.model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=4)
        assert not looked  # both were filled in sight
        text = fam.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
        other = anew(text)
        for _ in range(3):
            fam.model(input_ids=torch.tensor([[7]]), past_key_values=other)
        assert looked == [other]


def test_a_session_remembers_a_bounded_number_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.adapters.vlm import cache_kinds
    from vtc.adapters.vlm.columns import Stage, State

    monkeypatch.setattr(cache_kinds, "REMEMBERED", 2)
    prints = cache_kinds.Prints()
    origin = torch.tensor([[0, 2]])
    layer = SimpleNamespace(keys=torch.ones(1, 1, 2, 4))
    for _ in range(4):
        state = State([Stage(0, origin >= 0, origin, gap=1)])
        prints.add(SimpleNamespace(layers=[layer]), state)
    assert len(prints._prints) == 2
