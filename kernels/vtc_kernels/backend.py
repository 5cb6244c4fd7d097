"""Where an operator runs, and how it is registered.

Every operator has one meaning, written in torch; that code is also what runs on a CPU. On a GPU
with Triton the same operator launches a kernel. torch.compile traces through both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op

#: Triton can be imported (it has no wheels for macOS)
TRITON = find_spec("triton") is not None
#: device types that Triton compiles for; AMD GPUs call themselves "cuda"
GPUS = ("cuda", "xpu")
#: every registered operator by name
OPERATORS: dict[str, Any] = {}


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether a kernel moves these tensors. fp64 is left to torch, for kernels compute in fp32."""
    device = next(t.device.type for t in tensors if t is not None)
    if device not in GPUS or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return False
    if not TRITON:
        _without_triton(device)
    return TRITON


@cache
def _without_triton(device: str) -> None:
    warnings.warn(
        f"vtc_kernels: the tensors are on {device!r} but Triton is not installed, so the torch "
        f"formulas run, with more launches and more memory traffic. pip install triton",
        stacklevel=4,
    )


def operator(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register `function` as torch.ops.vtc_kernels.<its name without a leading underscore>.

    It must run on fake tensors: its shapes follow from shapes alone.
    """
    name = function.__name__.lstrip("_")
    full = f"vtc_kernels::{name}"
    if TRITON:
        op = triton_op(full, function, mutates_args=mutates)
    else:
        op = custom_op(full, function, mutates_args=mutates)
        op.register_fake(function)
    OPERATORS[name] = op
    return op
