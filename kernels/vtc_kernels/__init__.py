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

__all__ = [
    "gather_rows",
    "hash_uniform",
    "max_min_select",
    "merge_rows",
    "nearest_kept",
    "row_attention",
    "segments",
]
