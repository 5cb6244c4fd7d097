"""Hugging Face vision-language models: drop tokens inside the vision tower (`vision.<i>`), before
(`projector`) or inside (`decoder.<i>`) the language model, or from its KV cache (`cache`).

The families of transformers share one seam: the base model scatters image features into
`inputs_embeds` and calls its text model once, with keyword arguments. No family is named here;
what a model has or lacks is found by looking at it. The hooks themselves are in `hooks`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...context import Site
from ...errors import UnsupportedModel
from ...hooks import refuse_second
from ...recipe import Recipe
from ...reducer import Host, Rewriter, Selector
from ...registry import ADAPTERS, REDUCERS
from ...session import Session
from ..attention import takes_keywords
from ..units import PREVIOUS_BLOCK_SIGNALS
from .hooks import Hooks
from .masks import Reach, reach_of
from .signals import (
    ATTENTION_SIGNALS,
    CACHE_SIGNALS,
    PREVIOUS_LAYER_SIGNALS,
    SEQUENCE_SIGNALS,
)
from .tower import (
    CARRIED_SIGNALS,
    PROJECTOR_SIGNALS,
    TOWER_SIGNALS,
    Tower,
    placeholder_tokens,
    token_of,
)
from .vision import VISION_SIGNALS

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
#: layers whose columns are known, or that have none; others are refused
KNOWN_KINDS = ATTENTION_KINDS | {"linear_attention", "conv", "hybrid", "moe", "mlp"}


@ADAPTERS.add("hf_vlm")
class HfDecoder:
    """Adapter for image-text-to-text models of transformers 5."""

    name = "hf_vlm"
    counts = "language-model prefill"

    def __init__(self, model: nn.Module) -> None:
        base = _base_model(model)
        if base is None:
            raise UnsupportedModel(f"{type(model).__name__}: {self.matches(model)}")
        self.model, self.base = model, base
        self.text: Any = _text_model(base)
        self.layers: Sequence[Any] = self.text.layers
        self.config: Any = self.text.config
        self.depth = len(self.layers)
        self.tokens = placeholder_tokens(base)
        self.video_token = token_of(base.config, "video")
        self.kinds = list(getattr(self.config, "layer_types", None) or [self._kind()] * self.depth)
        self.tower = Tower.find(base)
        self._weights: list[float] = []
        self.base_arguments = tuple(inspect.signature(base.forward).parameters)
        self.outer_arguments = tuple(inspect.signature(model.forward).parameters)

    def _kind(self) -> str:
        window = getattr(self.config, "sliding_window", None)
        sliding = window is not None and getattr(self.config, "use_sliding_window", True)
        return "sliding_attention" if sliding else "full_attention"

    def reach(self, layer: int) -> Reach | None:
        """How far a layer looks, None for everything."""
        return reach_of(self.config, self.kinds[layer])

    def rotary(self, layer: int, hidden: Tensor, places: Tensor) -> Any:
        """Rotary tables of a layer at other positions [B, L]."""
        rotary = getattr(self.text, "rotary_emb", None)
        if rotary is None or not hasattr(self.layers[layer], "input_layernorm"):
            raise UnsupportedModel(
                "keys and queries are turned by positions, and without position_ids this model "
                "counts padding as well: pass position_ids (attention_mask.cumsum(-1) - 1)."
            )
        kinds = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary(hidden, places, *([self.kinds[layer]] if kinds else []))

    def too_long(self, columns: int) -> str | None:
        """Why nothing can be dropped of a sequence that ends at `columns`."""
        floor = getattr(self.config, "floor_scale", None)
        if not floor or not getattr(self.config, "attn_temperature_tuning", False):
            return None
        if columns < floor:
            return None
        return (
            f"from column {floor:.0f} on this language model scales queries by the column that "
            f"they have in what is left (attn_temperature_tuning), and this sequence has "
            f"{columns}: shorten the prompt, or load the model with attn_temperature_tuning=False."
        )

    @property
    def implementation(self) -> str:
        """Name of the attention function in use: sdpa, eager, flash_attention_2, ..."""
        return str(getattr(self.config, "_attn_implementation", None) or "eager")

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        base = _base_model(model)
        if getattr(getattr(base or model, "config", None), "is_encoder_decoder", False):
            return "a decoder-only language model (this one is encoder-decoder)"
        if base is None:
            return "a transformers model with a language_model or text_model of decoder layers"
        text = _text_model(base)
        crosses = getattr(text.config, "cross_attention_layers", None)
        if crosses or hasattr(text.layers[0], "cross_attn"):
            return "image tokens inside the sequence (this model reads images by cross-attention)"
        if getattr(text.config, "hidden_size_per_layer_input", None):
            return "layers without per-layer token inputs (gemma3n and gemma4 are not supported)"
        odd = sorted(set(getattr(text.config, "layer_types", None) or ()) - KNOWN_KINDS)
        if odd:
            return (
                f"layers of full or sliding attention, or recurrent ones (what {', '.join(odd)} "
                f"does with tokens that are missing is not known)"
            )
        if not placeholder_tokens(base):
            return "image_token_id or video_token_id in the config"
        have = set(inspect.signature(text.layers[0].forward).parameters)
        missing = {"attention_mask", "position_embeddings"} - have
        if missing:
            return f"decoder layers that take {', '.join(sorted(missing))}"
        return None

    def sites(self) -> dict[str, frozenset[str]]:
        sequence = SEQUENCE_SIGNALS
        if not hasattr(self.text, "norm"):
            sequence = sequence - {"normed", "text_normed"}
        sites: dict[str, frozenset[str]] = {}
        if self.tower is not None and self.tower.closed is None:
            for i in range(self.tower.feature + 1):
                before = frozenset() if i == 0 else PREVIOUS_BLOCK_SIGNALS
                sites[f"vision.{i}"] = (VISION_SIGNALS - PREVIOUS_BLOCK_SIGNALS) | before
        carried = CARRIED_SIGNALS if self.tower else frozenset[str]()
        sites["projector"] = sequence | carried | (PROJECTOR_SIGNALS if self.tower else carried)
        for i in range(0 if self._recurrent() else self.depth):
            offered = ATTENTION_SIGNALS if self._seam() else frozenset()
            if i == 0:
                offered = offered - PREVIOUS_LAYER_SIGNALS
            if not hasattr(self.layers[i], "input_layernorm"):
                offered = offered - {"attn_ahead"}
            sites[f"decoder.{i}"] = sequence | carried | offered
        if self.cached_layers:
            attention = {"attn_last", "attn_text"} if self._seam() else set[str]()
            sites["cache"] = CACHE_SIGNALS | carried | attention
        return sites

    @property
    def cached_layers(self) -> list[int]:
        """Layers whose cache holds every column: recurrent ones have none, windows bound theirs."""
        if self._recurrent():
            return []
        return [i for i, kind in enumerate(self.kinds) if kind == "full_attention"]

    def host(self) -> Host:
        rotary = self.tower is not None and self.tower.packed
        return Host(self.depth, frozenset(self.sites()), rotary)

    def refusals(self) -> dict[str, str]:
        out = {"dit": "this is not a diffusion transformer"}
        if self.tower is None:
            out["vision"] = "no vision tower with attention blocks was found"
        else:
            out["vision"] = self.tower.closed or (
                f"the language model reads what leaves block {self.tower.feature} of the tower"
            )
        if self._recurrent():
            why = f"{self._stateful()} have no per-token state to drop"
            out |= {"decoder": why, "cache": why}
            out |= dict.fromkeys(ATTENTION_SIGNALS, why)
        elif not self.cached_layers:
            out["cache"] = "every layer has a window or chunks, which bound its cache already"
        if not self._recurrent() and not self._seam():
            why = "its decoder layers do not pass keyword arguments on to the attention function"
            out |= dict.fromkeys(ATTENTION_SIGNALS, why)
        for name in PREVIOUS_LAYER_SIGNALS:
            out.setdefault(name, "read from the layer before the site, so from decoder.1 on")
        out.setdefault("attn_ahead", "read from the decoder layer about to run")
        if self.tower is None:
            out |= dict.fromkeys(TOWER_SIGNALS, out["vision"])
        else:
            out |= dict.fromkeys(PROJECTOR_SIGNALS, "offered at the projector")
            out |= dict.fromkeys(CARRIED_SIGNALS, "offered behind the vision tower")
            block = "read from the block before the site, so from vision.1 on, and behind the tower"
            out |= dict.fromkeys(PREVIOUS_BLOCK_SIGNALS, block)
        return out

    def _recurrent(self) -> bool:
        return bool(set(self.kinds) - ATTENTION_KINDS)

    def _stateful(self) -> str:
        return f"recurrent layers ({', '.join(sorted(set(self.kinds) - ATTENTION_KINDS))})"

    def _seam(self) -> bool:
        """Keyword arguments of every layer reach the attention function."""
        pairs = [(layer, getattr(layer, "self_attn", None)) for layer in self.layers]
        return all(a is not None and takes_keywords(x) and takes_keywords(a) for x, a in pairs)

    def check(self, recipe: Recipe) -> None:
        tower = (self.tower.tower, self.tower.blocks[0]) if self.tower else ()
        refuse_second((self.base, *tower))
        if len({step.scope for step in recipe.steps if step.site.kind != "vision"}) > 1:
            raise UnsupportedModel("all steps of a recipe must share one `scope`.")
        frames = [step.method for step in recipe.steps if REDUCERS[step.method].frames]
        if frames and any(step.scope == "sample" for step in recipe.steps):
            raise UnsupportedModel(
                f"{frames[0]!r} compares the frames of one video, scope='sample' pools all that a "
                f"prompt shows: use scope='image'."
            )
        if any(step.positions == "renumber" for step in recipe.steps):
            plain = set(self.kinds) == {"full_attention"} and hasattr(self.text, "rotary_emb")
            axes = hasattr(self.base, "rope_deltas")
            alone = len(recipe.steps) == 1 and issubclass(
                REDUCERS[recipe.steps[0].method], Rewriter
            )
            if not plain or (axes and not alone):
                raise UnsupportedModel(
                    "positions='renumber' needs one line of rotary positions and full attention in "
                    "every layer; this model has multimodal positions, sliding windows or chunks."
                )
        if "flash" in self.implementation and any(map(self.reach, range(self.depth))):
            raise UnsupportedModel(
                "flash attention counts sliding windows and chunks in stored columns, which are "
                "fewer than the original ones: load the model with attn_implementation='sdpa'."
            )
        mass = any(step.mass for step in recipe.steps)
        if mass and self._recurrent():
            raise UnsupportedModel(
                f"mass is not possible here: {self._stateful()} have no attention that could "
                f"weigh merged tokens. Use mass=0."
            )
        if mass and not self._seam():
            raise UnsupportedModel(f"mass is not possible here: {self.refusals()['keys']}.")
        if mass and self.implementation == "flex_attention":
            raise UnsupportedModel("mass is not possible with flex_attention: use sdpa or eager.")
        rewriters = [
            s.method
            for s in recipe.steps
            if issubclass(REDUCERS[s.method], Rewriter) and s.site.kind == "vision"
        ]
        if rewriters and self.tower is not None and self.tower.packed:
            raise UnsupportedModel(
                f"{rewriters[0]!r} writes new tokens, which have no place of their own in this "
                f"vision tower: it packs images of all sizes with a position per patch. Use a "
                f"method that chooses tokens."
            )
        for step in recipe.steps:
            last = self.tower.feature if self.tower is not None else 0
            if issubclass(REDUCERS[step.method], Selector) and (step.site.layer or 0) >= last:
                raise UnsupportedModel(
                    f"{step.method!r} at {step.at!r} drops behind that block, but the language "
                    f"model reads what leaves block {last}: use an earlier one."
                )
        if "paged" in self.implementation:
            raise UnsupportedModel("paged (continuous-batching) attention cannot be shortened.")

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        if site.kind != "vision" or self.tower is None:
            return list(self.layers[site.layer or 0 :])
        return self.tower.blocks[site.layer or 0 : self.tower.feature + 1]

    def install(self, session: Session) -> None:
        Hooks(self, session).install(session.installed)

    def prefill_flops(self, widths: Sequence[int]) -> float:
        """2 FLOPs per multiply-add: weights per token, attention over the causal half."""
        if not self._weights:
            self._weights = [_active_weights(layer, self.config) for layer in self.layers]
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return sum(
            2 * weights * width + 2 * heads * size * width * width
            for weights, width in zip(self._weights, widths, strict=True)
        )

    def find_visual(
        self, ids: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L] placeholders, and which of them are video (None: no such distinction)."""

        def spots(token: int) -> Tensor:
            if ids is not None:
                return ids == token
            assert embeds is not None
            table = self.base.get_input_embeddings()  # type: ignore[operator]
            row = table(torch.tensor(token, device=embeds.device))
            return (embeds == row.to(embeds.dtype)).all(-1)

        masks = {token: spots(token) for token in self.tokens}
        visual = torch.stack(list(masks.values())).any(0)
        both = len(masks) > 1 and self.video_token in masks
        return visual, masks[self.video_token] if both and self.video_token is not None else None

    def find_newlines(self, visual: Tensor, embeds: Tensor) -> Tensor | None:
        """[B, L] placeholders where embeds [B, L, D] hold the newline that the model puts after
        lines of image tokens; None where it has none."""
        newline: Any = getattr(self.base, "image_newline", None)
        if not torch.is_tensor(newline) or torch.compiler.is_compiling():
            return None
        found, dtype = torch.zeros_like(visual), embeds.dtype
        for narrow in (dtype, torch.bfloat16, torch.float16):  # autocast rounds features
            row = newline.detach().to(narrow).to(dtype)
            found = found | ((embeds == row).all(-1) & row.any())
        return visual & found


def _base_model(model: nn.Module) -> Any:
    """The module that scatters image features and owns the text model."""
    for name in ("", "model", "base_model", "model.model"):
        module: Any = model
        for part in filter(None, name.split(".")):
            module = getattr(module, part, None)
        if isinstance(module, nn.Module) and hasattr(module, "config") and _text_model(module):
            return module
    return None


def _text_model(base: Any) -> Any:
    for name in ("language_model", "text_model"):
        text = getattr(base, name, None)
        for candidate in (text, getattr(text, "model", None)):
            if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
                return candidate
    return None


def _active_weights(layer: nn.Module, config: Any) -> float:
    """Weights that one token meets in a layer; of the experts only those it is routed to."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / (experts or 1)
    return sum(
        weight.numel() * (share if ".experts" in name else 1)
        for name, weight in layer.named_parameters()
        if weight.ndim >= 2
    )
