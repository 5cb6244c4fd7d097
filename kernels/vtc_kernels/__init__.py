"""Token movement for vision transformers: gather, merge, select, few-row attention scores.

Stands on its own: it needs torch and nothing of vtc."""

from .reference import (
    gather_rows,
    hash_uniform,
    max_min_select,
    merge_rows,
    nearest_kept,
    row_attention,
    segments,
)
from .sensitivity import (
    Norm,
    TwoLayer,
    algebraic_sensitivity,
    difference_sensitivity,
    jacobian_products,
    jacobian_sensitivity,
    low_rank,
    triangular_root,
    unit_directions,
)

__all__ = [
    "Norm",
    "TwoLayer",
    "algebraic_sensitivity",
    "difference_sensitivity",
    "gather_rows",
    "hash_uniform",
    "jacobian_products",
    "jacobian_sensitivity",
    "low_rank",
    "max_min_select",
    "merge_rows",
    "nearest_kept",
    "row_attention",
    "segments",
    "triangular_root",
    "unit_directions",
]
