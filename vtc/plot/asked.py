"""What `vtc plot layers` and `vtc plot kept` share: a model, a prompt with images, and settings."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, InvalidRecipe


@dataclass(frozen=True)
class Asked:
    """A prompt as the model is given it, and its images as they were before."""

    model: Any
    processor: Any
    inputs: Any
    images: list[Any]


def options(parser: argparse.ArgumentParser) -> None:
    """Model, prompt, and methods or recipes."""
    from ..bench.options import budgets, method_and_params

    def method(text: str) -> tuple[str, str, dict[str, Any]]:
        try:
            return (text, *method_and_params(text))
        except InvalidRecipe as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="zoo name, folder or hub id")
    add("--image", type=Path, nargs="+", required=True, metavar="FILE")
    add("--prompt", required=True, metavar="TEXT")
    add("--method", type=method, nargs="+", default=[], metavar="M",
        help="names of `vtc list`, with parameters as name:key=value")  # fmt: skip
    add("--keep", type=budgets, metavar="K", help="budgets of the methods, such as 0.25 or "
        "0.5,0.25,64,auto (default: the methods' own)")  # fmt: skip
    add("--at", metavar="SITE", help="where the methods act (default: where their papers do)")
    add("--recipe", type=Path, nargs="+", default=[], metavar="YAML", help="files as in configs/")
    add("--seed", type=int, help="for methods that draw")
    add("--device", help="default: cuda when there is one, else cpu")
    add("--trust-remote-code", action="store_true", help="run code of the model repo")


def requests(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `attach`."""
    given = {k: v for k in ("at", "seed") if (v := getattr(args, k)) is not None}
    out: dict[str, dict[str, Any]] = {}
    for (text, name, params), keep in itertools.product(args.method, args.keep or [None]):
        told = {} if keep is None else {"keep": keep}
        words = [text, f"{keep:.0%}" if isinstance(keep, float) else str(keep or ""), args.at or ""]
        out[" ".join(filter(None, words))] = {"method": name, **told, **given, **params}
    for path in args.recipe:
        out[path.stem] = {"method": path}
    if not out:
        raise InvalidRecipe("nothing to draw: give --method, --recipe, or several of them.")
    if not args.method and (given or args.keep):
        raise InvalidRecipe("a recipe already says everything: --keep, --at and --seed are for "
            "--method.")  # fmt: skip
    return out


def ask(args: argparse.Namespace, wanted: Sequence[dict[str, Any]]) -> Asked:
    """Load the model, check every setting before any work, and encode the prompt."""
    from .. import attach
    from ..commands import loading

    images = [loading.open_image(path) for path in args.image]
    model, processor = loading.load_model(args)
    for request in wanted:
        attach(model, strict=False, **request).detach()
    inputs = loading.encode(processor, args.prompt, images).to(model.device, model.dtype)
    return Asked(model, processor, inputs, images)


def sessions(asked: Asked, wanted: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The prompt once through the model in every setting: name, and the session that saw it."""
    import torch

    from .. import attach

    for name, request in wanted.items():
        try:
            with torch.inference_mode(), attach(asked.model, **request) as session:
                asked.model(**asked.inputs)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error
        yield name, session
