"""What the installed transformers does without vtc: ways of generating in which it fails itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from vtc import versions
from vtc.testing import families, oracle

#: options of `generate` after which the first new token has the same scores as without them
SAME = ("prefill_chunk_size", "num_beams", "cache_implementation")


def need(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Skip where models of this class, without vtc, fail or answer differently with `options`."""
    for name in SAME:
        if options.get(name) and (why := fault(type(model), name, options[name])):
            pytest.skip(why)


def need_checkpointing(model: Any) -> None:
    """Skip where gradient checkpointing runs hooks twice, which vtc refuses."""
    if versions.checkpoints_hooks(oracle.text_model(model).layers[0]):
        pytest.skip("this version of transformers checkpoints around hooks")


@functools.cache
def fault(cls: type[nn.Module], option: str, value: Any) -> str | None:
    made = (families.make(name) for name in families.usable())
    family = next((family for family in made if isinstance(family.model, cls)), None)
    if family is None:
        return None
    says = f"this version of transformers, without vtc and with {option}={value}"
    options: Any = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        whole = family.model.generate(**family.inputs, **options).logits[0]
        try:
            got = family.model.generate(**family.inputs, **options, **{option: value}).logits[0]
        except Exception as error:  # whatever it raises
            return f"{says}: {error!r}"
    whole = whole.repeat_interleave(len(got) // len(whole), 0)
    same = torch.allclose(got, whole, atol=1e-3)
    return None if same else f"{says}, gives another answer"
