"""Images in tiles: newlines follow their line and are in no budget; every tile has its share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.adapters.vlm.rows import find_rows
from vtc.context import Context, Layout, Signals, Site
from vtc.errors import MissingSignal
from vtc.testing import families, oracle, towerref, trace

SITES: dict[str, tuple[str, Any]] = {
    "projector": ("random", 6),
    "decoder.2": ("norm", 6),
    "cache": ("random", 6),
    "vision.1": ("random", 3),  # of each tile
}
METHODS = ("random", "norm", "grid", "divprune", "fastervlm", "visionzip", "zoo_prune", "dart")


@functools.cache
def family(name: str, images: tuple[int, ...] = (1, 2)) -> families.Family:
    return families.make(name, images_per_row=images)


def lines(fam: families.Family) -> list[tuple[int, list[int], list[tuple[int, list[int]]]]]:
    """Sample and columns of every image, and of each newline its column and those of its line. The
    first 16 tokens are a view of the whole picture; by the sizes of the pictures, all lines are
    equally long."""
    newline = towerref.newlines(fam, fam.inputs)
    out = []
    for sample, columns in trace.rows_of(fam.visual()):
        found, line = [], []
        for column in columns[16:]:
            if newline[sample, column]:
                found.append((column, line))
                line = []
            else:
                line.append(column)
        assert found and not line and len({len(each) for _, each in found}) == 1
        out.append((sample, columns, found))
    return out


def columns_left(fam: families.Family, step: vtc.Step) -> tuple[Any, list[set[int]]]:
    """The trace, and original columns of every sample that the last layer's cache holds."""
    with torch.no_grad(), vtc.attach(fam.model, vtc.Recipe((step,), 1)) as session:
        cache = fam.model(**fam.inputs, use_cache=True).past_key_values
    stage = cache._vtc_state.stage(families.LAYERS - 1)
    found = zip(stage.origin, stage.valid, strict=True)
    return session.trace, [set(origin[valid].tolist()) for origin, valid in found]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_newline_stays_as_long_as_a_token_of_its_line_does(name: str, site: str) -> None:
    method, keep = SITES[site]
    fam = family(name)
    ran, left = columns_left(fam, vtc.Step(method, site, keep))
    gone = 0
    for sample, columns, found in lines(fam):
        newlines = {column for column, _ in found}
        tokens = left[sample] & set(columns) - newlines
        if site != "vision.1":
            assert len(tokens) == keep  # exactly: newlines are on top
        for column, line in found:
            stays = bool(tokens & set(line))
            assert (column in left[sample]) == stays
            gone += not stays
    assert gone and len(ran)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"merge": "nearest", "mass": 1.0}], ids=["drop", "merge"])
def test_no_method_sees_a_newline_and_nothing_merges_with_it(
    method: str, options: dict[str, Any]
) -> None:
    fam = family("llava_next")
    newline = towerref.newlines(fam, fam.inputs)
    at = "decoder.2" if method == "dart" else "projector"
    step = vtc.Step(method, at, 7, **options)
    with torch.no_grad(), vtc.attach(fam.model, vtc.Recipe((step,))) as session:
        fam.model(**fam.inputs)
    (entry,) = session.trace
    for row, (sample, columns, found) in enumerate(lines(fam)):
        seen = torch.tensor(columns)[entry.source_in[row, : entry.n_in[row]]]
        assert not newline[sample, seen].any()
        assert entry.n_in[row] == len(columns) - len(found) and entry.n_out[row] == 7
    if options:  # everything merges, and with nothing but tokens of the picture
        total = (entry.plan.size * entry.plan.slots).sum(1)
        assert torch.allclose(total, torch.tensor(entry.n_in).float())


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_no_bit(name: str, method: str) -> None:
    fam = family(name)
    at = "decoder.2" if method == "dart" else "projector"
    with torch.no_grad():
        plain = fam.model(**fam.inputs).logits
        with vtc.attach(fam.model, method, keep=1.0, at=at):
            assert torch.equal(fam.model(**fam.inputs).logits, plain)


