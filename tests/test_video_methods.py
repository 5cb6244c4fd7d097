"""Methods that compare frames: EVS, VidCom2, DyCoke and FrameFusion, against slow loops that are
written from the formulas, and the rows that adapters hand them: whole videos of every family.

Contracts (budgets, masking, batches, gradients, ...) are in `test_contract`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vtc
from vtc import draw
from vtc.algorithms.frames import share
from vtc.context import Layout, Signals, Site
from vtc.errors import InvalidBudget, InvalidInput, InvalidRecipe, UnsupportedModel
from vtc.methods.framefusion import even_ratio
from vtc.plan import Plan
from vtc.reducer import Host
from vtc.session import Reduction
from vtc.testing import batches, families, oracle, towerref, trace

WIDTH = 6
TOLERANCE = 1e-4
#: frames, cells and tokens behind them
SHAPES = [(1, 6, 0), (2, 4, 1), (3, 6, 0), (5, 4, 1), (9, 2, 0)]


def clip(frames: int, cells: int, tail: int = 0, seed: int = 0) -> Tensor:
    """[N, D] tokens of which some repeat almost exactly from frame to frame."""
    gen = torch.Generator().manual_seed(seed)
    video = torch.randn(frames, cells, WIDTH, generator=gen)
    still = torch.rand(frames, cells, generator=gen) < 0.4
    for t in range(1, frames):
        video[t, still[t]] = video[t - 1, still[t]] + 0.3 * video[t, still[t]]
    return torch.cat([video.flatten(0, 1), torch.randn(tail, WIDTH, generator=gen)])


def context(
    clips: list[Tensor],
    layouts: list[Layout | None],
    sources: list[list[int]] | None = None,
    at: str = "projector",
    depth: int = 0,
    history: tuple[tuple[int, ...], ...] = (),
    **signals: Tensor,
) -> vtc.Context:
    """Right-padded rows; `sources` where only a part of a grid is left."""
    counts = tuple(map(len, clips))
    places = [torch.tensor(s) for s in sources or [list(range(n)) for n in counts]]
    pad = torch.nn.utils.rnn.pad_sequence
    whole = zip(layouts, counts, strict=True)
    return vtc.Context(
        x=pad(clips, batch_first=True),
        visual=torch.arange(max(counts)) < torch.tensor(counts)[:, None],
        counts=counts,
        original=tuple(n if grid is None else grid.n for grid, n in whole),
        source=pad(places, batch_first=True),
        layout=tuple(layouts),
        site=Site.parse(at),
        signals=Signals({name: lambda value=value: value for name, value in signals.items()}),
        depth=depth,
        history=history,
    )


def video(shape: tuple[int, int, int], seed: int = 0) -> vtc.Context:
    frames, cells, tail = shape
    return context([clip(*shape, seed=seed)], [Layout(frames, 1, cells, tail)])


def kept(plan: Plan, row: int = 0) -> list[int]:
    return plan.index[row, : plan.kept[row]].tolist()


def method(name: str, **params: Any) -> Any:
    return vtc.REDUCERS[name](**params)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def best(scores: dict[int, float], k: int) -> list[int]:
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:k])


def with_tail(shape: tuple[int, int, int], k: int, choose: Any) -> list[int]:
    """Frames are chosen from with what the tokens behind them leave."""
    frames, cells, tail = shape
    room = k - tail if k > tail else k
    behind = list(range(frames * cells, frames * cells + tail)) if k > tail else []
    return choose(room) + behind


# --------------------------------------------------------------------------------------------
# the same from the formulas, token by token


def slow_share(weights: list[float], k: int, most: int) -> list[int]:
    """Whole numbers in proportion to the weights, at most `most`; what rounds to one goes first."""
    full: set[int] = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in full)
        unit = (k - len(full) * most) / rest if rest else 0.0
        over = {i for i, w in enumerate(weights) if i not in full and w * unit > most + 1e-9}
        if not over:
            break
        full |= over
    exact = [float(most) if i in full else w * unit for i, w in enumerate(weights)]
    out = [math.floor(e + 1e-9) for e in exact]
    order = [i for i in range(len(out)) if out[i] < most]
    order.sort(key=lambda i: (-(exact[i] - out[i] + (0.5 - 1e-9 <= exact[i] < 1)), i))
    for i in order[: k - sum(out)]:
        out[i] += 1
    return out


def slow_novelty(x: Tensor, cells: int) -> dict[int, float]:
    mean = x[:cells].double().mean(0)
    return {c: 1 - cosine(x[c], mean) for c in range(cells)}


def slow_evs(x: Tensor, shape: tuple[int, int, int], k: int, first: str) -> list[int]:
    frames, cells, _ = shape
    score = slow_novelty(x, cells)
    if first == "keep" and k >= cells:
        score = dict.fromkeys(range(cells), 255.0)
    for place in range(cells, frames * cells):
        score[place] = 1 - cosine(x[place], x[place - cells])
    return best(score, k)


def slow_vidcom2(x: Tensor, shape: tuple[int, int, int], k: int) -> list[int]:
    frames, cells, _ = shape
    x = x[: frames * cells].double()
    spread = [float(((c - c.mean()) ** 2).mean()) for c in x.T]
    low = sorted(range(WIDTH), key=lambda c: spread[c])[: WIDTH // 2]
    x = x[:, low]
    x = torch.stack([row / row.norm() for row in x])

    def g(token: Tensor, centre: Tensor) -> float:
        d = float(((token - centre) ** 2).sum())
        return sum(math.exp(-d / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    of_video = [g(token, x.mean(0)) for token in x]
    spans = [range(f * cells, (f + 1) * cells) for f in range(frames)]
    of_frame = [g(x[i], x[list(span)].mean(0)) for span in spans for i in span]
    u = [-sum(of_video[i] for i in span) / cells for span in spans]
    raised = [math.exp((value - max(u)) / 0.01) for value in u]
    p = [value / sum(raised) for value in raised]
    quota = slow_share([1 + q - 1 / frames for q in p], k, cells)
    picked: list[int] = []
    for span, n in zip(spans, quota, strict=True):
        picked += best({i: -(of_video[i] + of_frame[i]) for i in span}, n)
    return sorted(picked)


def slow_dycoke(x: Tensor, shape: tuple[int, int, int], k: int | None) -> list[int]:
    """k=None: the paper's numbers of tokens."""
    frames, cells, _ = shape
    few = math.floor(0.3 * cells + 1e-9)
    quota = [cells if f % 4 == 0 else few for f in range(frames)]
    if k is not None:
        quota = slow_share([max(n, 1e-3) for n in quota], k, cells)
    picked: list[int] = []
    for f in range(frames):
        base = {0: f - 4, 1: f - 1, 2: f - 2, 3: f - 1}[f % 4]
        span = range(f * cells, (f + 1) * cells)
        if f == 0:
            score = slow_novelty(x, cells)
        else:
            score = {i: 1 - cosine(x[i], x[i - (f - base) * cells]) for i in span}
        picked += best(score, quota[f])
    return sorted(picked)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropping_methods_equal_loops_over_tokens_at_every_budget(shape: tuple[int, int, int]):
    ctx, n = video(shape), shape[0] * shape[1] + shape[2]
    x = ctx.x[0]
    for k in range(1, n):
        for first in ("keep", "score"):
            plan = method("evs", first=first).plan(ctx, (k,))
            expected = with_tail(shape, k, lambda room, f=first: slow_evs(x, shape, room, f))
            assert kept(plan) == expected, (k, first)
        plan = method("vidcom2").plan(ctx, (k,))
        assert kept(plan) == with_tail(shape, k, lambda room: slow_vidcom2(x, shape, room)), k
        plan = method("dycoke_ttm").plan(ctx, (k,))
        assert kept(plan) == with_tail(shape, k, lambda room: slow_dycoke(x, shape, room)), k
    plan = method("dycoke_ttm").plan(ctx, (n,))  # keep="auto"
    assert kept(plan) == with_tail(shape, n, lambda _: slow_dycoke(x, shape, None))


