"""A KeyboardInterrupt at any registration or removal of a hook leaves nothing on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.adapters.attention import Overlay
from vtc.hooks import Hook, Wrapped
from vtc.testing import dits, families

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 48, "patch_size": 8, "image_size": 32}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "vlm": lambda: families.make("llava").model,
    "timm": partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "encoder": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)).eval(),
    "dit": lambda: dits.make("dit", depth=2),
}
METHODS: dict[str, list[dict[str, Any]]] = {
    "vlm": [
        {"method": "visionzip", "keep": 0.25},
        {"method": "fastv", "keep": 0.5},
        {"method": "mustdrop"},
    ],
    "timm": [{"method": "tome", "r": 2}],
    "encoder": [{"method": "random", "keep": 0.5, "at": "vision.1", "mass": 1.0}],
    "dit": [{"method": "toca"}],
}
#: what puts something on a model, or takes it away
PLACES = [
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (Wrapped, "settle"),
    (Overlay, "put"),
]
REMOVALS = [(Hook, "remove"), (Wrapped, "remove"), (Overlay, "remove")]


@contextmanager
def interrupted(places: list[tuple[type, str]], at: int, after: bool) -> Iterator[list[int]]:
    """The `at`-th call of these methods is interrupted, before or after it does its work."""
    calls = [0]

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            hit = calls[0] == at
            if hit and not after:
                raise KeyboardInterrupt
            out = original(*args, **kwargs)
            if hit:
                raise KeyboardInterrupt
            return out

        return call

    patches = [mock.patch.object(o, name, wrap(getattr(o, name))) for o, name in places]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def traces(model: nn.Module) -> list[Any]:
    """All hooks, all attributes of modules, and the attention functions."""
    found: list[Any] = [sorted(ALL_ATTENTION_FUNCTIONS._local_mapping)]
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks)
        kinds = (
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        found.append([sorted(vars(module)), *(list(d) for d in (*hooks, *kinds))])
    return found


CELLS = [pytest.param(n, m, id=f"{n}-{m['method']}") for n, ms in METHODS.items() for m in ms]


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_attach_and_detach_interrupted_at_every_hook(name: str, options: dict[str, Any]) -> None:
    model = MAKERS[name]().eval()
    before = traces(model)
    with interrupted(PLACES, 0, False) as calls:
        session = vtc.attach(model, **options)
    count = calls[0]
    assert count > 3 and traces(model) != before
    with interrupted(REMOVALS, 0, False) as calls:
        session._remove()
    assert calls[0] >= count - 1 and traces(model) == before  # a method may wrap nothing

    for after in (False, True):
        for at in range(1, count + 1):
            with interrupted(PLACES, at, after), pytest.raises(KeyboardInterrupt):
                vtc.attach(model, **options)
            assert traces(model) == before, (at, after)
            session = vtc.attach(model, **options)  # nothing says that there is one already
            with interrupted(REMOVALS, at, after), pytest.raises(KeyboardInterrupt):
                session._remove()
            assert traces(model) == before, (at, after)


def test_an_interrupt_inside_a_session_ends_it() -> None:
    model = MAKERS["timm"]().eval()
    before = traces(model)
    x: Tensor = torch.zeros(1, 3, 32, 32)
    with pytest.raises(KeyboardInterrupt), vtc.attach(model, "tome", r=2):
        model(x)
        raise KeyboardInterrupt
    assert traces(model) == before
