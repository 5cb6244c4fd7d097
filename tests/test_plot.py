"""`vtc plot`: points and fronts by hand, pictures of real sessions, and what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc.commands import cli
from vtc.errors import InvalidInput
from vtc.plot import asked, layers, pareto, points, style
from vtc.testing import families

SCENE = Path(__file__).parent.parent / "demos" / "pictures" / "scene_1.png"
ZOO = ["--model", "tiny-llava-shapes", "--image", str(SCENE), "--prompt", "how many objects ?"]


def row(method: str, keep: Any, right: float, cost: float, **more: Any) -> dict[str, Any]:
    """A record of `vtc bench quality`."""
    site = "" if method == "dense" else more.pop("site", "projector")
    own = {"method": method, "site": site, "keep": keep, "merge": "none", "mass": 0.0, "seed": 0}
    scores = {"exact_match": right, "counting": None, "not_counting": right, "shape": right}
    costs = {"tokens_processed": None, "flops": cost, "time": cost / 1e8}
    return own | scores | costs | more


QUALITY = [
    row("dense", 1.0, 0.9, 100e6, merge=None, mass=None),
    row("divprune", 0.5, 0.9, 60e6),
    row("divprune", 0.25, 0.7, 40e6),
    row("divprune", 0.25, 0.6, 40e6, seed=1),
    row("divprune", 0.25, 0.8, 40e6, merge="nearest", mass=1.0),
    row("random", 0.25, 0.5, 40e6),
    row("grid", 0.1, 0.4, 20e6),
    row("fastv", 0.1, 0.6, 60e6, site="decoder.2"),
]


def written(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_points_average_seeds_and_tell_variants_apart(tmp_path: Path) -> None:
    kind, found = points.read([written(tmp_path / "q.json", QUALITY)])
    assert kind is points.QUALITY and len(found) == 7
    (plain,) = (p for p in found if (p.method, p.keep, p.options) == ("divprune", 0.25, ""))
    assert plain.scores["exact_match"] == pytest.approx((0.65, 0.0707), abs=1e-4)
    assert plain.costs == {"flops": 40e6, "time": 0.4}
    assert "counting" not in plain.scores and plain.scores["shape"][0] == pytest.approx(0.65)
    (merged,) = (p for p in found if p.options)
    assert merged.options == "merge+mass" and merged.scores["exact_match"] == (0.8, 0.0)


def test_the_front_is_what_no_other_point_beats(tmp_path: Path) -> None:
    _, found = points.read([written(tmp_path / "q.json", QUALITY)])
    best = pareto.front(found, "flops", "exact_match")
    assert [(p.method, p.options, p.keep) for p in best] == [
        ("grid", "", 0.1),
        ("divprune", "merge+mass", 0.25),
        ("divprune", "", 0.5),
    ]  # dense is as good as the last one, and dearer


def test_budgets_are_written_as_they_were_given() -> None:
    assert [pareto.budget(k) for k in (0.25, 64, "auto", 1.0)] == ["25 %", "64", "auto", "100 %"]


def test_controls_and_dense_are_told_from_methods(tmp_path: Path) -> None:
    _, found = points.read([written(tmp_path / "q.json", QUALITY)])
    looks = {series[1] + series[3]: look for series, look in pareto.looks_of(found).items()}
    assert looks["dense"].marker == "*" and looks["random"].marker == "x"
    assert looks["grid"].marker == "+" and looks["grid"].color != looks["random"].color
    assert looks["divprune"].color == looks["divprunemerge+mass"].color == style.COLORS[0]
    assert (looks["divprune"].line, looks["divprunemerge+mass"].line) == ("-", "--")
    assert looks["fastv"].color == style.COLORS[1]
    assert style.look("random", [], 1).marker != "x" == style.look("random:a=1", []).marker
    many = [f"m{i}" for i in range(2 * len(style.COLORS))]
    shown = {(look.color, look.marker) for look in (style.look(m, many) for m in many)}
    assert len(shown) == len(many)


class Drawn:
    """The figure that would have been saved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures: list[Any] = []
        for module in (pareto, layers):
            monkeypatch.setattr(module, "save", lambda figure, path: self.figures.append(figure))

    @property
    def panels(self) -> list[Any]:
        (figure,) = self.figures
        return [panel for panel in figure.axes if panel.get_visible()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield Drawn(monkeypatch)
    style.pyplot().close("all")


def test_a_quality_file_becomes_panels_over_flops_and_time(tmp_path: Path, drawn: Drawn) -> None:
    source = written(tmp_path / "q.json", QUALITY)
    assert cli.main(["plot", "pareto", str(source), "--out", str(tmp_path / "p.png")]) == 0
    flops, time = drawn.panels
    assert flops.get_xlabel() == "FLOPs of one question, tower and prefill, MFLOPs"
    assert time.get_xlabel() == "time, share of the dense model's"
    assert flops.get_ylabel() == "right answers, all questions"
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in flops.lines}
    assert lines[(20.0, 40.0, 60.0)] == (0.4, 0.8, 0.9)  # the front
    assert lines[(40.0, 60.0)] == pytest.approx((0.65, 0.9))  # divprune
    assert [text.get_text() for text in flops.texts] == ["10 %", "25 %", "50 %"]
    (legend,) = drawn.figures[0].legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told[:2] == ["Pareto front", "dense"] and "divprune  projector  merge, mass" in told
    drawn.figures[0].canvas.draw()  # lays the legend out
    box = legend.get_window_extent()
    assert all(not box.overlaps(panel.get_window_extent()) for panel in drawn.panels)


