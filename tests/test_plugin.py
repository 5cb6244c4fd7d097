"""Methods of other packages: one is built, installed and used; broken ones break nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vtc
from vtc import registry
from vtc.commands import tables
from vtc.errors import PluginWarning, UnknownName
from vtc.registry import Registry, flaw

ROOT = Path(__file__).parent.parent
SOURCE = Path(__file__).parent / "plugin"
GUIDE = ROOT / "docs" / "guides" / "plugins.md"

#: parts of one program, so that torch is imported once; `said` cuts its output there
USE = """
import sys
import vtc
from vtc.commands import cli

def part():
    print("=== part ===")

codes = [cli.main(["list"])]
part()
codes.append(cli.main(["show", "unusual"]))
part()
codes.append(cli.main(["list", "--check", README]))
print(codes, "vtc.testing" in sys.modules)
part()
import torch
from vtc.testing import families
model, inputs = (fam := families.make("llava")).model, fam.inputs
print("pytest" in sys.modules)
for request, options in (("unusual", {"keep": 16, "distance": "euclid"}), ("recipe.yaml", {})):
    with vtc.attach(model, request, **options) as session, torch.no_grad():
        model(**inputs)
    print(session.trace[-1].site, session.trace[-1].method, session.trace[-1].n_out)
print(vtc.describe(model).methods["unusual"])
"""
RECIPE = """steps:
  - {method: unusual, at: decoder.1, keep: 0.25, params: {distance: euclid}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package, built and installed as pip does."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, work / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target"]
    run(work, sys.executable, "-m", "pip", "install", *options, str(work / "site"), "./source")
    return work


def run(work: Path, *command: str) -> str:
    """What a command prints, with the installed package on the path."""
    here = [work / "site", ROOT, ROOT / "kernels", ROOT / "model_zoo"]
    path = os.pathsep.join(map(str, here))
    env = os.environ | {"PYTHONPATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said(installed: Path) -> list[str]:
    (installed / "recipe.yaml").write_text(RECIPE)
    code = f"README = {str(ROOT / 'README.md')!r}\n{USE}"
    return run(installed, sys.executable, "-c", code).split("=== part ===\n")


def test_the_command_lists_and_shows_it(said: list[str]) -> None:
    listed, shown, checked, _ = said
    row = next(line for line in listed.splitlines() if line.startswith("unusual"))
    assert "the tokens that are least like" in row and "vtc-example-method" in row
    assert listed.splitlines()[0].rstrip().endswith("package")
    assert shown.startswith("unusual: baseline (package vtc-example-method 0.1.0)")
    assert "distance" in shown and "'cosine'" in shown
    assert "the tables are current" in checked  # without methods of other packages
    assert checked.endswith("[0, 0, 0] False\n")


def test_it_is_attached_by_its_name_and_by_a_recipe(said: list[str]) -> None:
    assert said[-1].splitlines() == [
        "False",
        "projector unusual (16, 16, 16)",
        "decoder.1 unusual (16, 16, 16)",
        "at vision.0 and later, projector, decoder.0 and later",
    ]


def test_it_passes_the_contract_suite(installed: Path) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "source/tests"]
    passed = re.search(r"(\d+) passed", run(installed, *pytest_))
    assert passed and int(passed[1]) > 60


def test_the_guide_quotes_the_files() -> None:
    if not GUIDE.exists():
        pytest.skip("an installed package has no guides")
    text = re.sub("```[a-z]+\n", "```\n", GUIDE.read_text())
    for name in ("pyproject.toml", "vtc_example_method/__init__.py", "tests/test_unusual.py"):
        assert f"```\n{(SOURCE / name).read_text()}```" in re.sub("```[a-z]+\n", "```\n", text), (
            name
        )


# --------------------------------------------------------------------------------------------
# broken ones


class Entry:
    """An entry point of a package, which loads `item` or raises it."""

    def __init__(self, name: str, item: Any) -> None:
        self.name, self.item, self.value = name, item, "theirs:Thing"
        self.dist = type("Dist", (), {"name": "their-package", "version": "1.2"})

    def load(self) -> Any:
        if isinstance(self.item, Exception):
            raise self.item
        return self.item() if callable(self.item) and not isinstance(self.item, type) else self.item


