"""gather_tokens: torch against plain indexing, the kernel against torch, gradients, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DTYPES, indices, launched, randn
from torch import Tensor
from vtc_kernels import gather_tokens
from vtc_kernels.launch import gather as launch


def plain(x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
    """Row by row, by indexing."""
    rows = [x[b if x.shape[0] > 1 else 0].movedim(axis - 1, 0)[i] for b, i in enumerate(index)]
    return torch.stack([r.movedim(0, axis - 1) for r in rows])


@pytest.mark.parametrize("n", [1, 7, 33, 577])
@pytest.mark.parametrize("d", [8, 72, 1000])
def test_rows_of_all_sizes(n: int, d: int) -> None:
    x = randn(2, 1, n, d, dtype=torch.bfloat16)
    for k in sorted({0, 1, n - 1, n}):
        index = indices(2, n, k)
        expected = plain(x[:, 0], index)
        assert torch.equal(gather_tokens(index, x[:, 0])[0], expected)
        assert torch.equal(launched(launch.gather, [x], index)[0][:, 0], expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
def test_bits_of_every_dtype(dtype: torch.dtype, itype: torch.dtype) -> None:
    """NaN, infinities and -0 are bits like others; odd rows move as narrower words."""
    index = indices(2, 33, 9).to(itype)
    for width in (1, 3, 10, 72):
        x = (randn(2, 3, 33, width) * 3).to(dtype)
        if dtype.is_floating_point:
            x[:, :, index[0, 0], 0] = torch.tensor(float("nan")).to(dtype)
            x[:, :, index[0, 1], 0] = -0.0
        raw = torch.uint8 if dtype == torch.bool else torch.int8
        expected = plain(x, index, 2).view(raw)
        assert torch.equal(launched(launch.gather, [x], index)[0].view(raw), expected)
        assert torch.equal(gather_tokens(index, x, axis=2)[0].view(raw), expected)
