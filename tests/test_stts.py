"""STTS: scorer, ranking, bias, packing and loss against plain loops and towers that mask.

The list in the numbering of the paper's checks: kept counts, packed equals alone, packing, bias,
gradients, loss, monotone ranking, batches, images untouched."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import vtc
from vtc.adapters.clips import Clips, VideoUnits, first_fit
from vtc.context import Context, Layout, Site
from vtc.errors import (
    InvalidInput,
    InvalidRecipe,
    InvalidWeights,
    NothingReduced,
    UnsupportedModel,
)
from vtc.methods.stts import STTS
from vtc.modules.stts import TokenScorer, attention_bias, similarity_loss
from vtc.plan import Plan
from vtc.reducer import Host
from vtc.testing import configs, families, oracle, towerref
from vtc.testing.towerref import TowerReduction

TOLERANCE = 1e-4
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "molmo2")


# --------------------------------------------------------------------------------------------
# the scorer


def scorer(dim: int = 8, heads: int = 2, hidden: int = 12) -> TokenScorer:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = TokenScorer(dim, heads, hidden)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.4)
    return module


def slow_scores(module: TokenScorer, groups: Tensor) -> Tensor:
    """[T, P, G, D] -> [T, P], cell by cell, head by head."""
    t, p, g, d = groups.shape
    width = d // module.heads
    pooled = torch.zeros(t, p, d)
    for frame in range(t):
        for cell in range(p):
            z = groups[frame, cell]
            query = z.sum(0) / g
            q, keys, values = (
                F.linear(x, layer.weight, layer.bias)
                for x, layer in ((query, module.query), (z, module.key), (z, module.value))
            )
            heads = []
            for head in range(module.heads):
                own = slice(head * width, (head + 1) * width)
                weights = (keys[:, own] @ q[own] / math.sqrt(width)).softmax(0)
                heads.append(weights @ values[:, own])
            pooled[frame, cell] = module.out(torch.cat(heads))
    scores = torch.zeros(t, p)
    for frame in range(t):
        for cell in range(p):
            before = pooled[frame - 1, cell] if frame else torch.zeros(d)
            scores[frame, cell] = module.mlp(torch.cat([before, pooled[frame, cell]])).sigmoid()
    return scores


def test_scores_are_those_of_plain_loops() -> None:
    module, groups = (
        scorer(),
        torch.randn(2, 3, 5, 4, 8, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        wanted = torch.stack([slow_scores(module, video) for video in groups])
        assert torch.allclose(module(groups), wanted, atol=1e-6)


def test_scorer_starts_as_published() -> None:
    with pytest.raises(InvalidInput, match="Linear has no attn or self_attn or attention"):
        TokenScorer.beside(torch.nn.Linear(4, 4))
    before = torch.get_rng_state()
    model = families.make("qwen2_vl").model.model.visual.blocks[0]
    made = TokenScorer.beside(model)
    assert torch.equal(before, torch.get_rng_state())
    assert (made.dim, made.heads, made.hidden) == (32, 2, 64)
    first = made.mlp[0].weight.detach()
    assert (
        abs(float(first.std()) - 1 / 8) < 0.01 and first.abs().max() > 2.5 / 8
    )  # not cut at 2 std
    assert all(not p.any() for name, p in made.named_parameters() if name.endswith("bias"))


def test_flops_are_those_of_the_paper() -> None:
    """so400m at 378 px: 4.46 GMAC per frame, 33.77 M weights."""
    module = TokenScorer(1152, 16, 4304)
    assert abs(module.flops(1, 81, 9) / 2e9 - 4.46) < 0.01
    assert abs(sum(p.numel() for p in module.parameters()) / 1e6 - 33.77) < 0.01


@pytest.mark.parametrize("axis", ["row", "frame", "video"])
def test_bias_lies_between_minus_two_and_zero(axis: str) -> None:
    scores = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    bias = attention_bias(scores, axis)
    assert not bias[:, 0].any()  # the first frame of each video
    for video in range(2):
        for t in range(1, 3):
            for row in range(4):
                s = scores[video, t, row]
                over = {"row": s, "frame": scores[video, t], "video": scores[video]}[axis]
                floor = math.exp(-2)
                span = float(over.max() - over.min()) + 1e-6
                wanted = (floor + (s - over.min()) * (1 - floor) / span).log()
                assert torch.allclose(bias[video, t, row], wanted, atol=1e-6)
    flat = attention_bias(torch.full((1, 2, 2, 2), 0.3), axis)
    assert torch.isfinite(flat).all() and flat.min() >= -2.0001


def test_loss_skips_first_frames_and_is_zero_for_the_target() -> None:
    groups = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(2))
    cosine = torch.stack(
        [
            F.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1)
            for a, b in pairwise(groups.unbind(1))
        ],
        1,
    )
    exact = F.pad(1 - cosine, (0, 0, 1, 0), value=7.0)  # whatever the first frame has
    assert float(similarity_loss(exact, groups, detach=True)) < 1e-12
    off = exact + torch.tensor([0.0, 0.1, 0.3])[None, :, None]
    assert math.isclose(float(similarity_loss(off, groups, detach=True)), 0.05, rel_tol=1e-5)
    still = groups[:, :1].expand(-1, 3, -1, -1, -1).contiguous()
    assert float(similarity_loss(torch.zeros(2, 3, 4), still, detach=True)) < 1e-12


def test_target_is_detached_on_request() -> None:
    for detach in (True, False):
        groups = torch.randn(1, 2, 3, 2, 4, requires_grad=True)
        scores = torch.full((1, 2, 3), 0.2, requires_grad=True)
        similarity_loss(scores, groups, detach).backward()
        assert scores.grad is not None and bool(scores.grad.any())
        assert (groups.grad is None or not groups.grad.any()) is detach


def test_weights_go_and_come_back(tmp_path: Path) -> None:
    module = scorer()
    module.save(tmp_path / "a.safetensors")
    other = TokenScorer(8, 2, 12)
    other.load(tmp_path / "a.safetensors")
    groups = torch.randn(1, 2, 3, 4, 8)
    assert torch.equal(module(groups), other(groups))
    with pytest.raises(InvalidInput, match="of another shape"):
        TokenScorer(8, 2, 16).load(tmp_path / "a.safetensors")
    with pytest.raises(InvalidInput, match="heads is '2' there and '4' here"):
        TokenScorer(8, 4, 12).load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("path", ["", "model.vision_backbone.temporal_token_scorer."])
def test_released_names_load(path: str, tmp_path: Path) -> None:
    """Names of the released scorer, alone and as its checkpoint has them."""
    names = {
        **{"patch_token_pooler.wq": "query", "patch_token_pooler.wk": "key"},
        **{"patch_token_pooler.wv": "value", "patch_token_pooler.wo": "out"},
        **{"mlp.w1": "mlp.0", "mlp.w2": "mlp.2", "mlp.w3": "mlp.4"},
    }
    module, file = scorer(), tmp_path / "released.safetensors"
    state = module.state_dict()
    released = {
        f"{path}{theirs}.{kind}": state[f"{ours}.{kind}"].clone()
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }
    assert len(released) == len(state)
    save_file(released, file)
    other = TokenScorer(8, 2, 12)
    other.load(file)
    groups = torch.randn(1, 2, 3, 4, 8)
    assert torch.equal(module(groups), other(groups))
    released.pop(f"{path}mlp.w3.bias")
    save_file(released, file)
    with pytest.raises(InvalidWeights, match=r"1 missing, the first is mlp.4.bias \(1,\)"):
        other.load(file)


# --------------------------------------------------------------------------------------------
# ranking


def context(*grids: Layout, dim: int = 8, seed: int = 0) -> Context:
    """Units of one patch each."""
    counts = tuple(grid.n for grid in grids)
    gen = torch.Generator().manual_seed(seed)
    steps = torch.arange(max(counts)).expand(len(counts), -1)
    return Context(
        x=torch.randn(len(counts), max(counts), dim, generator=gen),
        visual=steps < torch.tensor(counts)[:, None],
        counts=counts,
        original=counts,
        source=steps,
        layout=grids,
        site=Site.parse("vision.1"),
    )


def kept(plan: Plan, row: int) -> list[int]:
    return plan.index[row, : plan.kept[row]].tolist()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.99])
def test_exact_counts_and_a_whole_first_frame(share: float) -> None:
    grids = (Layout(5, 2, 3), Layout(3, 2, 3), Layout(1, 4, 4))
    ctx, module = context(*grids), scorer()
    k = tuple(max(6, round(share * n)) for n in ctx.counts)
    plan = STTS().decide(module, ctx, k).plan
    assert plan.kept == (k[0], k[1], 16)  # the image keeps everything
    assert kept(plan, 2) == list(range(16))
    for row in (0, 1):
        assert set(range(6)) <= set(kept(plan, row))
        grid = grids[row]
        scores = slow_scores(module, ctx.x[row, : grid.n].view(grid.frames, 6, 1, 8)).flatten()
        rest = sorted(range(6, grid.n), key=lambda i: -float(scores[i].detach()))[: k[row] - 6]
        assert kept(plan, row) == [*range(6), *sorted(rest)]


def test_budgets_below_the_first_frame_keep_its_best() -> None:
    ctx, module = context(Layout(4, 2, 3)), scorer()
    plan = STTS().decide(module, ctx, (4,)).plan
    scores = slow_scores(module, ctx.x[0, :6].view(1, 6, 1, 8))[0]
    assert kept(plan, 0) == sorted(scores.topk(4).indices.tolist())


class Fixed(torch.nn.Module):
    """A scorer whose scores are given."""

    dim = 8

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, groups: Tensor) -> Tensor:
        return self.scores


def test_raising_a_score_never_loses_its_group() -> None:
    ctx = context(Layout(4, 2, 2))
    scores = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(3))
    before = set(kept(STTS().decide(Fixed(scores), ctx, (9,)).plan, 0))
    for place in before:
        scores.view(-1)[place] += 0.5
        assert place in kept(STTS().decide(Fixed(scores), ctx, (9,)).plan, 0)
        scores.view(-1)[place] -= 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [(4, 4), (7, 9), (12, 5), (16, 15)])
def test_of_equal_scores_the_first_are_dropped(k: tuple[int, int], seed: int) -> None:
    """As by a stable sort, worst first, of which the beginning is dropped."""
    grids = (Layout(4, 2, 2), Layout(4, 2, 2))
    levels = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(seed))
    scores = levels / 4
    plan = STTS().decide(Fixed(scores), context(*grids), k).plan
    for row in (0, 1):
        ranked = [(100.0 if i < 4 else float(scores[row].flatten()[i]), i) for i in range(16)]
        order = sorted(range(16), key=lambda i: ranked[i][0])  # stable
        assert kept(plan, row) == sorted(order[16 - k[row] :])


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = torch.full((1, 4, 4), 0.5)
    scores[0, 2, 1] = float("nan")
    with pytest.raises(InvalidInput, match="scores contain NaN"):
        STTS().decide(Fixed(scores), context(Layout(4, 2, 2)), (9,))


def test_videos_do_not_touch_each_other() -> None:
    grids = (Layout(3, 2, 2), Layout(4, 2, 2), Layout(3, 2, 2))
    ctx, module = context(*grids), scorer()
    together = STTS().decide(module, ctx, (7, 9, 6))
    for row, (grid, k) in enumerate(zip(grids, (7, 9, 6), strict=True)):
        alone = Context(
            x=ctx.x[row : row + 1, : grid.n],
            visual=torch.ones(1, grid.n, dtype=torch.bool),
            counts=(grid.n,),
            original=(grid.n,),
            source=torch.arange(grid.n)[None],
            layout=(grid,),
            site=ctx.site,
        )
        single = STTS().decide(module, alone, (k,))
        assert kept(together.plan, row) == kept(single.plan, 0)
        assert together.bias is not None and single.bias is not None
        assert torch.allclose(together.bias[row, : grid.n], single.bias[0], atol=1e-6)


def test_what_was_dropped_before_is_refused() -> None:
    ctx = context(Layout(3, 2, 2))
    short = Context(**{**vars(ctx), "counts": (11,)})
    with pytest.raises(InvalidInput, match="drop nothing in front of it"):
        STTS().decide(scorer(), short, (5,))


def test_heuristic_keeps_what_changed() -> None:
    """By hand: cell 1 of frame 1 and cell 2 of frame 2 turn; everything else stands still."""
    x = torch.ones(1, 12, 4)
    x[0, 4 + 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x[0, 8 + 1] = x[0, 4 + 1]
    x[0, 8 + 2] = -1.0
    ctx = Context(**{**vars(context(Layout(3, 2, 2))), "x": x})
    plan = vtc.REDUCERS["stts_heuristic"]().decide(torch.nn.Module(), ctx, (6,)).plan
    assert kept(plan, 0) == [0, 1, 2, 3, 5, 10]


# --------------------------------------------------------------------------------------------
# packing


def test_first_fit_decreasing() -> None:
    assert first_fit([3, 9, 0, 5, 4, 1], 9) == [[1], [3, 4], [0, 5]]
    assert first_fit([0, 0], 9) == []


@pytest.mark.parametrize("seed", range(4))
def test_bins_are_full_and_whole(seed: int) -> None:
    counts = torch.randint(0, 17, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    bins = first_fit(counts, 16)
    placed = sorted(frame for members in bins for frame in members)
    assert placed == [i for i, n in enumerate(counts) if n]
    assert all(sum(counts[i] for i in members) <= 16 for members in bins)
    assert len(bins) <= 11 / 9 * math.ceil(sum(counts) / 16) + 1


@pytest.mark.parametrize("packing", ["segments", "bins"])
@pytest.mark.parametrize(("side", "merge", "prefix"), [(4, 2, 0), (3, 1, 1), (5, 2, 1)])
def test_unpacking_is_the_inverse(packing: str, side: int, merge: int, prefix: int) -> None:
    """Whole frames come back on what was kept, zeros elsewhere; also grids that do not divide."""
    frames, gen = (3, 2), torch.Generator().manual_seed(6)
    units = VideoUnits(Clips(frames), prefix, Layout(1, side, side), merge, torch.device("cpu"))
    x = torch.randn(5, prefix + side * side, 6, generator=gen)
    cells = math.ceil(side / merge) ** 2
    assert units.layout == (Layout(3, *[math.ceil(side / merge)] * 2),) * 1 + (
        Layout(2, *[math.ceil(side / merge)] * 2),
    )
    keep = torch.rand(2, 3 * cells, generator=gen) < 0.5
    keep[1, 2 * cells :] = False
    keep[0, cells : 2 * cells] = False  # a frame that loses everything
    left = units.after(Plan.from_mask(keep), 0.0)
    left.pack_in(packing == "bins", refill=False)
    packed = left.pack(x)
    assert left.fits(packed)
    back = left.restore(packed)
    lost = back.abs().sum(-1) == 0
    assert torch.equal(back[~lost], x[~lost])
    per_frame = torch.cat([keep[0].view(3, cells), keep[1, : 2 * cells].view(2, cells)])
    grid = per_frame.view(5, *[math.ceil(side / merge)] * 2)
    spare = -side % merge // 2  # padded half before, half after
    patches = grid.repeat_interleave(merge, 1).repeat_interleave(merge, 2)
    patches = patches[:, spare : spare + side, spare : spare + side].flatten(1)
    assert torch.equal(~lost[:, prefix:], patches)
    assert torch.equal(~lost[:, :prefix], patches.any(1, keepdim=True).expand(-1, prefix))
    assert torch.equal(left.take(packed)[left.real], units.take(x).gather(
        1, left.source[..., None].expand(-1, -1, merge * merge * 6))[left.real])  # fmt: skip


def test_empty_frames_open_no_bin() -> None:
    units = VideoUnits(Clips((6,)), 0, Layout(1, 2, 2), 1, torch.device("cpu"))
    keep = torch.ones(1, 24, dtype=torch.bool)
    keep[0, 8:12] = False
    left = units.after(Plan.from_mask(keep), 0.0)
    left.pack_in(bins=True, refill=True)
    assert left.pack(torch.randn(6, 4, 3)).shape == (5, 4, 3)


# --------------------------------------------------------------------------------------------
# in models, against towers that mask


def run(
    fam: families.Family, at: int, keep: float = 0.5, **options: Any
) -> tuple[vtc.Session, Any, list[Context], list[Any]]:
    """Greedy decoding with STTS, and what it saw and decided."""
    contexts, decisions = [], []
    with vtc.attach(fam.model, "stts", keep=keep, at=f"vision.{at}", **options) as session:
        method = session.methods[0]
        randomise(session.modules[f"vision.{at}"])

        def spy(module: Any, ctx: Context, k: tuple[int, ...]) -> Any:
            contexts.append(ctx)
            decisions.append(type(method).decide(method, module, ctx, k))
            return decisions[-1]

        object.__setattr__(method, "decide", spy)
        with torch.no_grad():
            out = fam.model.generate(
                **fam.inputs,
                max_new_tokens=3,
                output_logits=True,
                return_dict_in_generate=True,
            )
    return session, out, contexts, decisions


def randomise(module: TokenScorer) -> None:
    """Scores that differ."""
    gen = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))


def reductions(at: int, ctx: Context, decision: Any) -> list[TowerReduction]:
    """What a masking tower does: the bias before block `at`, masked keys from the next block on."""
    keep, bias = [], []
    for row, n in enumerate(ctx.counts):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[kept(decision.plan, row)] = True
        keep.append(mask)
        none = decision.bias is None
        bias.append(torch.zeros(n) if none else decision.bias[row, :n])
    every = [torch.ones_like(mask) for mask in keep]
    off = [torch.zeros_like(b) for b in bias]
    return [TowerReduction(at, every, bias=bias), TowerReduction(at + 1, keep, bias=off)]


def check(fam: families.Family, ref: families.Family, at: int, **options: Any) -> vtc.Session:
    session, out, contexts, decisions = run(fam, at, **options)
    calls = [reductions(at, c, d) for c, d in zip(contexts, decisions, strict=True)]
    with towerref.masked_tower(ref, calls):
        gone = towerref.zero_columns(ref, ref.inputs)
    tokens = out.sequences[:, ref.inputs["input_ids"].shape[1] :]
    with towerref.masked_tower(ref, calls):
        wanted = oracle.run(ref, ref.inputs, keep={"projector": ~gone}, forced=tokens)[0]
    assert bool(gone.any())
    for a, b in zip(out.logits, wanted, strict=True):
        assert (a - b).abs().max() <= TOLERANCE
    return session


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_dropping_equals_masking(name: str, attn: str) -> None:
    fam, ref = families.make(name, attn), families.make(name)
    session = check(fam, ref, 1)
    grid = session.trace[-1].layout[-1]
    assert grid is not None and session.trace[-1].n_out[-1] == (grid.n + 1) // 2
    images = session.trace[0]
    for had, left, layout in zip(images.n_in, images.n_out, images.layout, strict=True):
        assert layout is not None and (had == left or layout.frames > 1)


@pytest.mark.parametrize("keep", [0.4, 0.8, 0.9])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bins_equal_masking(attn: str, keep: float) -> None:
    """Also where there are as many bins as frames."""
    fam, ref = families.make("llava_onevision", attn), families.make("llava_onevision")
    check(fam, ref, 2, packing="bins", keep=keep)


@pytest.mark.parametrize("keep", [0.8, 0.9])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_small_losses_equal_masking(name: str, keep: float) -> None:
    check(families.make(name), families.make(name), 1, keep=keep)


@pytest.mark.parametrize("name", ["llava", "llava_siglip_qwen3", "internvl"])
def test_frames_given_as_images(name: str) -> None:
    fam, ref = (families.make(name, images_per_row=(4, 8)) for _ in range(2))
    session = check(fam, ref, 1, frames_per_video=4)
    assert len(session.trace[0].n_in) == 3


def test_refilled_frames_run_whole() -> None:
    """A frame alone in its bin keeps all its patches inside; its dropped ones are still lost."""
    fam, ref = (families.make("llava_onevision") for _ in range(2))
    _, out, contexts, decisions = run(fam, 1, 0.7, packing="bins", refill=True)
    calls = [reductions(1, c, d) for c, d in zip(contexts, decisions, strict=True)]
    frames = calls[1][1].keep[0].view(4, 4)
    counts = [4 * int(n) for n in frames.sum(1)]
    alone = [b[0] for b in first_fit(counts, 16) if len(b) == 1]
    assert alone and any(counts[i] < 16 for i in alone)
    inside = frames.clone()
    inside[alone] = True
    calls[1][1] = TowerReduction(2, [inside.flatten()], bias=calls[1][1].bias)
    with towerref.masked_tower(ref, calls):
        embeds = oracle.encode(ref.model, ref.inputs).embeds
    video = (ref.inputs["input_ids"] == families.VIDEO).nonzero()[:-1]  # the newline stays
    lost = video[~frames.flatten()]
    embeds[lost[:, 0], lost[:, 1]] = 0
    gone = ref.visual() & (embeds == 0).all(-1)
    tokens = out.sequences[:, ref.inputs["input_ids"].shape[1] :]
    with towerref.masked_tower(ref, calls):
        wanted = oracle.run(ref, ref.inputs, keep={"projector": ~gone}, forced=tokens)[0]
    for a, b in zip(out.logits, wanted, strict=True):
        assert (a - b).abs().max() <= TOLERANCE


def test_images_are_untouched() -> None:
    fam = families.make("llava_onevision", images_per_row=(1, 2))
    with torch.no_grad():
        before = fam.model(**fam.inputs).logits
        with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", strict=False) as session:
            assert torch.equal(fam.model(**fam.inputs).logits, before)
        assert session.trace[0].n_in == session.trace[0].n_out
        with (
            pytest.raises(NothingReduced, match="no video was seen at vision.1.*frames_per_video"),
            vtc.attach(fam.model, "stts_heuristic", keep=0.5, at="vision.1"),
        ):
            fam.model(**fam.inputs)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_everything_kept_without_bias_is_the_model_itself(name: str) -> None:
    fam = families.make(name)
    with torch.no_grad():
        before = fam.model(**fam.inputs).logits
        with vtc.attach(fam.model, "stts", keep=1.0, at="vision.1", bias=False):
            assert torch.equal(fam.model(**fam.inputs).logits, before)
        with vtc.attach(fam.model, "stts", keep=1.0, at="vision.1"):
            assert not torch.equal(fam.model(**fam.inputs).logits, before)
        assert torch.equal(fam.model(**fam.inputs).logits, before)  # no trace


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_heuristic_runs_where_stts_does(name: str) -> None:
    fam = families.make(name)
    with torch.no_grad(), vtc.attach(fam.model, "stts_heuristic", keep=0.5, at="vision.1") as s:
        fam.model(**fam.inputs)
    assert s.trace[-1].n_out[-1] == (s.trace[-1].n_in[-1] + 1) // 2
    assert "random" not in s.report()


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_gradients_reach_the_scorer_through_the_bias_alone(name: str) -> None:
    fam = families.make(name)
    inputs = fam.labelled()
    for bias in (True, False):
        with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", bias=bias) as session:
            module = session.modules["vision.1"]
            module.eval()
            fam.model(**inputs).loss.backward()
            grads = [p.grad for p in module.parameters()]
        assert any(g is not None and bool(g.abs().sum()) for g in grads) is bias
        assert session.take_loss() == 0.0


def test_training_adds_the_temporal_loss() -> None:
    fam = families.make("qwen2_5_vl")
    with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", detach_target=True) as session:
        module = session.modules["vision.1"].train()
        loss = fam.model(**fam.labelled()).loss
        aside = session.take_loss()
        assert torch.is_tensor(aside) and float(aside) > 0
        (loss + 0.5 * aside).backward()
        assert all(p.grad is not None for p in module.parameters())
        with torch.no_grad():
            fam.model(**fam.labelled())
        assert session.take_loss() == 0.0


def test_bfloat16_and_a_file_of_weights(tmp_path: Path) -> None:
    fam = families.make("qwen2_5_vl", dtype=torch.bfloat16)
    with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1") as session, torch.no_grad():
        randomise(session.modules["vision.1"])
        session.modules["vision.1"].save(tmp_path / "w.safetensors")
        first = fam.model(**fam.inputs).logits
        assert "the scorer is random" in session.report()
    path = str(tmp_path / "w.safetensors")
    with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", weights=path) as session:
        with torch.no_grad():
            assert torch.equal(fam.model(**fam.inputs).logits, first)
        assert "random" not in session.report()


def test_clear_refusals() -> None:
    fam = families.make("llava_onevision")
    with pytest.raises(UnsupportedModel, match="reads what leaves block 3"):
        vtc.attach(fam.model, "stts", keep=0.5, at="vision.3")
    with pytest.raises(InvalidRecipe, match="without merge and mass"):
        vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", mass=1.0)
    with pytest.raises(InvalidRecipe, match="use packing='bins'"):
        vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", refill=True)
    with pytest.raises(InvalidRecipe, match="a video has 2 or more"):
        vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", frames_per_video=1)
    fam = families.make("llava", images_per_row=(3,))
    with (
        pytest.raises(UnsupportedModel, match="given 3 images, which are no whole videos of 2"),
        vtc.attach(fam.model, "stts", keep=0.5, at="vision.1", frames_per_video=2),
    ):
        fam.model(**fam.inputs)


def test_encoders_alone_are_refused() -> None:
    tower = families.make("llava_siglip_qwen3").model.model.vision_tower
    with pytest.raises(UnsupportedModel, match="an image encoder alone"):
        vtc.attach(tower, "stts", keep=0.5, at="vision.1")
    assert vtc.describe(tower).methods["stts"].startswith("no: ")
    assert vtc.describe(families.make("molmo2").model).methods["stts"] == "at vision.0 to vision.2"


def test_more_frames_at_equal_tokens() -> None:
    """Test-time scaling: twice the frames at half the budget give as many tokens."""
    counts = []
    for frames, keep in ((2, 1.0), (4, 0.5)):
        fam = families.make("llava", images_per_row=(frames,))
        options: dict[str, Any] = {"frames_per_video": frames, "bias": False}
        with (
            torch.no_grad(),
            vtc.attach(fam.model, "stts", keep=keep, at="vision.1", **options) as s,
        ):
            fam.model(**fam.inputs)
        counts.append(s.trace[0].n_out)
    assert counts[0] == counts[1] == (128,)


def test_grids_that_do_not_divide() -> None:
    """LLaVA-OneVision at 27 x 27 pools 2 x 2 with neighbours: 5 x 5 -> 3 x 3 here. A dropped patch
    goes on as it was when it was dropped; what is pooled of lost groups is zero."""
    import transformers

    config = transformers.LlavaOnevisionConfig(
        vision_config=configs.siglip(patch_size=14, image_size=70),
        text_config=transformers.Qwen2Config(**families.TEXT),
        image_token_index=families.IMAGE,
        video_token_index=families.VIDEO,
        image_grid_pinpoints=configs.PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    base, tower = model.model, model.model.vision_tower
    video = torch.randn(1, 3, 3, 70, 70)
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.1", strict=False) as s:
        found = base.get_video_features(video).pooler_output[0]
    assert s.trace[0].n_in == (27,) and s.trace[0].n_out == (14,)
    keep = torch.zeros(27, dtype=torch.bool)
    keep[s.trace[0].source[0]] = True

    # group g of 3 x 3 holds rows 2g, 2g + 1 of 5: the last one has a single row
    patches = keep.view(3, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    patches = patches[:, :5, :5].flatten(1)  # [3, 25]
    with torch.no_grad():
        x = tower.embeddings(video[0])
        x = tower.encoder.layers[0](x, None)
        dropped = x
        mask = torch.zeros(3, 1, 25, 25).masked_fill(~patches[:, None, None], -1e30)
        for layer in tower.encoder.layers[1:]:
            x = layer(x, mask)
        x = torch.where(patches[..., None], x, dropped)
        wanted = base.apply_pooling(base.multi_modal_projector(x)).flatten(0, 1)
    wanted = torch.where(keep[:, None], wanted, 0)
    assert (found[:27] - wanted).abs().max() < 1e-5
    assert torch.equal(found[27], base.image_newline)


@pytest.mark.parametrize("method", ["random", "tome_merge"])
def test_videos_of_one_frame(method: str) -> None:
    fam = families.make("llava_onevision")
    pixels = torch.randn(1, 1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, *[families.VIDEO] * 5, 7]])
    inputs = {"input_ids": ids, "pixel_values_videos": pixels}
    with torch.no_grad(), vtc.attach(fam.model, method, keep=0.5, at="vision.1") as session:
        assert fam.model(**inputs).logits.isfinite().all()
    assert session.trace[0].n_in == (4,) and session.trace[0].n_out == (2,)


def test_the_loss_is_a_mean_over_frames() -> None:
    """An image beside a video changes nothing, and videos weigh by their frames."""
    module, loss = scorer().train(), {}
    for name, grids in {
        "alone": (Layout(3, 2, 2),),
        "beside": (Layout(3, 2, 2), Layout(1, 2, 2)),
        "both": (Layout(3, 2, 2), Layout(5, 2, 2)),
    }.items():
        ctx = context(*grids)
        k = tuple(grid.n - 1 for grid in grids)
        loss[name] = STTS().decide(module, ctx, k).loss
    one = context(Layout(3, 2, 2), Layout(5, 2, 2))
    five = Context(
        **{
            **vars(one),
            **{name: getattr(one, name)[1:] for name in ("x", "visual", "source")},
            **{name: getattr(one, name)[1:] for name in ("counts", "original", "layout")},
        }
    )
    second = STTS().decide(module, five, (19,)).loss
    first = Context(
        **{
            **vars(five),
            "x": one.x[:1, :12],
            "visual": one.visual[:1, :12],
            "source": one.source[:1, :12],
            "counts": (12,),
            "original": (12,),
            "layout": (Layout(3, 2, 2),),
        }
    )
    third = STTS().decide(module, first, (11,)).loss
    assert loss["alone"] is not None and second is not None and third is not None
    assert torch.allclose(loss["both"], (2 * third + 4 * second) / 6)
    assert torch.allclose(loss["beside"], loss["alone"])


def test_nothing_is_kept_of_forwards_that_do_not_train() -> None:
    fam = families.make("qwen2_5_vl")
    with vtc.attach(fam.model, "stts", keep=0.5, at="vision.1") as session:
        fam.model(**fam.inputs)
        assert session.take_loss() == 0.0


def test_grids_of_an_earlier_video_are_no_grids_of_an_image() -> None:
    fam = families.make("qwen2_vl", images_per_row=(1,))
    gen = torch.Generator().manual_seed(0)
    grid = torch.tensor([[2, 8, 6]])
    pixels = torch.randn(96, 3 * 2 * 14 * 14, generator=gen)
    with torch.no_grad(), vtc.attach(fam.model, "evs", keep=0.5) as session:
        fam.model.model.get_video_features(pixels, grid)
        fam.model(**fam.inputs)
    t, h, w = fam.inputs["image_grid_thw"][0].tolist()
    assert session.trace[-1].layout == (Layout(t, h // 2, w // 2),)


def test_the_default_site_fits_the_tower() -> None:
    """The paper's block where there is one, else the last that drops in front of another."""
    fam = families.make("llava_onevision")
    with torch.no_grad(), vtc.attach(fam.model, "stts_heuristic", keep=0.5) as session:
        fam.model(**fam.inputs)
    assert session.trace[-1].site == "vision.2"
    sites = frozenset(f"vision.{i}" for i in range(25)) | {"projector"}
    assert Host(24, sites).selecting("vision.4") == "vision.4"
