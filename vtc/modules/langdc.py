"""LangDC: a small language model captions each clip of a video, and hidden states of the caption's
tokens become the clip's visual tokens. What says more gets more tokens: EOS decides.

Wang et al., "Language-aware dynamic compression" (LangDC), EMNLP 2025,
https://arxiv.org/abs/2509.00969. Shapes: C clips, n visual tokens of a clip, L caption tokens;
d_v is the width of visual tokens, d_e that of the small model, d that of the host.

Differs from the released code: a soft token is the state AT its caption token, as in training
(`position="predict"`: the state that predicts it, as the code generates); the state is that of
`layer`, also where two encoders see the video (the code reads layer 0 there); a caption ends before
the first EOS, whatever pads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import InvalidInput, UnsupportedModel
from ..versions import cache_argument, cache_in
from .lora import Lora
from .weights import building, load_weights, read_settings, save_weights

Grid = tuple[int, int]
Projection = Literal["identity", "linear", "mlp"]

_CONFIG, _WEIGHTS = "langdc.json", "langdc.safetensors"
#: the layer's states of the forwards that run now
_STATES: ContextVar[list[Tensor] | None] = ContextVar("vtc_langdc_states", default=None)


@dataclass(frozen=True)
class Settings:
    """What the shapes of the weights do not tell.

    Attributes:
        before, after: prompt ids of the small model, in front of the visual tokens and behind them.
        eos: ids that end a caption.
        projector, post, base_projector: "identity", "linear", or "mlp": linear, GELU, linear.
        pool: each frame is averaged to at most this many rows and columns for the small model.
        base: the same for the tokens that go to the host beside the captions (BasePruner).
        clip_frames: frames of a clip; the last clip repeats its last frame, a picture is one frame.
        layer: whose states are soft tokens, counted as transformers does: 0 is the embeddings, the
            number of layers is what leaves the final norm. None: two thirds of the depth.
        position: "at" a caption token, or what "predict"s it.
        keep_eos: whether EOS gives a soft token, too.
        max_len, min_len: soft tokens of a clip; max_len=0 for none, the pooled tokens alone.
        eos_bias: added to the logits of EOS; the higher, the shorter.
        total: most soft tokens of a video. Where its captions are longer in all, each keeps one
            token and then the same share of its others, from its beginning.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    eos: tuple[int, ...]
    projector: Projection = "mlp"
    post: Projection = "mlp"
    base_projector: Projection = "identity"
    pool: Grid = (8, 8)
    base: Grid = (4, 4)
    clip_frames: int = 4
    layer: int | None = None
    position: Literal["at", "predict"] = "at"
    keep_eos: bool = False
    max_len: int = 128
    min_len: int = 1
    eos_bias: float = 0.0
    total: int | None = None

    def __post_init__(self) -> None:
        least = {"pool": min(self.pool), "base": min(self.base), "clip_frames": self.clip_frames}
        least |= {"min_len": self.min_len, "total": self.total or 1}
        wrong = [name for name, value in least.items() if value < 1]
        if wrong:
            raise InvalidInput(
                f"langdc: {', '.join(f'{n}={getattr(self, n)}' for n in wrong)}: from 1 on."
            )
        if 0 != self.max_len < self.min_len:
            raise InvalidInput(
                f"langdc: max_len={self.max_len} is below min_len={self.min_len}: raise it."
            )
        if not self.eos:
            raise InvalidInput("langdc: eos=(): give the ids that end a caption.")
        if self.position not in ("at", "predict"):
            raise InvalidInput(f"langdc: position={self.position!r}: use 'at' or 'predict'.")


