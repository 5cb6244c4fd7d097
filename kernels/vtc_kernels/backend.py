"""Where an operator runs, and how it is registered.

Every operator has one meaning, written in torch; that code is also what runs on a CPU. On a GPU
with Triton the same operator launches a kernel. torch.compile traces through both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema, triton_op
from torch.utils._pytree import tree_leaves

#: Triton can be imported (it has no wheels for macOS)
TRITON = find_spec("triton") is not None
#: device types that the kernels are compiled for in tests; AMD GPUs call themselves "cuda"
GPUS = ("cuda",)
#: every registered operator by name
OPERATORS: dict[str, Any] = {}


def on_gpu(*tensors: Tensor | None, copies: bool = False) -> bool:
    """Whether a kernel moves these tensors. Unless it only copies, fp64 is left to torch, for
    kernels compute in fp32. Tensors on different devices are refused."""
    places = {t.device for t in tensors if t is not None}
    if len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise ValueError(f"the tensors are on {names}: move them to one device")
    device = next(iter(places)).type
    if device not in GPUS:
        return False
    if not copies and any(t is not None and t.dtype == torch.float64 for t in tensors):
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


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(function)
    def run(*args: Any) -> Any:
        first = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if first is None or first.device.type != "cuda" or not torch.cuda.is_initialized():
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return run


def operator(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register `function` as torch.ops.vtc_kernels.<its name without a leading underscore>.

    It must run on fake tensors: its shapes follow from shapes alone.
    """
    name = function.__name__.lstrip("_")
    full, schema = f"vtc_kernels::{name}", infer_schema(function, mutates_args=mutates)
    function = _on_its_device(function)
    if TRITON:
        op = triton_op(full, function, mutates_args=mutates, schema=schema)
    else:
        op = custom_op(full, function, mutates_args=mutates, schema=schema)
        op.register_fake(function)
    OPERATORS[name] = op
    return op