def method(name: str = "", **more: Any) -> type:
    """A class that would do, but for `more`."""
    own = {"paper": "baseline", "sites": frozenset({"projector"}), "name": name, **more}
    return dataclass(frozen=True)(type("Thing", (vtc.Scorer,), own))


def clashing() -> type:
    """What importing a module does that registers a name twice."""
    return vtc.register("random")(method())


NO_CLASS = "is no class that inherits from vtc.Method"
TWICE = "registered twice: by vtc.methods.random.Random and by"
#: name of the entry point, what it loads or raises, words of the warning
BROKEN: dict[str, tuple[str, Any, str]] = {
    "import error": ("theirs", ImportError("No module named 'nowhere'"), "ImportError: No module"),
    "any error": ("theirs", ZeroDivisionError("division by zero"), "ZeroDivisionError: division"),
    "taken name": ("random", method(), TWICE),
    "taken inside": ("theirs", clashing, TWICE),
    "a function": ("theirs", lambda: len, NO_CLASS),
    "a module": ("theirs", re, NO_CLASS),
    "another class": ("theirs", dict, f"dict {NO_CLASS}"),
    "bad name": ("Their-Method", method(), "'Their-Method': use lower-case letters, digits"),
    "two names": ("theirs", method("ours"), "as 'ours', its entry point says 'theirs'"),
    "no site": ("theirs", method(sites=frozenset({"lens"})), r"sites=.*'lens'.*: give a frozenset"),
    "no sites": ("theirs", method(sites=frozenset()), "has no sites or no budgets"),
    "no signal": ("theirs", method(needs={"keys"}), "needs={'keys'}: give a frozenset of keys"),
    "odd default": ("theirs", method(default_at="decoder.1"), "'decoder.1', which is none of its"),
    "odd site": ("theirs", method(default_at="lens"), "not a site: 'lens'"),
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `vtc.REDUCERS` find these entry points, until the end of the test."""

    def load(*entries: Entry) -> Registry[Any]:
        fresh: Registry[Any] = Registry("method", "vtc.methods", "vtc.reducers", flaw)
        fresh._items.update({name: vtc.REDUCERS[name] for name in vtc.REDUCERS})
        for name in ("_items", "_loaded", "packages", "broken"):
            monkeypatch.setattr(vtc.REDUCERS, name, getattr(fresh, name))
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        return vtc.REDUCERS

    return load


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_one_is_named_once_and_breaks_nothing(what: str, loaded: Any) -> None:
    name, item, words = BROKEN[what]
    good = method("fine")
    names = set(vtc.REDUCERS)
    reducers = loaded(Entry(name, item), Entry("fine", good))
    with pytest.warns(PluginWarning, match=words) as warned:
        assert set(reducers) == names | {"fine"}
    assert len(warned) == 1
    said = str(warned[0].message)
    assert said.startswith(f"method {name!r} of their-package 1.2 (theirs:Thing) cannot be used: ")
    assert said.endswith(". It is left out.")
    assert reducers["fine"] is good and reducers.packages == {"fine": "their-package 1.2"}
    assert reducers["random"].__module__ == "vtc.methods.random"
    assert "fine" in tables.listing() and "fine" not in tables.listing(markdown=True)
    if name != "random":
        with pytest.raises(UnknownName, match=words):
            reducers[name]
        with pytest.raises(UnknownName, match=words):
            vtc.Recipe.load({"steps": [{"method": name, "at": "projector", "keep": 0.5}]})


def test_warnings_as_errors_leave_the_others_usable(loaded: Any) -> None:
    reducers = loaded(Entry("theirs", dict), Entry("fine", method("fine")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PluginWarning):
            list(reducers)
        assert "fine" in reducers and "divprune" in reducers and "theirs" not in reducers


def test_an_undecorated_class_gets_the_name_of_its_entry_point(loaded: Any) -> None:
    @dataclass(frozen=True)
    class Plain(vtc.Scorer):
        """Keeps the first tokens."""

        sites: ClassVar[frozenset[str]] = frozenset({"projector"})

    assert loaded(Entry("plain", Plain))["plain"].name == "plain"


def test_a_parameter_without_a_default_is_refused() -> None:
    assert flaw("theirs", method(__annotations__={"share": float})) == (
        "needs a default for its parameter 'share'."
    )


def test_the_group_is_what_the_example_names() -> None:
    text = (SOURCE / "pyproject.toml").read_text()
    assert f'entry-points."{vtc.REDUCERS._group}"' in text
