"""What a vision tower knows about its tokens, carried over to the language model's visual tokens:
attention, keys, ranks, sizes, the projector's input.

How families lay out features behind the projector (tiles, newlines, window order) differs, so it
is not assumed: projector outputs are found again among the visual tokens by their values."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...context import Layout
from ...errors import MissingSignal, UnsupportedModel
from ...plan import Plan
from ...reducer import Rewrite
from ..attention import Call, Side, Tap, attention_of, received, weighed
from ..clips import Clips, VideoUnits
from ..slot import Slot
from ..units import GridUnits, PackedUnits, Units

#: of every visual token, at the projector and, carried along, at later sites
CARRIED_SIGNALS = frozenset({"attn_cls", "vision_keys", "cls_rank", "tile"})
#: what the projector does, at the projector only
PROJECTOR_SIGNALS = frozenset({"features", "projector"})
TOWER_SIGNALS = CARRIED_SIGNALS | PROJECTOR_SIGNALS

#: runs of the tower that are remembered while no forward reads them
MOST = 64
#: rows that are compared at once
BLOCK = 256
_UNMATCHED = (
    "an image or video has tokens that equal no output of the projector: this family changes "
    "features after its projector (video pooling, scaling, tiles made smaller), or the image was "
    "encoded too long ago, so what the vision tower knows or did cannot be carried over. Use a "
    "method that reads the embeddings (divprune) or the decoder (fastv)."
)


@dataclass(frozen=True)
class Tower:
    """The tower, its blocks and its projector.

    Attributes:
        base: the model around it.
        mergers: modules that turn patches into language-model tokens, the projector first.
        feature: block whose output the language model reads; `reader` the block that reads it
            next (the same one when it is the last).
        merge: side of the square of patches that becomes one token.
        packed: patches of all images in one sequence (Qwen); else [images, tokens, channels].
        closed: why tokens cannot be dropped inside, or None.
    """

    base: nn.Module
    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    mergers: tuple[nn.Module, ...]
    feature: int
    reader: int
    implementation: str
    merge: int
    packed: bool
    closed: str | None

    @property
    def projector(self) -> nn.Module:
        return self.mergers[0]

    @classmethod
    def find(cls, base: nn.Module) -> Tower | None:
        """By structure: a submodule with a list of blocks that have an attention child."""
        config: Any = base.config
        for name in ("vision_tower", "visual", "vision_model", "vision_encoder"):
            tower: Any = getattr(base, name, None)
            if not isinstance(tower, nn.Module):
                continue
            merger = getattr(tower, "merger", None)
            projector = merger
            for other in ("multi_modal_projector", "connector"):
                projector = projector or getattr(base, other, None)
            blocks = _blocks(tower)
            if projector is None or not blocks:
                return None
            last = len(blocks) - 1
            layer = getattr(config, "vision_feature_layer", None)
            feature = last
            if isinstance(layer, int):  # hidden_states[i] leaves block i - 1
                feature = min(max(layer - 1 if layer >= 0 else len(blocks) + layer, 0), last)
            named = getattr(tower.config, "fullatt_block_indexes", None) or ()
            full = [i for i in named if i <= last]  # the default names blocks of a deep tower
            reader = min(feature + 1, last)
            if full:  # only these look at the whole image
                feature = reader = max(full)
            attention = attention_of(blocks[feature])
            own: Any = getattr(attention, "config", None) or tower.config
            return cls(
                base=base,
                tower=tower,
                blocks=tuple(blocks),
                mergers=(projector, *getattr(tower, "deepstack_merger_list", ())),
                feature=feature,
                reader=reader,
                implementation=str(getattr(own, "_attn_implementation", None) or "eager"),
                merge=_merge(config, tower.config),
                packed=merger is not None,
                closed=_closed(blocks[0], merger is not None),
            )
        return None

    def placeholders(self, device: torch.device) -> Tensor:
        """[1 or 2, D] embeddings of the image and the video placeholder. device: where the model
        computes, which offloaded weights do not tell."""
        table: Any = self.base.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            return table(torch.tensor(placeholder_tokens(self.base), device=device))

    def lost(self, x: Tensor) -> Tensor:
        """[R, N] True for visual tokens x [R, N, D] that were dropped inside the tower: all zero,
        or the placeholder's own embedding, where a model adds its features to that."""
        lost = (x == 0).all(-1)
        for row in self.placeholders(x.device).to(x.dtype):
            lost = lost | (x == row).all(-1)
        return lost

    @property
    def pools(self) -> bool:
        """The model pools what the projector makes of the frames of a video."""
        return hasattr(self.base, "apply_pooling")

    def units(self, tokens: Tensor, grids: Tensor | None, clips: Clips | None = None) -> Units:
        """The units of one run, from its untouched hidden states (or anything of their shape);
        `clips`: where the run is one on videos."""
        if clips is not None and not self.packed:
            return self._video_units(tokens, clips)
        if not self.packed:
            if tokens.ndim != 3:
                raise UnsupportedModel(
                    f"this vision tower's hidden states have shape {tuple(tokens.shape)}, expected "
                    f"[images, tokens, channels]."
                )
            return GridUnits.square(tokens, self.merge)
        if grids is None:
            raise MissingSignal("this vision tower was called without grid_thw.")
        config: Any = self.tower.config
        side = self.merge
        layout = [Layout(t, h // side, w // side) for t, h, w in grids.tolist()]
        total = sum(grid.n for grid in layout)
        order = torch.arange(total, device=tokens.device)
        if getattr(config, "fullatt_block_indexes", None):
            from transformers.vision_utils import get_vision_window_index

            order = get_vision_window_index(grids, side, config.window_size, config.patch_size)[0]
        return PackedUnits(layout, side * side, order.to(tokens.device))

    def _video_units(self, tokens: Tensor, clips: Clips) -> Units:
        side = math.isqrt(tokens.shape[1])
        merge, prefix = self.merge, tokens.shape[1] - side * side
        if self.pools:
            own: Any = type(self.base)
            pool = own.apply_pooling  # not what a session wraps around it
            with torch.no_grad():
                cells = pool(self.base, tokens.new_zeros(1, side * side, 1)).shape[1]
            merge = -(-side // math.isqrt(cells))
        if sum(clips.frames) != len(tokens) or prefix > 8:
            raise UnsupportedModel(
                f"this vision tower reads {len(tokens)} frames of {tokens.shape[1]} tokens for "
                f"videos of {clips.frames} frames: they are no square grids of single frames."
            )
        return VideoUnits(clips, prefix, Layout(1, side, side), merge, tokens.device)


@dataclass(frozen=True)
class Projected:
    """One call of the projector.

    Attributes:
        given: what it read, None once nobody can ask any more; `shape` of it.
        made: how many tokens it made of that. out: what went on, dropped tokens as zeros.
        more: it read anything else besides. pooled: tokens were pooled behind it.
    """

    given: Tensor | None
    shape: torch.Size
    made: int
    out: Tensor
    more: bool
    pooled: bool = False

    @property
    def tokens(self) -> int | None:
        """Tokens that it made of each image [images, patches, C], where those are fewer."""
        images = self.shape[0] if len(self.shape) == 3 else 0
        made = self.made // images if images else 0
        return made if images and made != self.shape[1] else None


@dataclass
class Encoding:
    """One run of the tower.

    Attributes:
        owner: the session's part that remembers it; `used` once a forward has read it.
        tables: what a forward has asked for, so that attention calls need not be kept.
        taps: attention calls of the tapped blocks. grids: its grid_thw argument.
        clips: of a run on videos.
        waiting: what a selector leaves behind the block that runs; `lean`: that block, and what is
            added to the attention logits of its keys; `dropped`: whole frames where they were left.
        states: (block, units that it and later blocks see), from the untouched tower on.
        projected: calls of the projector.
        first, rewrite: a rewriter's first block and what it does around the blocks from there on.
        replayed: what rides along with blocks that gradient checkpointing will run again.
    """

    owner: weakref.ref[Any]
    taps: dict[int, Tap]
    grids: Tensor | None = None
    clips: Clips | None = None
    waiting: tuple[Plan, Units] | None = None
    lean: tuple[int, Tensor] | None = None
    dropped: Tensor | None = None
    states: list[tuple[int, Units]] = field(default_factory=list)
    projected: list[Projected] = field(default_factory=list)
    replayed: list[Side] = field(default_factory=list)
    tables: dict[str, Tensor] = field(default_factory=dict)
    used: bool = False
    first: int = 0
    rewrite: Rewrite | None = None

    def slim(self) -> None:
        """Forget what the tables were made of."""
        self.taps = {}
        self.projected = [replace(call, given=None) for call in self.projected]

    def start(self, tower: Tower, tokens: Tensor) -> None:
        """Take the units from untouched hidden states, once."""
        if not self.states:
            self.states.append((-1, tower.units(tokens, self.grids, self.clips)))

    def at(self, block: int) -> Units:
        """What `block` saw."""
        return [units for first, units in self.states if first <= block][-1]

    @property
    def shortened(self) -> bool:
        return len(self.states) > 1

    @property
    def now(self) -> Units:
        return self.states[-1][1]


#: runs of vision towers that a forward of a language model may still ask about
ENCODINGS: Slot[tuple[Encoding, ...]] = Slot("vtc_encodings", ())


class Matched(Mapping[str, Any]):
    """Tower signals of visual tokens x [R, N, D]; `there` [R, N] says which exist and were not
    dropped inside the tower: those get score 0, key 0, rank 1 and tile -1.
    """

    def __init__(
        self, tower: Tower, encodings: Sequence[Encoding], x: Tensor, there: Tensor
    ) -> None:
        self.tower, self.encodings = tower, encodings
        if not self.encodings:
            raise MissingSignal(
                "the vision tower did not run before this forward (were image features passed "
                "in ready-made, or encoded in another thread?), so what it knows is not known here."
            )
        pool = torch.cat([_rows(e.projected[0].out) for e in self.encodings]).to(x.dtype)
        place, known = _find(pool, _rows(x))
        if not torch.compiler.is_compiling() and not bool(known.any()):
            for row in tower.placeholders(x.device):  # a model that adds its features to them
                place, known = _find(pool + row, _rows(x))
                if bool(known.any()):
                    break
        self.place, self.known = place.reshape(there.shape), known.reshape(there.shape) & there
        every = (self.known == there).all()
        if torch.compiler.is_compiling():
            torch._assert_async(every, _UNMATCHED)
        elif not bool(every):
            raise MissingSignal(_UNMATCHED)
        self._done: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._done:
            make, fill = _TABLES[name]
            tables, images = [], 0
            for encoding in self.encodings:
                if name not in encoding.tables:
                    encoding.tables[name] = make(self.tower, encoding)
                table = encoding.tables[name]
                if name == "tile":
                    table = torch.where(table >= 0, table + images, table)
                    images += len(encoding.now.counts)
                tables.append(table)
            table = torch.cat(tables)
            known = self.known.reshape(*self.known.shape, *[1] * (table.ndim - 1))
            self._done[name] = torch.where(known, table[self.place], table.new_tensor(fill))
        return self._done[name]

    def __iter__(self) -> Any:
        return iter(_TABLES)

    def __len__(self) -> int:
        return len(_TABLES)


# ---------------------------------------------------------------------- tables of one encoding


def scores(tower: Tower, encoding: Encoding, block: int) -> Tensor:
    """[R, N] attention of the CLS token, or the mean received without one, summed over patches,
    for the units that `block` saw."""
    calls, units = _calls(encoding, block), encoding.at(block)
    if units.packed:
        if "flash" in tower.implementation:
            raise MissingSignal(
                "flash attention runs all images of this tower in one call, so attn_cls cannot be "
                "told apart per image: load the vision tower with attn_implementation='sdpa'."
            )
        values = torch.cat([received(c)[0] for c in calls])[None]
    elif isinstance(units, VideoUnits):  # one call for each frame once they differ
        frames = [weighed(c, bool(units.prefix), None) for c in calls]
        values = torch.cat(frames, 1)
    else:
        assert isinstance(units, GridUnits)
        values = weighed(calls[-1], bool(units.prefix), units.columns())
    return units.per_unit(values[:, None, :, None])[..., 0].sum(2)


def key_values(encoding: Encoding, block: int) -> Tensor:
    """[R, N, C] keys of a block, mean over heads and patches."""
    calls, units = _calls(encoding, block), encoding.at(block)
    cut = units.packed or isinstance(units, VideoUnits)
    keys = torch.cat([c.key for c in calls], 2) if cut else calls[-1].key
    return units.per_unit(keys).mean(2)


def _score_table(tower: Tower, encoding: Encoding) -> Tensor:
    _check(tower, encoding)
    return encoding.at(tower.feature).pool(scores(tower, encoding, tower.feature))


def _key_table(tower: Tower, encoding: Encoding) -> Tensor:
    _check(tower, encoding)
    return encoding.at(tower.feature).pool(key_values(encoding, tower.feature))


def _rank_table(tower: Tower, encoding: Encoding) -> Tensor:
    """Rank by the attention of the block that reads the features, over the number of units."""
    _check(tower, encoding)
    units = encoding.at(tower.reader)
    score = scores(tower, encoding, tower.reader).masked_fill(~units.real, float("-inf"))
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1).double()
    count = torch.tensor(units.counts, device=rank.device)[:, None]
    return units.pool(rank / count, 1.0)


def _tile_table(tower: Tower, encoding: Encoding) -> Tensor:
    _check(tower, encoding)
    units = encoding.now
    rows = torch.arange(len(units.counts), device=units.real.device)[:, None]
    return units.pool(rows.expand(units.real.shape), -1)


def _size_table(tower: Tower, encoding: Encoding) -> Tensor:
    _check(tower, encoding)
    units = encoding.now
    return units.pool(units.real.float() if units.size is None else units.size, 1.0)


def _feature_table(tower: Tower, encoding: Encoding) -> Tensor:
    """[tokens, U] what the projector read for each of its outputs."""
    call = encoding.projected[0]
    given, made = call.given, call.made
    if given is None:  # kept until the tables are made
        raise MissingSignal(
            "tokens of this video are pooled behind the projector, so no projector input belongs "
            "to one of them: use a method that reads the embeddings."
        )
    if given.ndim > 3:
        raise MissingSignal(
            f"the projector reads a tensor of shape {tuple(given.shape)}, so what it reads per "
            f"token is not known: use a method that reads the embeddings (divprune)."
        )
    if call.tokens is not None:
        return _take(given, _per_image(given.shape, call.tokens)).flatten(0, 1)
    features = given.reshape(made, -1)
    if encoding.shortened and isinstance(encoding.now, PackedUnits):
        return encoding.now.restore(features)
    return features


_TABLES: dict[str, tuple[Callable[[Tower, Encoding], Tensor], float]] = {
    "attn_cls": (_score_table, 0.0),
    "vision_keys": (_key_table, 0.0),
    "cls_rank": (_rank_table, 1.0),
    "tile": (_tile_table, -1),
    "size": (_size_table, 1.0),
    "features": (_feature_table, 0.0),
}


def _calls(encoding: Encoding, block: int) -> list[Call]:
    tap = encoding.taps[block]
    return tap.calls if tap.calls else [tap.call]  # an empty tap explains itself


def _check(tower: Tower, encoding: Encoding) -> None:
    """Make sure that the units are what the projector made tokens of."""
    if not encoding.states:
        calls = _calls(encoding, tower.feature)
        if not tower.packed and calls[-1].query.shape[0] == 1 and _blocked(calls[-1].mask):
            raise MissingSignal(
                "this tower packs several images into one sequence (Pixtral), where tokens cannot "
                "be told apart by place: tower signals are offered for one image per batch only."
            )
        rows = calls[0].query[:, 0]
        if tower.packed:
            rows = torch.cat([c.query[0, 0] for c in calls])
        try:
            encoding.start(tower, rows)
        except UnsupportedModel as error:
            raise MissingSignal(f"tower signals are not known here: {error}") from error
    out = encoding.projected[0].out
    made, there = out.numel() // out.shape[-1], sum(encoding.now.original)
    if made != there:
        raise MissingSignal(
            f"{there} groups of tower tokens became {made} projected tokens, so tower signals "
            f"cannot be carried over to them."
        )


# ---------------------------------------------------------------------- the projector


def arrangement(tower: Tower, call: Projected) -> tuple[Callable[[nn.Module, Tensor], Tensor], int]:
    """How to run the projector on single tokens [n, width], and their width, from the shapes of
    one of its calls."""
    if call.pooled:
        raise MissingSignal(
            "tokens of this video are pooled behind the projector, which is then no function of "
            "single tokens: use a method that does not ask for the projector."
        )
    if call.more:
        raise MissingSignal(
            f"the projector {type(tower.projector).__name__} reads more than the tower's tokens "
            f"(image sizes), so it is no function of single tokens."
        )
    shape, made = call.shape, call.made
    channels = shape[-1]
    if call.tokens is not None:
        side, merge = _per_image(shape, call.tokens)
        return _in_images(side, merge), channels * merge * merge
    lead = (1,) if len(shape) == 3 else ()
    group = shape.numel() // channels // made

    def run(module: nn.Module, x: Tensor) -> Tensor:
        out = module.forward(x.reshape(*lead, -1, channels))
        return out.reshape(len(x), -1)

    return run, channels * group


def _in_images(side: int, merge: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Run a projector that wants whole images of `side` x `side` patches."""
    grid = side // merge

    def run(module: nn.Module, x: Tensor) -> Tensor:
        spare = -len(x) % (grid * grid)
        whole = torch.cat([x, x.new_zeros(spare, x.shape[1])])
        patches = whole.reshape(-1, grid, grid, merge, merge, x.shape[1] // merge**2)
        images = patches.transpose(2, 3).reshape(len(patches), side * side, -1)
        out = module.forward(images)
        return out.reshape(len(whole), -1)[: len(x)]

    return run


def _per_image(shape: torch.Size, tokens: int) -> tuple[int, int]:
    """Side of an image in patches, and of a group, of a projector that makes so many tokens of an
    image and merges patches itself."""
    side, merge = math.isqrt(shape[1]), math.isqrt(shape[1] // max(tokens, 1))
    if side * side != shape[1] or merge * merge * tokens != shape[1] or side % max(merge, 1):
        raise MissingSignal(
            f"the projector makes {tokens} tokens of {shape[1]} patches, which is not "
            f"a square grid of square groups: what it reads per token is not known."
        )
    return side, merge


def _take(given: Tensor, sides: tuple[int, int]) -> Tensor:
    """[images, side*side, C] in raster order -> [images, tokens, merge*merge*C]."""
    side, merge = sides
    n, _, c = given.shape
    grid = side // merge
    x = given.reshape(n, grid, merge, grid, merge, c).transpose(2, 3)
    return x.reshape(n, grid * grid, merge * merge * c)


# ---------------------------------------------------------------------- small things


def token_of(config: Any, kind: str) -> int | None:
    for suffix in ("_id", "_index"):
        value = getattr(config, f"{kind}_token{suffix}", None)
        if isinstance(value, int):
            return value
    return None


def placeholder_tokens(base: Any) -> tuple[int, ...]:
    found = (token_of(base.config, kind) for kind in ("image", "video"))
    return tuple(dict.fromkeys(t for t in found if t is not None))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _blocked(mask: Tensor | None) -> bool:
    """A mask that hides some tokens from others."""
    if mask is None:
        return False
    return not bool(mask.all()) if mask.dtype == torch.bool else bool((mask < 0).any())


def _find(pool: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For every token the first row of `pool` with the same values, and whether there is one."""
    ordered, order = _fingerprints(pool).sort(stable=True)
    first = torch.searchsorted(ordered, _fingerprints(tokens)).clamp(max=len(pool) - 1)
    place = order[first]
    return place, (ops.gather_rows(pool[None], place[None])[0] == tokens).all(-1)


def _fingerprints(rows: Tensor) -> Tensor:
    """[n, D] -> [n] equal for rows that are equal bit by bit, in blocks of rows."""
    bits = rows.contiguous().view(torch.int16)
    columns = torch.arange(bits.shape[1], device=rows.device)
    odd = (ops.hash_uniform(columns, 0).double() * 2**52).long() * 2 + 1
    return torch.cat([(block.long() * odd).sum(-1) for block in bits.split(BLOCK)])


def _blocks(tower: nn.Module) -> nn.ModuleList | None:
    """The longest list of blocks with attention."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [m for m in lists if attention_of(m[0]) is not None]
    return max(lists, key=len) if lists else None


def _merge(config: Any, own: Any) -> int:
    """Side of the square of patches that becomes one token; checked when the projector runs."""
    ratio = getattr(config, "downsample_ratio", None)
    if ratio:
        return round(1 / ratio)
    tokens = getattr(config, "mm_tokens_per_image", None)
    if tokens:
        return (own.image_size // own.patch_size) // math.isqrt(tokens)
    names = ["scale_factor", "spatial_merge_size"]
    if hasattr(own, "image_size"):  # images of any size are no square grids of patches
        names.append("downsample_factor")
    found = (getattr(c, n, None) for c in (config, own) for n in names)
    return next((int(m) for m in found if m), 1)


def _closed(block: nn.Module, packed: bool) -> str | None:
    """Why tokens cannot be dropped before this block."""
    parameters = inspect.signature(block.forward).parameters
    known = {"hidden_states", "attention_mask", "output_attentions"}
    known |= {"cu_seqlens", "max_seqlen", "position_embeddings"} if packed else set()
    extra = [n for n, p in parameters.items() if n not in known and p.kind is not p.VAR_KEYWORD]
    if extra:
        return f"blocks of its vision tower read more than the tokens: {', '.join(extra)}"
    if packed and "cu_seqlens" not in parameters:
        return "its vision tower packs images in a way that is not known"
    return None
