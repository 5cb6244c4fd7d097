"""Weights of a model that other libraries offload or quantise: whether they can be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..errors import UnsupportedModel


def readable(weight: Tensor) -> bool:
    """Its numbers are here and plain: neither offloaded nor quantised nor sharded."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, weights that accelerate has offloaded are where the module computes."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def check_readable(module: nn.Module, what: str) -> None:
    """Refuse weights whose numbers cannot be copied."""
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if weight is not None and not (isinstance(weight, Tensor) and readable(weight)):
            kind = type(part if callable(weight) else weight).__name__
            raise UnsupportedModel(
                f"{what} starts from the weights of the model, and {path or 'a part of it'} is "
                f"{kind}, whose numbers cannot be copied: attach to the model as it was before it "
                f"was quantised or sharded."
            )