@dataclass(frozen=True)
class Soft:
    """Soft caption tokens: tokens [C, L, d], mask [C, L] (a caption's tokens come first), and the
    caption ids [C, L] that they are the states of."""

    tokens: Tensor
    mask: Tensor
    ids: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Soft tokens of each clip."""
        return tuple(self.mask.sum(1).tolist())

    def per_video(self, clips: Sequence[int], total: int | None = None) -> list[Tensor]:
        """[M, d] of each video, which has that many of the clips, in their order."""
        videos = zip(self.tokens.split(list(clips)), self.mask.split(list(clips)), strict=True)
        out = []
        for tokens, mask in videos:
            counts = mask.sum(1).tolist()
            kept = counts if total is None else rescaled(counts, total)
            out.append(torch.cat([x[:n] for x, n in zip(tokens, kept, strict=True)]))
        return out


class BasePruner(nn.Module):
    """Averages each frame to a small grid, and projects: [T, h, w, d_v] -> [T, cells, d]."""

    def __init__(self, width: int, host_width: int, grid: Grid, kind: Projection) -> None:
        super().__init__()
        self.grid, self.project = grid, projection(kind, width, host_width, "base_projector")

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.project(x), self.grid)


class DynamicCompressor(nn.Module):
    """Visual tokens of clips -> soft caption tokens.

    Args:
        lm: a causal language model of transformers; it belongs to this module from now on.
        width: d_v of the visual tokens. host_width: d of what reads the soft tokens.
        settings: see `Settings`.
        lora: changes of the host that were trained with this; kept in the same folder.
    """

    def __init__(
        self, lm: Any, width: int, host_width: int, settings: Settings, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.lora = lora
        self.width, self.host_width, self.settings = width, host_width, settings
        inner = lm.get_input_embeddings().embedding_dim
        self.lm = lm
        self.project = projection(settings.projector, width, inner, "projector")
        self.post = projection(settings.post, inner, host_width, "post")
        self.base = BasePruner(width, host_width, settings.base, settings.base_projector)
        layers = _layers(lm)
        self.layer = round(len(layers) * 2 / 3) if settings.layer is None else settings.layer
        if not 0 <= self.layer <= len(layers):
            raise InvalidInput(
                f"langdc: layer={settings.layer}, but the small model has {len(layers)} layers: "
                f"use 0 (embeddings) to {len(layers)}."
            )
        if self.layer < len(layers):
            layers[self.layer].register_forward_pre_hook(_enters, with_kwargs=True)
        else:
            lm.base_model.register_forward_hook(_leaves)

    # ------------------------------------------------------------------ what goes in

    def clips(self, x: Tensor) -> Tensor:
        """A video [T, h, w, d_v] -> [S, n, d_e]: projected, averaged per frame, cut into clips."""
        cells = pooled(self.project(x), self.settings.pool)
        length = self.settings.clip_frames if len(cells) > 1 else 1
        cells = torch.cat([cells, cells[-1:].expand(-len(cells) % length, -1, -1)])
        return cells.unflatten(0, (-1, length)).flatten(1, 2)

    def _prompt(self, visual: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [C, P, d_e] of prompt and visual tokens [C, n, d_e], padding on the left."""
        c = len(visual)
        if mask is None:
            mask = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        before, after = (self._embed(ids).expand(c, -1, -1) for ids in self._words())
        embeds = torch.cat([before, visual.to(before.dtype), after], 1)
        mask = F.pad(mask, (before.shape[1], after.shape[1]), value=True)
        order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
        return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)

    def _words(self) -> tuple[Tensor, Tensor]:
        device = self.lm.get_input_embeddings().weight.device
        s = self.settings
        return tuple(  # type: ignore[return-value]
            torch.tensor([ids], dtype=torch.long, device=device) for ids in (s.before, s.after)
        )

    def _embed(self, ids: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids)

    def _run(
        self,
        embeds: Tensor,
        mask: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        rows: int = 1,
    ) -> tuple[Tensor, Tensor, Any]:
        """One forward of the small model over new tokens [C, t, d_e]; mask [C, past + t].

        Returns the logits of the last `rows` tokens, the layer's states [C, t, d_e], the cache."""
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        states: list[Tensor] = []
        token = _STATES.set(states)
        try:
            out = self.lm(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                position_ids=places,
                use_cache=use_cache,
                logits_to_keep=rows,
                **cache_argument(self.lm.forward, cache),
            )
        finally:
            _STATES.reset(token)
        return out.logits[:, -rows:], states[0], cache_in(out) if use_cache else None

    # ------------------------------------------------------------------ generating

    def forward(self, vision: Tensor, mask: Tensor | None = None) -> Soft:
        """Clips [C, n, d_v] of pooled visual tokens, mask [C, n] -> their soft tokens."""
        return self.caption(self.project(vision), mask)

    def caption(self, visual: Tensor, mask: Tensor | None = None) -> Soft:
        """Caption projected clips [C, n, d_e] greedily, all at once; gradients stop at the states.

        Costs one forward of the small model per token of the longest caption."""
        if self.settings.max_len == 0:
            none = torch.zeros(len(visual), 0, dtype=torch.long, device=visual.device)
            return Soft(visual.new_zeros(len(visual), 0, self.host_width), none.bool(), none)
        states, slots, ids = self._greedy(visual, mask)
        return Soft(self.post(states), slots, ids)

    def caption_videos(self, videos: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Soft tokens [M, d] of each video [T, h, w, d_v], all clips captioned at once, and the
        multiply-adds x 2 of the small model."""
        clips = [self.clips(video) for video in videos]  # [S, n, d_e] each
        visual = pad_sequence([clip for c in clips for clip in c], batch_first=True)
        lengths = torch.tensor([c.shape[1] for c in clips for _ in c], device=visual.device)
        mask = torch.arange(visual.shape[1], device=visual.device) < lengths[:, None]
        soft = self.caption(visual, mask)
        flops = self.flops(len(visual), visual.shape[1], int(soft.mask.sum()))
        return soft.per_video([len(c) for c in clips], self.settings.total), flops

    @torch.no_grad()
    def _greedy(self, visual: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        s, at = self.settings, self.settings.position == "at"
        embeds, seen = self._prompt(visual, mask)
        eos = torch.tensor(s.eos, device=embeds.device)
        logits, state, cache = self._run(embeds, seen, use_cache=True)
        state = state[:, -1]
        running = torch.ones(len(visual), dtype=torch.bool, device=embeds.device)
        states: list[Tensor] = []
        slots: list[Tensor] = []
        ids: list[Tensor] = []
        for step in range(s.max_len):
            token = self._choose(logits[:, -1], eos, step)
            goes_on = running & ~torch.isin(token, eos)
            used = running if s.keep_eos else goes_on
            if not bool(used.any()):
                break
            slots.append(used)
            ids.append(token)
            more = bool(goes_on.any()) and step + 1 < s.max_len
            if not at:
                states.append(state)
            if at or more:
                seen = F.pad(seen, (0, 1), value=True)
                logits, state, cache = self._run(self._embed(token[:, None]), seen, cache, True)
                state = state[:, -1]
            if at:
                states.append(state)
            running = goes_on
            if not more:
                break
        return torch.stack(states, 1), torch.stack(slots, 1), torch.stack(ids, 1)

    def _choose(self, logits: Tensor, eos: Tensor, step: int) -> Tensor:
        """[C] the most likely tokens."""
        logits = logits.float()
        if self.settings.eos_bias:
            logits = logits.clone()
            logits[:, eos] += self.settings.eos_bias
        if step < self.settings.min_len:
            logits = logits.index_fill(1, eos, float("-inf"))
        return logits.argmax(-1)

    # ------------------------------------------------------------------ given captions

    def soft_of(
        self, visual: Tensor, captions: Tensor, written: Tensor, mask: Tensor | None = None
    ) -> Soft:
        """The soft tokens of given captions, in one parallel forward without gradients through
        the small model: what `caption` gives where it writes the same.

        visual: [C, n, d_e] projected clips; captions: [C, L] ids; written: [C, L] which of them
        exist, from the left (EOS among them only with `keep_eos`)."""
        with torch.no_grad():
            _, states = self._forced(visual, captions, written, mask)
        last = states.shape[1] - (self.settings.position == "predict")
        states = states[:, last - captions.shape[1] : last]
        return Soft(self.post(states), written, captions)

    def caption_loss(
        self, visual: Tensor, captions: Tensor, written: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross entropy of the captions and of the EOS behind each, whose place is all that
        teaches length. Arguments as in `soft_of`, captions without EOS."""
        logits, _ = self._forced(visual, captions, written, mask)
        ends = written.sum(1, keepdim=True)
        targets = F.pad(torch.where(written, captions, -100), (0, 1), value=-100)
        targets = targets.scatter(1, ends, self.settings.eos[0])
        return F.cross_entropy(logits.transpose(1, 2).float(), targets)

    def _forced(
        self, visual: Tensor, captions: Tensor, written: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [C, 1 + L, V] that predict each caption token and what follows; all states."""
        if bool((written.int().diff(dim=1) > 0).any()):
            raise InvalidInput("langdc: captions have to be padded on the right.")
        embeds, seen = self._prompt(visual, mask)
        embeds = torch.cat([embeds, self._embed(captions)], 1)
        logits, states, _ = self._run(
            embeds, torch.cat([seen, written], 1), rows=captions.shape[1] + 1
        )
        return logits, states

    # ------------------------------------------------------------------ keeping

    def flops(self, prompts: int, length: int, written: int) -> float:
        """Multiply-adds x 2 of `prompts` prompts with `length` visual tokens each, and of `written`
        caption tokens: weights of the small model's layers, without its attention scores."""
        s = self.settings
        if s.max_len == 0:
            return 0.0
        weights = sum(p.numel() for layer in _layers(self.lm) for p in layer.parameters())
        return 2.0 * weights * (prompts * (length + len(s.before) + len(s.after)) + written)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and settings (JSON) into a folder, made where it is not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / _WEIGHTS, {})
        about = {
            "width": self.width,
            "host_width": self.host_width,
            "settings": asdict(self.settings),
            "lm": self.lm.config.to_dict(),
            "lora": None if self.lora is None else self.lora.about,
        }
        text = json.dumps(about, indent=1)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, **changes: Any) -> DynamicCompressor:
        """Read what `save` wrote, in eval mode and float32; `changes` replace settings that hold no
        weights, such as max_len.

        Raises:
            InvalidWeights: a file is missing or damaged, or the two do not fit each other.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        path = Path(folder) / _CONFIG
        about = read_settings(path)
        with torch.random.fork_rng(devices=[]):
            with building(path):
                given: dict[str, Any] = about["settings"]
                given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
                stored, widths = Settings(**given), (int(about["width"]), int(about["host_width"]))
                config = AutoConfig.for_model(**about["lm"])
                lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                lora = None if about["lora"] is None else Lora(**about["lora"])
            made = cls(lm, *widths, replace(stored, **changes), lora)
        load_weights(made, Path(folder) / _WEIGHTS)
        return made.eval()


# ---------------------------------------------------------------------- parts


def stand_in(width: int, settings: Settings) -> DynamicCompressor:
    """Untrained: a tiny small model of random weights, always the same ones."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return DynamicCompressor(lm, width, width, settings).eval()


