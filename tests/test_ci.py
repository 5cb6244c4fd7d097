"""Pinned releases fit pyproject.toml; a step of CI says in one line what it cannot import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    """Release by package; a line that is no exact release is an error."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)( ; .+)?", line)
        assert match, f"{name} holds {line!r}, which is no exact release for every platform"
        found[match[1]] = match[2]
    return found


def test_constraints_hold_every_requirement_at_a_release_that_is_allowed() -> None:
    held, harness = pins("constraints.txt"), pins(".ci/harness.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["dev"] + ["pip", "editables"]:
        wanted = Requirement(line)
        release = held[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(release), f"{line}: constraints.txt has {release}"
    for line in (ROOT / ".ci/harness.in").read_text().splitlines()[1:]:
        wanted = Requirement(line.partition("#")[0])
        name = canonicalize_name(wanted.name)
        assert wanted.specifier.contains((held | harness)[name]), line
    filelock = next(Requirement(line) for line in extras["lmms-eval"] if "filelock" in line)
    assert filelock.specifier.contains(harness["filelock"])


def test_constraints_of_the_harness_are_only_what_differs() -> None:
    lines = set((ROOT / "constraints.txt").read_text().splitlines())
    assert not lines & set((ROOT / ".ci/harness.txt").read_text().splitlines())


def step(tmp_path: Path, code: str) -> tuple[int, str, Path]:
    """Exit code and output of a step that runs `code`, and where it leaves the rest."""
    script = tmp_path / ".ci" / "step"
    script.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "step", script)
    command = [sys.executable, str(script), "demo", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout, tmp_path / "out" / "ci" / "demo.log"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import yaml._gone",
            r"No module named 'yaml\._gone' \(<string>, line 1\); installed: (?i:pyyaml) [\d.]+;",
        ),
        (
            "from yaml import gone",
            r"cannot import name 'gone' from 'yaml' .*; installed: (?i:pyyaml) [\d.]+;",
        ),
        ("import gone_at_all", r"No module named 'gone_at_all' .*; installed: nothing of that"),
    ],
)
def test_a_step_that_cannot_import_says_so_in_one_line(
    tmp_path: Path, code: str, said: str
) -> None:
    status, out, rest = step(tmp_path, code)
    assert status == 1 and len(out.splitlines()) == 1
    assert re.match(rf"demo: cannot import: {said}", out), out
    assert out.endswith("; the rest: out/ci/demo.log\n") and "Traceback" in rest.read_text()


def test_a_step_that_fails_by_something_else_shows_all_of_it(tmp_path: Path) -> None:
    code = "try:\n    import gone\nexcept ImportError:\n    raise KeyError('this')"
    status, out, rest = step(tmp_path, code)
    assert status == 1 and "KeyError: 'this'" in out and "Traceback" in out and not rest.exists()


def test_a_step_that_succeeds_shows_what_it_prints(tmp_path: Path) -> None:
    code = "print('ImportError: only told')"
    assert step(tmp_path, code)[:2] == (0, "ImportError: only told\n")