@pytest.mark.parametrize("name", ["evs", "vidcom2", "dycoke_ttm"])
def test_a_batch_of_videos_and_an_image_equals_each_alone(name: str):
    shapes = [*SHAPES, SHAPES[1]]
    clips = [clip(*shape, seed=i) for i, shape in enumerate(shapes)]
    layouts: list[Layout | None] = [Layout(t, 1, c, tail) for t, c, tail in shapes]
    layouts[0] = None  # an image of unknown grid
    k = tuple(max(1, len(x) // 3) for x in clips)
    together = method(name).plan(context(clips, layouts), k)
    assert together.kept == k
    for row, (x, layout) in enumerate(zip(clips, layouts, strict=True)):
        alone = method(name).plan(context([x], [layout]), (k[row],))
        assert kept(together, row) == kept(alone)


def test_shares_are_exact_and_full_frames_pass_theirs_on():
    weights = torch.tensor([[3.0, 1, 1, 1], [1, 1, 1, 1], [1.9, 0.9, 0.9, 0.9], [8.0, 1, 1, 2]])
    assert share(weights, (8, 6, 4, 17), 5).tolist() == [
        [4, 2, 1, 1],  # 4, 4/3, 4/3, 4/3
        [2, 2, 1, 1],
        [1, 1, 1, 1],  # no frame is empty
        [5, 4, 3, 5],  # the first is full and leaves 12 for 1, 1, 2: so is the last, 3.5 and 3.5
    ]
    for seed in range(20):
        gen = torch.Generator().manual_seed(seed)
        frames, most = 2 + seed % 5, 4 + seed % 3
        w = torch.rand(1, frames, generator=gen) + 0.01
        for k in range(1, frames * most + 1):
            assert share(w, (k,), most)[0].tolist() == slow_share(w[0].tolist(), k, most)


# --------------------------------------------------------------------------------------------
# by hand: frames of two cells, tokens in the plane, "east" and "north"

E, N, W = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def drawn(*frames: list[list[float]], tail: int = 0) -> vtc.Context:
    x = torch.tensor([token for frame in frames for token in frame] + [E] * tail)
    return context([x], [Layout(len(frames), 1, len(frames[0]), tail)])


def test_evs_by_hand():
    # frame 1 repeats, frame 2 turns its second cell by 90 degrees, frame 3 its first by 180
    ctx = drawn([E, E], [E, E], [E, N], [W, N], tail=1)
    assert kept(method("evs").plan(ctx, (4,))) == [0, 1, 6, 8]  # a frame, the strongest, newline
    assert kept(method("evs").plan(ctx, (5,))) == [0, 1, 5, 6, 8]
    assert kept(method("evs").plan(ctx, (2,))) == [6, 8]  # less than a frame: all compete
    assert kept(method("evs", first="score").plan(ctx, (4,))) == [0, 5, 6, 8]
    assert kept(method("evs").plan(ctx, (1,))) == [6]  # no room for the newline


def test_dycoke_by_hand():
    # window of four: 1 with 0, 3 with 2, 2 with 0; then a lone last frame, a first one again
    frames = [E, E, E, E], [E, N, E, E], [E, E, W, E], [E, E, W, N], [E, E, E, E]
    ctx = drawn(*frames)
    assert kept(method("dycoke_ttm").plan(ctx, (20,))) == [0, 1, 2, 3, 5, 10, 15, 16, 17, 18, 19]
    # 30 tokens to prune in three frames of four leave 4 + 3 * 1 and 4
    assert method("dycoke_ttm").plan(ctx, (20,)).kept == (11,)


def test_vidcom2_gives_more_to_the_frame_that_stands_out():
    # channels 2 and 3 vary most and are not looked at
    loud = [[1.0, 0.0, 9.0 * i, -7.0 * i] for i in range(8)]
    odd = [[0.2, 1.0, 0.0, 0.0], [-0.2, 1.0, 0.0, 0.0]]
    x = torch.tensor(loud[:4] + odd + loud[4:])
    plan = method("vidcom2").plan(context([x], [Layout(5, 1, 2)]), (6,))
    frames = [place // 2 for place in kept(plan)]
    assert [frames.count(f) for f in range(5)] == [1, 1, 2, 1, 1]


def test_framefusion_merges_runs_into_their_first_token():
    x = torch.tensor([[1.0, 0], [0, 1], [2.0, 0], [1, 0], [3.0, 0], [1, 0.1]])
    ctx = context([x], [Layout(3, 1, 2)], at="decoder.0", depth=4)
    plan = method("framefusion_merge", threshold=0.9, cost=0.5).plan(ctx, (6,))
    # cell 0 is one run of three, cell 1 turns in frame 1 and then stays
    assert kept(plan) == [0, 1, 3]
    assert vtc.ops.apply(plan, ctx.x)[0].tolist() == [[2.0, 0], [0, 1], [1.0, pytest.approx(0.05)]]
    assert plan.size is not None and plan.size.tolist() == [[3.0, 1, 2]]
    assert plan.assign is not None and plan.assign.tolist() == [[0, 1, 0, 2, 0, 2]]


# --------------------------------------------------------------------------------------------
# FrameFusion


def slow_merge(
    x: Tensor, source: list[int], cells: int, gone: int | None, threshold: float
) -> tuple[list[int], dict[int, list[int]]]:
    """Kept positions and the members of each; gone=None takes all pairs above the threshold."""
    order = sorted(range(len(x)), key=lambda i: (source[i] % cells, source[i]))
    pairs = [
        (cosine(x[a], x[b]), source[a] % cells == source[b] % cells, j + 1)
        for j, (a, b) in enumerate(zip(order, order[1:], strict=False))
    ]
    pairs.sort(key=lambda pair: (not pair[1], -pair[0], pair[2]))
    if gone is None:
        merged = {j for sim, same, j in pairs if same and sim >= threshold}
    else:
        merged = {j for _, _, j in pairs[:gone]}
    groups: dict[int, list[int]] = {}
    for j, i in enumerate(order):
        if j not in merged:
            leader = i
            groups[leader] = []
        groups[leader].append(i)
    return sorted(groups), groups


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_framefusion_merging_equals_loops_at_every_budget(frames: int):
    cells = 4
    x = clip(frames, cells)
    source = [i for i in range(frames * cells) if i not in (5, 9)]  # an earlier step dropped some
    x = x[source]
    sizes = torch.arange(1.0, len(x) + 1)[None]
    ctx = context([x], [Layout(frames, 2, 2)], [source], "decoder.1", 9, token_size=sizes)
    for k in (*range(1, len(x)), None):
        gone = None if k is None else len(x) - k
        params = {} if k else {"threshold": 0.8, "cost": 0.1}
        plan = method("framefusion_merge", **params).plan(ctx, (k or len(x),))
        if k is None:  # the budget allows to merge all but one token
            places, groups = slow_merge(x, source, cells, None, 0.8)
        else:
            places, groups = slow_merge(x, source, cells, gone, 0.0)
        assert kept(plan) == places
        merged = vtc.ops.apply(plan, ctx.x)[0]
        for slot, place in enumerate(places):
            mean = x[groups[place]].double().mean(0)
            assert (merged[slot] - mean).abs().max() < 1e-6
            assert plan.size is not None
            assert plan.size[0, slot] == sum(i + 1 for i in groups[place])


def test_merging_stops_at_the_compute_budget():
    x = torch.ones(12, WIDTH)  # all alike: everything could merge
    ctx = context([x], [Layout(6, 1, 2)], at="decoder.0", depth=10)
    plan = method("framefusion_merge", cost=0.5).plan(ctx, (12,))
    assert plan.kept == (6,)  # 10 layers of 6
    late = context([x], [Layout(6, 1, 2)], at="decoder.2", depth=10, history=((12,), (12,)))
    # (60 - 24) / 8 = 4.5 may stay: the number that merges, 7.5, is rounded down
    assert method("framefusion_merge", cost=0.5).plan(late, (12,)).kept == (5,)


@pytest.mark.parametrize("cost", [0.3, 0.5])
def test_pruning_meets_the_compute_budget(cost: float):
    attention = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(1))
    history = ((100,), (60,))
    ctx = context(
        [torch.ones(40, WIDTH)],
        [Layout(10, 2, 5)],
        [list(range(40))],
        "decoder.2",
        20,
        history,
        attn_last=attention,
    )
    left = round((100 * 20 * cost - 160) / 18)
    plan = method("framefusion_prune", cost=cost).plan(ctx, (40,))
    if left >= 40:
        assert plan.kept == (40,)  # merging has met it
    else:
        mean = {i: float(attention[0, :, i].mean()) for i in range(40)}
        assert kept(plan) == best(mean, left)
    with pytest.raises(InvalidBudget, match="have spent the compute budget cost=0.05"):
        method("framefusion_prune", cost=0.05).plan(ctx, (40,))


@pytest.mark.parametrize(("cost", "depth", "merges"), [(0.3, 28, 2), (0.25, 4, 2), (1.0, 9, 1)])
def test_a_fixed_schedule_costs_what_was_asked(cost: float, depth: int, merges: int):
    parts = method("framefusion", merges=merges).parts(Host(depth), cost)
    share, widths = 1.0, []
    budgets = {int(part.at.removeprefix("decoder.")): part.keep for part in parts}
    for layer in range(depth):
        share = budgets.get(layer, share)
        widths.append(share)
    assert sum(widths) / depth == pytest.approx(cost)
    assert [p.method for p in parts] == ["framefusion_merge"] * merges + ["framefusion_prune"]
    assert even_ratio(1.0, merges, depth) == 1.0


def test_framefusion_by_threshold_meets_its_cost_on_a_model():
    fam, inputs = clips_of("llava", ["video"])
    with vtc.attach(fam.model, "framefusion", keep="auto", merges=1, cost=0.5) as session:
        fam.model(**inputs)
    widths = [r.n_out[0] for r in session.trace]
    n = session.trace[0].n_in[0]
    assert session.recipe.steps[0].keep == "auto" and len(widths) == 2
    assert widths[1] == round((0.5 * 4 * n - widths[0]) / 3)
    assert session.stats()["visual_tokens"] == pytest.approx(0.5 * n, abs=0.5)


# --------------------------------------------------------------------------------------------
# rows: which tokens are which frame


def clips_of(
    name: str, *kinds: list[str], frames: int = 3
) -> tuple[families.Family, families.Inputs]:
    """A family and one prompt per argument. "frames" are images that touch, "video" is a video of
    the model's own, or where it has none, images with text between them."""
    fam = families.make(name)
    rows = []
    for r, row in enumerate(kinds):
        gen = torch.Generator().manual_seed(40 + r)
        segments = [batches.words(3 + r, gen)]
        for j, kind in enumerate(row):
            for i in range(frames if kind == "frames" or fam.recipe.video is None else 1):
                if i and kind != "frames":
                    segments.append(batches.words(2, gen))
                make = fam.recipe.video if kind == "video" else None
                segments.append((make or fam.recipe.image)(j, gen))
            segments.append(batches.words(4, gen))
        rows.append(segments)
    return fam, families.collate(rows, fam.recipe, "left", torch.float32)


def layouts(name: str, *kinds: list[str], at: str = "evs", **options: Any) -> Any:
    fam, inputs = clips_of(name, *kinds)
    with vtc.attach(fam.model, at, keep=0.5) as session:
        fam.model.generate(**inputs, max_new_tokens=1, **options)
    first = session.trace[0]
    shapes = [g and (g.frames, g.height, g.width, g.tail) for g in first.layout]
    assert all(g is None or g.n == n for g, n in zip(first.layout, first.n_in, strict=True))
    return list(zip(first.samples, shapes, strict=True))


V = ["video"]


@pytest.mark.parametrize(
    ("name", "kinds", "expected"),
    [
        ("llava", [["frames"], V], [(0, (3, 8, 8, 0)), (1, (3, 8, 8, 0))]),
        ("internvl", [V, ["frames"]], [(0, (3, 4, 4, 0)), (1, (3, 4, 4, 0))]),
        ("smolvlm", [V], [(0, (3, 4, 4, 0))]),
        ("llava_onevision", [[*V, *V], V + ["image"]],
         [(0, (4, 2, 2, 0)), (0, (4, 2, 2, 0)), (1, (4, 2, 2, 0)), (1, None)]),
        ("qwen2_5_vl", [[*V, *V], V], [(0, (3, 4, 4, 0))] * 2 + [(1, (3, 4, 4, 0))]),
        ("qwen3_vl", [[*V, *V], V + ["image"]],
         [(0, (3, 2, 4, 0)), (0, (3, 2, 4, 0)), (1, (3, 2, 4, 0)), (1, (1, 6, 4, 0))]),
    ],
)  # fmt: skip
def test_a_row_is_a_whole_video(name: str, kinds: list[list[str]], expected: list[Any]):
    assert layouts(name, *kinds) == expected
    beams = [(s * 2 + b, g) for s in range(2) for b in range(2) for o, g in expected if o == s]
    assert layouts(name, *kinds, num_beams=2) == beams


def test_other_methods_still_get_every_frame_as_a_row_where_text_stands_between():
    assert layouts("qwen3_vl", V, at="random") == [(0, (1, 2, 4, 0))] * 3
    assert layouts("internvl", V, at="random") == [(0, (1, 4, 4, 0))] * 3
    assert layouts("llava_onevision", V, at="random") == [(0, (4, 2, 2, 0))]
    assert layouts("llava", ["frames"], at="random") == [(0, (3, 8, 8, 0))]


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_molmo_tells_the_grids_of_its_videos_to_the_method_that_encodes_them(how: str):
    fam = families.make("molmo2")
    with vtc.attach(fam.model, "evs", keep=0.5) as session:
        if how == "forward":
            fam.model(**fam.inputs)
        else:
            fam.model.generate(**fam.inputs, max_new_tokens=1)
    assert session.trace[0].layout == (Layout(3, 3, 3), Layout(4, 3, 3), Layout(5, 3, 3))
    assert session.trace[0].samples == (0, 1, 1)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_glm_writes_its_videos_with_image_placeholders(how: str):
    fam = families.make("glm4v", row=0)
    frame = [502, *[families.IMAGE] * 8, 503, 7]
    ids = torch.tensor([[5, 504, *frame * 3, 505, 9, 504, *frame * 2, 505, 11]])
    gen = torch.Generator().manual_seed(0)
    grids = torch.tensor([[3, 4, 8], [2, 4, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == families.IMAGE) * 2,
        "pixel_values_videos": torch.randn(160, 3 * 2 * 14 * 14, generator=gen),
        "video_grid_thw": grids,
    }
    with vtc.attach(fam.model, "evs", keep=0.5) as session:
        if how == "forward":
            fam.model(**inputs)
        else:
            fam.model.generate(**inputs, max_new_tokens=2)
    assert session.trace[0].layout == (Layout(3, 2, 4), Layout(2, 2, 4))
    assert "get_video_features" not in vars(fam.model.model)


def test_videos_whose_frames_are_not_known_are_refused():
    fam, inputs = clips_of("qwen3_vl", V)
    with torch.no_grad():
        ready = fam.model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        )
    given = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "video_grid_thw")}
    with (
        vtc.attach(fam.model, "evs", keep=0.5, strict=False),
        pytest.raises(InvalidInput, match=r"which frame is not known: runs of \[8\] placeholders"),
    ):
        fam.model(**given, mm_encoder_outputs={"video": ready})
    with pytest.raises(UnsupportedModel, match="compares the frames of one video, scope='sample'"):
        vtc.attach(fam.model, "evs", keep=0.5, scope="sample")
    recipe = {"steps": [{"method": m, "at": a, "keep": k} for m, a, k in
                        (("random", "vision.1", 0.5), ("evs", "projector", 0.25))]}  # fmt: skip
    with (
        vtc.attach(fam.model, recipe, strict=False),
        pytest.raises(InvalidInput, match="evs at projector: row 0 has 12 of its 24 tokens"),
    ):
        fam.model(**inputs)


