"""Prompt look-up that finds drafts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vtc.testing import families


class Only(LogitsProcessor):
    """Allow the text of the prompt alone, so that a look-up in the prompt finds drafts."""

    def __init__(self, inputs: families.Inputs, visual: Tensor) -> None:
        self.allowed = inputs["input_ids"][~visual].unique()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, float("-inf"))
        out[:, self.allowed] = scores[:, self.allowed]
        return out
