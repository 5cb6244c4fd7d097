"""Is a drawn patch where its token looked? Known pictures through the image processors and
models of transformers: any-resolution tiles, packed towers with windows, frames of videos."""

from __future__ import annotations

import gc
import pickle
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vtc
from vtc import draw
from vtc.adapters.vlm.tiles import Packing
from vtc.context import Layout, Part
from vtc.draw.tiles import arrange
from vtc.errors import InvalidInput
from vtc.testing import configs, families

TILE, SIDE = 56, 4  # pixels of a tile of the tiny models, tokens along it
GREY = (128, 128, 128)
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def ramp(width: int, height: int) -> Image.Image:
    """Red says how far right a pixel is, green how far down."""
    red = torch.arange(width).add(0.5).div(width).expand(height, -1)
    green = torch.arange(height).add(0.5).div(height)[:, None].expand(-1, width)
    colors = torch.stack([red, green, torch.ones_like(red)], -1)
    return Image.fromarray((colors * 255).round().byte().numpy())


def tiling(name: str):
    """The image processor of an any-resolution family for tiles as small as the tiny models'."""
    cls = {
        "llava_next": transformers.LlavaNextImageProcessor,
        "llava_onevision": transformers.LlavaOnevisionImageProcessor,
    }[name]
    size = {"height": TILE, "width": TILE}
    return cls(size=size, crop_size=size, image_grid_pinpoints=configs.PINPOINTS, **PLAIN)


def colors_of_tokens(pixels: Tensor) -> Tensor:
    """[views, 3, H, W] -> [views, tokens, 3] mean colour of the patch of every token, 0 to 1."""
    pooled = F.avg_pool2d(pixels * 0.5 + 0.5, TILE // SIDE)
    return pooled.flatten(2).transpose(1, 2)


def check_colors(parts: tuple[Part, ...], tokens: Tensor, slack: float) -> None:
    """Every token has the colour of the place where it is drawn, within `slack` cells."""
    for part in parts:
        left, top, right, bottom = part.box
        wide, high = (right - left) / part.width, (bottom - top) / part.height
        for cell, place in enumerate(part.places):
            line, column = divmod(cell, part.width)
            x, y = left + (column + 0.5) * wide, top + (line + 0.5) * high
            red, green, blue = tokens[place].tolist()
            if blue > 0.99:  # no padding around the picture
                assert abs(red - x) < slack * wide and abs(green - y) < slack * high, (part, cell)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(150, 90), (90, 150), (112, 112), (56, 56), (200, 40), (61, 113)])
def test_tokens_of_tiles_are_drawn_where_they_looked(name: str, size: tuple[int, int]):
    model = families.make(name).model.model
    found = tiling(name)([ramp(*size)], return_tensors="pt")
    given = {"image_sizes": found["image_sizes"], "image_newline": torch.full((3,), -1.0)}
    if name == "llava_next":
        given["vision_feature_select_strategy"] = "default"
    features = {"image_features": [colors_of_tokens(found["pixel_values"][0])]}
    (tokens,), _ = model.pack_image_features(**features, **given)
    (parts,) = Packing(model.pack_image_features, features | given).parts
    assert len(parts) == 2 and parts[0] == Part(0, SIDE, SIDE, (0, 0, 1, 1))
    assert parts[1].end == len(tokens) and parts[1].gap == 1
    shown = {place for part in parts for place in part.places}
    assert shown == set((tokens[:, 2] >= 0).nonzero()[:, 0].tolist())  # all but newlines
    check_colors(parts, tokens, slack=0.3)


def test_tiles_that_are_scaled_down_are_drawn_where_they_looked():
    model = families.make("llava_onevision").model.model
    found = tiling("llava_onevision")([ramp(110, 112)], return_tensors="pt")
    features = {"image_features": [colors_of_tokens(found["pixel_values"][0])]}
    given = {"image_sizes": found["image_sizes"], "vision_aspect_ratio": "anyres_max_2"}
    (tokens,), _ = model.pack_image_features(**features, **given)
    (parts,) = Packing(model.pack_image_features, features | given).parts
    assert (parts[1].height, parts[1].width, parts[1].gap) == (5, 5, 0)  # of 8 x 8
    check_colors(parts, tokens, slack=0.3)


