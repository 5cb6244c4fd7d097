"""FlexDiT (SparseDiT): few tokens in the middle of a diffusion transformer, fewer in noise.

Chang et al., "FlexDiT: Dynamic Token Density Control for Diffusion Transformer" (later SparseDiT),
NeurIPS 2025, https://arxiv.org/abs/2412.06028. Blocks keep their weights and get roles: a
poolingformer adds the mean of all values instead of attention; a generation block attends from
pooled tokens to dense ones (Y, which are kept); sparse blocks are ordinary ones on few tokens; a
recovery block starts from Up(sparse) W1 + b1 + Y W2 + b2 and attends to the sparse ones; the others
are dense. With W1 = 0, W2 = I it starts as a short cut. Numbers of tokens follow the noise
(`vtc.modules.flexdit.Schedule`). Train the model and `session.modules["dit.0"]` together, on
timesteps from `session.methods[0].schedule.draw`; save_pretrained keeps the one, `.save` the other.

Differs from the paper and its code: the text holds the least share at the clean end, the FLOPs it
prints come from holding the most at the noisy end (`hold`); the text is the default. The code has
no schedule: equal numbers in `rate`. W1 acts before the upsampling, the projection of a
poolingformer on one token: same values, (N - M) C^2 and N C^2 multiply-adds less than the paper
counts. Positions are not added again, as in the code. Ours: presets "dit_b_256", "pixart", "latte".

When to use: diffusion transformers that you can fine-tune; of no use untrained.

Cost: pooling, and two linear layers for every recovery; the report counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..context import Layout
from ..errors import UnsupportedModel
from ..modules.flexdit import Grid, Group, Hold, Schedule, SparseDense, pooled, roles, small_grid
from ..reducer import Block, Denoiser, Moment, Passage, Trained
from ..registry import register

_XL = {"modules": 4, "group": (1, 3, 1, 1), "rate": (0.61, 0.86)}
_ANY: dict[str, Any] = {"poolingformers": 1, "group": (1, 3, 1, 1), "rate": (0.61, 0.86)}
PRESETS: dict[str, dict[str, Any]] = {
    "dit_xl_256": _XL | {"poolingformers": 1, "top": 3},
    "dit_xl_512": _XL | {"poolingformers": 2, "top": 2},
    "dit_xl_512_sparse": _XL | {"poolingformers": 2, "top": 2, "rate": (0.90, 0.96)},
    "dit_b_256": _ANY | {"modules": 2, "group": (1, 2, 1, 1), "top": 1},
    "pixart": _XL | {"poolingformers": 2, "top": 2},
    "latte": {"poolingformers": 1, "group": (1, 4, 1, 0), "rate": (0.75, 0.86)},
}


@register("flexdit")
@dataclass(frozen=True)
class FlexDiT(Denoiser, Trained):
    """Keeps all tokens at both ends of a diffusion transformer, pooled ones in its middle.

    Args:
        preset: values for what is left out below; None: one poolingformer, as many groups of
            (1, 3, 1, 1) as fit, the rate of DiT-XL.
        poolingformers, modules, top: blocks at the bottom, groups, dense blocks behind them.
        group: blocks of one: generation, sparse, recovery, dense.
        rate: share of tokens that sparse blocks do without, for data and for noise.
        hold: where the schedule is flat, "clean" (paper), "noisy" (the FLOPs it prints).
        intervals: of noise, in each of which training has one number of tokens.
        weights: safetensors file of the recoveries (`session.modules["dit.0"].save`).
    """

    preset: (
        Literal["dit_xl_256", "dit_xl_512", "dit_xl_512_sparse", "dit_b_256", "pixart", "latte"]
        | None
    ) = None
    poolingformers: int | None = None
    modules: int | None = None
    group: Group | None = None
    top: int | None = None
    rate: tuple[float, float] | None = None
    hold: Hold = "clean"
    intervals: int = 8
    weights: str | None = None

    paper: ClassVar[str] = "SparseDiT (FlexDiT), NeurIPS 2025, https://arxiv.org/abs/2412.06028"
    asks: ClassVar[frozenset[str]] = frozenset({"mixed"})

    def __post_init__(self) -> None:
        _ = self.schedule  # wrong numbers raise here

    def _value(self, name: str) -> Any:
        given = getattr(self, name)
        return (PRESETS[self.preset] if self.preset else _ANY).get(name) if given is None else given

    @property
    def schedule(self) -> Schedule:
        least_and_most: tuple[float, float] = self._value("rate")
        return Schedule(*least_and_most, self.hold, self.intervals)

    def note(self, module: Any) -> str | None:
        if self.weights is not None:
            return None
        return "not trained for few tokens, unless this session did it: give weights=path"

    def fits(self, depth: int) -> None:
        self._roles(depth)

    def _roles(self, depth: int) -> Any:
        return roles(depth, *map(self._value, ("poolingformers", "modules", "group", "top")))

    def build(self, blocks: Sequence[nn.Module]) -> SparseDense:
        made = SparseDense.beside(blocks[0], self._roles(len(blocks)))
        if self.weights is not None:
            made.load(self.weights)
        return made

    def start(self, module: Any, moment: Moment) -> Passage:
        share = self.schedule.of_batch(moment.noise, moment.least, moment.training)
        grid = moment.layout.height, moment.layout.width
        return _Flex(module, moment.layout, small_grid(grid, share))


class _Flex(Passage):
    """One forward. `dense`: tokens before the last generation; `sparse`: before the recovery."""

    def __init__(self, module: SparseDense, layout: Layout, small: Grid) -> None:
        self.module, self.layout, self.small = module, layout, small
        self.grid: Grid = layout.height, layout.width
        self.dense: Tensor | None = None
        self.sparse: Tensor | None = None

    def enter(self, block: Block, x: Tensor) -> Tensor:
        role = self.module.roles[block.index]
        if role == "generate":
            if x.shape[1] != self.layout.cells:
                raise UnsupportedModel(
                    f"flexdit: {x.shape[1]} tokens enter block {block.index}, but the images have "
                    f"{self.layout.cells}: are there other tokens among them?"
                )
            self.dense = x
            return pooled(x, self.grid, self.small)
        if role == "recover":
            assert self.dense is not None
            (_, m, width), n, dense = x.shape, self.layout.cells, self.dense
            block.spend(self.layout.frames * (n + m) * width**2)
            self.dense, self.sparse = None, x
            return self.module.recovery(block.index)(x, dense, self.grid, self.small)
        return x

    def attention(self, block: Block, x: Tensor) -> Tensor:
        role = self.module.roles[block.index]
        if role == "pool":
            return block.mean_value(x).expand_as(x)
        if role not in ("generate", "recover"):
            return block.attend(x)
        other = self.dense if role == "generate" else self.sparse
        assert other is not None
        return block.attend(x, block.modulated(other))