# --------------------------------------------------------------------------------------------
# dropping equals masking, where the contracts have no such prompt


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llava", [["frames"], [*V, "frames"]]),
        ("llava_onevision", [[*V, *V], V + ["image"]]),
        ("qwen2_5_vl", [[*V, *V], V]),
        ("qwen3_vl", [[*V, *V], V + ["image"]]),
    ],
)
@pytest.mark.parametrize("recipe", ["dycoke", "framefusion"])
def test_two_videos_and_video_with_image_equal_masking(
    name: str, kinds: list[list[str]], recipe: str
):
    fam, inputs = clips_of(name, *kinds)
    params = {"first": 1} if recipe == "dycoke" else {}
    with vtc.attach(fam.model, recipe, keep=0.3, **params) as session:
        run = fam.model.generate(
            **inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
        )
    tokens = run.sequences[:, inputs["input_ids"].shape[1] :]
    rows = rows_of(session.trace[0], fam.visual(inputs))
    newline = towerref.newlines(fam, inputs)
    masks = masks_of(session.trace, rows, fam.visual(inputs), newline)
    expected, _ = oracle.run(families.make(name), inputs, forced=tokens, **masks)
    worst = max((a - b).abs().max().item() for a, b in zip(run.logits, expected, strict=True))
    assert worst <= TOLERANCE