def test_an_image_of_one_view_has_no_tiles():
    model = families.make("llava_next").model.model
    given = {
        "image_features": [torch.zeros(1, 16, 8)],
        "image_sizes": torch.tensor([[50, 50]]),
        "vision_feature_select_strategy": "default",
        "image_newline": torch.zeros(8),
    }
    assert Packing(model.pack_image_features, given).parts == ((Part(0, 4, 4, (0, 0, 1, 1)),),)


def test_a_packing_that_is_no_grid_of_tiles_stays_unknown():
    def shuffled(image_features, image_sizes):
        return [torch.cat([views[0], views[1:].flatten(0, 1).flip(0)]) for views in image_features]

    given = {"image_features": [torch.zeros(3, 16, 8)], "image_sizes": torch.tensor([[50, 50]])}
    assert Packing(shuffled, given).parts == ((),)
    assert Packing(shuffled, given | {"image_features": [torch.zeros(3, 15, 8)]}).parts == ((),)

    def mixing(image_features, image_sizes):
        return [F.linear(views.flatten(0, 1), torch.eye(8)) for views in image_features]

    assert Packing(mixing, given).parts == ((),)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_session_records_the_tiles_of_every_image(name: str):
    family = families.make(name, images_per_row=(1, 2))
    with vtc.attach(family.model, "random", keep=0.5) as session, torch.no_grad():
        family.model(**family.inputs)
        family.model.generate(**family.single(1), num_beams=2, max_new_tokens=2)
    dense, beams = session.trace
    tokens = [sum(part.height * part.width for part in parts) for parts in dense.parts]
    assert tokens == list(dense.n_in)  # newlines have places, but no method sees them
    assert dense.layout == (None,) * 3  # methods see no grid: there is none
    assert set(dense.parts) == set(beams.parts) | set(dense.parts[:1])
    assert "pack_image_features" not in vars(family.model.model)


def test_tiles_are_found_when_they_are_read_and_not_in_a_forward():
    family = families.make("llava_next")
    base, calls = family.model.model, []
    own = base.pack_image_features

    def pack(image_features, image_sizes, vision_feature_select_strategy, image_newline=None):
        calls.append(len(image_features))
        width = family.model.config.text_config.hidden_size
        if image_features[0].shape[-1] != width:  # coordinates
            raise KeyError("a model's own code")
        return own(image_features, image_sizes, vision_feature_select_strategy, image_newline)

    base.pack_image_features = pack
    with vtc.attach(family.model, "random", keep=0.5) as session, torch.no_grad():
        family.model(**family.inputs)
    (entry,) = session.trace
    assert len(calls) == 1  # the forward's own
    assert list(map(tuple, entry.parts)) == [()] * len(entry.n_in) and len(calls) == 2

    del base.pack_image_features
    with vtc.attach(family.model, "random", keep=0.5) as session, torch.no_grad():
        family.model(**family.inputs)
    (entry,) = session.trace
    copy = pickle.loads(pickle.dumps(entry.parts))
    assert entry.parts == copy and {type(parts) for parts in copy} == {tuple}
    assert all(parts[0] == Part(0, SIDE, SIDE, (0, 0, 1, 1)) for parts in copy)


def test_tiles_are_found_without_the_device_of_the_features_and_keep_no_model():
    family = families.make("llava_next")
    given = {
        "image_features": [torch.zeros(3, 16, 8, device="meta")],  # nothing of it can be read
        "image_sizes": torch.tensor([[56, 112]]),
        "vision_feature_select_strategy": "default",
        "image_newline": torch.zeros(8, device="meta"),
    }
    packing = Packing(family.model.model.pack_image_features, given)
    given["image_sizes"] += 1000  # somebody's buffer
    with torch.device("meta"):
        (parts,) = packing.parts
    assert parts[1:] == (Part(16, 4, 8, (0, 0, 1, 1), 1),)
    later, model = Packing(family.model.model.pack_image_features, given), ref(family.model)
    del family
    gc.collect()
    assert model() is None and later.parts == ((),)


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    out = Image.new("RGB", size, GREY)
    out.paste((255, 255, 255), box)
    return out


