"""Token-wise feature caching in diffusion transformers: outputs of attention and MLP are kept from
step to step, and the MLP runs again for some tokens only. The methods say when and for how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..context import Layout
from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel
from ..reducer import Block, Denoiser, Moment, Passage, top_k

Score = Literal["attention", "value", "random", "staleness"]
#: seeds of the blocks of a step are this far apart
STRIDE = 104729
#: by how much the noise may be less than what a count of steps says is left. More noise is common:
#: samplers of flows shift their steps towards it
ASTRAY = 0.2


@dataclass(frozen=True)
class Choice:
    """How the tokens that a block computes anew are chosen: the highest scores.

    Attributes:
        score: "attention" a token received at the last whole step, length of its "value" there,
            summed over heads, in both cases over the length of the vector of all tokens; "random";
            "staleness" alone.
        staleness: weight of the steps since a token was computed, over `interval`.
        bonus, cell: the highest score of every cell x cell tokens is raised by this share.
        pairs: the two halves of a batch, which guidance makes of one image, choose together.
    """

    score: Score = "attention"
    staleness: float = 0.25
    interval: int = 3
    bonus: float = 0.0
    cell: int = 2
    pairs: bool = False

    @torch.no_grad()
    def base(self, block: Block, x: Tensor, sequences: int) -> Tensor | None:
        """[R, n] what modulated tokens x [R, n, D] tell of themselves, after they attended.
        sequences: rows that one sample has."""
        n, d = x.shape[1:]
        if self.score == "attention":
            block.spend(sequences * n * n * d)
            return F.normalize(block.received(x).float(), dim=1)
        return F.normalize(block.value_norm(x), dim=1) if self.score == "value" else None

    def rank(self, base: Tensor | None, age: Tensor, layout: Layout, seed: int) -> Tensor:
        """[R, n] of `base` and the steps since each token was computed."""
        rows, n = age.shape
        stale = age / self.interval
        if self.score == "random":
            place = torch.arange(n, device=age.device)
            score = ops.hash_uniform(place, seed).expand(rows, -1)
        else:
            score = stale if base is None else base + self.staleness * stale
        if self.pairs:
            if rows % 2:
                raise InvalidInput(
                    f"pairs=True, but the batch has {rows} rows: the two halves of an even batch "
                    f"are a pair. Leave pairs out where the model is called once per prompt."
                )
            score = score.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
        return raised(score, layout, self.bonus, self.cell) if self.bonus else score


def raised(score: Tensor, layout: Layout, bonus: float, cell: int) -> Tensor:
    """score [R, n] >= 0 with the highest of every cell x cell tokens times 1 + bonus; cells at the
    border of the grid are cut. n: tokens of the grid, or of one of its frames."""
    height, width = layout.height, layout.width
    grid = score.reshape(-1, 1, height, width)
    _, index = F.max_pool2d(grid, cell, ceil_mode=True, return_indices=True)
    best = torch.zeros_like(grid).flatten(1).scatter(1, index.flatten(1), 1.0)
    return (grid.flatten(1) * (1 + bonus * best)).reshape(score.shape)


@dataclass(frozen=True)
class Kept:
    """Of one block.

    Attributes:
        attention, mlp: [R, n, D] their outputs before the gates.
        base: see `Choice.base`.
        call: [R, n] when the MLP of each token ran.
    """

    attention: Tensor
    mlp: Tensor
    base: Tensor | None
    call: Tensor


class CachePassage(Passage):
    """One step. `share` says of each block the share of tokens whose MLP runs again while its
    attention is as it was; None: the block runs as a whole. reuse: from this block on none runs,
    and what left the last one leaves it again; None: all run."""

    def __init__(
        self,
        moment: Moment,
        choice: Choice,
        share: Callable[[Block], float | None],
        reuse: int | None = None,
    ) -> None:
        self.moment, self.choice, self.share, self.reuse = moment, choice, share, reuse
        self.kept: dict[int, Kept] = moment.state.setdefault("kept", {})
        self.part: float | None = None
        self.index: Tensor | None = None
        self.fresh: dict[str, Any] = {}

    def skips(self, i: int) -> bool:
        return self.reuse is not None and i >= self.reuse

    def enter(self, block: Block, x: Tensor) -> Tensor:
        self.part, self.index, self.fresh = self.share(block), None, {}
        return x

    def reads(self, block: Block, what: Literal["attention", "mlp"]) -> Tensor | None:
        if self.part is None:
            return None
        kept = self.kept[block.index]
        rows, n = kept.call.shape
        count = 0 if what == "attention" else tokens(self.part, n)
        if not count:
            return torch.empty(rows, 0, dtype=torch.long, device=kept.call.device)
        seed = self.moment.seed + STRIDE * block.index
        age = (self.moment.call - kept.call).float()
        score = self.choice.rank(kept.base, age, self.moment.layout, seed)
        everyone = torch.ones_like(kept.call, dtype=torch.bool)
        self.index = top_k(score, everyone, (count,) * rows).index
        return self.index

    def attention(self, block: Block, x: Tensor) -> Tensor:
        if self.part is not None:
            return self.kept[block.index].attention
        sequences = self.moment.layout.n // x.shape[1]
        self.fresh["attention"] = out = block.attend(x)
        self.fresh["base"] = self.choice.base(block, x, sequences)
        return out

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        rows, n = x.shape[:2]
        call = self.moment.call
        if self.part is None:
            self.fresh["mlp"] = out = block.feed(x)
            self.fresh["call"] = torch.full((rows, n), call, device=x.device)
            return out
        kept = self.kept[block.index]
        if self.index is None:
            return kept.mlp
        out = ops.put_rows(kept.mlp, self.index, block.feed(x))
        times = kept.call.scatter(1, self.index, call)
        self.kept[block.index] = replace(kept, mlp=out, call=times)
        return out

    def leave(self, i: int, x: Tensor) -> Tensor:
        if self.fresh:
            self.kept[i], self.fresh = Kept(**self.fresh), {}
        return x

    def finish(self, x: Tensor) -> Tensor:
        if self.reuse is not None:
            return self.moment.state["output"]
        self.moment.state["output"] = x
        return x


def tokens(share: float, n: int) -> int:
    """A share of n tokens, rounded down; 0.29 of 100 is 29, although a little less in binary."""
    return int(share * n + 1e-6)


def check_moment(name: str, moment: Moment) -> None:
    """Refuse forwards that are no steps of a run."""
    if moment.training:
        raise UnsupportedModel(
            f"{name!r} keeps what blocks computed from step to step of a sampler, but the model is "
            f"in training mode, where calls are no steps: call model.eval() first."
        )
    if moment.noise - moment.least > 1e-6:
        raise InvalidInput(
            f"{name!r}: samples of this batch are {moment.least:.3f} to {moment.noise:.3f} noisy, "
            f"but they share a schedule: give samples of one timestep."
        )


# ---------------------------------------------------------------------- the papers' schedules


@dataclass(frozen=True)
class Schedule:
    """When steps are whole, and how many tokens run again at the others.

    Attributes:
        interval: steps from one whole step to the next, about. 1: all are whole.
        first: so many at the start are whole.
        down: steps are counted down, and progress as steps left; else up from the first one.
        slope: the interval is divided by 1 + slope - 2 * slope * progress.
        tight: the interval is 2 where .2 to .4 of the steps are left.
        steps: of the sampler; 0: not known, its progress is how little noise is left.
        share: of tokens, before weights.
        step_weight: at the last step the share is 1 + step_weight as large, at the first
            1 - step_weight. layer_weight: at the first block and the last one.
        mlp_weight: factor of the share. single_weight: in Flux's single blocks.
        score, bonus, cell: see `Choice`.
    """

    interval: int
    share: float
    step_weight: float = 0.0
    layer_weight: float = 0.0
    mlp_weight: float = 1.0
    single_weight: float = 1.0
    first: int = 1
    down: bool = True
    slope: float = 0.4
    tight: bool = True
    steps: int = 0
    score: Literal["attention", "value"] = "attention"
    bonus: float = 0.0
    cell: int = 2

    def progress(self, name: str, moment: Moment) -> float:
        """Steps left over all steps, as the released code counts them: this one among those that
        are left where it counts up."""
        if not self.steps:
            return moment.noise
        if moment.call >= self.steps:
            raise InvalidInput(
                f"{name!r} counts the steps of the sampler and was told steps={self.steps}, but "
                f"this run takes more. Give their number, or steps=0 to go by the noise."
            )
        left = (self.steps - self.down - moment.call) / self.steps
        if left - moment.noise > ASTRAY + 1 / self.steps:
            raise InvalidInput(
                f"{name!r}: call {moment.call} of steps={self.steps} leaves {left:.2f} of the run, "
                f"but the images are {moment.noise:.2f} noisy. Give the number of steps that the "
                f"sampler takes, or steps=0 to go by the noise."
            )
        return left

    def gap(self, progress: float) -> int:
        """Steps from one whole step to the next."""
        if self.interval == 1:
            return 1
        if self.tight and 0.2 <= progress < 0.4:
            return 2
        return round(self.interval / (1 + self.slope - 2 * self.slope * progress))

    def place(self, moment: Moment) -> int:
        """0: this step is whole, by the interval that the last whole one has set. Else where it is
        between two of them: steps to the next one if they are counted down, else since the last."""
        if moment.call < self.first:
            return 0
        gap = moment.state["gap"]
        if self.steps:
            return (self.steps - 1 - moment.call if self.down else moment.call) % gap
        since = moment.call - moment.state["whole"]
        return (-since if self.down else since) % gap

    def part(self, progress: float, block: Block, blocks: int) -> float:
        """Share of the tokens of a block whose MLP runs again."""
        depth = block.index / max(blocks - 1, 1)
        share = self.share * (1 + self.step_weight * (1 - 2 * progress))
        share *= 1 + self.layer_weight * (1 - 2 * depth)
        share *= self.single_weight if block.kind == "single" else self.mlp_weight
        return min(max(share, 0.0), 1.0)


_DDIM = Schedule(3, 0.07, 2.0, -0.2, 2.5, bonus=0.6)
_UP: dict[str, Any] = {"down": False, "tight": False}
#: by model and sampler, as released for ToCa; "dit" is DDIM with any number of steps
PRESETS = {
    "dit": _DDIM,
    "dit_ddim50": replace(_DDIM, steps=50),
    "dit_ddpm250": Schedule(4, 0.07, 0.4, 0.8, 2.5, steps=250, bonus=0.6),
    "pixart": Schedule(3, 0.3, -0.9, 0.6, 1.6, slope=0.2, steps=20, bonus=0.4, cell=4, **_UP),
    "flux": Schedule(4, 0.1, 0.0, 0.5, 0.4, 1.6, first=3, slope=0.0, score="value", **_UP),
}


@dataclass(frozen=True)
class TokenCache(Denoiser):
    """What ToCa and DuCa share.

    Args:
        preset: the model and the sampler that the other values are for; what is None comes from it.
            Those of DiT name the steps of the paper, "pixart" counts 20, "dit" and "flux" none.
        interval: steps from one whole step to the next, about; 1 changes nothing.
        steps: of the sampler, counted as the released code for this model does; 0: unknown, the
            noise tells how far it is, and steps are counted from one whole step to the next.
        share: of tokens whose MLP runs again, before weights.
        step_weight, layer_weight: the share grows with the steps (falls with the blocks) from
            1 - weight to 1 + weight (1 + weight to 1 - weight).
        mlp_weight, single_weight: factor of the share; of the single blocks of Flux.
        score: "attention" a token receives, or length of its "value" (sum over heads), which every
            model offers.
        staleness: weight of the steps since a token was computed, over the interval.
        bonus, cell: the highest score of every cell x cell tokens is raised by this share.
        pairs: the two halves of a batch (guidance) choose the same tokens.
    """

    preset: Literal["dit", "dit_ddim50", "dit_ddpm250", "pixart", "flux"] = "dit"
    interval: int | None = None
    steps: int | None = None
    share: float | None = None
    step_weight: float | None = None
    layer_weight: float | None = None
    mlp_weight: float | None = None
    single_weight: float | None = None
    score: Literal["attention", "value"] | None = None
    staleness: float = 0.25
    bonus: float | None = None
    cell: int | None = None
    pairs: bool = False

    #: values of a method that are not those of the preset
    own: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        least = {"interval": 1, "steps": 0, "share": 0, "cell": 1, "staleness": 0, "bonus": 0}
        least |= {"mlp_weight": 0, "single_weight": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InvalidRecipe(f"{self.name}.{name} is {value}: it is at least {low}.")

    @property
    def schedule(self) -> Schedule:
        given = {f.name: getattr(self, f.name, None) for f in fields(Schedule)}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.preset], **{**self.own.get(self.preset, {}), **given})

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"received"} if self.schedule.score == "attention" else ())

    def reuses(self, place: int) -> bool:
        """Whether no block runs at this place between two whole steps; see `Schedule.place`."""
        return False

    def start(self, module: Any, moment: Moment) -> Passage:
        check_moment(self.name, moment)
        plan, state = self.schedule, moment.state
        progress = plan.progress(self.name, moment)
        choice = Choice(
            plan.score, self.staleness, plan.interval, plan.bonus, plan.cell, self.pairs
        )
        whole = plan.place(moment) == 0
        if whole:
            state["gap"], state["whole"] = plan.gap(progress), moment.call
        # behind the first block of a whole step its new interval holds already
        place = plan.place(moment)
        early = 1 if whole else 0

        def share(block: Block) -> float | None:
            if place == 0 or block.index < early:
                return None
            return plan.part(progress, block, moment.blocks)

        return CachePassage(moment, choice, share, early if place and self.reuses(place) else None)


#: for the docstrings of methods that take these parameters
ARGUMENTS = str(TokenCache.__doc__).partition(".")[2]
