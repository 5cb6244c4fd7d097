"""Hugging Face vision-language models: drop tokens before (`projector`) or inside (`decoder.<i>`)
the language model.

The families of transformers share one seam: the base model scatters image features into
`inputs_embeds` and calls its text model once, with keyword arguments. Hooks at the base model find
the visual positions, hooks at the text model and its layers move tokens and everything that is
aligned with them. No family is named; what a model lacks is found by looking at it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .. import ops
from ..context import Context, Layout, Signals
from ..errors import InvalidInput, UnsupportedModel
from ..plan import Plan
from ..recipe import Recipe
from ..registry import ADAPTERS
from ..session import Session
from .attention import Overlay, Side, Tap, attention_rows
from .columns import Stage, State, adopt, physical_length, state_of
from .hf_tower import TOWER_SIGNALS, Tower
from .rows import Rows, find_rows, pack

#: signals read from the attention of a decoder layer
ATTENTION_SIGNALS = frozenset({"keys", "queries", "text_keys", "attn_last", "attn_text", "attn_ahead"})
#: signals that only need the sequence itself
SEQUENCE_SIGNALS = frozenset({"text", "text_mask", "normed", "text_normed", "token_size"})

_FORWARD: ContextVar[Forward | None] = ContextVar("vtc_forward", default=None)


@dataclass
class Forward:
    """State of one forward of the base model; gone when it returns."""

    owner: object
    visual: Tensor | None
    is_video: Tensor | None
    grids: dict[str, list[tuple[int, int, int]]]
    state: State | None
    previous: Any
    features: int = 0
    keep_last: int = 0
    rows: Rows | None = None
    valid: Tensor = field(default_factory=lambda: torch.empty(0))
    origin: Tensor = field(default_factory=lambda: torch.empty(0))
    dense: bool = True
    past: int = 0
    length: int = 0
    index: Tensor | None = None  # text-model columns -> columns of the current layer
    index_width: int = 0
    shrunk: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # layer, index, valid
    deep: tuple[Tensor, list[Tensor]] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    taps: dict[int, Tap] = field(default_factory=dict)
    gathered_mask: bool = False

    def once(self, key: Any, holds: Any, make: Callable[[], Any]) -> Any:
        """Compute per forward and argument; `holds` stays referenced so that ids stay unique."""
        if key not in self.memo:
            self.memo[key] = (holds, make())
        return self.memo[key][1]


@ADAPTERS.add("hf_decoder")
class HfDecoder:
    """Adapter for image-text-to-text models of transformers 5."""

    name = "hf_decoder"

    def __init__(self, model: nn.Module) -> None:
        base = _base_model(model)
        if base is None:
            raise UnsupportedModel(f"{type(model).__name__}: {self.matches(model)}")
        self.model, self.base = model, base
        self.text = _text_model(base)
        self.layers: Sequence[nn.Module] = self.text.layers
        self.config: Any = self.text.config
        self.depth = len(self.layers)
        self.tokens = _placeholder_tokens(base)
        self.video_token = _token(base.config, "video")
        self.kinds = list(getattr(self.config, "layer_types", None) or [self._kind()] * self.depth)
        self.tower = Tower.find(base)
        self._base_args = tuple(inspect.signature(base.forward).parameters)
        self._outer_args = tuple(inspect.signature(model.forward).parameters)
        self._deepstack = hasattr(self.text, "_deepstack_process")

    def _kind(self) -> str:
        window = getattr(self.config, "sliding_window", None)
        sliding = window is not None and getattr(self.config, "use_sliding_window", True)
        return "sliding_attention" if sliding else "full_attention"

    # ------------------------------------------------------------------ what is offered

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        base = _base_model(model)
        if base is None:
            return "a transformers model with a language_model or text_model that has decoder layers"
        text = _text_model(base)
        config = text.config
        if getattr(base.config, "is_encoder_decoder", False):
            return "a decoder-only language model (this one is encoder-decoder)"
        if getattr(config, "cross_attention_layers", None) or hasattr(text.layers[0], "cross_attn"):
            return "image tokens inside the sequence (this model reads images by cross-attention)"
        if getattr(config, "hidden_size_per_layer_input", None):
            return "layers without per-layer token inputs (gemma3n and gemma4 are not supported)"
        if not _placeholder_tokens(base):
            return "image_token_id or video_token_id in the config"
        wanted = {"attention_mask", "position_embeddings"}
        have = set(inspect.signature(text.layers[0].forward).parameters)
        if not wanted <= have:
            return f"decoder layers that take {', '.join(sorted(wanted - have))}"
        return None

    def sites(self) -> dict[str, frozenset[str]]:
        sequence = SEQUENCE_SIGNALS if hasattr(self.text, "norm") else SEQUENCE_SIGNALS - {"normed", "text_normed"}
        tower = frozenset() if self.tower is None else TOWER_SIGNALS
        sites = {"projector": sequence | tower}
        if not self._recurrent():
            for i in range(self.depth):
                ahead = ATTENTION_SIGNALS if i else frozenset({"attn_ahead"})
                if not self._probeable(i):
                    ahead = ahead - {"attn_ahead"}
                sites[f"decoder.{i}"] = sequence | (ahead if self._taps_possible() else frozenset())
        return sites

    def refusals(self) -> dict[str, str]:
        out = {
            "vision": "dropping inside Hugging Face vision towers is not available yet",
            "cache": "KV-cache eviction is not available yet",
            "dit": "this is not a diffusion transformer",
        }
        if self._recurrent():
            kinds = ", ".join(sorted(set(self.kinds) - {"full_attention", "sliding_attention"}))
            out["decoder"] = f"recurrent layers ({kinds}) have no per-token state to drop"
        if not self._taps_possible():
            why = "its decoder layers do not pass keyword arguments on to the attention function"
            out |= dict.fromkeys(ATTENTION_SIGNALS, why)
        for name in ("keys", "queries", "text_keys", "attn_last", "attn_text"):
            out.setdefault(name, "read from the layer before the site: there from decoder.1 on")
        if self.tower is None:
            out |= dict.fromkeys(TOWER_SIGNALS, "no vision tower with attention blocks was found")
        return out

    def _recurrent(self) -> bool:
        return bool(set(self.kinds) - {"full_attention", "sliding_attention"})

    def _taps_possible(self) -> bool:
        layer = self.layers[0]
        return _takes_kwargs(layer) and hasattr(layer, "self_attn") and _takes_kwargs(layer.self_attn)

    def _probeable(self, i: int) -> bool:
        return hasattr(self.layers[i], "input_layernorm") and hasattr(self.layers[i], "self_attn")

    @property
    def implementation(self) -> str:
        return str(getattr(self.config, "_attn_implementation", None) or "eager")

    def check(self, recipe: Recipe) -> None:
        for hook in self.base._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), _Hooks):
                raise UnsupportedModel(
                    "a vtc session is already attached to this model. Detach it first, or put "
                    "all steps in one recipe."
                )
        if len({step.scope for step in recipe.steps}) > 1:
            raise UnsupportedModel("all steps of a recipe must share one `scope`.")
        if any(step.mass for step in recipe.steps) and not self._taps_possible():
            raise UnsupportedModel(f"mass needs the attention seam: {self.refusals()['keys']}.")
        if "paged" in self.implementation:
            raise UnsupportedModel("paged (continuous-batching) attention cannot be shortened.")
        if self.implementation == "flex_attention" and any(s.mass for s in recipe.steps):
            raise UnsupportedModel("mass is not available with flex_attention: use sdpa or eager.")

    def install(self, session: Session) -> list[Any]:
        return _Hooks(self, session).install()

    def prefill_flops(self, widths: Sequence[int]) -> float:
        """2 FLOPs per multiply-add: projections and MLP per token, attention over the causal half."""
        total = 0.0
        for layer, width in zip(self.layers, widths, strict=True):
            weights = _active_weights(layer, self.config)
            heads = self.config.num_attention_heads
            size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
            total += 2 * weights * width + 2 * heads * size * width * width
        return total


class _Hooks:
    """The hooks of one session on one model."""

    def __init__(self, adapter: HfDecoder, session: Session) -> None:
        self.a, self.session = adapter, session
        steps = session.recipe.steps
        self.before = next((n for n, s in enumerate(steps) if s.site.kind == "projector"), None)
        self.inside = {s.site.layer: n for n, s in enumerate(steps) if s.site.kind == "decoder"}
        self.mass = {s.site.layer or 0: s.mass for s in steps if s.mass}
        self.tapped = {
            layer - 1
            for layer, n in self.inside.items()
            if layer and session.methods[n].needs & (ATTENTION_SIGNALS - {"attn_ahead"})
        }
        self.uses_tower = any(m.needs & TOWER_SIGNALS for m in session.methods)

    def install(self) -> list[Any]:
        a, handles = self.a, list[Any]()
        needs_seam = self.tapped or self.mass or any(
            "attn_ahead" in m.needs for m in self.session.methods
        )
        if needs_seam:
            handles.append(Overlay([a.implementation]))
        if self.uses_tower and a.tower is not None:
            handles += a.tower.install()
        if a.tower is not None:
            handles.append(a.tower.projector.register_forward_hook(self.projected))
        if a.model is not a.base:
            handles.append(a.model.register_forward_pre_hook(self.outer_before, with_kwargs=True))
            handles.append(a.model.register_forward_hook(self.outer_after, always_call=True))
        handles.append(a.base.register_forward_pre_hook(self.base_before, with_kwargs=True))
        handles.append(a.base.register_forward_hook(self.base_after, always_call=True))
        handles.append(a.text.register_forward_pre_hook(self.text_before, with_kwargs=True))
        handles.append(a.text.register_forward_hook(self.text_after))
        sliding = "sliding_attention" in a.kinds
        flash = "flash" in a.implementation
        if self.inside or self.mass or sliding or flash:
            for i, layer in enumerate(a.layers):
                hook = partial(self.layer_before, i)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    # ------------------------------------------------------------------ outer model: what is wanted

    def outer_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(self.a._outer_args, args, strict=False)) | kwargs
        keep = named.get("logits_to_keep", 0)
        _WANTED.set(keep if isinstance(keep, int) and named.get("labels") is None else 0)

    def outer_after(self, module: nn.Module, args: Any, output: Any) -> None:
        _WANTED.set(0)

    # ------------------------------------------------------------------ base model: where are tokens

    def base_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a = self.a
        named = dict(zip(a._base_args, args, strict=False)) | kwargs
        ids, embeds, cache = (named.get(k) for k in ("input_ids", "inputs_embeds", "past_key_values"))
        fresh = named.get("mm_encoder_outputs") or {}
        fresh = fresh.values() if isinstance(fresh, dict) else [fresh]
        # A generated or drafted token may be the placeholder id: believe it only with features.
        believed = any(v is not None for v in fresh) or any(
            v is not None for k, v in named.items() if k.startswith("pixel_values")
        )
        visual = is_video = None
        if believed and (ids is not None or embeds is not None):
            visual, is_video = _find_visual(a, module, ids, embeds)
        grids = {
            kind: [tuple(g) for g in named[f"{kind}_grid_thw"].tolist()]
            for kind in ("image", "video")
            if torch.is_tensor(named.get(f"{kind}_grid_thw")) and not torch.compiler.is_compiling()
        }
        keep_last = _WANTED.get()
        forward = Forward(
            self, visual, is_video, grids, state_of(cache), _FORWARD.get(), keep_last=keep_last
        )
        _FORWARD.set(forward)
        state = forward.state
        if state is not None and named.get("position_ids") is None and state.last_position is not None:
            width = (ids if ids is not None else embeds).shape[1]
            steps = torch.arange(1, width + 1, device=state.last_position.device)
            kwargs["position_ids"] = state.last_position + steps
            return args, kwargs
        return None

    def base_after(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = _FORWARD.get()
        if forward is not None and forward.owner is self:
            _FORWARD.set(forward.previous)
            if self.a.tower is not None:
                self.a.tower.forget()

    def projected(self, module: nn.Module, args: Any, output: Any) -> None:
        f = self.current()
        if f is not None and torch.is_tensor(output):
            f.features += output.numel() // output.shape[-1]

    def current(self) -> Forward | None:
        forward = _FORWARD.get()
        return forward if forward is not None and forward.owner is self else None

    # ------------------------------------------------------------------ text model: the projector site

    def text_before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        f = self.current()
        embeds = kwargs.get("inputs_embeds")
        if f is None or embeds is None or (f.state is None and f.visual is None):
            return None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        b, length, _ = embeds.shape
        device = embeds.device
        f.length, f.past = length, physical_length(cache)
        f.valid, f.dense = _new_columns(mask, b, length, f.past, device)
        state = f.state = f.state or State()
        first = state.stage(0)
        start = f.past if first is None or not f.past else first.origin[:, f.past - 1 : f.past] + 1
        f.origin = torch.arange(length, device=device).expand(b, length) + start
        positions = kwargs.get("position_ids")
        if positions is None and (first is not None and f.past):
            positions = kwargs["position_ids"] = f.origin
        if positions is not None:
            last = positions[..., -1:]
            state.last_position = last.expand(*last.shape[:-2], b, 1)
        if f.visual is not None:
            f.rows = find_rows(f.visual, f.is_video, f.grids, self._scope(), f.features)
        self._refuse_cache(cache)
        changed = False
        plan = None
        if f.rows is not None and self.before is not None:
            plan = self._reduce(self.before, f, embeds, 0, {})
        if plan is not None:
            self._shrink_inputs(f, plan, kwargs, cache, mask)
            changed = True
        elif first is not None:
            first.extend(f.past, f.valid, f.origin, f.dense, f)
            kwargs["attention_mask"] = None if first.dense and cache is not None else first.valid
            changed = True
        deep = kwargs.get("deepstack_visual_embeds")
        if deep is not None and self.inside and min(self.inside) <= len(deep) and f.rows is not None:
            f.deep = (kwargs.pop("visual_pos_masks"), list(kwargs.pop("deepstack_visual_embeds")))
            changed = True
        f.index_width = f.length
        return (args, kwargs) if changed else None

    def _scope(self) -> str:
        return self.session.recipe.steps[0].scope

    def _refuse_cache(self, cache: Any) -> None:
        if cache is None:
            return
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise UnsupportedModel(f"cache {type(cache).__name__} has no layers; use DynamicCache.")
        sliding = [x for x in layers if getattr(x, "is_sliding", False)]
        if any(hasattr(x, "max_cache_len") for x in sliding):
            raise UnsupportedModel(
                "a StaticCache with sliding-window layers cannot hold a shortened sequence (its "
                "ring buffer counts original columns). Use the default cache."
            )

    def _shrink_inputs(
        self, f: Forward, plan: Plan, kwargs: dict[str, Any], cache: Any, mask: Any
    ) -> None:
        """Apply the projector plan to everything the text model is called with."""
        embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        state, full = f.state, f.length
        keep, index, valid, dense = self._pack(f, plan)
        rows = f.rows.after(plan, index, self.session.recipe.steps[self.before].mass)
        kwargs["inputs_embeds"] = self._move(f, rows, plan, embeds, index)
        if positions is not None:
            kwargs["position_ids"] = ops.gather_tokens(positions, index, -1)
        old = f.valid
        origin = f.origin.gather(1, index)
        previous = state.stage(0)
        known = f.past > 0
        past_valid = previous.valid[:, : f.past] if previous else _past_valid(mask, old, f.past)
        past_origin = previous.origin[:, : f.past] if previous else _arange_like(past_valid)
        stage = Stage(
            0,
            torch.cat([past_valid, valid], 1) if known else valid,
            torch.cat([past_origin, origin], 1) if known else origin,
            dense=dense and (previous.dense if previous else not known or bool(past_valid.all())),
            gap=(previous.gap if previous else 0) + full - index.shape[1],
        )
        f.rows = rows
        past_bias = None if previous is None or previous.bias is None else previous.bias[:, : f.past]
        stage.bias = _with_past(f.rows.bias(*index.shape), past_bias, f.past)
        state.add(stage, f)
        if cache is not None:
            adopt(cache, state)
        if kwargs.get("visual_pos_masks") is not None:
            chosen = keep[kwargs["visual_pos_masks"]]
            kwargs["visual_pos_masks"] = kwargs["visual_pos_masks"].gather(1, index) & valid
            kwargs["deepstack_visual_embeds"] = [
                d[chosen] for d in kwargs["deepstack_visual_embeds"]
            ]
        kwargs["attention_mask"], f.gathered_mask = _shrink_mask(
            mask, index, valid, full, stage, cache, f.past
        )
        f.shrunk.append((0, index, valid))
        f.valid, f.origin, f.dense, f.length = valid, origin, dense, index.shape[1]

    def _pack(self, f: Forward, plan: Plan) -> tuple[Tensor, Tensor, Tensor, bool]:
        """keep [B, L], index [B, K] and valid [B, K] of the packed sequence, and host knowledge."""
        keep = f.rows.keep(plan, f.valid.shape)
        return (keep, *pack(keep, f.valid, f.dense, f.rows, plan))

    def _move(self, f: Forward, rows: Rows, plan: Plan, x: Tensor, index: Tensor) -> Tensor:
        """The shortened sequence; merged tokens are written over their kept token."""
        moved = ops.gather_tokens(x, index, -2)
        if plan.weight is None:
            return moved
        merged = ops.apply(plan, f.rows.take(x))
        return rows.put(moved, merged.to(x.dtype))

    def text_after(self, module: nn.Module, args: Any, output: Any) -> Any:
        f = self.current()
        if f is None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and f.state is not None and f.state.stages and state_of(cache) is None:
            adopt(cache, f.state)
        full = f.shrunk[0][1] if f.shrunk else None
        dense_width = f.rows.width if f.rows is not None else 0
        if not torch.compiler.is_compiling() and f.rows is not None:
            widths = [self._width(f, i, dense_width) for i in range(self.a.depth)]
            batch = f.valid.shape[0]
            dense = batch * self.a.prefill_flops([dense_width] * self.a.depth)
            self.session.count(True, dense, batch * self.a.prefill_flops(widths))
        elif not torch.compiler.is_compiling():
            self.session.count(False)
        if full is None or f.rows is None or f.rows.only_text_in_last(f.keep_last):
            return None
        return _restore(output, f, dense_width)

    def _width(self, f: Forward, layer: int, dense: int) -> int:
        width = dense
        for start, index, _ in f.shrunk:
            width = index.shape[1] if start <= layer else width
        return width

    # ------------------------------------------------------------------ decoder layers

    def layer_before(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        f = self.current()
        if f is None or f.state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        changed = False
        if f.deep is not None and 0 < i <= len(f.deep[1]):
            where, features = f.deep
            hidden = hidden.clone()
            hidden[where] = hidden[where] + features[i - 1].to(hidden.dtype)
            changed = True
        number = self.inside.get(i)
        if number is not None and f.rows is not None:
            plan = self._reduce(number, f, hidden, i, kwargs)
            if plan is not None:
                hidden = self._shrink_hidden(f, plan, hidden, i, number, cache)
                changed = True
        stage = f.state.stage(i)
        if stage is not None:
            changed |= self._align(i, stage, f, hidden, cache, kwargs)
        side = self._side(i, stage, f)
        if side is not None:
            kwargs["vtc"] = side
            changed = True
        if not changed:
            return None
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _side(self, i: int, stage: Stage | None, f: Forward) -> Side | None:
        bias = stage.bias if stage is not None else None
        tap = None
        if i in self.tapped and f.rows is not None:
            tap = f.taps[i] = Tap()
        return None if bias is None and tap is None else Side(tap, bias)

    def _shrink_hidden(
        self, f: Forward, plan: Plan, hidden: Tensor, i: int, number: int, cache: Any
    ) -> Tensor:
        keep, index, valid, dense = self._pack(f, plan)
        rows = f.rows.after(plan, index, self.session.recipe.steps[number].mass)
        moved = self._move(f, rows, plan, hidden, index)
        if f.deep is not None:
            where, features = f.deep
            chosen = keep[where]
            f.deep = (where.gather(1, index) & valid, [d[chosen] for d in features])
        state, previous = f.state, f.state.stage(i)
        past = physical_length(cache, i)
        past_valid = _past_of(previous, past, f.valid)
        past_origin = previous.origin[:, :past] if previous else _arange_like(past_valid)
        origin = f.origin.gather(1, index)
        inherited = previous.gap if previous else 0
        stage = Stage(
            i,
            torch.cat([past_valid, valid], 1),
            torch.cat([past_origin, origin], 1),
            dense=dense and (previous.dense if previous else True),
            gap=inherited + f.length - index.shape[1],
        )
        f.rows = rows
        past_bias = None if previous is None or previous.bias is None else previous.bias[:, :past]
        stage.bias = _with_past(f.rows.bias(*index.shape), past_bias, past)
        state.add(stage, f)
        if cache is not None:
            adopt(cache, state)
        f.index = index if f.index is None else f.index.gather(1, index)
        total = index if not f.shrunk else f.shrunk[-1][1].gather(1, index)
        f.shrunk.append((i, total, valid))
        f.valid, f.origin, f.dense, f.length = valid, origin, dense, index.shape[1]
        f.memo = {}
        return moved

    def _align(
        self, i: int, stage: Stage, f: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> bool:
        """Make mask, positions and rotary tables of layer i fit its own columns."""
        past = physical_length(cache, i)
        mask, changed = kwargs.get("attention_mask"), False
        if "flash" in self.a.implementation and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = None  # gaps would be read as packed sequences
            changed = True
        sliding = self.a.kinds[i] == "sliding_attention"
        if stage.start == 0 and f.index is None:
            if sliding and not f.gathered_mask:  # the window counts original columns
                kwargs["attention_mask"] = self._mask(i, stage, f, hidden, cache)
                changed = True
            return changed
        if f.index is not None:  # this forward dropped tokens inside the language model
            tables = kwargs.get("position_embeddings")
            if tables is not None:
                key = ("rope", id(tables if torch.is_tensor(tables) else tables[0]))
                kwargs["position_embeddings"] = f.once(
                    key, tables, partial(_gather_tables, tables, f.index)
                )
            if kwargs.get("position_ids") is not None:
                ids = kwargs["position_ids"]
                kwargs["position_ids"] = f.once(
                    ("ids", id(ids)), ids, lambda: ops.gather_tokens(ids, f.index, -1)
                )
            if torch.is_tensor(mask) and mask.ndim == 4 and past == 0:
                kwargs["attention_mask"] = f.once(
                    ("mask", id(mask)),
                    mask,
                    lambda: _gather_mask(mask, f.index, f.valid, f.index_width),
                )
                return True
        else:
            stage.extend(past, f.valid, f.origin, f.dense, f)
        kwargs["attention_mask"] = self._mask(i, stage, f, hidden, cache)
        return True

    def _mask(self, i: int, stage: Stage, f: Forward, hidden: Tensor, cache: Any) -> Any:
        """A fresh mask for the columns that layer i really has."""
        kind = self.a.kinds[i]

        def make() -> Any:
            extra: dict[str, Any] = {}
            function = create_causal_mask
            if kind == "sliding_attention":
                function = create_sliding_window_causal_mask
                window, at = self.a.config.sliding_window, stage.origin
                extra["and_mask_function"] = lambda b, h, q, kv: at[b, kv] > at[b, q] - window
            return function(
                config=self.a.config,
                inputs_embeds=hidden,
                attention_mask=None if stage.dense else stage.valid,
                past_key_values=cache,
                position_ids=None,
                layer_idx=i,
                **extra,
            )

        return f.once((stage.start, kind), None, make)

    # ------------------------------------------------------------------ contexts and signals

    def _reduce(
        self, number: int, f: Forward, x: Tensor, layer: int, kwargs: dict[str, Any]
    ) -> Plan | None:
        rows, step = f.rows, self.session.recipe.steps[number]
        if x.shape[0] == 0 or rows.sample.numel() == 0:
            raise InvalidInput(f"{step.at}: empty batch.")
        ctx = Context(
            x=rows.take(x),
            visual=rows.valid,
            counts=rows.counts,
            original=rows.original,
            source=rows.source,
            layout=rows.layout,
            site=step.site,
            signals=Signals(self._signals(number, f, x, layer, kwargs)),
            seed=self.session.recipe.seed,
        )
        return self.session.reduce(number, ctx, rows.samples)

    def _signals(
        self, number: int, f: Forward, x: Tensor, layer: int, kwargs: dict[str, Any]
    ) -> dict[str, Callable[[], Tensor]]:
        rows, needs = f.rows, self.session.methods[number].needs
        norm = getattr(self.a.text, "norm", None)
        text: Callable[[], tuple[Tensor, Tensor]] = lambda: f.once(  # noqa: E731
            "text", None, lambda: rows.text_after(f.valid)
        )

        def text_of(values: Tensor) -> Tensor:
            index, _ = text()
            return ops.gather_rows(values.index_select(0, rows.sample), index)

        makers: dict[str, Callable[[], Tensor]] = {
            "text": lambda: text_of(x),
            "text_mask": lambda: text()[1],
            "normed": lambda: norm(rows.take(x)),
            "text_normed": lambda: norm(text_of(x)),
        }
        if rows.size is not None or "token_size" in needs:
            makers["token_size"] = rows.sizes
        if self.a.tower is not None and layer == 0 and needs & TOWER_SIGNALS:
            matched = lambda: f.once("tower", None, lambda: self.a.tower.match(rows.take(x), rows.valid))  # noqa: E731
            makers |= {"attn_cls": lambda: matched()[0], "vision_keys": lambda: matched()[1]}
        tap = f.taps.get(layer - 1)
        if tap is not None:
            cache = kwargs.get("past_key_values")
            static = physical_length(cache, layer - 1) - x.shape[1]
            shift = lambda: tap.call.key.shape[2] - x.shape[1] if _dynamic(cache) else static  # noqa: E731
            last = lambda: rows.last_prompt(f.valid)  # noqa: E731
            flat_keys = lambda: _new_keys(tap.call.key, shift(), x.shape[1])  # noqa: E731
            makers |= {
                "attn_last": lambda: rows.columns(
                    attention_rows(tap.call, last()[:, None]), shift()
                )[:, :, 0],
                "attn_text": lambda: rows.text_attention(tap.call, text(), shift()),
                "keys": lambda: rows.take(flat_keys()),
                "queries": lambda: rows.take(_new_keys(tap.call.query, 0, x.shape[1])),
                "text_keys": lambda: text_of(flat_keys()),
            }
        if "attn_ahead" in needs and self.session.recipe.steps[number].site.kind == "decoder":
            makers["attn_ahead"] = lambda: self._probe(layer, f, x, kwargs)
        return {k: v for k, v in makers.items() if k in needs or k == "token_size"}

    def _probe(self, i: int, f: Forward, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attention row of the last prompt token in layer i, before it runs: only its q and k."""
        layer, tap = self.a.layers[i], Tap()
        tables = kwargs.get("position_embeddings")
        if f.index is not None and tables is not None:
            tables = _gather_tables(tables, f.index)
        previous = f.state.stage(i)
        mask = None if f.dense and (previous is None or previous.dense) else f.valid
        layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=tables,
            attention_mask=None,
            past_key_values=None,
            vtc=Side(tap=tap, probe=True),
        )
        call = replace(tap.call, mask=mask, causal=True)
        if previous is not None and previous.bias is not None:
            call = replace(call, bias=previous.bias[:, -x.shape[1] :])
        return f.rows.columns(attention_rows(call, f.rows.last_prompt(f.valid)[:, None]), 0)[:, :, 0]


