"""The command line: help, exit codes, what errors say, tables of the README, run and demo."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
import vtc_zoo
from PIL import Image

import vtc
from vtc.bench.options import method_and_params
from vtc.commands import cli, demo, loading, tables
from vtc.errors import InvalidInput, InvalidRecipe, UnsupportedModel, UnsupportedSite, VtcError
from vtc.recipe import Recipe
from vtc.reducer import Host
from vtc.testing import families

ZOO = cli.ZOO_MODEL
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
COMMANDS = [
    "list",
    "show",
    "describe",
    "run",
    "videoqa",
    "demo",
    "zoo",
    "zoo list",
    "zoo make-scenes",
    "zoo make-clips",
    "bench",
]


@pytest.fixture(scope="session")
def zoo() -> str:
    """Name of the small model; skips when its weights are not there."""
    try:
        vtc_zoo.path(ZOO)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return ZOO


@pytest.fixture
def scene(tmp_path: Path) -> str:
    """A picture that the small model can read."""
    assert cli.main(["zoo", "make-scenes", "--out", str(tmp_path / "s"), "--n", "1"]) == 0
    return str(tmp_path / "s" / "scene_1.png")


def asked(model: str, image: str, *more: str) -> list[str]:
    prompt = ["--prompt", "how many objects are there ?", "--max-new-tokens", "3"]
    return ["run", "--model", model, "--image", image, *prompt, *more]


# ---------------------------------------------------------------------- help and exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: vtc {command}") and "examples:" in out
    assert f"vtc {command}" in out.split("examples:")[1]
    assert max(len(line) for line in out.splitlines()) <= 120


def test_the_top_level_help_names_every_command_and_the_exit_codes(
    capsys: pytest.CaptureFixture[str],
):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert command.split()[0] in out
    assert "vtc demo" in out and "exit codes:" in out
    for code, meaning in cli.CODES.items():
        assert f"  {code:<4} {meaning}\n" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["lisst"], 2),
        (["--version"], 0),
        (["zoo"], 2),
        (["bench"], 2),
        (["show"], 2),
        (["show", "divprune"], 0),
        (["show", "divprun"], 2),
        (["run", "--model", "x"], 2),
        (["list", "--check", "no-such-file.md"], 2),
        (["list", "--check", "a", "--write", "b"], 2),
        (["demo", "--questions", "0"], 2),
        (["zoo", "make-scenes", "--out", "x", "--n", "-1"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == code
    told = capsys.readouterr()
    assert "Traceback" not in told.err and bool(told.err) == bool(code)


def test_importing_the_command_line_is_light():
    heavy = "{'torch', 'transformers', 'PIL', 'yaml'}"
    code = f"import vtc.commands.cli, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_package_can_be_run():
    words = [sys.executable, "-m", "vtc", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"vtc {vtc.__version__}\n"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--method", "divprun", "--keep", "0.5"], 2, "Did you mean 'divprune'?"),
        (["--method", "divprune", "--keep", "0"], 2, "a token count must be at least 1"),
        (["--method", "divprune", "--keep", "-3"], 2, "a token count must be at least 1"),
        (["--method", "divprune", "--keep", "1.5"], 2, "above 0 and at most 1.0"),
        (["--method", "divprune", "--keep", "half"], 2, "give a share like 0.25, a token count"),
        (["--method", "divprune"], 2, "needs a budget: e.g. keep=0.25"),
        (["--method", "divprune", "--keep", "4", "--mass", "3"], 2, "from 0 (off) to 1 (full)"),
        (["--method", "fastv", "--param", "pool=min"], 2, "'min'"),
        (["--method", "fastv", "--param", "poll=max"], 2, "Did you mean 'pool'?"),
        (["--method", "fastv", "--param", "pool"], 2, "write NAME=VALUE"),
        (["--method", "fastv", "--at", "projector", "--keep", "4"], 2, "'fastv' works at decoder"),
        (["--method", "fastv", "--at", "decoder.9", "--keep", "4"], 2, "no site 'decoder.9'"),
        (["--method", "fastv", "--param", "pool=[a"], 2, "pool='[a' is no value that YAML can"),
        (["--recipe", "no-such.yaml"], 2, "cannot read recipe 'no-such.yaml'"),
        (["--recipe", "x.yaml", "--keep", "4"], 2, "leave out keep"),
        (["--recipe", "x.yaml", "--method", "fastv"], 2, "not allowed with"),
        ([], 2, "one of the arguments --method --recipe is required"),
    ],
)
def test_what_is_wrong_with_a_run_is_one_clear_line(
    more: list[str], code: int, says: str, zoo: str, scene: str, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    assert cli.main(asked(zoo, scene, *more)) == code
    told = capsys.readouterr()
    line = told.err.strip().splitlines()[-1]
    assert says in line and line.startswith("vtc") and "Traceback" not in told.err
    assert not told.out


def test_images_and_models_that_are_not_there(
    scene: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def told(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    method = ("--method", "random", "--keep", "4")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    missing = str(tmp_path / "no.png")
    assert told(*asked(ZOO, missing, *method)) == (2, f"vtc: no such image: {missing}")
    code, line = told(*asked(ZOO, str(text), *method))
    assert code == 2 and line.startswith(f"vtc: not an image that can be read: {text}. It is")
    code, line = told(*asked("tiny-lava-shapes", scene, *method))
    assert code == 2 and f"Did you mean '{ZOO}'?" in line and "not a folder" in line
    code, line = told(*asked("./nowhere/at-all", scene, *method))
    assert code == 2 and "unknown model './nowhere/at-all'" in line
    code, line = told(*asked(str(tmp_path), scene, *method))
    assert code == 1 and line.startswith(f"vtc: no weights of '{tmp_path}' were found: ")
    code, line = told("describe", "org/name-that-is-not-cached")
    assert code == 1 and "cannot load 'org/name-that-is-not-cached'" in line


def test_debug_shows_the_traceback():
    with pytest.raises(VtcError, match="unknown method"):
        cli.main(["show", "nothing", "--debug"])


# ---------------------------------------------------------------------- tables


def test_list_names_every_method_and_where_it_acts(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in vtc.REDUCERS:
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name
    assert "decoder layers 8, 16, 24 of 32" in out  # a method with stages
    assert cli.main(["list", "--markdown"]) == 0
    marked = capsys.readouterr().out.splitlines()
    assert len(marked) == 2 + len(vtc.REDUCERS)
    assert "[DivPrune, CVPR 2025](https://arxiv.org/abs/2503.02175)" in "\n".join(marked)
    assert {line.count("|") for line in marked} == {1 + len(tables.METHOD_HEADER)}


def test_the_readme_is_checked_and_refreshed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    readme = tmp_path / "README.md"
    start, end = "<!-- vtc list -->", "<!-- /vtc list -->"
    more, done = "<!-- vtc list --families -->", "<!-- /vtc list --families -->"
    readme.write_text(f"# Title\n{start}\nold\n{end}\nmiddle\n{more}\n{done}\nlast\n")
    words = [str(readme)]
    assert cli.main(["list", "--check", *words]) == 1
    assert f"not current: run `vtc list --write {readme}`" in capsys.readouterr().err
    assert cli.main(["list", "--write", *words]) == 0
    assert "tables refreshed" in capsys.readouterr().out
    assert cli.main(["list", "--check", *words]) == 0
    assert cli.main(["list", "--write", *words]) == 0
    assert "were current" in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith(f"# Title\n{start}\n\n| method |") and text.endswith(f"{done}\nlast\n")
    assert "old" not in text and f"{end}\nmiddle\n{more}\n\n| family |" in text
    readme.write_text(text.replace("| `divprune` |", "| `divprun` |"))
    assert cli.main(["list", "--check", *words]) == 1
    readme.write_text(f"# Title\n{start}\nold\n{end}\nno table of families\n")
    assert cli.main(["list", "--write", *words]) == 0
    text = readme.read_text()
    assert "| `divprune` |" in text and text.endswith(f"{end}\nno table of families\n")


@pytest.mark.parametrize("text", ["", "<!-- /vtc list --><!-- vtc list -->", "<!-- vtc list -->"])
def test_a_readme_without_markers_is_told_which(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "README.md").write_text(text)
    for option in ("--check", "--write"):
        assert cli.main(["list", option, str(tmp_path / "README.md")]) == 1
        assert "needs the markers <!-- vtc list --> and" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_the_families_of_the_table_are_the_ones_that_are_tested():
    by_status = {
        status: [f for f in tables.FAMILIES if f.status == status]
        for status in (tables.TESTED, tables.SHARED, tables.REFUSED)
    }
    built = by_status[tables.TESTED] + by_status[tables.SHARED]
    assert {f.name for f in built} == set(families.FAMILIES)
    for family in built:
        model = families.make(family.name).model
        assert family.classes == (type(model).__name__,)
        assert None in vtc.adapters_for(model).values(), family.name


@pytest.mark.parametrize(
    "name", [c for f in tables.FAMILIES if f.status == tables.REFUSED for c in f.classes]
)
def test_the_refused_families_are_refused(name: str):
    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            model = cls(cls.config_class())
    except ImportError as error:
        pytest.skip(f"{name} needs more packages: {error}")
    assert None not in vtc.adapters_for(model).values()


def test_show_says_all_about_a_method(capsys: pytest.CaptureFixture[str]):
    for name in vtc.REDUCERS:
        assert cli.main(["show", name]) == 0
        out = capsys.readouterr().out
        for field in dataclasses.fields(vtc.REDUCERS[name]):
            assert field.name in out
        for signal in vtc.REDUCERS[name].needs:
            assert signal in out
        assert "default site" in out or "made of" in out


def test_text_tables_wrap_words_and_align_numbers():
    table = tables.text_table(("name", "n"), [("a longer name", "5"), ("b", "12.5%")], 8)
    assert table.splitlines() == [
        "name          n",
        "--------  -----",
        "a longer      5",
        "name",
        "b         12.5%",
    ]


def test_a_parameter_beside_a_name_that_yaml_cannot_read():
    assert method_and_params("evs:at=[a, b]") == ("evs", {"at": ["a", "b"]})
    with pytest.raises(InvalidRecipe, match=r"at='\[a' is no value that YAML can read"):
        method_and_params("evs:at=[a")


# ---------------------------------------------------------------------- describe, run, zoo, bench


def test_describe_reads_no_weights(zoo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["describe", zoo]) == 0
    told = capsys.readouterr().out
    assert "LlavaForConditionalGeneration (adapter hf_vlm)" in told and "decoder.3" in told
    (tmp_path / "config.json").write_text((vtc_zoo.path(zoo) / "config.json").read_text())
    assert cli.main(["describe", str(tmp_path)]) == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "tiny-vit-fmnist"])
def test_describe_knows_image_encoders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", name]) == 0
    told = capsys.readouterr().out
    assert "VisionTransformer" in told and "vision.1.mlp" in told and "projector" in told
    assert re.search(r"tome +tome_merge at vision.0.mlp, vision.1.mlp, \.\.\.", told)


def test_models_that_answer_no_prompt_say_what_to_do(
    scene: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "random", "--keep", "4")
    for words, parts in (
        (asked("tiny-vit-fmnist", scene, *more), ("image encoder", "vtc describe")),
        (asked("tiny-dit-digits", scene, *more), ("draws pictures", "vtc_zoo.digits.sample")),
        (["describe", "timm/vit_bse_patch16_224"], ("Did you mean vit_base_patch16_224",)),
        (["describe", "tiny-lookupvit-fmnist"], ("compresses by itself", "grid=(3, 3)")),
    ):
        assert cli.main(words) == cli.USAGE
        line = capsys.readouterr().err
        assert all(part in line for part in parts)


def test_run_answers_twice_reports_and_draws(
    zoo: str, scene: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    picture = tmp_path / "deep" / "kept.png"
    stages = ["--method", "pdrop", "--keep", "0.25", "--picture", str(picture)]
    assert cli.main(asked(zoo, scene, *stages)) == 0
    out = capsys.readouterr().out
    assert out.startswith("dense:       ") and "compressed:  " in out
    assert "language-model prefill" in out and f"picture of the kept patches: {picture}" in out
    with Image.open(picture) as image:
        assert image.width == 3 * 360 + 2 * 8 and image.height > 360  # three stages


def test_run_on_a_picture_of_another_shape_and_with_a_recipe(
    zoo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wide = tmp_path / "wide.jpg"
    Image.effect_mandelbrot((150, 100), (-2, -1, 1, 1), 20).convert("RGB").save(wide)
    recipe = tmp_path / "r.yaml"
    Recipe.build("visionzip", 4, 16).dump(recipe)
    picture = tmp_path / "kept.png"
    words = asked(zoo, str(wide), "--recipe", str(recipe), "--picture", str(picture))
    assert cli.main(words) == 0
    assert re.search(r"visionzip +144 +16 ", capsys.readouterr().out)
    with Image.open(picture) as image:  # what the model saw: the middle square
        assert image.width == 360 and image.height < 400


def test_run_with_options_of_the_method_and_the_step(zoo: str, scene: str):
    more = ["--keep", "9", "--merge", "nearest", "--mass", "0.5", "--seed", "3"]
    assert cli.main(asked(zoo, scene, "--method", "random", "--at", "decoder.1", *more)) == 0
    assert cli.main(asked(zoo, scene, "--method", "fastv", "--param", "pool=max")) == 0


def test_a_processor_without_chat_template_gets_the_raw_prompt():
    class Processor:
        image_token = "<image>"

        def __call__(self, **given: object) -> dict[str, object]:
            return given

    placed = "a <image> b <image>"
    for prompt, text in (("what ?", "<image><image>what ?"), (placed, placed)):
        given = loading.encode(Processor(), prompt, ["one", "two"])
        assert given == {"images": ["one", "two"], "text": text, "return_tensors": "pt"}
    with pytest.raises(InvalidInput, match="'<image>' 1 times, but the number of images is 3"):
        loading.encode(Processor(), "<image> what ?", ["one", "two", "three"])
    with pytest.raises(UnsupportedModel, match="neither a chat template nor a placeholder for an"):
        loading.encode(object(), "what ?", ["one"])


def test_images_are_turned_as_they_were_held_and_damaged_ones_refused(tmp_path: Path):
    file = tmp_path / "held.png"
    held = Image.new("RGB", (2, 1), "red")
    held.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is the bottom of the scene
    held.save(file, exif=exif)
    upright = loading.open_image(file)
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0) and upright.getpixel((0, 1)) == (0, 0, 255)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(loading.UsageError, match="not an image that can be read: .*held.png"):
        loading.open_image(file)


@pytest.mark.parametrize(
    "raised", [SyntaxError("broken PNG file"), ValueError("bad"), IndexError()]
)
def test_whatever_an_image_reader_raises_is_one_error(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(loading.UsageError, match="not an image that can be read"):
        loading.open_image(tmp_path / "a.png")


def test_images_of_16_bits_become_8(tmp_path: Path):
    levels = torch.tensor([[0, 300, 3000, 65535]], dtype=torch.uint16)
    Image.fromarray(levels.numpy()).save(tmp_path / "deep.png")
    deep = loading.open_image(tmp_path / "deep.png")
    assert [deep.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 11, 255]
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(VtcError, match="floating point.*give 8 bits"):
        loading.open_image(tmp_path / "float.tif")


def test_zoo_list_and_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["zoo", "list"]) == 0
    assert ZOO in capsys.readouterr().out
    words = ["zoo", "make-scenes", "--out", str(tmp_path), "--n", "2", "--seed", "5"]
    assert cli.main(words) == 0
    items = demo.packaged(tmp_path)
    assert len({id(item.image) for item in items}) == 2


def test_a_benchmark_is_imported_only_when_it_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = types.ModuleType("vtc_fake_bench")

    def configure(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--n", type=int, default=1)

    module.configure = configure  # type: ignore[attr-defined]
    module.run = lambda args: args.n  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vtc_fake_bench", module)
    monkeypatch.setitem(cli.BENCHES, "fake", ("vtc_fake_bench", "nothing"))
    monkeypatch.setitem(cli.BENCHES, "gone", ("vtc_no_such_bench", "nothing"))
    assert cli.main(["bench", "--help"]) == 0  # although one of them cannot be imported
    assert cli.main(["bench", "fake", "--n", "7"]) == 7
    assert cli.main(["bench", "fake", "--m", "7"]) == 2
    assert cli.main(["bench", "gone"]) == 1
    assert "`vtc bench gone` cannot start: No module named" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.BENCHES)
def test_the_benchmarks_can_be_asked_for_help(name: str, capsys: pytest.CaptureFixture[str]):
    if importlib.util.find_spec(cli.BENCHES[name][0]) is None:
        pytest.skip(f"{cli.BENCHES[name][0]} is not part of this build")
    assert cli.main(["bench", name, "--help"]) == 0
    assert f"usage: vtc bench {name}" in capsys.readouterr().out


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load_round_trip_and_say_what_they_are_for(path: Path):
    recipe = Recipe.load(path)
    assert Recipe.load(recipe.dump()) == recipe
    assert path.read_text().startswith("# ")


def test_configs_run_on_the_small_model_when_their_layers_exist(zoo: str):
    model = vtc_zoo.load(zoo)[0]
    refused = []
    for path in CONFIGS:
        try:
            vtc.attach(model, path).detach()
        except UnsupportedSite:
            refused.append(path.stem)
    deep = [path.stem for path in CONFIGS if path.stem.startswith("mustdrop_")]
    deep.remove("mustdrop_merge_only")
    other = [path.stem for path in CONFIGS if Recipe.load(path).steps[0].site.kind == "dit"]
    assert set(refused) == {*other, *deep, "pyramiddrop"}  # written for 24 and more layers


MUSTDROP = {
    "mustdrop_llava_192": (32, False, {"preset": 192}),
    "mustdrop_llava_128": (32, False, {"preset": 128}),
    "mustdrop_llava_64": (32, False, {"preset": 64}),
    "mustdrop_llava_exact_64": (32, False, {"keep": 64}),
    "mustdrop_llava_13b_192": (40, False, {"preset": 192}),
    "mustdrop_internvl3_8b": (28, False, {"preset": 192}),
    "mustdrop_smolvlm2_2b": (24, False, {"preset": 192}),
    "mustdrop_qwen2_5_vl_7b": (28, True, {"preset": 192}),
}


@pytest.mark.parametrize("name", MUSTDROP)
def test_configs_of_mustdrop_are_what_the_method_builds(name: str):
    depth, rotary, options = MUSTDROP[name]
    path = next(path for path in CONFIGS if path.stem == name)
    host = Host(depth, None, rotary)
    assert Recipe.load(path) == Recipe.build("mustdrop", depth, host=host, **options)


def test_every_mustdrop_config_is_checked():
    found = {path.stem for path in CONFIGS if path.stem.startswith("mustdrop_")}
    assert found == {*MUSTDROP, "mustdrop_merge_only"}


def test_the_pyramid_of_the_configs_is_the_one_of_the_method():
    path = next(path for path in CONFIGS if path.stem == "pyramiddrop")
    assert Recipe.load(path) == Recipe.build("pdrop", depth=32)


# ---------------------------------------------------------------------- demo


def test_the_quick_demo(zoo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "o")]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    methods = [line.split("  ")[0] for line in out.splitlines() if " MFLOPs " in line]
    steps = {"mustdrop_merge", "mustdrop_filter", "mustdrop_cache", "tome_merge"}
    steps |= {name for name in vtc.REDUCERS if vtc.REDUCERS[name].frames}  # no videos here
    steps |= {name for name in vtc.REDUCERS if vtc.REDUCERS[name].sites == {"dit"}}
    steps |= {"stts_heuristic"}
    assert methods[0] == "dense" and set(methods) - {"divprune + merge + mass", "dense"} == {
        name
        for name in vtc.describe(vtc_zoo.load(zoo)[0]).methods
        if name not in steps and not vtc.REDUCERS[name].trained  # it would be a stand-in
    }
    dense = next(line for line in out.splitlines() if line.startswith("dense"))
    assert int(dense.split("/")[0].split()[-1]) >= 10  # of 12: the model is trained
    assert "sanity benchmark on one small trained model" in " ".join(out.split())
    assert f"picture of the kept patches: {tmp_path / 'o' / 'kept_tokens.png'}" in out
    with Image.open(tmp_path / "o" / "kept_tokens.png") as image:
        assert image.width > 600 and image.height > 1000


def test_the_demo_names_what_it_left_out(zoo: str, capsys: pytest.CaptureFixture[str]):
    model, processor = vtc_zoo.load(zoo)
    wanted = [demo.Setting(), demo.Setting("random", 7.0), demo.Setting("grid", 0.5)]
    results = demo.measure(model, processor, demo.load_items(3), wanted)
    assert [r.setting.name for r in results] == ["dense", "grid"]
    told = "".join(capsys.readouterr())
    assert "left out: random 700%" in told
    assert "144 -> 72" in demo.summary(results)


def test_without_the_packaged_pictures_others_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert demo.load_items(13)[:12] == demo.packaged(demo.PICTURES)
    monkeypatch.setattr(demo, "PICTURES", tmp_path)
    items = demo.load_items(15)
    assert len(items) == 15 and len({item.image.tobytes() for item in items}) == 8