def bright(panel: Image.Image) -> set[tuple[int, int]]:
    """Pixels that are not darkened, of a panel without its outlines."""
    at = range(0, panel.width), range(0, panel.height)
    return {(x, y) for x in at[0] for y in at[1] if panel.getpixel((x, y))[0] >= 128}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_overlay_of_tiles_is_bright_where_the_kept_tokens_looked(name: str):
    family = families.make(name)
    size, box = (110, 56), (28, 14, 56, 42)  # 2 x 1 tiles, 1 pixel of padding left and right
    found = tiling(name)([marked(size, box)], return_tensors="pt")
    ids = torch.cat([torch.arange(2, 6), torch.full((52,), families.IMAGE), torch.arange(6, 9)])
    inputs = {"input_ids": ids[None], **found}

    def brightness(module, args, output):  # in place of what a random tower would say
        # 0.5 where grey, 1 where white: the longest tokens look at the marked box
        return torch.ones_like(output) * colors_of_tokens(found["pixel_values"][0])[..., :1]

    handle = family.model.model.multi_modal_projector.register_forward_hook(brightness)
    with vtc.attach(family.model, "norm", keep=6) as session, torch.no_grad():
        family.model.model.image_newline.data.zero_()
        family.model(**inputs)
    handle.remove()
    panel = draw.overlay(marked(size, box), session.trace, size=112, captions=False)
    assert panel.size == (112 + 4 + 112, 56)
    whole, tiles = panel.crop((0, 0, 112, 56)), panel.crop((116, 0, 228, 56))
    assert {(x // 14, y // 14) for x, y in bright(tiles)} == {(2, 1), (3, 1), (2, 2), (3, 2)}
    assert {(x // 28, y // 14) for x, y in bright(whole)} == {(1, 1), (1, 2)}
    (fate,) = draw.fates(session.trace)
    assert len(fate.kept) == 6 and len(fate.home) == 52


def independent(model: torch.nn.Module) -> None:
    """Blocks of a packed tower that leave every patch as it is."""
    last = ("attn.proj", "mlp.down_proj", "mlp.linear_fc2", "mlp.fc2")
    for name, weights in model.named_parameters():
        if "visual.blocks" in name and any(part in name for part in last):
            weights.data.zero_()


QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
PATCH = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


def packed(image: Image.Image):
    tool = transformers.Qwen2VLImageProcessor(
        **PATCH, **PLAIN, size={"shortest_edge": 28 * 28, "longest_edge": 10**6}
    )
    found = tool([image], return_tensors="pt")
    units = found["image_grid_thw"].prod() // 4
    ids = torch.cat([torch.arange(2, 6), torch.full((units,), families.IMAGE), torch.arange(6, 9)])
    kinds = (ids == families.IMAGE).int()
    return {"input_ids": ids[None], "mm_token_type_ids": kinds[None], **found}


@pytest.mark.parametrize("name", QWEN[:3])  # glm4v makes all patches equally long before a block
def test_packed_towers_are_drawn_in_raster_order_windows_or_not(name: str):
    """5 x 7 units of 28 pixels: windows of 2 x 2 units are cut at both edges."""
    model = families.make(name).model
    independent(model)
    region = {(1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5)}  # line, column
    image = marked((7 * 28, 5 * 28), (4 * 28, 28, 6 * 28, 4 * 28))
    panels = {}
    for at in ("vision.0", "vision.2", "vision.3"):
        with vtc.attach(model, "norm", keep=6, at=at) as session, torch.no_grad():
            model(**packed(image))
        (stage,) = session.trace
        assert stage.layout == (Layout(1, 5, 7),)
        assert {divmod(place, 7) for place in stage.source[0].tolist()} == region
        panels[at] = draw.overlay(image, stage, size=196, captions=False)
        assert {(y // 28, x // 28) for x, y in bright(panels[at])} >= region
        assert panels[at].getpixel((4 * 28 + 14, 28 + 14)) == (255, 255, 255)
        assert panels[at].getpixel((14, 14))[0] < 128 * (draw.DARK + 0.01)
    assert panels["vision.0"].tobytes() == panels["vision.3"].tobytes()


@pytest.mark.parametrize("name", QWEN)
def test_tokens_of_the_language_model_are_in_raster_order_too(name: str):
    """Which embeddings change when a region of the picture does, in the model alone."""
    model = families.make(name).model
    independent(model)
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"][0])

    text = model.model.language_model
    handle = text.register_forward_pre_hook(look, with_kwargs=True)
    plain, image = Image.new("RGB", (196, 140), GREY), marked((196, 140), (112, 28, 168, 112))
    with torch.no_grad():
        model(**packed(plain))
        model(**packed(image))
    handle.remove()
    changed = (seen[0] - seen[1]).abs().amax(-1)[4:-3] > 1e-3
    places = changed.nonzero()[:, 0].tolist()
    with vtc.attach(model, "random", keep=0.5) as session, torch.no_grad():
        model(**packed(image))
    (grid,) = session.trace[0].layout
    assert grid == Layout(1, 5, 7)
    expected = {(y, x) for y in (1, 2, 3) for x in (4, 5)}
    assert {divmod(place, grid.width) for place in places} == expected


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_of_a_video_are_drawn_with_their_own_patches(name: str):
    model = families.make(name).model
    independent(model)
    boxes = [(0, 0, 28, 28), (56, 28, 84, 56), (28, 28, 56, 56)]
    clip = [marked((84, 56), box) for box in boxes for _ in range(2)]  # two frames are one step
    tool = transformers.Qwen2VLVideoProcessor(
        **PATCH, **PLAIN, size={"shortest_edge": 28 * 28, "longest_edge": 10**6}
    )
    found = tool(clip, return_tensors="pt", do_sample_frames=False)
    assert found["video_grid_thw"].tolist() == [[3, 4, 6]]
    ids = torch.cat([torch.arange(2, 6), torch.full((18,), families.VIDEO), torch.arange(6, 9)])
    kinds = 2 * (ids == families.VIDEO).int()
    with vtc.attach(model, "norm", keep=3, at="vision.2") as session, torch.no_grad():
        model(input_ids=ids[None], mm_token_type_ids=kinds[None], **found)
    assert session.trace[0].source[0].tolist() == [0, 6 + 5, 12 + 4]
    panel = draw.overlay(clip, session.trace, size=84, captions=False)
    for frame, (x, y, _, _) in enumerate(boxes):
        shown = panel.crop((frame * 88, 0, frame * 88 + 84, 56))
        white = {at for at in bright(shown) if shown.getpixel(at) == (255, 255, 255)}
        assert {(a // 28 * 28, b // 28 * 28) for a, b in white} == {(x, y)}


def cut(picture: Image.Image, columns: int, rows: int, whole: str) -> list[Image.Image]:
    """Tiles of one size, the whole picture before or behind them."""
    big = picture.resize((columns * 32, rows * 32))
    tiles = [
        big.crop((x, y, x + 32, y + 32))
        for y in range(0, big.height, 32)
        for x in range(0, big.width, 32)
    ]
    view = [picture.resize((32, 32))]
    return {"": tiles, "first": view + tiles, "last": tiles + view}[whole]


@pytest.mark.parametrize("whole", ["", "first", "last"])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (6, 1), (1, 6), (4, 3), (1, 2)])
def test_tiles_are_put_back_where_they_were(shape: tuple[int, int], whole: str):
    picture = ramp(170, 130)
    way = arrange(picture, cut(picture, *shape, whole))
    where = {"": None, "first": 0, "last": shape[0] * shape[1]}[whole]
    assert way is not None and (way.columns, way.rows, way.whole) == (*shape, where)


def test_pictures_that_are_no_tiles_of_the_picture_are_not_arranged():
    assert arrange(ramp(100, 80), [ramp(32, 32).rotate(90)] * 4) is None
    assert arrange(ramp(100, 80), [ramp(100, 80)]) is None


def test_equal_tiles_stand_as_the_shape_of_the_picture_says():
    way = arrange(Image.new("RGB", (300, 100), GREY), [Image.new("RGB", (32, 32), GREY)] * 3)
    assert way is not None and (way.columns, way.rows, way.whole) == (3, 1, None)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "internvl"])
@pytest.mark.parametrize("at", ["projector", "vision.1"])
def test_tiles_that_are_runs_or_frames_are_drawn_as_one_picture(name: str, at: str):
    """2 x 1 tiles and the whole picture, 16 tokens each; the model is told nothing of places."""
    model = families.make(name).model
    picture = ramp(150, 70)
    tiles = cut(picture, 2, 1, "last")
    pixels = torch.stack([torch.from_numpy(np.array(t.resize((56, 56)))) for t in tiles])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    run = torch.full((16,), families.IMAGE)
    between = run[:0] if name == "internvl" else torch.tensor([7, 8])
    ids = torch.cat([torch.arange(2, 6), *[run, between] * 3, torch.arange(6, 9)])
    pixels = pixels if name == "internvl" else pixels[None]
    with vtc.attach(model, "grid", keep=0.25, at=at) as session, torch.no_grad():
        model(input_ids=ids[None], pixel_values=pixels)
    tool = SimpleNamespace(image_processor=SimpleNamespace(**PLAIN))
    seen = draw.as_seen(tool, pixels)
    out = draw.prompt_picture([picture], seen, session.trace, size=160)
    # the whole picture, and 2 tiles of 4 x 4 tokens of 20 pixels with 2 pixels between them
    assert out.size == (160 + 4 + 80 + 2 + 80, 160 + 20)
    for panel, (left, edge) in enumerate([(164, 20), (246, 20), (0, 40)]):
        kept = [p for row in range(len(session.trace[0].n_in)) for p in home(session, row)]
        kept = [p % 16 for p in kept[panel * len(kept) // 3 : (panel + 1) * len(kept) // 3]]
        for place in range(16):
            x, y = left + place % 4 * edge + edge // 2, place // 4 * edge + edge // 2
            blue = out.getpixel((x, y))[2]
            assert blue == (255 if place in kept else round(255 * draw.DARK)), (panel, place)


def home(session: vtc.Session, row: int) -> tuple[int, ...]:
    return draw.fates(session.trace, row)[-1].kept


def test_one_stage_is_drawn_by_its_number():
    family = families.make("llava")
    recipe = vtc.Recipe((vtc.Step("random", "projector", 0.5), vtc.Step("norm", "decoder.1", 0.25)))
    with vtc.attach(family.model, recipe) as session, torch.no_grad():
        family.model(**family.single(0))
    assert draw.stage_labels(session.trace) == ["projector random", "decoder.1 norm"]
    image = Image.new("RGB", (80, 80), GREY)
    both = draw.overlay(image, session.trace, size=80, captions=False)
    for number, left in ((0, 0), (1, 80 + draw.GAP), (-1, 80 + draw.GAP)):
        one = draw.overlay(image, session.trace, size=80, captions=False, stages=number)
        assert one.tobytes() == both.crop((left, 0, left + 80, 80)).tobytes()
        whole = draw.prompt_picture([image], [], session.trace, size=80, stages=number)
        assert whole.size == (80, 100)
    with pytest.raises(InvalidInput, match=r"stages=2: give 'all', 'last' or one of 0 \(projector"):
        draw.overlay(image, session.trace, stages=2)
    with pytest.raises(InvalidInput, match="stages='first'"):
        draw.overlay(image, session.trace, stages="first")  # type: ignore[arg-type]