_WANTED: ContextVar[int] = ContextVar("vtc_logits_to_keep", default=0)


# ---------------------------------------------------------------------- looking at models


def _base_model(model: nn.Module) -> nn.Module | None:
    """The module that scatters image features and owns the text model."""
    for name in ("", "model", "base_model", "model.model"):
        module: Any = model
        for part in filter(None, name.split(".")):
            module = getattr(module, part, None)
        if isinstance(module, nn.Module) and hasattr(module, "config") and _text_model(module) is not None:
            return module
    return None


def _text_model(base: nn.Module) -> Any:
    for name in ("language_model", "text_model"):
        text = getattr(base, name, None)
        for candidate in (text, getattr(text, "model", None)):
            if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
                return candidate
    return None


def _token(config: Any, kind: str) -> int | None:
    for suffix in ("_id", "_index"):
        value = getattr(config, f"{kind}_token{suffix}", None)
        if isinstance(value, int):
            return value
    return None


def _placeholder_tokens(base: nn.Module) -> tuple[int, ...]:
    found = (_token(base.config, kind) for kind in ("image", "video"))
    return tuple(dict.fromkeys(t for t in found if t is not None))


def _takes_kwargs(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _active_weights(layer: nn.Module, config: Any) -> float:
    """Weights that one token meets in a layer; of the experts only those it is routed to."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or 1
    total = 0.0
    for name, weight in layer.named_parameters():
        if weight.ndim >= 2:
            total += weight.numel() * (active / experts if ".experts" in name else 1)
    return total


def _find_visual(
    a: HfDecoder, module: nn.Module, ids: Tensor | None, embeds: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[B, L] placeholders, and which of them are video."""

    def spots(token: int) -> Tensor:
        if ids is not None:
            return ids == token
        table = module.get_input_embeddings()  # type: ignore[operator]
        row = table(torch.tensor(token, device=embeds.device))
        return (embeds == row.to(embeds.dtype)).all(-1)

    masks = {token: spots(token) for token in a.tokens}
    visual = next(iter(masks.values()))
    for mask in masks.values():
        visual = visual | mask
    both = len(masks) > 1 and a.video_token in masks
    return visual, masks[a.video_token] if both else None


# ---------------------------------------------------------------------- columns and masks


def _new_columns(
    mask: Any, b: int, length: int, past: int, device: torch.device
) -> tuple[Tensor, bool]:
    """Which of this forward's columns are real tokens, and whether all of them are."""
    if isinstance(mask, dict):
        four = [m for m in mask.values() if torch.is_tensor(m) and m.ndim == 4]
        mask = mask.get("full_attention", four[0] if four else None)
    if torch.is_tensor(mask) and mask.ndim == 2:
        valid = mask[:, -length:].bool()
        return valid, False if torch.compiler.is_compiling() else bool(valid.all())
    if torch.is_tensor(mask) and mask.ndim == 4 and past == 0:
        # Left padding: a column is padding when the last query cannot see it.
        row = mask[:, 0, -1, :length]
        row = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        valid = row.expand(b, length)
        return valid, False if torch.compiler.is_compiling() else bool(valid.all())
    return torch.ones(b, length, dtype=torch.bool, device=device), True


def _past_valid(mask: Any, new: Tensor, past: int) -> Tensor:
    """[B, past] validity of columns written before any drop."""
    if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] >= past + new.shape[1]:
        return mask[:, :past].bool()
    return new.new_ones(new.shape[0], past)


