"""What a method is: a frozen dataclass of hyper-parameters with a pure function of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import ops
from .budget import Keep
from .context import Context, Layout, Site
from .errors import InvalidInput, UnsupportedModel
from .plan import Plan

if TYPE_CHECKING:
    from .hooks import Installed


@runtime_checkable
class Reducer(Protocol):
    """Decides which tokens stay. `plan` sees tensors only: no model, no global state.

    Class attributes:
        name: set by `@register("name")`.
        paper: title, year and arXiv address.
        sites: kinds of site where it works, e.g. {"projector", "decoder"}.
        needs: signals it reads; `attach` refuses a model that does not offer them.
        default_at: site used when the user names none.
        budgets: "fixed" when it keeps exactly k tokens, "auto" when it can decide itself how many.
        every_step: at `cache`, True to act after every forward, not after those with images only.
        frames: True when a row has to be a whole video, also where a model puts text between its
            frames. Budgets then refer to the video. An image is one frame.
        trained: True when it brings weights.
        merging: True when every token goes into a kept one by itself, so that `merge` has nothing
            to do.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    sites: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]]
    default_at: ClassVar[str]
    budgets: ClassVar[frozenset[str]]
    every_step: ClassVar[bool]
    frames: ClassVar[bool]
    trained: ClassVar[bool]
    merging: ClassVar[bool]

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        """Keep `k[r]` tokens of row r (1 <= k[r] <= ctx.counts[r]); see `Plan`.

        With keep="auto" (`budgets` says whether that is possible) k is what `left` says; where that
        is None it is `ctx.counts`, the most that can stay, and the method decides. Otherwise k
        differs from `ctx.counts`.
        """
        ...

    def left(self, counts: tuple[int, ...]) -> tuple[int, ...] | None:
        """With keep="auto": tokens that stay of `counts`, if shapes alone tell (then it works under
        torch.compile too); None when the tokens themselves decide."""
        ...


class Method:
    """Defaults for a reducer. Subclasses are frozen dataclasses."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    sites: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_at: ClassVar[str] = "projector"
    budgets: ClassVar[frozenset[str]] = frozenset({"fixed"})
    every_step: ClassVar[bool] = False
    frames: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    merging: ClassVar[bool] = False

    def places(self, depth: int, keep: Keep | None) -> Mapping[str, Keep]:
        """Sites and budgets when the user gives neither `at` nor `schedule`."""
        if keep is None and "auto" in self.budgets:
            keep = "auto"
        return {} if keep is None else {self.default_at: keep}

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        raise TypeError(f"{type(self).__name__} must define plan(ctx, k) or score(ctx)")

    def left(self, counts: tuple[int, ...]) -> tuple[int, ...] | None:
        return None


@dataclass(frozen=True)
class Host:
    """What a composite method asks about a model: decoder layers, its sites (None: those of
    LLaVA), and whether its vision tower has rotary positions."""

    depth: int
    sites: frozenset[str] | None = None
    rotary_tower: bool = False

    def has(self, site: str) -> bool:
        return self.sites is None or site in self.sites

    def selecting(self, site: str) -> str:
        """The site, or the last one where a `Selector` can act in a tower of fewer blocks."""
        inside = [Site.parse(s).layer or 0 for s in self.sites or () if s.startswith("vision.")]
        if max(inside, default=0) == 0:
            return site
        return f"vision.{min(Site.parse(site).layer or 0, max(inside) - 1)}"


@dataclass(frozen=True)
class Part:
    """One step of a composite method: the arguments of `vtc.Step`. `mass` holds where the user
    gives none."""

    method: str
    at: str
    keep: Keep
    params: Mapping[str, Any] = field(default_factory=dict)
    mass: float = 0.0


class Composite(Method):
    """A published method of several steps. It only writes the recipe; its steps do the work and
    share what the model's adapter carries along with each token."""

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        raise TypeError(f"{type(self).__name__} must define parts(host, keep)")


