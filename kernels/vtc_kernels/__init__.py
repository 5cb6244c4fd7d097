"""Token movement for vision transformers: gather, merge, select, few-row attention scores.

Stands on its own: it needs torch and nothing of vtc."""

from .operators.expand import expand_tokens
from .operators.gather import gather_tokens
from .operators.merge import merge_tokens
from .reference import (
    gather_rows,
    hash_uniform,
    max_min_select,
    merge_rows,
    nearest_kept,
    row_attention,
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
from .token_map import TokenMap, segments

__all__ = [
    "Norm",
    "TokenMap",
    "TwoLayer",
    "algebraic_sensitivity",
    "difference_sensitivity",
    "expand_tokens",
    "gather_rows",
    "gather_tokens",
    "hash_uniform",
    "jacobian_products",
    "jacobian_sensitivity",
    "low_rank",
    "max_min_select",
    "merge_rows",
    "merge_tokens",
    "nearest_kept",
    "row_attention",
    "segments",
    "triangular_root",
    "unit_directions",
]
