"""Unusual: what looks like everything else in an image can go.

A baseline without a paper of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

import vtc


@vtc.register("unusual")
@dataclass(frozen=True)
class Unusual(vtc.Scorer):
    """Keeps the tokens that are least like the mean token of their image.

    Args:
        distance: between a token and the mean, of directions or of vectors.
    """

    distance: Literal["cosine", "euclid"] = "cosine"

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder"})

    def score(self, ctx: vtc.Context) -> Tensor:
        """[R, N] higher stays; rows are images, padded where ctx.visual is False."""
        x = ctx.x.float()  # [R, N, D]
        there = ctx.visual[..., None].float()  # [R, N, 1]
        mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)  # [R, 1, D]
        if self.distance == "euclid":
            return (x - mean).norm(dim=-1)
        return -torch.cosine_similarity(x, mean, dim=-1)
