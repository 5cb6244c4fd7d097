"""Versions of other libraries: what is refused, what is told, and that one place knows of them."""

from __future__ import annotations

import re
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import vtc
from vtc import versions
from vtc.commands.cli import main
from vtc.errors import UnsupportedModel
from vtc.testing import families

ROOT = Path(__file__).parents[1]


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + optional["vision"] + optional["diffusers"]
    made = map(Requirement, lines)
    return {requirement.name: requirement for requirement in made}


@pytest.mark.parametrize("package", versions.LIBRARIES)
def test_what_attach_accepts_is_what_pip_installs(package: str) -> None:
    library = versions.LIBRARIES[package]
    wanted = requirements()[library.name]
    assert set(library.supported.split(",")) == {str(part) for part in wanted.specifier}
    assert all(map(library.supports, library.tested))
    assert list(library.tested) == sorted(library.tested, key=Version)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("5.16.0", False),
        ("5.16.1", True),
        ("5.20.2", True),
        ("5.24.3.dev0", True),
        ("5.24.0+local", True),
        ("5.25.0", False),
        ("6.0", False),
    ],
)
def test_a_version_out_of_range_is_refused_by_name(
    version: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fam = families.make("llava", row=0)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    if fits:
        vtc.attach(fam.model, "grid", keep=0.5, strict=False).detach()
        return
    says = rf"this is transformers {version}, and vtc supports transformers>=5\.16\.1,<5\.25: .*"
    with pytest.raises(UnsupportedModel, match=says + f"{versions.GO_ON}=1"):
        vtc.attach(fam.model, "grid", keep=0.5)
    assert not any(module._forward_pre_hooks for module in fam.model.modules())
    monkeypatch.setenv(versions.GO_ON, "1")
    versions._warn.cache_clear()
    with pytest.warns(versions.UntestedVersion, match=f"does not support transformers {version}"):
        vtc.attach(fam.model, "grid", keep=0.5, strict=False).detach()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        vtc.attach(fam.model, "grid", keep=0.5, strict=False).detach()


def test_libraries_that_the_model_does_not_come_from_are_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.0")
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    vtc.attach(model, "grid", keep=0.5, at="vision.1", strict=False).detach()
    monkeypatch.setattr(timm, "__version__", "1.0.15")
    with pytest.raises(UnsupportedModel, match=r"this is timm 1\.0\.15, and vtc supports timm>="):
        vtc.attach(model, "grid", keep=0.5, at="vision.1")


def test_one_place_knows_versions() -> None:
    """Everything else looks at signatures and attributes."""
    asked = re.compile(r"__version__|metadata\.version|is_torch_|is_transformers_version")
    told = {"__init__.py", "versions.py", "cli.py", "env.py", "records.py", "work.py", "command.py"}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vtc").rglob("*.py")
        if asked.search(path.read_text(encoding="utf-8")) and path.name not in told
    }
    assert found <= {"vtc/bench/census.py", "vtc/testing/families.py"}  # which print it


def test_the_environment_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"vtc {vtc.__version__}, Python 3." in out
    (line,) = [line for line in out.splitlines() if line.startswith("transformers ")]
    assert transformers.__version__ in line and ">=5.16.1, <5.25" in line
    from vtc.commands import env

    real = env.installed
    given: Any = {"transformers": "5.15.0", "decord": None, "timm": "1.0.27"}
    monkeypatch.setattr(env, "installed", lambda name: given[name] if name in given else real(name))
    assert main(["env"]) == 1
    out = capsys.readouterr().out
    states = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip()}
    assert states["timm"] == "supported" and states["decord"] == "missing"
    assert "not supported: transformers. vtc.attach refuses their models." in out
    assert "decord: reading videos (pip install 'vision-token-compression[video]')" in out


# ---------------------------------------------------------------------- differences by interface


def test_a_cache_by_either_of_its_names() -> None:
    cache = object()
    assert versions.cache_of({"cache": None, "past_key_values": cache}) is cache
    assert versions.cache_of({"cache": cache}) is cache
    assert versions.cache_of({"use_cache": True}) is None

    def new(cache: Any = None, past: int = 0) -> None: ...
    def old(past_key_values: Any = None) -> None: ...
    def neither(mask: Any = None) -> None: ...

    assert versions.cache_argument(new, cache) == {"cache": cache}
    assert versions.cache_argument(old, cache) == {"past_key_values": cache}
    assert versions.cache_argument(neither, cache) == {}


def test_a_cache_in_an_output_is_found_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    fam = families.make("llava", row=0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fam.model(**fam.inputs, use_cache=True)
        assert versions.cache_in(out).get_seq_length() == fam.inputs["input_ids"].shape[1]
        assert versions.cache_in(fam.model(**fam.inputs, use_cache=False)) is None
    assert not caplog.records


class Around(nn.Linear):
    """Checkpoints as transformers before 5.23 does: around its hooks."""

    gradient_checkpointing = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_checkpointing_around_hooks_is_refused() -> None:
    layer = Around(2, 2)
    with pytest.raises(UnsupportedModel, match=r"of Around runs hooks a second time.*5\.23"):
        versions.check_checkpointing(layer)
    versions.check_checkpointing(layer.eval())
    inside = nn.Linear(2, 2)
    inside.gradient_checkpointing = True  # type: ignore[assignment]
    versions.check_checkpointing(inside)