def rows_of(first: Any, visual: Tensor) -> list[trace.Row]:
    """The runs of each prompt, given out in order to rows that are as long."""
    runs = trace.rows_of(visual)
    out: list[trace.Row] = []
    for sample, n in zip(first.samples, first.n_in, strict=True):
        columns: list[int] = []
        while len(columns) < n:
            owner, run = runs.pop(0)
            assert owner == sample
            columns += run
        out.append((sample, columns))
    assert not runs
    return out


def masks_of(
    reductions: Any, rows: list[trace.Row], visual: Tensor, newline: Tensor
) -> dict[str, Any]:
    """Keep, mix and evict of the oracle."""
    masks = trace.Masks()
    for reduction in reductions:
        if reduction.site.startswith("cache"):
            trace._evict(masks, reduction, rows, visual, newline)
        else:
            trace._add(masks, reduction, rows, visual, 0.0, newline)
    return {"keep": masks.keep, "mix": masks.mix, "evict": masks.evict}


# --------------------------------------------------------------------------------------------
# pictures, grids, parameters


def test_a_sub_grid_keeps_the_newline_behind_a_video():
    ctx = context([torch.zeros(9, 2)], [Layout(2, 2, 2, 1)])
    assert kept(method("grid").plan(ctx, (3,))) == [3, 7, 8]
    assert kept(method("grid").plan(ctx, (1,))) == [5]


