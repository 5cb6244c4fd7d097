"""FLOPs that a forward really does, counted operation by operation.

Counted are matrix products, convolutions and attention, 2 per multiply-add, including those of the
compression method itself; sorting, gathering, norms and activations are not. Unlike torch's own
table, which has no entry for the fused attention of CPUs, causal attention counts only the pairs
of query and key that the kernel visits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """One measured forward. What is in neither part: projector, embedding, output head."""

    total: int
    tower: int
    language_model: int


def measure(model: nn.Module, call: Callable[[], Any]) -> Flops:
    """Run `call`, which uses `model`, and count. Works inside an attached session.

    What a method computes at its site belongs to the language model, where the site is.
    """
    tower, text = parts(model)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), counter:
        tower_flops, text_flops = _count_in(tower, counter), _count_in(text, counter)
        try:
            call()
        finally:
            total = counter.get_total_flops()
            inside = [count() for count in (tower_flops, text_flops)]
    return Flops(total, *inside)


def total(call: Callable[[], Any]) -> int:
    """Run `call`, and count all that it does."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops()


def parts(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Vision tower (None when the adapter knows none) and language model."""
    from ..session import adapter_for

    adapter: Any = adapter_for(model)
    return None if adapter.tower is None else adapter.tower.tower, adapter.text


def _count_in(module: nn.Module | None, counter: FlopCounterMode) -> Callable[[], int]:
    """Watch what `counter` gains while `module` runs; the result stops watching and tells."""
    if module is None:
        return lambda: 0
    started, gained = [], []
    before = module.register_forward_pre_hook(
        lambda *_: started.append(counter.get_total_flops()), prepend=True
    )
    after = module.register_forward_hook(
        lambda *_: gained.append(counter.get_total_flops() - started.pop())
    )

    def stop() -> int:
        before.remove()
        after.remove()
        return sum(gained)

    return stop


def _visited_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key; a causal query i sees keys 0..i."""
    if not causal:
        return queries * keys
    full = max(0, queries - keys)
    rows = queries - full
    return rows * (rows + 1) // 2 + full * keys


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Fused attention [B, H, Lq, D]; grouped KV heads cost as many products as query heads."""
    batch, heads, queries, width = query.shape
    pairs = _visited_pairs(queries, key.shape[2], is_causal)
    return 2 * batch * heads * pairs * (width + value.shape[-1])


attention._get_raw = True  # type: ignore[attr-defined]  # the counter hands over tensors

FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention: attention,
}
