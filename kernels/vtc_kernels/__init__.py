"""Operators that move, select and merge tokens of vision transformers.

Stands on its own: it needs torch, uses Triton where that is installed, and knows nothing of vtc.
"""

from .draws import hash_uniform
from .operators.attention import qrow_scores
from .operators.cache import kv_compact
from .operators.expand import expand_tokens
from .operators.gather import gather_tokens
from .operators.match import bipartite_match
from .operators.maxmin import maxmin_select, maxmin_tokens
from .operators.merge import merge_tokens
from .operators.norm import gather_norm
from .operators.pack import PackMap, pack_varlen, unpack_varlen
from .operators.pool import pool_tokens, unpool_tokens
from .operators.probe import zoo_sensitivity
from .operators.select import select_topk
from .operators.temporal import temporal_cosine
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
    "PackMap",
    "TokenMap",
    "TwoLayer",
    "algebraic_sensitivity",
    "bipartite_match",
    "difference_sensitivity",
    "expand_tokens",
    "gather_norm",
    "gather_tokens",
    "hash_uniform",
    "jacobian_products",
    "jacobian_sensitivity",
    "kv_compact",
    "low_rank",
    "maxmin_select",
    "maxmin_tokens",
    "merge_tokens",
    "pack_varlen",
    "pool_tokens",
    "qrow_scores",
    "segments",
    "select_topk",
    "temporal_cosine",
    "triangular_root",
    "unit_directions",
    "unpack_varlen",
    "unpool_tokens",
    "zoo_sensitivity",
]
