"""Versions of the libraries that models come from: which are supported, and how they differ.

Nothing else in vtc looks at a version. Differences are found by interface, where a name stands in a
signature or an output, so that a release in between needs no entry of its own."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from .errors import UnsupportedModel


@dataclass(frozen=True)
class Library:
    """A library that models come from.

    Attributes:
        name: in pip. supported: the range that `attach` accepts.
        tested: releases that the tests run with, the newest last.
    """

    name: str
    supported: str
    tested: tuple[str, ...]

    def supports(self, version: str) -> bool:
        return SpecifierSet(self.supported, prereleases=True).contains(Version(version))


#: package that a model's classes come from -> the library
LIBRARIES = {
    "torch": Library("torch", ">=2.13", ("2.14.1",)),
    "transformers": Library(
        "transformers", ">=5.16.1,<5.25", ("5.16.1", "5.19.0", "5.22.0", "5.24.0")
    ),
    "timm": Library("timm", ">=1.0.25,<1.1", ("1.0.25", "1.0.31")),
    "open_clip": Library("open_clip_torch", ">=3.2,<4", ("3.2.0", "3.3.0")),
    "diffusers": Library("diffusers", ">=0.35,<0.43", ("0.35.2", "0.42.1")),
}
#: with any value: go on with versions that are not supported
GO_ON = "VTC_ANY_VERSION"

#: what a KV cache is called, as an argument and in outputs: since transformers 5.24, and before
CACHE = ("cache", "past_key_values")


class UntestedVersion(UserWarning):
    """A library of a version that vtc does not support is used all the same."""


def check(model: nn.Module) -> None:
    """Refuse a model whose classes come from a version of a library that is not supported."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for package in sorted((roots | {"torch"}) & LIBRARIES.keys()):
        library = LIBRARIES[package]
        version = getattr(sys.modules[package], "__version__", None)
        if version is None or library.supports(version):
            continue
        if not os.environ.get(GO_ON):
            raise UnsupportedModel(
                f"this is {library.name} {version}, and vtc supports "
                f"{library.name}{library.supported}: install one of these, or set the environment "
                f"variable {GO_ON}=1 to go on at your own risk (other versions have given wrong "
                f"answers without an error)."
            )
        _warn(library, version)


@functools.cache
def _warn(library: Library, version: str) -> None:
    text = (
        f"vtc does not support {library.name} {version}, but {library.supported}: compare answers."
    )
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


def checkpoints_hooks(layer: nn.Module) -> bool:
    """Gradient checkpointing of this layer runs its hooks again in the backward pass, as in
    transformers before 5.23, where it wraps `__call__`."""
    return type(layer).__call__ is not nn.Module.__call__


def check_checkpointing(layer: nn.Module) -> None:
    """Refuse gradient checkpointing that would drop tokens a second time in the backward pass."""
    on = layer.training and getattr(layer, "gradient_checkpointing", False)
    if on and checkpoints_hooks(layer):
        raise UnsupportedModel(
            f"gradient checkpointing of {type(layer).__name__} runs hooks a second time, in the "
            f"backward pass: switch it off, or use transformers 5.23 or later, where it does not."
        )
