"""What LookupViT adds to the blocks of a ViT: how compressed tokens read the lookup tokens, and how
lookup tokens hear back. `LookupBlock` is this and a block of its own; `LookupSides` is this beside
the blocks of somebody's encoder. See `vtc.modules.lookupvit` for the paper and the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput
from .borrowed import at_hand, check_readable
from .weights import load_weights, save_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
#: how weights of what lookup tokens hear are normalised, see `LookupSide`
InfuseNorm = Literal["none", "col", "softmax"]
#: names of the parts of a before-norm block: of timm, of transformers, of open_clip
_NORMS = ("norm1", "layer_norm1", "layernorm_before", "ln_1")
_ATTENTIONS = ("attn", "self_attn", "attention")
_HEADS = ("num_heads", "num_attention_heads")
_OUTPUTS = ("proj", "out_proj", "o_proj", "projection_layer")
_ACTS = ("act", "activation_fn", "gelu")


class Mlp(nn.Module):
    """LayerNorm, linear, activation, linear: [..., D] -> [..., D], without the residual."""

    def __init__(self, dim: int, hidden: int, eps: float, act: str, bias: bool = True) -> None:
        super().__init__()
        self.act = act
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(self.norm(x))))


class LookupSide(nn.Module):
    """Gather, infuse and lookup MLP of one block, all before-norm and residual.

    Args:
        dim: width D of both streams.
        heads: attention heads; D is split among them.
        lookup_ratio: hidden width of the MLP of lookup tokens, in D.
        qkv_bias, proj_bias: whether these linear layers have a bias (`proj_bias` also for the MLP).
        qk_norm: LayerNorm on queries and keys of each head.
        eps: of every LayerNorm.
        act: activation of the MLP, a key of `ACTIVATIONS`.
        infuse_norm: along which weights lookup tokens hear back. "none": the attention that was
            gathered with, transposed (a lookup token receives M / N on average); "softmax": its
            logits, transposed, with a softmax over the M compressed tokens; "col": the first,
            divided by the sum of what a lookup token receives.
        infuse: False leaves the lookup stream as it is, and has no weights for it.

    Attributes:
        reorder: multiply in the order that costs least (`_few`); False counts as the paper does.
    """

    reorder = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        lookup_ratio: float = 0.5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        act: str = "gelu",
        infuse_norm: InfuseNorm = "none",
        infuse: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InvalidInput(
                f"dim={dim} does not split into heads={heads}: give a number of heads that "
                f"divides dim"
            )
        if act not in ACTIVATIONS:
            raise InvalidInput(f"act={act!r} is not known: give one of {', '.join(ACTIVATIONS)}")
        if infuse_norm not in get_args(InfuseNorm):
            raise InvalidInput(
                f"infuse_norm={infuse_norm!r} is not known: give one of "
                f"{', '.join(get_args(InfuseNorm))}"
            )
        hidden = share(dim, "lookup_ratio", lookup_ratio)
        self.dim, self.heads, self.infuse_norm, self.infuse = dim, heads, infuse_norm, infuse

        def norm(width: int = dim) -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=eps)

        self.gather_norm_p, self.gather_norm_l = norm(), norm()
        self.gather_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.gather_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.gather_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.gather_q_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.gather_k_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.gather_proj = nn.Linear(dim, dim, bias=proj_bias)
        if infuse:
            self.infuse_v_norm = norm()
            self.infuse_v = nn.Linear(dim, dim, bias=qkv_bias)
            self.infuse_proj = nn.Linear(dim, dim, bias=proj_bias)
            self.lookup_mlp = Mlp(dim, hidden, eps, act, proj_bias)
        self.apply(init)

    def gather(self, z_p: Tensor, z_l: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Let compressed tokens read the lookup tokens.

        Args:
            z_p: [B, M, D] compressed tokens, prefix tokens among them.
            z_l: [B, N, D] lookup tokens.
            mask: [B, N] bool, False for padding.

        Returns:
            z_p [B, M, D] with what was read added, and the weights [B, H, M, N], in the dtype of
            the values, along which `infuse_into` hands back: the attention A, whose rows sum to 1
            (to 0 where `mask` leaves nothing to read), or with infuse_norm="softmax" weights whose
            columns do.
        """
        lookup = self.gather_norm_l(z_l)
        q = self.gather_q_norm(self._split(self.gather_q(self.gather_norm_p(z_p))))
        q = q * q.shape[-1] ** -0.5
        few = self._few(z_p.shape[1], z_l.shape[1])
        scores = (self._few_scores if few else self._scores)(q, lookup)
        if mask is None:
            weights = scores.softmax(-1)  # summed in fp32, also in half precision
        else:
            seen = mask[:, None, None, :]
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1) * seen
        read = (self._few_read if few else self._read)(weights, lookup)
        if self.infuse and self.infuse_norm == "softmax":
            weights = scores.softmax(2) if mask is None else scores.softmax(2) * seen
        return z_p + self.gather_proj(read), weights

    def flops(self, m: int, n: int) -> float:
        """Of one image with M compressed and N lookup tokens: 2 for each multiply-add."""
        few, d = self._few(m, n), self.dim
        product = (m * d * d + self.heads * n * m * d) if few else (n * d * d + n * m * d)
        if not self.infuse:
            return 2.0 * (2 * m * d * d + 2 * product)
        mlp = 2 * n * d * self.lookup_mlp.fc1.out_features
        return 2.0 * (3 * m * d * d + 3 * product + mlp)

    def _few(self, m: int, n: int) -> bool:
        """Whether it costs less to carry the projections of N lookup tokens over to the heads x M
        queries that meet them: (q W) z instead of q (W z). The same numbers but for rounding."""
        less = m * (self.heads * n + self.dim) < n * (self.dim + m)
        return self.reorder and less and isinstance(self.gather_k_norm, nn.Identity)

    def _scores(self, q: Tensor, lookup: Tensor) -> Tensor:
        """[B, H, M, N] of queries [B, H, M, d], already scaled."""
        return q @ self.gather_k_norm(self._split(self.gather_k(lookup))).transpose(-1, -2)

    def _few_scores(self, q: Tensor, lookup: Tensor) -> Tensor:
        rows, heads, m, width = q.shape
        weight = self.gather_k.weight.unflatten(0, (heads, width))  # [H, d, D]
        carried = (q.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (rows, m))
        carried = carried.transpose(0, 1).flatten(1, 2)  # [B, H M, D]
        if self.gather_k.bias is None:
            scores = carried @ lookup.transpose(1, 2)
        else:
            shift = (q * self.gather_k.bias.unflatten(0, (heads, 1, width))).sum(-1)
            scores = torch.baddbmm(shift.flatten(1)[..., None], carried, lookup.transpose(1, 2))
        return scores.unflatten(1, (heads, m))

    def _read(self, weights: Tensor, lookup: Tensor) -> Tensor:
        """[B, M, D] values that the weights [B, H, M, N] take from lookup tokens."""
        return self._merge(weights @ self._split(self.gather_v(lookup)))

    def _few_read(self, weights: Tensor, lookup: Tensor) -> Tensor:
        rows, heads, m, _ = weights.shape
        seen = (weights.flatten(1, 2) @ lookup).unflatten(1, (heads, m))  # [B, H, M, D]
        weight = self.gather_v.weight.unflatten(0, (heads, -1))  # [H, d, D]
        value = seen.transpose(0, 1).flatten(1, 2) @ weight.transpose(1, 2)
        value = self._merge(value.unflatten(1, (rows, m)).transpose(0, 1))
        if self.gather_v.bias is None:
            return value
        total = weights.sum(-1).transpose(1, 2)  # 1, or 0 where a mask leaves nothing to read
        bias = self.gather_v.bias.unflatten(0, (heads, -1))
        return value + (total[..., None] * bias).flatten(2)

    def infuse_into(self, z_l: Tensor, z_p: Tensor, weights: Tensor) -> Tensor:
        """Hand refined tokens back along weights of `gather`, then the lookup MLP: [B, N, D]."""
        if self.infuse_norm == "col":
            total = weights.sum(2, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        value = self._split(self.infuse_v(self.infuse_v_norm(z_p)))
        few = self._few(z_p.shape[1], z_l.shape[1])
        heard = (self._few_heard if few else self._heard)(weights, value)
        z_l = z_l + heard
        return z_l + self.lookup_mlp(z_l)

    def _heard(self, weights: Tensor, value: Tensor) -> Tensor:
        """[B, N, D] what goes back along the weights [B, H, M, N] of values [B, H, M, d]."""
        return self.infuse_proj(self._merge(weights.transpose(-1, -2) @ value))

    def _few_heard(self, weights: Tensor, value: Tensor) -> Tensor:
        rows, heads, m, width = value.shape
        weight = self.infuse_proj.weight.unflatten(1, (heads, width)).permute(1, 2, 0)  # [H, d, D]
        carried = (value.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (rows, m))
        carried = carried.transpose(0, 1).flatten(1, 2)  # [B, H M, D]
        back = weights.flatten(1, 2).transpose(1, 2)
        if self.infuse_proj.bias is None:
            return back @ carried
        return torch.baddbmm(self.infuse_proj.bias[None, None], back, carried)

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, D / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        """[B, H, T, D / H] -> [B, T, D]."""
        return x.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def start_from(
        self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, head_norms: Sequence[Any]
    ) -> None:
        """Start from the norm and the fused projection [3 D, D] of an attention. The output
        projections and the second layer of the lookup MLP become zero: at first z_p and z_l stay
        as they are."""
        for target in (self.gather_norm_p, self.gather_norm_l):
            copy_weights(target, norm)
        for i, linear in enumerate((self.gather_q, self.gather_k, self.gather_v)):
            linear.weight.copy_(weight.chunk(3)[i])
            if bias is not None:
                linear.bias.copy_(bias.chunk(3)[i])
        if not all(nothing(n) for n in head_norms):
            copy_weights(self.gather_q_norm, head_norms[0])
            copy_weights(self.gather_k_norm, head_norms[1])
        zeroed = [self.gather_proj]
        if self.infuse:
            copy_weights(self.infuse_v_norm, norm)
            zeroed += [self.infuse_proj, self.lookup_mlp.fc2]
        for linear in zeroed:
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()

    @classmethod
    def beside(cls, block: nn.Module, **options: Any) -> LookupSide:
        """A warm start beside a block that stays where it is: its first norm, its projections, the
        activation of its MLP (GELU when the MLP does not name one).

        Args:
            block: has a LayerNorm and an attention with a number of heads and projections that
                `qkv` reads.
            options: lookup_ratio, infuse_norm, infuse.

        Raises:
            ValueError: the block has no such parts.
        """
        norm = layer_norm(_first(block, _NORMS), f"{' or '.join(_NORMS)} of a block")
        attn, heads = attention_and_heads(block)
        weight, bias = qkv(attn)
        dim = norm.normalized_shape[0]
        check_square(weight, dim)
        head_norms = [getattr(attn, n, None) for n in ("q_norm", "k_norm")]
        qk_norm = not all(nothing(n) for n in head_norms)
        if qk_norm:
            for each in head_norms:
                if layer_norm(each, "attn.q_norm, attn.k_norm").normalized_shape != (dim // heads,):
                    raise InvalidInput(
                        "queries and keys are normed over all heads at once: a LayerNorm of each "
                        "head is needed there"
                    )
        act = _first(getattr(block, "mlp", None), _ACTS)
        new = cls(
            dim,
            heads,
            qkv_bias=bias is not None,
            proj_bias=getattr(_first(attn, _OUTPUTS), "bias", None) is not None,
            qk_norm=qk_norm,
            eps=norm.eps,
            act="gelu" if act is None else activation(act),
            **options,
        )
        new.start_from(norm, weight, bias, head_norms)
        return new.to(weight.device, weight.dtype)


def attention_and_heads(block: nn.Module) -> tuple[nn.Module, int]:
    """The attention of a block and its number of heads; ValueError where there is none."""
    attn = _first(block, _ATTENTIONS)
    heads, width = _first(attn, _HEADS), getattr(attn, "head_dim", None)
    if heads is None and width and isinstance(query := getattr(attn, "q_proj", None), nn.Linear):
        heads = query.out_features // width
    if heads is None:
        raise InvalidInput(
            f"{type(block).__name__} has no {' or '.join(_ATTENTIONS)} with "
            f"{' or '.join(_HEADS)}: weights beside a block start from an attention of that kind"
        )
    return attn, int(heads)


class LookupSides(nn.Module):
    """The side weights for the blocks of an encoder, one `LookupSide` each; the last one has no
    infusion, as nobody reads the lookup tokens behind it.

    Args:
        blocks: those of the encoder, in order; they are read and stay as they are.
        lookup_ratio, infuse_norm: see `LookupSide`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        lookup_ratio: float = 0.5,
        infuse_norm: InfuseNorm = "none",
    ) -> None:
        super().__init__()
        last = len(blocks) - 1
        options: dict[str, Any] = {"lookup_ratio": lookup_ratio, "infuse_norm": infuse_norm}
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            sides = []
            for i, block in enumerate(blocks):
                with at_hand(block):
                    check_readable(block, "lookupvit")
                    sides.append(LookupSide.beside(block, infuse=i < last, **options))
        self.blocks = nn.ModuleList(sides)

    def __getitem__(self, i: int) -> LookupSide:
        side = self.blocks[i]
        assert isinstance(side, LookupSide)
        return side

    @property
    def dim(self) -> int:
        """Width D of both streams."""
        return self[0].dim

    @property
    def about(self) -> dict[str, str]:
        """What the shapes of the weights do not tell; kept in the file beside them."""
        first = self[0]
        mlp = [side.lookup_mlp.act for side in map(self.__getitem__, range(len(self.blocks) - 1))]
        found = {"heads": str(first.heads), "infuse_norm": first.infuse_norm}
        return found | ({"act": mlp[0]} if mlp else {})

    def save(self, path: str | Path) -> None:
        """Write the weights as one safetensors file."""
        save_weights(self, path, self.about)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; everything has to fit."""
        load_weights(self, path, self.about)


# ---------------------------------------------------------------------- parts of blocks


def init(module: nn.Module) -> None:
    """Weights as in a ViT: truncated normal of 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def share(dim: int, name: str, ratio: float) -> int:
    """Hidden channels of an MLP."""
    hidden = int(dim * ratio + 1e-6)  # a ratio that came from a division must not lose a channel
    if hidden < 1:
        raise InvalidInput(
            f"{name}={ratio} must leave at least one hidden channel of dim={dim}: give a larger "
            f"ratio"
        )
    return hidden


def _first(owner: Any, names: Sequence[str]) -> Any:
    """The first of these parts that there is."""
    return next((p for n in names if (p := getattr(owner, n, None)) is not None), None)


def check_square(weight: Tensor, dim: int) -> None:
    if tuple(weight.shape) != (3 * dim, dim):
        raise InvalidInput(
            f"the attention maps {weight.shape[1]} channels to {weight.shape[0]}, and "
            f"LookupBlock needs {dim} to {3 * dim}: heads that together are as wide as the "
            f"tokens, with as many key as query heads"
        )


def nothing(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)


def layer_norm(module: Any, name: str) -> nn.LayerNorm:
    if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
        raise InvalidInput(
            f"{name} is {module!r}: LookupViT needs LayerNorm with weight and bias there"
        )
    return module


def qkv(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [3 D, D] and bias [3 D] of queries, keys and values, however they are kept."""
    if getattr(attn, "qkv", None) is not None:
        if any(getattr(attn, n, None) is not None for n in ("q_bias", "v_bias")):
            raise InvalidInput("q_bias and v_bias outside of qkv: put them into attn.qkv.bias")
        return attn.qkv.weight, attn.qkv.bias
    if getattr(attn, "in_proj_weight", None) is not None:
        return attn.in_proj_weight, attn.in_proj_bias
    for names in (("q", "k", "v"), ("q_proj", "k_proj", "v_proj")):
        if all(getattr(attn, n, None) is not None for n in names):
            parts = [getattr(attn, n) for n in names]
            weight = torch.cat([p.weight for p in parts])
            if all(p.bias is None for p in parts):
                return weight, None
            zero = torch.zeros_like(parts[0].weight[:, 0])
            return weight, torch.cat([zero if p.bias is None else p.bias for p in parts])
    raise InvalidInput(
        f"{type(attn).__name__} has neither qkv nor q, k, v nor q_proj, k_proj, v_proj "
        f"nor in_proj_weight: LookupViT reads one of these"
    )


def activation(module: Callable[[Tensor], Tensor]) -> str:
    """The name of an activation, found by what it computes."""
    probe = torch.linspace(-4, 4, 65)
    with torch.no_grad():
        found = module(probe.clone())
        for name, act in ACTIVATIONS.items():
            if torch.allclose(found, act(probe), atol=1e-6):
                return name
    raise InvalidInput(f"activation {module!r} is not known: use one of {', '.join(ACTIVATIONS)}")


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