@pytest.mark.parametrize("step", ["projector", "decoder.1", "cache"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_what_is_left_equals_masking_tokens_and_their_newlines(name: str, step: str) -> None:
    fam, ref = family(name), families.make(name, images_per_row=(1, 2))
    options: Any = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    with torch.no_grad(), vtc.attach(fam.model, "random", keep=5, at=step) as session:
        run = fam.model.generate(**fam.inputs, **options)
    masks = trace.masks(session.trace, fam.visual())
    tokens = run.sequences[:, fam.inputs["input_ids"].shape[1] :]
    wanted, _ = oracle.run(ref, fam.inputs, keep=masks.keep, evict=masks.evict, forced=tokens)
    for got, expected in zip(run.logits, wanted, strict=True):
        assert (got - expected).abs().max() <= 1e-4


def test_the_newline_after_a_video_is_on_top_of_its_budget() -> None:
    fam = families.make("llava_onevision", row=1)  # an image and a video
    newline = towerref.newlines(fam, fam.inputs)[0]
    ran, (left,) = columns_left(fam, vtc.Step("evs", "projector", 3))
    assert ran[-1].n_in[-1] == 16 and ran[-1].n_out[-1] == 3
    video = trace.rows_of(fam.visual())[-1][1]
    assert newline[video[-1]] and video[-1] in left and len(left & set(video)) == 4


def placed(text: str) -> Any:
    """Rows of one prompt: "o" a token, "|" a newline, "." text."""
    visual = torch.tensor([[c != "." for c in text]])
    newline = torch.tensor([[c == "|" for c in text]])
    return find_rows(visual, None, {}, "image", newline=newline)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("..oooooo|.", [[8] * 6]),  # one newline ends all there is
        ("oooooo|oo|", [[0, 1, 2, 3, 6, 6, 9, 9]]),  # a view of the whole picture, two lines
        ("ooo|ooo|.o|", [[3, 3, 3, 7, 7, 7], [10]]),
        ("oo|oo|ooooo|o|", [[2, 2, 5, 5, 6, 7, 8, 9, 11, 13]]),  # two images that touch
        ("|oo|o.", [[3, 3, 4]]),  # a line that began in the chunk before
    ],
)
def test_lines_are_found_without_the_grid(text: str, ends: list[list[int]]) -> None:
    rows = placed(text)
    assert [rows.ends[r, :n].tolist() for r, n in enumerate(rows.counts)] == ends


def test_a_run_of_newlines_alone_is_no_image() -> None:
    assert placed("..||.") is None
    assert placed("..|.oo|").counts == (2,)


def looked(k: int, tile: list[int], score: list[float], method: str = "fastervlm") -> list[int]:
    n = len(tile)
    signals = {
        "attn_cls": torch.tensor([score]),
        "tile": torch.tensor([tile]),
        "vision_keys": torch.eye(n)[None],
    }
    ctx = Context(
        x=torch.eye(n)[None],
        visual=torch.ones(1, n, dtype=torch.bool),
        counts=(n,),
        original=(n,),
        source=torch.arange(n)[None],
        layout=(None,),
        site=Site("projector"),
        signals=Signals({name: (lambda v=v: v) for name, v in signals.items()}),
    )
    cls: Any = vtc.registry.REDUCERS[method]
    plan = cls().plan(ctx, (k,))
    plan.check(ctx.visual)
    if method == "visionzip":
        group = torch.tensor(tile)
        there = plan.assign[0] >= 0
        assert torch.equal(group[plan.index[0]][plan.assign[0][there]], group[there])
    return plan.index[0].tolist()


def test_every_tile_has_its_own_budget() -> None:
    tile = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    score = [9.0, 8.0, 7.0, 0.1, 0.4, 0.2, 0.3, 5.0, 6.0]  # tile 0 has all of the highest
    assert looked(3, tile, score) == [0, 4, 8]
    assert looked(5, tile, score) == [0, 1, 4, 6, 8]
    assert looked(8, tile, score) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert looked(3, [0] * 9, score) == [0, 1, 2]  # one tile: the whole picture


def test_contextual_tokens_stay_within_their_tile() -> None:
    tile = [0] * 10 + [1] * 10
    score = torch.arange(20.0).flip(0).tolist()
    kept = looked(14, tile, score, "visionzip")
    assert len([i for i in kept if i < 10]) == len([i for i in kept if i >= 10]) == 7


@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "zoo_prune"])
def test_tiles_of_a_model_share_evenly(method: str) -> None:
    fam = family("llava_next")
    with torch.no_grad(), vtc.attach(fam.model, method, keep=12) as session:
        fam.model(**fam.inputs)
    (entry,) = session.trace
    for row, (_, columns, found) in enumerate(lines(fam)):
        n = entry.n_out[row]
        whole = int((entry.source[row, :n] < 16).sum())
        views = 5 if len(columns) - len(found) == 80 else 3
        assert whole == 12 // views + (12 % views > 0)


def test_tokens_that_no_projector_made_are_an_error_not_newlines() -> None:
    """Tiles that a model makes smaller after its projector."""
    fam = families.make("llava_next", row=0)
    base: Any = fam.model.model
    own = base.pack_image_features

    def pack(*args: Any, **kwargs: Any) -> Any:
        packed, counts = own(*args, **kwargs)
        return [torch.cat([image[:20], image[20:] * 0.5]) for image in packed], counts

    base.pack_image_features = pack
    with (
        torch.no_grad(),
        vtc.attach(fam.model, "fastervlm", keep=4, strict=False),
        pytest.raises(MissingSignal, match="tokens that equal no output of the projector"),
    ):
        fam.model(**fam.inputs)
    del base.pack_image_features


def test_a_base_view_with_one_newline_has_a_grid() -> None:
    visual = torch.ones(1, 17, dtype=torch.bool)
    newline = torch.zeros_like(visual)
    newline[0, -1] = True
    rows: Any = find_rows(visual, None, {}, "image", 16, newline=newline)
    assert rows.layout == (Layout(1, 4, 4),) and rows.counts == rows.original == (16,)
    assert isinstance(rows.ends, Tensor) and rows.ends.tolist() == [[16] * 16]
