import pytest
import torch
from vtc_example_method import Unusual

import vtc
from vtc import testing


@pytest.mark.parametrize("case", testing.cases("unusual", quick=True), ids=str)
def test_contract(case):
    case.check()


def test_the_odd_one_stays():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [9.0, 9.0]]])  # the last is padding
    ctx = vtc.Context(
        x=x,
        visual=torch.tensor([[True, True, True, False]]),
        counts=(3,),
        original=(3,),
        source=torch.arange(4)[None],
        layout=(None,),
        site=vtc.Site("projector"),
    )
    assert Unusual().plan(ctx, (1,)).index.tolist() == [[1]]
