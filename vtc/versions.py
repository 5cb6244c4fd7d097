"""Versions of the libraries that models come from: which were tested, and how they differ.

Nothing else in vtc looks at a version. Differences are found by interface, where a name stands in a
signature or an output, so that a release in between needs no entry of its own."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from .errors import UnsupportedModel

#: package that a model's classes come from -> its name in pip, and the versions that were tested
TESTED = {
    "torch": ("torch", ">=2.13"),
    "transformers": ("transformers", ">=5.16.1,<5.25"),
    "timm": ("timm", ">=1.0.25,<1.1"),
    "open_clip": ("open_clip_torch", ">=3.2,<4"),
    "diffusers": ("diffusers", ">=0.35,<0.43"),
}
#: with any value: go on with versions that were never tested
GO_ON = "VTC_ANY_VERSION"

#: what a KV cache is called, as an argument and in outputs: since transformers 5.24, and before
CACHE = ("cache", "past_key_values")


class UntestedVersion(UserWarning):
    """A library of another version than those that vtc was tested with."""


def tested(package: str, version: str) -> bool:
    """Whether vtc was tested with that version of one of `TESTED`."""
    return SpecifierSet(TESTED[package][1], prereleases=True).contains(Version(version))


def check(model: nn.Module) -> None:
    """Refuse a model whose classes come from a version of a library that was never tested."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for package in sorted((roots | {"torch"}) & TESTED.keys()):
        name, allowed = TESTED[package]
        version = getattr(sys.modules[package], "__version__", None)
        if version is None or tested(package, version):
            continue
        if not os.environ.get(GO_ON):
            raise UnsupportedModel(
                f"this is {name} {version}, and vtc was tested with {name}{allowed}: install one "
                f"of these, or set the environment variable {GO_ON}=1 to go on at your own risk "
                f"(other versions have given wrong answers without an error)."
            )
        _warn(name, version, allowed)


@functools.cache
def _warn(name: str, version: str, allowed: str) -> None:
    text = f"{name} {version} was never tested with vtc ({name}{allowed} was): compare answers."
    warnings.warn(text, UntestedVersion, stacklevel=4)


# --------------------------------------------------------------------- KV caches of transformers


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model or a layer, under either of its names."""
    return next((c for name in CACHE if (c := arguments.get(name)) is not None), None)


def cache_in(output: Any) -> Any:
    """The KV cache in an output, by its fields: to ask by the old name would warn."""
    return cache_of(getattr(output, "__dict__", {}))


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The KV cache as a keyword argument of a function; nothing where it takes none."""
    name = _cache_name(getattr(function, "__func__", function))
    return {} if name is None else {name: cache}


@functools.cache
def _cache_name(function: Callable[..., Any]) -> str | None:
    names = inspect.signature(function).parameters
    return next((name for name in CACHE if name in names), None)


def check_features(model: nn.Module, why: str) -> None:
    """Refuse a model that takes no features of images that were encoded before."""
    base = getattr(model, "base_model", model)
    if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModel(
            f"{type(model).__name__} takes no features that were encoded before "
            f"(mm_encoder_outputs, which transformers has since 5.19 and not for every model): "
            f"{why}."
        )
