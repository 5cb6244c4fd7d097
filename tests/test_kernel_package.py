"""The package as such: without Triton, with everything it exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import vtc_kernels

ROOT = Path(__file__).parent.parent

WITHOUT = """
import sys, warnings
sys.path[:0] = [{root!r}]
sys.modules["triton"] = None  # as where it is not installed
from importlib import util
real = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch
import vtc_kernels as v
from vtc_kernels import backend

x = torch.arange(24.0).reshape(2, 4, 3).requires_grad_()
to = v.select_topk(x[..., 0], 2)
kept = v.gather_tokens(to, x)[0]
back = v.expand_tokens(kept, to)
op = backend.OPERATORS["gather"]([x[:, None]], to.index)[0]
(op.sum() + back.sum()).backward()
merged, sizes = v.merge_tokens(x.detach(), v.TokenMap.merge(torch.zeros(2, 4, dtype=torch.long), 1))
print(kept.tolist(), x.grad.sum().item(), merged.tolist(), sizes.tolist(), backend.TRITON)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    backend._without_triton("cuda")
print(caught[0].message)
"""


def test_everything_works_without_triton() -> None:
    code = WITHOUT.format(root=str(ROOT / "kernels"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == (
        "[[[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]], [[18.0, 19.0, 20.0], [21.0, 22.0, 23.0]]] 24.0 "
        "[[[4.5, 5.5, 6.5]], [[16.5, 17.5, 18.5]]] [[4.0], [4.0]] False"
    )
    assert "Triton is not installed" in second and "pip install triton" in second
    assert "WARNING" not in done.stderr


def test_every_operator_is_in_the_readme() -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()
    for name in vtc_kernels.__all__:
        module = getattr(vtc_kernels, name).__module__
        if module.startswith("vtc_kernels.operators"):
            assert f"`{name}`" in readme, name