def test_scores_costs_and_methods_can_be_chosen(tmp_path: Path, drawn: Drawn) -> None:
    files = [written(tmp_path / f"{name}.json", QUALITY) for name in ("monday", "tuesday")]
    words = ["--x", "flops", "--score", "shape,not_counting", "--methods", "fastv"]
    out = ["--out", str(tmp_path / "p.svg")]
    assert cli.main(["plot", "pareto", *map(str, files), *words, *out]) == 0
    assert [panel.get_ylabel() for panel in drawn.panels] == [
        "right answers, shape",
        "right answers, all but counting",
    ]
    told = [text.get_text() for text in drawn.figures[0].legends[0].get_texts()]
    assert "monday  fastv  decoder.2" in told and "tuesday  random  projector" in told
    assert not any("divprune" in name for name in told)


SPEED = [
    {"pixels": 256, "case": "dense", "flops_ratio": 1.0, "ms": 9.0},
    {"pixels": 256, "case": "dense again", "flops_ratio": 1.0, "speedup": 1.01, "ms": 9.0},
    {"pixels": 256, "case": "pooled 25 %", "flops_ratio": 2.0, "speedup": 1.8, "ms": 5.0},
    {"pixels": 256, "case": "limit 25%", "flops_ratio": 2.0, "speedup": 1.9, "ms": 4.8},
    {"pixels": 512, "case": "dense", "flops_ratio": 1.0, "ms": 90.0},
    {"pixels": 512, "case": "pooled 25 %", "flops_ratio": 4.0, "speedup": 3.0, "ms": 30.0},
]


def test_files_without_scores_become_speed_over_flops(tmp_path: Path, drawn: Drawn) -> None:
    source = written(tmp_path / "dit.json", SPEED)
    assert cli.main(["plot", "pareto", str(source), "--out", str(tmp_path / "p.png")]) == 0
    small, large = drawn.panels
    assert (small.get_title(), large.get_title()) == ("pixels 256", "pixels 512")
    ideal, *others = large.lines
    assert ideal.get_ydata()[0] == pytest.approx(4.0) and ideal.get_xdata()[0] == 0.25
    assert (0.25, 3.0) in [(line.get_xdata()[0], line.get_ydata()[0]) for line in others]
    assert (0.5, 1.8) in [(line.get_xdata()[0], line.get_ydata()[0]) for line in small.lines]


def test_a_panel_without_the_cost_says_so(tmp_path: Path, drawn: Drawn) -> None:
    alone = {"pixels": 1024, "case": "pooled 25 %", "flops_ratio": 0.0, "speedup": 2.0}
    source = written(tmp_path / "dit.json", [*SPEED, alone])
    assert cli.main(["plot", "pareto", str(source), "--out", str(tmp_path / "p.png")]) == 0
    *others, empty = drawn.panels
    assert [text.get_text() for text in empty.texts] == ["no flops in these records"]
    assert not empty.lines and all(panel.lines and not panel.texts for panel in others)