@dataclass
class Rewrite:
    """What a `Rewriter` does in one forward; subclasses hold what has to live as long.

    Attributes:
        plan: which tokens its own ones stand for; for positions, pictures and whole grids. Inside
            encoders it is as many in every row, at `projector` rows may differ.
        tokens: [R, M, U] what goes on instead of `Context.x`.
        flops: of the work beside the blocks so far, all rows together.
    """

    plan: Plan
    tokens: Tensor
    flops: float = field(default=0.0, init=False)

    def before(self, i: int, x: Tensor) -> Tensor:
        """What the i-th block behind the site reads, of x [B, prefix + tokens, D]."""
        return x

    def after(self, i: int, x: Tensor) -> Tensor:
        """What leaves that block, of its output x."""
        return x

    def left(self, i: int, output: Any) -> Tensor:
        """`after`, of what a block of a user's model returned."""
        if not torch.is_tensor(output):
            raise UnsupportedModel(
                f"a block of this model returned {type(output).__name__}, not its tokens: a method "
                f"that writes tokens cannot read what leaves it."
            )
        return self.after(i, output)


class Trained(Method):
    """A method that brings weights. The session owns them (`Session.modules`)."""

    trained: ClassVar[bool] = True

    def build(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """The weights beside these blocks, from the site to the last one that is read."""
        raise TypeError(f"{type(self).__name__} must define build(blocks)")

    def note(self, module: Any) -> str | None:
        """What a reader of the report has to know; `module` is what `build` gave."""
        return None


class Rewriter(Trained):
    """A method that writes new tokens instead of choosing among those there are: a forward owns its
    `Rewrite`, adapters call it around the blocks."""

    budgets: ClassVar[frozenset[str]] = frozenset({"auto"})

    def start(self, module: Any, ctx: Context) -> Rewrite:
        """Begin a forward at the site; `module` is what `build` gave."""
        raise TypeError(f"{type(self).__name__} must define start(module, ctx)")

    def install(self, module: Any, blocks: Sequence[nn.Module], on: Installed) -> None:
        """Put on these blocks what else acts there while a session lives."""


@dataclass(frozen=True)
class Decision:
    """What a `Selector` decides before a block, which still sees all tokens.

    Attributes:
        plan: which tokens stay behind that block.
        bias: [R, N] added to the attention logits of every token as a key in that block.
        loss: to be added to the loss of a training step (`Session.take_loss`).
        bins: frames that keep different numbers of tokens share bins as long as one whole frame,
            instead of lying one behind the other.
        refill: a frame alone in its bin keeps all its tokens up to the end of the tower.
    """

    plan: Plan
    bias: Tensor | None = None
    loss: Tensor | None = None
    bins: bool = False
    refill: bool = False


class Selector(Trained):
    """A method that scores tokens with weights of its own inside a vision tower. Gradients reach
    the weights through the bias on the attention of the block behind the site."""

    def decide(self, module: Any, ctx: Context, k: tuple[int, ...]) -> Decision:
        """Keep `k[r]` tokens of row r; `module` is what `build` gave. A row may keep all of its
        tokens where the method does not act on it (STTS on images)."""
        raise TypeError(f"{type(self).__name__} must define decide(module, ctx, k)")


@dataclass(frozen=True)
class Moment:
    """One forward of a diffusion transformer within a denoising run.

    Attributes:
        noise: how noisy the images still are, 1 noise, 0 data; `least`: the lowest of the batch.
        call: forwards of this run before this one.
        layout: tokens of one sample.
        blocks: how many there are.
        seed: for what is drawn in this call.
        state: what the method keeps from call to call; empty when a run begins. Guidance that
            calls the model once per prompt has one for each.
        training: the model is in training mode.
    """

    noise: float
    least: float
    call: int
    layout: Layout
    blocks: int
    seed: int
    state: dict[Any, Any]
    training: bool = False


class Block(Protocol):
    """A running block of a diffusion transformer, for a `Passage`. Tokens are those of the image,
    [B, n, D] with any n; text goes along by itself."""

    index: int

    @property
    def kind(self) -> Literal["self", "joint", "single"]:
        """How text comes to the attention: not at all, beside the image or in front of it."""
        ...

    def attend(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What the attention of the block makes of modulated tokens x, before its gate. `other`:
        modulated tokens [B, k, D] to attend to instead of x; None: x."""
        ...

    def mean_value(self, x: Tensor) -> Tensor:
        """[B, 1, D] what it would make of equal attention to all of x."""
        ...

    def modulated(self, y: Tensor) -> Tensor:
        """Tokens y as this block's attention reads them."""
        ...

    def feed(self, x: Tensor) -> Tensor:
        """What the MLP of the block makes of x, before its gate."""
        ...

    def received(self, x: Tensor) -> Tensor:
        """[B, n] attention that each of the modulated tokens x gets from all of them, mean over
        heads, summed over rows. Cheaper right behind `attend(x)`, as is `value_norm`."""
        ...

    def value_norm(self, x: Tensor) -> Tensor:
        """[B, n] length of the value of each of the modulated tokens x, summed over heads."""
        ...

    def spend(self, amount: float) -> None:
        """Multiply-adds on one sample that the method itself took in this block."""
        ...


class Passage:
    """What a `Denoiser` does in one forward; subclasses hold what has to live as long. As it is,
    nothing changes."""

    def skips(self, i: int) -> bool:
        """Whether block i is left out: what enters leaves it, until `leave`."""
        return False

    def enter(self, block: Block, x: Tensor) -> Tensor:
        """The tokens that the block works on, of those that reach it. As many in every sample."""
        return x

    def reads(self, block: Block, what: Literal["attention", "mlp"]) -> Tensor | None:
        """[B, m] ascending places of the tokens that this part of the block is given; None: all.
        Norms and modulation in front of it run for these alone."""
        return None

    def attention(self, block: Block, x: Tensor) -> Tensor:
        """What the block adds to its tokens, through its gate; x [B, m, D]: the modulated ones that
        `reads` names."""
        return block.attend(x)

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        """The same for the MLP."""
        return block.feed(x)

    def leave(self, i: int, x: Tensor) -> Tensor:
        """What leaves block i, of its output x. Behind the last one all tokens have to be there."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What the model reads behind all blocks, of what comes from them."""
        return x


class Denoiser(Method):
    """A method that acts inside all blocks of a diffusion transformer and through all steps of a
    denoising run. It stands alone in its recipe, at `dit.0`."""

    sites: ClassVar[frozenset[str]] = frozenset({"dit"})
    default_at: ClassVar[str] = "dit.0"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto"})

    @property
    def asks(self) -> frozenset[str]:
        """What it asks of blocks: any of "mixed" (attend to other tokens, `modulated`,
        `mean_value`), "received"."""
        return frozenset()

    def fits(self, depth: int) -> None:
        """Raise when its parameters are not for a model of so many blocks."""

    def start(self, module: Any, moment: Moment) -> Passage:
        """Begin a forward; `module` is what `build` gave, None for methods without weights."""
        raise TypeError(f"{type(self).__name__} must define start(module, moment)")


class Scorer(Method):
    """A method that ranks tokens: override `score`, the highest k stay, in their old order."""

    def score(self, ctx: Context) -> Tensor:
        """[R, N] higher is more important; values on padding are ignored."""
        raise TypeError(f"{type(self).__name__} must define score(ctx)")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        return top_k(self.score(ctx), ctx.visual, k)


def top_k(score: Tensor, valid: Tensor, k: tuple[int, ...]) -> Plan:
    """The k[r] highest scores of each row, ties to the lowest index, in ascending order."""
    if not torch.compiler.is_compiling() and bool(torch.isnan(score[valid]).any()):
        raise InvalidInput("scores contain NaN: the features at this site are not finite.")
    m, even = max(k), min(k) == max(k)
    counts = None if even else torch.tensor(k, device=score.device)
    to = ops.select_topk(score, m, valid=valid, counts=counts)
    return Plan(to.index, score.shape[1], None if even else k)


def summary(cls: type[Any]) -> str:
    """First line of a method's docstring, for tables."""
    return (cls.__doc__ or "").strip().splitlines()[0]