def test_pictures_of_a_video_show_its_frames_and_not_what_is_behind_them():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green")]
    pictures = []
    for tail in (0, 1):
        grid, n = Layout(2, 2, 2, tail), 8 + tail
        plan = Plan(torch.tensor([[1, 5, 7]]), n)
        steps = torch.arange(n)[None]
        step = Reduction("projector", "hand", (n,), (3,), 0.0, plan, steps, (grid,), (0,))
        (fate,) = draw.fates(step)
        assert fate.layout == grid and fate.kept == (1, 5, 7)
        pictures.append(draw.overlay(frames, step, captions=False))
        whole = draw.overlay(frames, step)
        assert draw.prompt_picture(frames, [], [step]).tobytes() == whole.tobytes()
    assert pictures[0].tobytes() == pictures[1].tobytes()
    size = pictures[0].height
    dark, bright = pictures[0].getpixel((5, 5)), pictures[0].getpixel((size - 8, 8))
    assert bright[0] > 2 * dark[0]  # of the red frame only the second cell was kept


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("vidcom2", {"temperature": 0.0}, "temperature=0.0, but it is above 0"),
        ("dycoke_ttm", {"prune": 1.5}, "prune=1.5, but it is a share"),
        ("dycoke_cache", {"prune": 1.0}, "prune=1.0: a share"),
        ("dycoke_cache", {"first": -1}, "layers count from 0"),
        ("framefusion_merge", {"cost": 0.0}, "cost=0.0: a share"),
        ("framefusion_prune", {"cost": 2.0}, "cost=2.0: a share"),
        ("framefusion", {"merges": 0}, "it is at least 1"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, Any], words: str):
    with pytest.raises(InvalidRecipe, match=words):
        method(name, **params)


@pytest.mark.parametrize(
    ("params", "keep", "depth", "words"),
    [
        ({}, 64, 28, "keep=64 is a token count"),
        ({"merges": 4}, 0.3, 4, "leaves none to prune in"),
        ({}, "auto", 4, "alone cost 50% of all 4, and cost is 30%"),
    ],
)
def test_framefusion_refuses_budgets_it_cannot_meet(
    params: dict[str, Any], keep: Any, depth: int, words: str
):
    with pytest.raises(InvalidBudget, match=words):
        method("framefusion", **params).parts(Host(depth), keep)


def test_dycoke_writes_its_steps():
    parts = method("dycoke", prune=0.5).parts(Host(28), None)
    assert [(p.method, p.at, p.keep) for p in parts] == [
        ("dycoke_ttm", "projector", "auto"),
        ("dycoke_cache", "cache", "auto"),
    ]
    assert parts[0].params == {"prune": 0.5} and parts[1].params == {"prune": 0.7, "first": 3}
    assert [p.method for p in method("dycoke").parts(Host(28), 1.0)] == ["dycoke_ttm"]
    assert len(method("dycoke", decode=False).parts(Host(28), 0.3)) == 1
