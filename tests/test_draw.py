"""Pictures of hand-made plans, pixel by pixel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vtc
from vtc import draw
from vtc.context import Layout
from vtc.errors import InvalidInput
from vtc.plan import Plan
from vtc.session import Reduction
from vtc.testing import families

GRAY = (200, 100, 50)
CELL = 12


def reduction(plan: Plan | None, source, layout, site="projector", n_in=None) -> Reduction:
    source = torch.as_tensor(source)
    n_in = n_in or (source.shape[1],) * source.shape[0]
    n_out = n_in if plan is None else plan.kept
    layouts = layout if isinstance(layout, tuple) else (layout,) * source.shape[0]
    return Reduction(site, "hand", n_in, n_out, 0.0, plan, source, layouts, tuple(range(len(n_in))))


def keep(places: list[int], n: int) -> Plan:
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, places] = True
    return Plan.from_mask(mask)


def picture(columns: int, rows: int, color=GRAY) -> Image.Image:
    return Image.new("RGB", (columns * CELL, rows * CELL), color)


def middle(image: Image.Image, place: int, columns: int, x: int = 0, y: int = 0):
    """Pixel in the middle of a patch, in a panel that starts at x, y."""
    at = (x + place % columns * CELL + CELL // 2, y + place // columns * CELL + CELL // 2)
    return image.getpixel(at)


def dimmed(level: float, color=GRAY) -> tuple[int, ...]:
    return tuple(round(v * round(255 * level) / 255) for v in color)


def close(one, other, slack: int = 1) -> bool:
    return all(abs(a - b) <= slack for a, b in zip(one, other, strict=True))


def bare(image, reductions, row=0, size=0, **options) -> Image.Image:
    size = size or max(image.size if isinstance(image, Image.Image) else image[0].size)
    return draw.overlay(image, reductions, row, size=size, captions=False, **options)


def test_kept_patches_are_untouched_and_dropped_ones_dark_on_a_grid_that_is_not_square():
    columns, rows = 5, 3
    out = bare(
        picture(columns, rows),
        reduction(keep([0, 7, 14], 15), torch.arange(15)[None], Layout(1, 3, 5)),
    )
    assert out.size == (columns * CELL, rows * CELL)
    for place in range(15):
        expected = GRAY if place in (0, 7, 14) else dimmed(draw.DARK)
        assert close(middle(out, place, columns), expected), place


def test_a_kept_patch_has_a_light_line_and_whole_pixels_of_its_own():
    out = bare(picture(4, 4), reduction(keep([5], 16), torch.arange(16)[None], Layout(1, 4, 4)))
    box = [(x, y) for x in range(CELL, 2 * CELL) for y in range(CELL, 2 * CELL)]
    edge = {p for p in box if {p[0], p[1]} & {CELL, 2 * CELL - 1}}
    half = tuple((v + 255) / 2 for v in GRAY)
    assert all(close(out.getpixel(p), half, 2) for p in edge)
    assert all(out.getpixel(p) == GRAY for p in set(box) - edge)
    outside = [(CELL - 1, CELL), (2 * CELL, CELL), (CELL, CELL - 1), (CELL, 2 * CELL)]
    assert all(close(out.getpixel(p), dimmed(draw.DARK)) for p in outside)


def test_merged_patches_take_the_colour_of_the_patch_they_went_into():
    plan = Plan(torch.tensor([[1, 6]]), 8, None, torch.tensor([[0, 0, 0, -1, 1, 1, 1, -1]]))
    out = bare(picture(4, 2), reduction(plan, torch.arange(8)[None], Layout(1, 2, 4)))
    for place, home in {0: 1, 2: 1, 4: 6, 5: 6}.items():
        tint, under = draw.token_color(home), dimmed(draw.UNDER)
        mixed = tuple(draw.TINT * t + (1 - draw.TINT) * u for t, u in zip(tint, under, strict=True))
        assert close(middle(out, place, 4), mixed, 2), place
    assert close(middle(out, 3, 4), dimmed(draw.DARK))
    assert middle(out, 1, 4) == middle(out, 6, 4) == GRAY
    assert out.getpixel((CELL + 1, 1)) == draw.token_color(1)  # outlined, two pixels wide
    assert draw.token_color(1) != draw.token_color(6)


def two_stages() -> list[Reduction]:
    first = reduction(keep([0, 2, 3, 5, 8], 9), torch.arange(9)[None], Layout(1, 3, 3))
    later = Plan(torch.tensor([[1, 4]]), 5, None, torch.tensor([[-1, 0, 0, -1, 1]]))
    second = reduction(later, [[0, 2, 3, 5, 8]], Layout(1, 3, 3), "decoder.2")
    return [first, second]


def test_stages_compose_on_the_original_grid():
    first, second = draw.fates(two_stages())
    assert first.kept == (0, 2, 3, 5, 8) and not first.merged
    assert second.kept == (2, 8)
    assert second.merged == (3,) and second.home[3] == 2 and second.hosts == {2}
    assert second.lost == (1, 0, -1, -1, 0, 1, 0, 0, -1)
    assert second.caption == "decoder.2 hand: 2 of 9 tokens"


def test_a_later_stage_alone_shows_what_came_in_as_all_there_was():
    (alone,) = draw.fates(two_stages()[1])
    assert alone.kept == (2, 8) and alone.home == (-1, -1, 2, 2, -1, -1, -1, -1, 8)


def test_stages_whose_counts_do_not_chain_are_not_one_forward():
    first = reduction(keep([0, 1, 2], 9), torch.arange(9)[None], Layout(1, 3, 3))
    assert len(draw.fates([first, two_stages()[1]])) == 1


def test_a_newline_that_is_put_behind_a_video_does_not_end_its_story():
    first = reduction(keep([1, 3], 4), torch.arange(4)[None], Layout(2, 1, 2), "vision.1")
    tail = Layout(2, 1, 2, 1)
    second = reduction(keep([1, 2], 3), [[1, 3, 4]], tail, "decoder.1")
    one, two = draw.fates([first, second])
    assert one.home == (-1, 1, -1, 3) and one.layout == Layout(2, 1, 2)
    assert two.home == (-1, -1, -1, 3, 4) and two.lost == (0, 1, 0, -1, -1)
    assert two.layout == tail and two.caption == "decoder.1 hand: 2 of 5 tokens"
    frames = [picture(2, 1), picture(2, 1)]
    assert bare(frames, [first, second], stages=1).tobytes() != bare(frames, second).tobytes()
    for other in (
        reduction(None, [[0, 3, 4]], tail, "decoder.1"),  # other tokens
        reduction(None, [[1, 3, 4]], Layout(1, 2, 2, 1), "decoder.1"),  # another grid
        reduction(None, [[1, 3, 4], [1, 3, 4]], tail, "decoder.1"),  # more rows
    ):
        assert len(draw.fates([first, other])) == 1


def test_a_token_merged_twice_lives_where_its_host_went():
    a = Plan(torch.tensor([[0, 2]]), 4, None, torch.tensor([[0, 0, 1, 1]]))
    b = Plan(torch.tensor([[1]]), 2, None, torch.tensor([[0, 0]]))
    layout = Layout(1, 2, 2)
    stages = [
        reduction(a, [[0, 1, 2, 3]], layout),
        reduction(b, [[0, 2]], layout, "decoder.1"),
    ]
    assert draw.fates(stages)[-1].home == (2, 2, 2, 2)


def test_stages_stand_side_by_side_and_the_last_one_shows_when_a_patch_was_lost():
    both = bare(picture(3, 3), two_stages())
    assert both.size == (2 * 3 * CELL + draw.GAP, 3 * CELL)
    right = 3 * CELL + draw.GAP
    assert middle(both, 5, 3) == GRAY
    assert close(middle(both, 5, 3, right), dimmed(draw.DUSK))  # lost in the second stage
    assert close(middle(both, 1, 3, right), dimmed(draw.DARK))  # lost in the first
    last = bare(picture(3, 3), two_stages(), stages="last")
    assert last.tobytes() == both.crop((right, 0, right + 3 * CELL, 3 * CELL)).tobytes()


def test_frames_of_a_video_stand_in_a_row_each_with_its_own_picture():
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [picture(2, 2, color) for color in colors]
    plan = keep([0, 5, 10], 12)
    out = bare(frames, reduction(plan, torch.arange(12)[None], Layout(3, 2, 2)))
    step = 2 * CELL + draw.GAP // 2
    assert out.size == (3 * step - draw.GAP // 2, 2 * CELL)
    for frame, color in enumerate(colors):
        for place in range(4):
            kept = frame * 4 + place in (0, 5, 10)
            expected = color if kept else dimmed(draw.DARK, color)
            assert close(middle(out, place, 2, frame * step), expected)


def test_more_frames_than_time_steps_are_spread_over_them():
    frames = [picture(1, 1, (60 * i, 0, 0)) for i in range(4)]
    out = bare(frames, reduction(None, torch.arange(2)[None], Layout(2, 1, 1)))
    assert [out.getpixel((x, 5))[0] for x in (5, CELL + draw.GAP // 2 + 5)] == [0, 120]


def test_rows_of_a_batch_are_told_apart_also_when_they_are_padded():
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    plan = Plan.from_mask(mask)
    both = reduction(
        plan, [[0, 1, 2, 3], [0, 1, 0, 0]], (Layout(1, 2, 2), Layout(1, 1, 2)), n_in=(4, 2)
    )
    assert draw.fates(both, 0)[0].kept == (0, 3)
    assert draw.fates(both, 1)[0].home == (-1, 1)
    with pytest.raises(InvalidInput, match=r"row 2: these reductions have 2 image"):
        draw.fates(both, 2)


def test_without_a_grid_the_tokens_are_a_strip_in_reading_order():
    image = Image.new("RGB", (140, 70), GRAY)
    out = bare(image, reduction(keep([0, 12], 13), torch.arange(13)[None], None))
    assert out.getpixel((5, 5)) == GRAY  # the picture itself is not touched
    side = 14
    top = out.height - 2 * side  # 13 tokens in lines of 10
    centres = [(i % 10 * side + side // 2, top + i // 10 * side + side // 2) for i in range(13)]
    for place, at in enumerate(centres):
        expected = draw.BOX if place in (0, 12) else dimmed(draw.DARK, draw.BOX)
        assert close(out.getpixel(at), expected), place
    assert out.getpixel((3 * side + 5, top + side + 5)) == draw.BACKGROUND  # no 14th token


def test_a_layout_that_does_not_fit_the_tokens_is_not_believed():
    assert draw.fates(reduction(None, [[0, 1, 2, 3, 4]], Layout(1, 2, 2)))[0].layout is None


def test_nothing_reduced_leaves_the_picture_alone():
    layout = Layout(1, 2, 2)
    image = picture(2, 2)
    assert bare(image, reduction(None, [[0, 1, 2, 3]], layout)).tobytes() == image.tobytes()


def test_the_last_forward_of_a_trace_is_drawn():
    layout = Layout(1, 2, 2)
    old = [
        reduction(keep([0, 1], 4), [[0, 1, 2, 3]], layout),
        reduction(keep([0], 2), [[0, 1]], layout, "decoder.1"),
    ]
    new = [
        reduction(keep([2, 3], 4), [[0, 1, 2, 3]], layout),
        reduction(keep([1], 2), [[2, 3]], layout, "decoder.1"),
    ]
    assert [fate.kept for fate in draw.fates([*old, *new])] == [(2, 3), (3,)]
    assert [fate.kept for fate in draw.fates([old[0], new[0]])] == [(2, 3)]


def test_patches_stay_whole_pixels_whatever_size_is_asked_for():
    image = Image.new("RGB", (640, 480), GRAY)
    plan = keep([0], 24 * 18)
    out = bare(image, reduction(plan, torch.arange(24 * 18)[None], Layout(1, 18, 24)), size=250)
    assert out.width % 24 == 0 and out.height % 18 == 0 and abs(out.width - 250) < 13
    cell = out.width // 24
    kept = {(x, y) for x in range(cell) for y in range(cell)}
    bright = {
        (x, y) for x in range(out.width) for y in range(out.height) if out.getpixel((x, y))[0] > 100
    }
    assert bright == kept


def test_captions_and_sheets_have_room_for_their_text():
    shown = draw.overlay(picture(3, 3), two_stages(), size=120)
    assert shown.height > 120
    cell = draw.Cell(picture(3, 3), "a caption that is far too long for so small a picture", True)
    group = draw.Group(draw.Cell(picture(3, 3), "a question\nright: yes"), ("50%", "25%"))
    sheet = draw.sheet("A title", [group, group], [("one\nsite", [cell, None, cell, cell])], "note")
    margin = sheet.crop((sheet.width - 10, 0, sheet.width, sheet.height))
    assert margin.getcolors() == [(margin.width * margin.height, draw.BACKGROUND)]


def test_pictures_as_the_model_saw_them():
    tool = SimpleNamespace(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    processor = SimpleNamespace(image_processor=tool)
    pixels = torch.zeros(2, 3, 4, 6)
    pixels[1] = 2.0
    seen = draw.as_seen(processor, pixels)
    assert [s.size for s in seen] == [(6, 4), (6, 4)]
    assert [s.getpixel((0, 0)) for s in seen] == [(128, 128, 128), (255, 255, 255)]
    views = torch.cat([pixels + 0.1, torch.zeros(1, 3, 4, 6)])[None]  # filled up with an empty one
    assert [s.getpixel((0, 0))[0] for s in draw.as_seen(processor, views)] == [134, 255]
    assert draw.as_seen(processor, torch.zeros(16, 1176)) == draw.as_seen(processor, None) == []


def test_tiles_of_one_image_are_not_taken_for_a_grid():
    one = reduction(keep([0], 16), torch.arange(16)[None], Layout(1, 4, 4))
    image, tile = picture(4, 4), picture(2, 2)
    assert (
        draw.prompt_picture([image], [image], [one]).size
        != draw.prompt_picture([image], [tile] * 4, [one]).size
    )
    with pytest.raises(InvalidInput, match="2 image"):
        draw.prompt_picture([image, image], [], [one])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "smolvlm"])
def test_what_a_session_recorded_can_be_drawn(name: str):
    family = families.make(name)
    recipe = vtc.Recipe(
        (
            vtc.Step("divprune", "projector", 0.5, merge="nearest"),
            vtc.Step("norm", "decoder.1", 0.25),
        )
    )
    with vtc.attach(family.model, recipe) as session, torch.no_grad():
        family.model(**family.inputs)
    last = session.trace[-1]
    for row, kept in enumerate(last.n_out):
        before, after = draw.fates(session.trace, row)
        assert len(after.kept) == kept and len(before.kept) == last.n_in[row]
        shown = session.trace[0].source_in[row, : session.trace[0].n_in[row]].tolist()
        assert set(after.kept) <= set(before.kept)
        assert -1 not in [before.home[place] for place in shown]
        places = last.source[row, :kept].tolist()
        assert list(after.kept) == places
        draw.overlay(picture(3, 2), session.trace, row, size=90)


def test_nothing_to_draw_says_what_to_do():
    with pytest.raises(InvalidInput, match="run the model while the session is attached"):
        draw.overlay(picture(1, 1), [])
    with pytest.raises(InvalidInput, match="at least one frame"):
        draw.overlay([], two_stages())