def test_loyalty_and_videoqa_records_have_axes_too(tmp_path: Path) -> None:
    setting = {"method": "divprune", "site": "projector", "keep": 0.5, "merge": "none", "mass": 0.0}
    loyal = setting | {"exact": 0.8, "exact_se": 0.1, "tokens": 0.9, "kl": 0.1, "flops": 0.6}
    kind, (point,) = points.read(
        [written(tmp_path / "l.json", [loyal | {"time": 0.7, "visual_tokens": 72.0}])]
    )
    assert kind.bench == "loyalty" and point.scores["exact"] == (0.8, 0.1)
    assert point.costs == {"flops": 0.6, "time": 0.7, "tokens": 72.0}
    asked = {"processes": 1, "what": "evs 25%", "rate": 4.0, "right": 0.5, "tokens": "72 -> 18"}
    kind, (point,) = points.read([written(tmp_path / "v.json", [asked])])
    assert (kind.bench, point.method) == ("videoqa", "evs 25%")
    assert point.costs == {"time": 250.0, "tokens": 18.0} and point.scores["right"] == (0.5, 0.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty: give what `vtc bench NAME --json FILE` writes"),
        ("[]", "is empty"),
        ("{", "is no JSON that can be read"),
        ('{"a": 1}', "holds no list of records"),
        ("[1]", "holds no list of records"),
        ('[{"a": 1, "b": 2}]', "has no score over a cost (its records have: a, b)"),
        (json.dumps(QUALITY[:1]), "has no method, only the dense model"),
        (json.dumps([QUALITY[1] | {"flops": "many"}]), "'many' is no number for 'FLOPs"),
        (json.dumps([QUALITY[1] | {"exact_match": None, "shape": None, "not_counting": None}]),
            "no record has a score"),
    ],
)  # fmt: skip
def test_bad_files_are_one_clear_error(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bad.json"
    source.write_text(content)
    assert cli.main(["plot", "pareto", str(source), "--out", str(tmp_path / "p.png")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vtc: ") and told.count("\n") == 1 and says in told
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.json"], "no such file: none.json"),
        (["q.json", "dit.json"], "files of different benches do not share axes"),
        (["q.json", "--methods", "divprun"], "not in these files: divprun. There: dense, divprune"),
        (
            ["q.json", "--score", "beauty"],
            "--score beauty: these records of vtc bench quality have",
        ),
        (["dit.json", "--x", "tokens"], "--x tokens: these records of vtc bench speed, dit or vit"),
        (["old.json", "--x", "time"], "have flops. Use one of them, or measure again"),
    ],
)
def test_wrong_wishes_say_what_is_there(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "q.json", QUALITY)
    written(tmp_path / "dit.json", SPEED)
    written(tmp_path / "old.json", [{k: v for k, v in r.items() if k != "time"} for r in QUALITY])
    assert cli.main(["plot", "pareto", *words, "--out", "p.png"]) == 2
    assert says in capsys.readouterr().err


def test_the_picture_needs_a_folder_and_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", "pareto", "q.json", "--out", "nowhere/p.png"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["plot", "pareto", "q.json", "--out", "p.txt"]) == 2
    assert "end it in .png, .pdf, .svg" in capsys.readouterr().err
    assert cli.main(["plot", "kept", *ZOO, "--method", "random", "--out", "p.svg"]) == 2
    assert "'p.svg': end it in .png" in capsys.readouterr().err


def test_matplotlib_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    for words in (["pareto", "q.json"], ["layers", *ZOO, "--method", "random"]):
        assert cli.main(["plot", *words, "--out", "p.png"]) == 1
        assert "pip install 'vision-token-compression[plot]'" in capsys.readouterr().err


def test_layers_of_a_recipe_that_acts_in_the_tower_and_behind_it() -> None:
    family = families.make("qwen2_5_vl")
    steps = [("vision.2", 0.75), ("projector", 0.5), ("decoder.2", 0.25)]
    recipe = vtc.Recipe(tuple(vtc.Step("random", at, keep) for at, keep in steps))
    inputs = family.batch([0])
    with vtc.attach(family.model, recipe) as session, torch.no_grad():
        family.model(**inputs)
    n = int(family.visual(inputs).sum())
    found = layers.stages(session, 1)
    expected = [round(n * share) for share in (0.75, 0.5, 0.25)]
    assert found.tower == ((2, n, expected[0]),)
    assert found.decoder == ((0, expected[0], expected[1]), (2, expected[1], expected[2]))
    assert layers.Depth.of(session.adapter) == layers.Depth(4, 4)
    assert layers.widths(n, found.tower, 4) == [n, n, expected[0], expected[0]]
    assert layers.widths(found.enter, found.decoder, 4) == [expected[1]] * 2 + [expected[2]] * 2


def test_layers_of_a_recipe_of_the_tower_alone() -> None:
    family = families.make("llava_next", images_per_row=(2,))
    with vtc.attach(family.model, "random", keep=0.5, at="vision.1") as session, torch.no_grad():
        family.model(**family.inputs)
    found = layers.stages(session, 2)
    assert found.tower == ((1, 8 * 16, 8 * 8),)  # views of both images
    assert found.decoder == () and found.enter == 8 * 8  # newlines are counted nowhere


@pytest.mark.parametrize("name", ["layers", "kept"])
def test_a_prompt_becomes_a_picture(name: str, tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    methods = ["--method", "divprune", "mustdrop:vision=false", "--keep", "0.5,20"]
    recipe = ["--recipe", str(SCENE.parents[2] / "configs" / "divprune_25.yaml")]
    assert cli.main(["plot", name, *ZOO, *methods, *recipe, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(10**6) or []) > 9


def test_every_setting_has_a_line_of_its_own(tmp_path: Path, drawn: Drawn) -> None:
    words = ["--method", "divprune", "fastv", "--keep", "0.5", "--out", str(tmp_path / "p.png")]
    assert cli.main(["plot", "layers", *ZOO, *words]) == 0
    (panel,) = drawn.panels
    values = [patch.get_data().values.round() for patch in panel.patches]
    assert [list(v) for v in values] == [[144] * 4, [72] * 4, [144, 144, 72, 72]]
    told = [text.get_text() for text in drawn.figures[0].legends[0].get_texts()]
    assert told == ["dense: 144", "divprune 50%: 72", "fastv 50%: 108"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to draw: give --method, --recipe"),
        (["--recipe", "r.yaml", "--keep", "0.5"], "a recipe already says everything"),
        (["--method", "divprun"], "divprun"),
        (["--method", "divprune", "--keep", "0.5", "--at", "vision.9"], "vision.9"),
    ],
)
def test_settings_that_cannot_be_drawn(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plot", "kept", *ZOO, *words, "--out", str(tmp_path / "p.png")]) in (1, 2)
    assert says in capsys.readouterr().err


def test_images_that_are_missing_show_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tiny-llava-shapes", "--image", "none.png", "--prompt", "?"]
    out = ["--out", str(tmp_path / "p.png")]
    assert cli.main(["plot", "kept", *words, "--method", "random", *out]) == 2
    assert "no such image: none.png" in capsys.readouterr().err


def test_settings_are_named_after_what_was_typed() -> None:
    method = ("zoo_prune:mode=jacobian", "zoo_prune", {"mode": "jacobian"})
    args = {"method": [method], "keep": [0.25, 64], "at": "decoder.1", "recipe": [], "seed": None}
    found = asked.requests(type("Args", (), args)())
    assert found == {
        "zoo_prune:mode=jacobian 25% decoder.1": {
            "method": "zoo_prune", "keep": 0.25, "at": "decoder.1", "mode": "jacobian"},
        "zoo_prune:mode=jacobian 64 decoder.1": {
            "method": "zoo_prune", "keep": 64, "at": "decoder.1", "mode": "jacobian"},
    }  # fmt: skip


def test_nothing_of_matplotlib_is_asked_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.PLOTS:
        assert cli.main(["plot", name, "--help"]) == 0
        assert f"vtc plot {name}" in capsys.readouterr().out


def test_points_of_records_that_are_no_file() -> None:
    with pytest.raises(InvalidInput, match="these rows has no method"):
        points.collect(points.QUALITY, QUALITY[:1], "these rows")
