"""Scheduled token cache: a table says of every step and block for how many tokens it runs.

Executes what DiffSparse learns: Zhu et al., "DiffSparse: Accelerating Diffusion Transformers with
Learned Token Sparsity", ICLR 2026, https://arxiv.org/abs/2604.03674. A block at share 1 runs as a
whole; below, its attention is what it was when it last ran as a whole, and its MLP runs for the
tokens with the highest scores, as in ToCa; at 0 nothing runs. `vtc.knapsack_allocate` makes a table
of a budget from what each share costs. Shares do not depend on the number of tokens.

Differs from the paper: the costs are not trained here; what ToCa does differently holds here too
(see `vtc show toca`). What attention does below share 1 is not published: it is as in ToCa.

When to use: diffusion transformers for which you measured what each share costs in each block and
step; without such a table use `toca` or `duca`.

Cost: as `toca`: scores at whole runs, outputs of attention and MLP of every block in memory from
step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..algorithms.token_cache import CachePassage, Choice, Score, check_moment
from ..errors import InvalidInput, InvalidRecipe, InvalidWeights
from ..modules.weights import castable, check_finite, read_weights
from ..reducer import Denoiser, Moment, Passage
from ..registry import register
from ..strict_yaml import read

Table = tuple[tuple[float, ...], ...]


@register("scheduled_cache")
@dataclass(frozen=True)
class ScheduledTokenCache(Denoiser):
    """Keeps outputs of blocks from step to step; a table says how many tokens run again, and where.

    Args:
        table: shares from 0 to 1, a row per step and a number per block, the first row all 1; or a
            safetensors or YAML file that has them under the name `table`.
        score: how tokens are chosen: "attention" received or length of "value" at the last whole
            run, "random", or "staleness", the steps since a token was computed.
        staleness: weight of these steps over `interval` beside attention or value.
        interval: steps that weigh 1.
        bonus, cell: the highest score of every cell x cell tokens is raised by this share.
        pairs: the two halves of a batch (guidance) choose the same tokens.
    """

    table: Table | str = ()
    score: Score = "attention"
    staleness: float = 0.25
    interval: int = 3
    bonus: float = 0.4
    cell: int = 4
    pairs: bool = False
    shares: Table = field(init=False, repr=False, compare=False, default=())

    paper: ClassVar[str] = "DiffSparse, ICLR 2026, https://arxiv.org/abs/2604.03674"

    def __post_init__(self) -> None:
        least = {"staleness": 0, "interval": 1, "bonus": 0, "cell": 1}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InvalidRecipe(
                    f"{self.name}.{name} is {getattr(self, name)}: it is at least {low}."
                )
        shares = _read(self.table) if isinstance(self.table, str) else self.table
        if shares:
            _check(shares)
        object.__setattr__(self, "shares", shares)

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"received"} if self.score == "attention" else ())

    def fits(self, depth: int) -> None:
        if not self.shares:
            raise InvalidRecipe(
                f"{self.name!r} needs table=[[1.0, ...], ...]: a row per step, the first all 1, "
                f"with {depth} shares each for this model."
            )
        if len(self.shares[0]) != depth:
            raise InvalidRecipe(
                f"{self.name}.table has rows of {len(self.shares[0])} shares, but this model has "
                f"{depth} blocks: give one for each."
            )

    def start(self, module: Any, moment: Moment) -> Passage:
        check_moment(self.name, moment)
        if moment.call >= len(self.shares):
            raise InvalidInput(
                f"{self.name}.table has {len(self.shares)} steps, but this run takes more: let the "
                f"sampler take at most {len(self.shares)}, or give a longer table."
            )
        row = self.shares[moment.call]
        choice = Choice(
            self.score, self.staleness, self.interval, self.bonus, self.cell, self.pairs
        )
        return CachePassage(
            moment, choice, lambda block: None if row[block.index] == 1 else row[block.index]
        )


def _read(path: str) -> Table:
    """The table in a file."""
    if path.endswith(".safetensors"):
        return _shares(path)
    try:
        table = read(Path(path), repr(path))["table"]
        return tuple(tuple(float(share) for share in row) for row in table)
    except (InvalidRecipe, KeyError, TypeError, ValueError) as error:
        raise InvalidRecipe(
            f"cannot read a table from {path!r}: {type(error).__name__}: {error}. Give a "
            f"safetensors file with a tensor `table` [steps, blocks], or a YAML file with "
            f"`table: [[1.0, ...], ...]`."
        ) from error


def _shares(path: str) -> Table:
    """The table in a safetensors file, as trained: no integers, nothing that is not finite."""
    found, _ = read_weights(path)
    check_finite(found, path)
    table = found.get("table")
    if table is None or table.ndim != 2 or not castable(table):
        told = {name: f"{value.dtype} {list(value.shape)}" for name, value in found.items()}
        raise InvalidWeights(
            f"the weights in {path!r} do not fit: a tensor `table` [steps, blocks] of numbers with "
            f"a fraction is needed, and it holds {told}. Give the file of a table"
        )
    return tuple(map(tuple, table.tolist()))


def _check(table: Table) -> None:
    widths = sorted({len(row) for row in table})
    if len(widths) > 1:
        raise InvalidRecipe(f"rows of `table` have {widths} shares: all need one per block.")
    wrong = [share for row in table for share in row if not 0.0 <= share <= 1.0]
    if wrong:
        raise InvalidRecipe(f"`table` has {wrong[0]}: shares are numbers from 0 to 1.")
    if not widths[0] or any(share != 1 for share in table[0]):
        raise InvalidRecipe(
            f"the first step of `table` is {list(table[0])}: it has to be 1 for every block, as "
            f"there is nothing to go on with before it."
        )