def projection(kind: Projection, width: int, to: int, name: str) -> nn.Module:
    """What brings tokens from one width to another."""
    if kind == "identity" and width == to:
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, to)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, to), nn.GELU(), nn.Linear(to, to))
    why = "" if kind != "identity" else f", which cannot bring tokens from {width} wide to {to}"
    raise InvalidInput(
        f"langdc: {name}={kind!r}{why}: use 'linear' or 'mlp', or 'identity' for equal widths."
    )


def pooled(x: Tensor, grid: Grid) -> Tensor:
    """Means of cells: [T, h, w, D] -> [T, cells, D], at most `grid` rows and columns per frame."""
    size = min(grid[0], x.shape[1]), min(grid[1], x.shape[2])
    return F.adaptive_avg_pool2d(x.movedim(-1, 1), size).flatten(2).transpose(1, 2)


def spread(made: int, places: int) -> Tensor:
    """[made] places for as many tokens: ascending, in even steps."""
    return (2 * torch.arange(made, device="cpu") + 1) * places // (2 * max(made, 1))


def rescaled(counts: Sequence[int], total: int) -> tuple[int, ...]:
    """Caption lengths that sum to at most `total`: one token each, then equal shares of the rest,
    largest remainders first."""
    if total < len(counts) and any(counts):
        raise InvalidInput(
            f"langdc: total={total} is less than one token for each of {len(counts)} clips: raise "
            f"total, or take longer clips."
        )
    spare, more = total - len(counts), sum(counts) - len(counts)
    if more <= spare:
        return tuple(counts)
    whole = [1 + (c - 1) * spare // more for c in counts]
    rest = [(c - 1) * spare % more for c in counts]
    first = sorted(range(len(counts)), key=lambda i: -rest[i])[: total - sum(whole)]
    return tuple(n + (i in first) for i, n in enumerate(whole))


def _layers(lm: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    depth = lm.config.num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModel(
        f"langdc: {type(lm).__name__} has no list of its {depth} decoder layers, so their states "
        f"cannot be read: use another small model."
    )


def _enters(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    states = _STATES.get()
    if states is not None:
        states.append(args[0] if args else kwargs["hidden_states"])


def _leaves(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    states = _STATES.get()
    if states is not None:
        states.append(output.last_hidden_state)
