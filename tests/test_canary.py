"""The interfaces of transformers that vtc relies on. When one of these fails after an update of
transformers, its message says what moved; then look at the named file of vtc/adapters."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import utils as generation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc import versions
from vtc.testing import families

SEEN = f"last seen in transformers 5.24, this is {transformers.__version__}"
LLAVA = families.make("llava", "eager", row=0)
FORWARD = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm", "paligemma")


def moved(what: str, where: str) -> str:
    """What an assertion says: the interface, who relies on it, and when it was there."""
    return f"{what} (used in vtc/adapters/{where}; {SEEN})"


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def text_model(model: nn.Module) -> Any:
    base: Any = model.model
    return base.language_model if hasattr(base, "language_model") else base.text_model


# ---------------------------------------------------------------------- the attention mapping


def test_attention_functions_can_be_overlaid():
    name, table = "test_canary", ALL_ATTENTION_FUNCTIONS
    local = getattr(table, "_local_mapping", None)
    assert isinstance(local, dict), moved("_local_mapping is no dict any more", "attention.py")
    assert name not in local
    table[name] = len
    try:
        assert local.get(name) is len and table[name] is len, moved(
            "ALL_ATTENTION_FUNCTIONS[name] = f does not write to _local_mapping", "attention.py"
        )
        assert name not in type(table)._global_mapping, moved(
            "ALL_ATTENTION_FUNCTIONS[name] = f changes the global mapping", "attention.py"
        )
    finally:
        del table[name]
    assert name not in local and name not in table, moved(
        "del ALL_ATTENTION_FUNCTIONS[name] does not undo the setting", "attention.py"
    )
    shadowed = table["sdpa"]
    table["sdpa"] = len
    del table["sdpa"]
    assert table["sdpa"] is shadowed, moved(
        "deleting an overlaid entry does not bring the library's one back", "attention.py"
    )


def test_eager_is_looked_up_in_the_mapping_first():
    table = ALL_ATTENTION_FUNCTIONS
    assert "eager" not in table, moved("eager attention has an entry by itself", "attention.py")
    assert table.get_interface("eager", max) is max, moved(
        "get_interface('eager', default) does not fall back to the default", "attention.py"
    )
    table["eager"] = min
    try:
        assert table.get_interface("eager", max) is min, moved(
            "get_interface('eager', default) ignores an entry of the mapping", "attention.py"
        )
    finally:
        del table["eager"]


@pytest.mark.parametrize("name", FORWARD)
def test_eager_attention_is_beside_the_attention_class(name: str):
    attention = text_model(families.make(name).model).layers[0].self_attn
    scope = vars(sys.modules[type(attention).__module__])
    own = [n for n in scope if n.endswith("eager_attention_forward")]
    assert own, moved(f"no eager_attention_forward in {type(attention).__module__}", "attention.py")
    wanted = {"module", "query", "key", "value", "attention_mask", "scaling"}
    assert wanted <= parameters(scope[own[0]]), moved(
        f"arguments of {own[0]} were renamed", "attention.py"
    )


# ---------------------------------------------------------------------- caches


def test_cache_methods():
    for method, argument in (
        ("get_seq_length", "layer_idx"),
        ("get_query_offset", "layer_idx"),
        ("get_mask_sizes", "layer_idx"),
        ("reorder_cache", "beam_idx"),
        ("batch_select_indices", "indices"),
        ("batch_repeat_interleave", "repeats"),
    ):
        function = getattr(Cache, method, None)
        assert function is not None, moved(f"Cache.{method} is gone", "vlm/columns.py")
        assert argument in parameters(function), moved(
            f"Cache.{method} has no argument {argument}", "vlm/columns.py"
        )
    assert callable(getattr(Cache, "reset", None)), moved("Cache.reset is gone", "vlm/columns.py")


def test_cache_layers():
    cache = DynamicCache()
    key = torch.randn(2, 1, 5, 4)
    cache.update(key, key + 1, 0)
    layer = cache.layers[0]
    assert isinstance(layer, DynamicLayer), moved("DynamicCache.layers changed", "vlm/columns.py")
    assert torch.equal(layer.keys, key) and torch.equal(layer.values, key + 1), moved(
        "cache layers do not hold keys and values [B, H, L, D]", "vlm/columns.py"
    )
    assert layer.get_seq_length() == 5 == cache.get_seq_length(0), moved(
        "get_seq_length of a cache layer changed", "vlm/columns.py"
    )
    assert cache.get_query_offset(0) == 5, moved(
        "Cache.get_query_offset is not the number of stored columns", "vlm/columns.py"
    )
    assert cache.get_mask_sizes(3, 0)[0] == 8, moved(
        "Cache.get_mask_sizes(3, layer) is not stored + 3 columns", "vlm/masks.py"
    )


def test_length_of_a_cache_can_be_replaced_without_moving_the_mask():
    """vtc lets get_seq_length count original tokens, while masks are built for stored ones."""
    cache = DynamicCache()
    key = torch.randn(1, 1, 5, 4)
    cache.update(key, key, 0)
    cache.get_seq_length = lambda layer_idx=0: 50  # type: ignore[method-assign]
    cache.get_query_offset = lambda layer_idx=0: 5  # type: ignore[method-assign]
    assert cache.get_mask_sizes(3, 0)[0] == 8, moved(
        "get_mask_sizes is computed from Cache.get_seq_length", "vlm/columns.py"
    )
    mask = masking_utils.create_causal_mask(
        config=text_model(LLAVA.model).config,
        inputs_embeds=torch.zeros(1, 3, 64),
        attention_mask=None,
        layer_idx=0,
        allow_is_causal_skip=False,
        **versions.cache_argument(masking_utils.create_causal_mask, cache),
    )
    assert mask is not None and mask.shape == (1, 1, 3, 8), moved(
        "create_causal_mask does not ask get_query_offset and get_mask_sizes", "vlm/masks.py"
    )
    assert (mask[0, 0] == 0).sum(-1).tolist() == [6, 7, 8], moved(
        "create_causal_mask does not start its queries at get_query_offset", "vlm/masks.py"
    )


def test_static_layers_are_known_by_their_length():
    text = text_model(families.make("gemma3").model).config
    layers = StaticCache(config=text, max_cache_len=64).layers
    assert all(hasattr(layer, "max_cache_len") for layer in layers), moved(
        "layers of a StaticCache have no max_cache_len", "vlm/cache_kinds.py"
    )
    assert [bool(layer.is_sliding) for layer in layers] == [True, False] * 2, moved(
        "is_sliding of cache layers changed", "vlm/cache_kinds.py"
    )
    assert not hasattr(DynamicLayer(), "max_cache_len"), moved(
        "layers of a DynamicCache have a max_cache_len", "vlm/cache_kinds.py"
    )


# ---------------------------------------------------------------------- masks


def test_mask_makers():
    wanted = {
        "config",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "layer_idx",
    }
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        maker = getattr(masking_utils, name)
        missing = wanted - parameters(maker)
        assert not missing, moved(f"{name} does not take {missing}", "vlm/masks.py")
        assert versions.cache_argument(maker, 1), moved(f"{name} takes no cache", "../versions.py")
    sliding = masking_utils.create_sliding_window_causal_mask
    assert "and_mask_function" in parameters(sliding), moved(
        "create_sliding_window_causal_mask does not take and_mask_function", "vlm/masks.py"
    )


def test_and_mask_function_narrows_a_sliding_mask():
    config = text_model(families.make("gemma3", "eager").model).config
    options = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 6, 64),
        "attention_mask": None,
        "position_ids": None,
        "layer_idx": 0,
    }
    maker = masking_utils.create_sliding_window_causal_mask
    narrow = maker(
        **options,
        **versions.cache_argument(maker, None),
        and_mask_function=lambda b, h, q, kv: kv > q - 2,
    )
    assert (narrow[0, 0] == 0).sum(-1).tolist() == [1, 2, 2, 2, 2, 2], moved(
        "and_mask_function is not combined with the window and the causal mask", "vlm/masks.py"
    )


# ---------------------------------------------------------------------- forwards


@pytest.mark.parametrize("name", FORWARD)
def test_what_a_forward_hands_down(name: str):
    """The base model calls its text model by keyword; a layer hands its keywords to the attention
    function; tables and masks come as keyword arguments of a layer."""
    family = families.make(name, row=0)
    text = text_model(family.model)
    into_text: list[set[str]] = []
    into_layer: list[dict[str, Any]] = []
    into_function: list[set[str]] = []

    def before_text(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        into_text.append({k for k, v in kwargs.items() if v is not None})

    def before_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        into_layer.append(dict(kwargs))
        return args, kwargs | {"test_canary": True}

    base = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def function(module: nn.Module, *args: Any, test_canary: bool = False, **kwargs: Any) -> Any:
        if test_canary:
            into_function.append(set(kwargs))
            assert [x.ndim for x in args[:3]] == [4, 4, 4]
        return base(module, *args, **kwargs)

    handles = [
        text.register_forward_pre_hook(before_text, with_kwargs=True),
        text.layers[1].register_forward_pre_hook(before_layer, with_kwargs=True),
    ]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        with torch.no_grad():
            family.model(**family.inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for handle in handles:
            handle.remove()
    assert len(into_text) == 1, moved(f"{name}: text model called more than once", "vlm/hooks.py")
    assert "inputs_embeds" in into_text[0], moved(
        f"{name}: the base model does not pass inputs_embeds by keyword", "vlm/hooks.py"
    )
    (given,) = into_layer
    assert {"attention_mask", "position_embeddings"} <= set(given), moved(
        f"{name}: a decoder layer gets {sorted(given)} by keyword", "vlm/hooks.py"
    )
    assert set(versions.CACHE) & set(given), moved(
        f"{name}: a decoder layer gets {sorted(given)}, no cache by a known name", "../versions.py"
    )
    tables = given["position_embeddings"]
    assert len(tables) == 2 and all(
        t.shape[-2] == family.inputs["input_ids"].shape[1] for t in tables
    ), moved(f"{name}: position_embeddings are not (cos, sin) [..., L, D]", "vlm/masks.py")
    assert len(into_function) == 1, moved(
        f"{name}: keyword arguments of a decoder layer do not reach the attention function",
        "attention.py",
    )
    assert "scaling" in into_function[0], moved(
        f"{name}: the attention function is not given scaling", "attention.py"
    )


@pytest.mark.parametrize("name", FORWARD)
def test_arguments_of_layers_and_norms(name: str):
    text = text_model(families.make(name).model)
    layer = text.layers[0]
    wanted = {"hidden_states", "attention_mask", "position_embeddings"}
    for module in (layer, layer.self_attn):
        missing = wanted - parameters(module.forward)
        assert versions.cache_argument(module.forward, 1), moved(
            f"{type(module).__name__} takes no cache by a known name", "../versions.py"
        )
        assert not missing, moved(
            f"{type(module).__name__} does not take {missing}", "vlm/signals.py"
        )
        kinds = {p.kind for p in inspect.signature(module.forward).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds, moved(
            f"{type(module).__name__}.forward does not take **kwargs", "vlm/adapter.py"
        )
    for owner, attribute in ((text, "norm"), (layer, "input_layernorm")):
        assert isinstance(getattr(owner, attribute, None), nn.Module), moved(
            f"{type(owner).__name__}.{attribute} was renamed", "vlm/signals.py"
        )


def test_generate_encodes_images_before_the_first_forward():
    """With `mm_encoder_outputs` the pixels do not come with the forward that needs placeholders;
    generate and the models got it in one release."""
    knows = "mm_encoder_outputs" in inspect.getsource(generation.GenerationMixin)
    supported = [
        name
        for name in FORWARD
        if "mm_encoder_outputs" in parameters(families.make(name).model.forward)
    ]
    assert knows == bool(supported), moved(
        f"mm_encoder_outputs: generate {knows}, models {supported}", "vlm/hooks.py"
    )
    family = families.make(supported[0] if knows else "llava", row=0)
    seen: list[dict[str, Any]] = []
    handle = family.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        family.model.generate(**family.inputs, max_new_tokens=2)
    finally:
        handle.remove()
    first, second = seen[0], seen[1]
    given = [k for k, v in first.items() if v is not None and k.startswith("pixel_values")]
    ready = first.get("mm_encoder_outputs") or {}
    assert isinstance(ready, dict) and (given or any(v is not None for v in ready.values())), moved(
        "the prefill of generate gets neither pixel_values nor mm_encoder_outputs", "vlm/hooks.py"
    )
    later = second.get("mm_encoder_outputs") or {}
    assert not any(v is not None for v in later.values()), moved(
        "decode steps get mm_encoder_outputs as well", "vlm/hooks.py"
    )


def test_generate_passes_the_number_of_logits():
    assert "logits_to_keep" in parameters(LLAVA.model.forward), moved(
        "logits_to_keep was renamed", "vlm/hooks.py"
    )
