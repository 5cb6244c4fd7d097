"""What methods promise at `dit.<i>`, on tiny diffusion transformers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..registry import REDUCERS
from ..session import Session, attach
from . import ditref, dits
from .checks import global_generators
from .errors import require
from .runs import TOLERANCE, state_of

#: places of a step, and the blocks it acts in: a span, one up to the end, around an attention
PLACES: tuple[tuple[dict[str, Any], tuple[int, int]], ...] = (
    ({"at": "dit.1", "until": "dit.3"}, (1, 3)),
    ({"at": "dit.2"}, (2, 4)),
    ({"at": "dit.1.attn"}, (1, 2)),
)
#: families that differ: text not at all, behind the image, in front of it
FEW = ("dit", "sd3", "flux")


@dataclass(frozen=True)
class DitCell:
    """A method on a family of diffusion transformers."""

    method: str
    family: str
    params: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-dit"

    @property
    def cls(self) -> Any:
        return REDUCERS[self.method]

    @property
    def site(self) -> str:
        return "dit.<i>"

    def attach(self, model: Any, **options: Any) -> Session:
        return attach(model, self.method, **dict(self.params) | options)

    def once(self) -> bool:
        """Run it; whether it gives dropped tokens to others, so that masking says nothing."""
        model = dits.make(self.family)
        with self.attach(model, keep=0.25, at="dit.1") as session:
            run(model, dits.inputs(self.family))
        plan = session.trace[-1].plan
        return plan is not None and plan.weight is not None


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return dits.call(model, given)


def kept(session: Session, family: str) -> Tensor:
    """[rows of the blocks, N] bool, of the last step that acted."""
    last = session.trace[-1]
    n = last.n_in[0] if last.layout[0] is None else last.layout[0].n
    keep = torch.zeros(len(last.n_in), n, dtype=torch.bool).scatter_(1, last.source, True)
    return keep.repeat_interleave(3, 0) if family == "latte" else keep


def keeping_everything_changes_no_bit(cell: DitCell) -> None:
    model, given = dits.make(cell.family), dits.inputs(cell.family)
    dense = run(model, given)
    for place, _ in PLACES:
        with cell.attach(model, keep=1.0, **place):
            alike = torch.equal(run(model, given), dense)
        require(alike, f"with keep=1.0 at {place} the output is not that of the model alone.")
        require(torch.equal(run(model, given), dense), f"the output changed after {place}.")


def dropping_equals_masking(cell: DitCell) -> None:
    """Against the whole model, in which nobody sees dropped tokens while they are away."""
    family = cell.family
    model, given = dits.make(family), dits.inputs(family)
    dense = run(model, given)
    for place, (start, end) in PLACES:
        with cell.attach(model, keep=0.25, **place) as session:
            short = run(model, given)
        keep = kept(session, family)
        if place["at"].endswith("attn"):
            reference = ditref.masked_attention(model, family, 1, keep)
        else:
            reference = ditref.masked(model, family, [(start, end, keep)])
        with reference:
            off = _far(short, run(model, given))
        require(off <= TOLERANCE, f"at {place} the output differs by {off:.2g} from masking.")
        require(_far(short, dense) > 10 * TOLERANCE, f"at {place} dropping changed nothing.")


def budget_is_exact_and_seeds_repeat(cell: DitCell) -> None:
    model, given = dits.make(cell.family), dits.inputs(cell.family)
    before, found = global_generators(), []
    k = 40 if cell.family == "wan" else 13
    for _ in range(2):
        with cell.attach(model, keep=k, at="dit.1", seed=3) as session:
            found.append(run(model, given))
        out = session.trace[-1].n_out
        require(out == (k, k), f"keep={k} at dit.1 kept {out}: return exactly k[r] tokens a row.")
    require(torch.equal(*found), "the same input and seed gave another output the second time.")
    require(global_generators() == before, "the global random state moved: draw by ctx.seed.")


def sample_alone_equals_sample_in_batch(cell: DitCell) -> None:
    model, given = dits.make(cell.family), dits.inputs(cell.family)
    alone = {
        k: v[:1] if torch.is_tensor(v) and k not in ("img_ids", "txt_ids") else v
        for k, v in given.items()
    }
    for place, _ in PLACES:
        with cell.attach(model, keep=0.5, **place):
            off = _far(run(model, alone), run(model, given)[:1])
        says = f"at {place} a sample alone differs by {off:.2g} from the same in a batch."
        require(off <= TOLERANCE, says)


def bfloat16_and_gradients(cell: DitCell) -> None:
    model, given = dits.make(cell.family), dits.inputs(cell.family)
    with cell.attach(model, keep=0.5, at="dit.1"):
        dits.call(model, given).square().mean().backward()
    for block in ditref.blocks(model)[:2]:
        grads = [p.grad for p in ditref.attention(block).parameters() if p.grad is not None]
        require(any(bool(g.any()) for g in grads), "no gradient reaches the attention of a block.")
    with cell.attach(model.bfloat16(), keep=0.25, at="dit.1", until="dit.3"):
        out = run(model, dits.halved(given))
    require(bool(out.isfinite().all()), "bfloat16 outputs are not finite.")


def detaching_restores_the_model(cell: DitCell) -> None:
    model, given = dits.make(cell.family), dits.inputs(cell.family)
    dense, before = run(model, given), state_of(model)
    with cell.attach(model, keep=0.5, at=["dit.1", "dit.2.attn"]):
        require(not torch.equal(run(model, given), dense), "attaching changed nothing.")
    require(state_of(model) == before, "hooks or attributes are left on the model.")
    require(torch.equal(run(model, given), dense), "after detaching the output is another one.")


def _far(a: Tensor, b: Tensor) -> float:
    """Largest difference."""
    return (a - b).abs().max().item()


CHECKS: tuple[Callable[[DitCell], None], ...] = (
    keeping_everything_changes_no_bit,
    budget_is_exact_and_seeds_repeat,
    sample_alone_equals_sample_in_batch,
    bfloat16_and_gradients,
    detaching_restores_the_model,
)