def _past_of(previous: Stage | None, past: int, new: Tensor) -> Tensor:
    return previous.valid[:, :past] if previous else new.new_ones(new.shape[0], past)


def _arange_like(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape)


def _with_past(bias: Tensor | None, past_bias: Tensor | None, past: int) -> Tensor | None:
    if bias is None and past_bias is None:
        return None
    if bias is None or not past:
        return bias
    head = bias.new_zeros(bias.shape[0], past) if past_bias is None else past_bias
    return torch.cat([head, bias], 1)


def _gather_tables(tables: Any, index: Tensor) -> Any:
    """Rotary tables [..., B|1, L, D], one tensor or a tuple, at the kept columns."""
    if torch.is_tensor(tables):
        return ops.gather_tokens(tables, index, -2)
    return tuple(ops.gather_tokens(t, index, -2) for t in tables)


def _gather_mask(mask: Tensor, index: Tensor, valid: Tensor, length: int) -> Tensor:
    """[B|1, H|1, L, KV] -> kept rows and kept columns; columns of a static cache beyond L blank."""
    b, k = index.shape
    mask = mask.expand(b, -1, -1, -1)
    heads, kv = mask.shape[1], mask.shape[-1]
    mask = mask.gather(2, index[:, None, :, None].expand(b, heads, k, kv))
    out = mask[..., :length].gather(3, index[:, None, None, :].expand(b, heads, k, k))
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    out = out.masked_fill(~valid[:, None, None, :], off)
    if kv > length:
        out = torch.cat([out, out.new_full((b, heads, k, kv - k), off)], -1)
    return out.contiguous()


