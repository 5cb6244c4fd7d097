"""Every command ends with a code of the one table, whatever happens, and says it in one line."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vtc.commands import cli, loading, outputs
from vtc.errors import OutputRefused, UnknownName, UnsupportedSite, VtcError, storage

PICTURE = str(Path(__file__).parents[1] / "demos" / "pictures" / "scene_1.png")
ABOUT = ("--model", cli.ZOO_MODEL, "--image", PICTURE, "--prompt", "x")
ASKED = (*ABOUT, "--method", "random", "--keep", "4")
#: words of a command -> where it is when something happens
COMMANDS: dict[tuple[str, ...], str] = {
    ("list",): "vtc.commands.tables.listing",
    ("env",): "vtc.commands.env.devices",
    ("show", "divprune"): "vtc.commands.tables.method_page",
    ("describe", cli.ZOO_MODEL): "vtc.commands.cli.model_structure",
    ("run", *ASKED): "vtc.commands.cli.load_model",
    ("videoqa", "--model", "tiny-llava-video", "--questions", "q", "--videos", "v", "--out",
        "o.jsonl"): "vtc.video.questions.read_questions",
    ("demo",): "vtc.commands.cli.load_model",
    ("demo", "--web"): "vtc.web.serve.socket.create_server",
    ("tune", "--model", cli.ZOO_MODEL, "--images", PICTURE, "--loyalty", "0.9", "--out",
        "o.yaml"): "vtc.tune.items.given",
    ("zoo", "list"): "vtc_zoo.names",
    ("zoo", "make-scenes", "--out", "o"): "vtc_zoo.shapes.write_scenes",
    ("zoo", "make-clips", "--out", "o"): "vtc_zoo.moving.write_clips",
    ("bench", "quality"): "vtc.bench.quality.load",
    ("bench", "speed"): "vtc.bench.synthetic.llava",
    ("bench", "stages"): "vtc.bench.synthetic.llava",
    ("bench", "memory"): "vtc.bench.memory.select",
    ("bench", "census"): "vtc.bench.census.registrations",
    ("bench", "videoqa", "--model", "m", "--questions", "q", "--videos", "v"):
        "vtc.video.questions.read_questions",
    ("bench", "dit"): "vtc.bench.dit.cases_of",
    ("bench", "vit"): "vtc.bench.vit.encoder_cases",
    ("bench", "loyalty", "--model", cli.ZOO_MODEL, "--images", PICTURE): "vtc.tune.items.given",
    ("plot", "pareto", "q.json", "--out", "o.png"): "vtc.plot.pareto.read",
    ("plot", "layers", *ASKED, "--out", "o.png"): "vtc.commands.loading.load_model",
    ("plot", "kept", *ASKED, "--out", "o.png"): "vtc.commands.loading.load_model",
}  # fmt: skip
HAPPENS: list[tuple[BaseException, int, str]] = [
    (KeyboardInterrupt(), 130, "vtc: stopped"),
    (VtcError("no\n luck."), 1, "vtc: no luck."),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1,
        "vtc: cannot "),
    (MemoryError(), 1, "vtc: too little memory: there is no more. Ask for less"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nx"), 1, "vtc: too little memory: CUDA out"),
    (UnknownName("unknown name."), 2, "vtc: unknown name."),
    (UnsupportedSite("no site."), 2, "vtc: no site."),
]  # fmt: skip


def name(words: Any) -> str:
    return " ".join(words[: 2 if words[0] in ("zoo", "bench", "plot") else 1])


@pytest.mark.parametrize("words", COMMANDS, ids=name)
def test_every_command_ends_with_a_code_of_the_table(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "--help"]) == cli.OK
    assert cli.main([*words, "--nonsense"]) == cli.USAGE
    capsys.readouterr()
    for error, code, line in HAPPENS:
        where = COMMANDS[words]
        if where.startswith("vtc.web") and type(error) not in (VtcError, UnknownName):
            continue  # Ctrl-C is how a page is ended in good order, and a port has its own error

        def happens(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(where, happens)
            assert cli.main(list(words)) == code, (words, error)
        said = capsys.readouterr().err
        assert said.startswith(line) and said.count("\n") == 1
        assert not isinstance(error, OSError) or ": No space left on device." in said
    assert cli.CODES.keys() >= {code for _, code, _ in HAPPENS}


def test_all_commands_are_in_the_table() -> None:
    there = {name(words) for words in COMMANDS}
    assert {f"bench {one}" for one in cli.BENCHES} | {f"plot {one}" for one in cli.PLOTS} <= there
    shown = re.search(r"\{(.*?)\}|COMMAND", cli._parser().format_usage())
    assert shown
    choices = next(a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    assert set(choices) == {one.partition(" ")[0] for one in there}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", *ABOUT, "--method", "fastv", "--keep", "4", "--at", "nowhere.1"), "nowhere.1"),
        (("run", *ASKED, "--device", "foo"), "no device 'foo' here (torch knows no such kind): "),
        (("run", *ASKED, "--device", "meta"), "no device 'meta' here (it holds no numbers): give"),
        (("run", *ASKED, "--device", "cpu:x"), "no device 'cpu:x' here ("),
        (("bench", "loyalty", "--model", cli.ZOO_MODEL, "--images", PICTURE, "--methods", "grid",
            "--device", "foo"), "no device 'foo' here"),
        (("plot", "kept", *ASKED, "--out", "o.png", "--device", "foo"), "no device 'foo' here"),
        (("bench", "quality", "--model", "tiny-vit-fmnist"), "is an image encoder and answers no"),
        (("bench", "quality", "--model", "tiny-dit-digits"), "draws pictures and answers no"),
        (("bench", "quality", "--model", "org/name"), "'org/name' is no model of the zoo, nor a"),
        (("bench", "quality", "--model", "tiny-lava"), "unknown model 'tiny-lava'"),
        (("tune", "--model", cli.ZOO_MODEL, "--images", PICTURE, "--loyalty", "0.9", "--out",
            "o.yaml"), "there is only one picture or video, so none can be held out"),
        (("plot", "pareto", "gone.json", "--out", "o.png"), "no such file: gone.json"),
    ],
)  # fmt: skip
def test_what_was_typed_wrongly_is_code_2(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(list(words)) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("vtc: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.usable("cpu") == torch.device("cpu")

    def absent(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", absent)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(loading.UsageError) as error:
        loading.usable("cuda")
    wanted = "no device 'cuda' here (Torch not compiled with CUDA enabled): give one of cpu."
    assert str(error.value) == wanted


# ---------------------------------------------------------------------- outputs


#: commands with `{}` where an output goes, the name of a good one, and whether its folder is made
OUTPUTS: list[tuple[tuple[str, ...], str, bool]] = [
    (("run", *ASKED, "--picture", "{}"), "p.png", True),
    (("tune", "--model", "m", "--loyalty", "1", "--out", "{}"), "r.yaml", False),
    (("tune", "--model", "m", "--loyalty", "1", "--json", "{}", "--out", "r.yaml"), "j", False),
    (("videoqa", "--model", "m", "--questions", "q", "--videos", "v", "--out", "{}"), "a", False),
    (("bench", "quality", "--plot", "{}"), "p.png", False),
    *(((*words, "--json", "{}"), "j.json", False) for words in COMMANDS if words[0] == "bench"),
    *(((*words[:-1], "{}"), "p.png", False) for words in COMMANDS if words[0] == "plot"),
]


@pytest.mark.parametrize(("words", "good", "made"), OUTPUTS, ids=lambda o: "")
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    words: tuple[str, ...],
    good: str,
    made: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def told(out: str) -> str:
        assert cli.main([word.format(out) for word in words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    ending = Path(good).suffix
    (tmp_path / f"folder{ending}").mkdir()
    (tmp_path / "file").write_text("mine")
    assert f"folder{ending} is a folder: name a file in it." in told(f"folder{ending}")
    assert "not a folder: " in told(f"file/{good}")
    assert "File name too long" in told("x" * 300 + good)
    if not made:
        assert "no such folder: " in told(f"gone/{good}")
    if ending == ".png":
        assert "'p.xyz': end it in .png" in told("p.xyz")
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", lambda **_: _raise(read_only))
    assert f"cannot write {good!r}: Read-only file system. Name another place." in told(good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{ending}"]


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("words", [("demo",), ("zoo", "make-scenes"), ("zoo", "make-clips")])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "deeper"):
        assert cli.main([*words, "--out", str(out)]) == 2
        assert f"not a folder: {file}" in capsys.readouterr().err
    assert file.read_text() == "mine"
    outputs.check_folder(tmp_path / "new" / "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "there.json"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "not there yet")
    for path in (file, tmp_path / "link", tmp_path / "new", Path("/dev/null")):
        outputs.check_file(path)
    outputs.check_file(tmp_path / "a" / "b" / "new", parents=True)
    assert file.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_fills_up_later_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtc.bench import records

    full = "No space left on device. Free some space, or name another place."
    with pytest.raises(OutputRefused) as error:
        records.write("/dev/full", [{"a": 1}], {})
    assert str(error.value) == f"cannot write '/dev/full': {full}"
    monkeypatch.setattr(
        "vtc_zoo.shapes.json.dumps", lambda _: _raise(OSError(errno.ENOSPC, full.split(".")[0]))
    )
    assert cli.main(["zoo", "make-scenes", "--out", str(tmp_path), "--n", "1"]) == 1
    assert capsys.readouterr().err == f"vtc: cannot write '{tmp_path}': {full}\n"


def test_what_storage_errors_say() -> None:
    read_only = OSError(errno.EROFS, "Read-only file system", "/a")
    assert storage(read_only) == (
        "cannot read or write '/a': Read-only file system. Name another place."
    )
    assert storage(read_only, "read", "b") == "cannot read 'b': Read-only file system."
    assert storage(OSError("many\nlines.")) == "cannot read or write: many lines."


# ---------------------------------------------------------------------- processes


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, *words], text=True, env={**os.environ, "PYTHONPATH": path}, **options
    )


def test_standard_output_that_is_full_or_closed() -> None:
    with open("/dev/full", "w") as full:
        done = python("-m", "vtc", "zoo", "list", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert re.match("vtc: cannot .*: No space left on device. Free some space", done.stderr)
    assert done.stderr.count("\n") == 1
    done = python("-c", "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, "
        "'-m', 'vtc', 'zoo', 'list'])", stderr=subprocess.PIPE)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["vtc.commands.cli", "vtc.commands.tables", "torch"])
def test_the_first_ctrl_c_counts_while_modules_are_imported(module: str) -> None:
    code = f"""
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from vtc.__main__ import main
sys.argv = ["vtc", "list"]
raise SystemExit(main())
"""
    done = python("-c", code, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vtc: stopped\n")