def _shrink_mask(
    mask: Any, index: Tensor, valid: Tensor, length: int, stage: Stage, cache: Any, past: int
) -> tuple[Any, bool]:
    """The mask argument for the shortened text model, and whether 4-D masks were gathered."""
    if isinstance(mask, dict):
        parts = list(mask.values())
        four = all(m is None or (torch.is_tensor(m) and m.ndim == 4) for m in parts)
        if four and past == 0 and (stage.dense or all(m is not None for m in parts)):
            gathered = {
                k: None if m is None else _gather_mask(m, index, valid, length)
                for k, m in mask.items()
            }
            return gathered, all(m is not None for m in parts)
    elif torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[-2] == length and past == 0:
        return _gather_mask(mask, index, valid, length), True
    # Without a cache never None: gapped positions would be read as packed sequences.
    return (None if stage.dense and cache is not None else stage.valid), False


def _dynamic(cache: Any) -> bool:
    return cache is None or not any(hasattr(x, "max_cache_len") for x in cache.layers)


def _new_keys(key: Tensor, start: int, length: int) -> Tensor:
    """[B, H, Lk, D] -> this forward's columns, heads side by side: [B, L, H*D]."""
    return key[:, :, start : start + length].transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------- outputs


def _restore(output: Any, f: Forward, width: int) -> Any:
    """Outputs at their original length: a dropped row repeats the kept row before it."""

    def back(x: Any, index: Tensor, valid: Tensor) -> Any:
        b, k = index.shape
        kept = torch.zeros(b, width + 1, dtype=torch.bool, device=x.device)
        kept = kept.scatter(1, torch.where(valid, index, width), True)[:, :width]
        before = k - valid.sum(1, keepdim=True)
        slot = (kept.cumsum(1) - 1 + before).clamp(min=0, max=k - 1)
        return ops.gather_rows(x, slot)

    _, index, valid = f.shrunk[-1]
    by_width = {i.shape[1]: (i, v) for _, i, v in f.shrunk}
    if isinstance(output, tuple):
        return (back(output[0], index, valid), *output[1:])
    output.last_hidden_state = back(output.last_hidden_state, index, valid)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(
            back(h, *by_width[h.shape[1]]) if h.shape[1] in by_width else h
            for h in output.hidden_states
        )
    return output
