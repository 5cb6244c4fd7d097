"""Arguments of a model in a harness: which model, what compresses it, how videos are read."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commands.loading import load_model, value_of
from ..errors import InvalidInput, InvalidRecipe, unknown
from ..recipe import Step
from ..registry import REDUCERS
from ..video.decode import check_options
from ..video.job import attach_request
from ..video.sampling import Sampling

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: of the harness, with their defaults; everything else says what compresses
OWN: dict[str, Any] = {
    "pretrained": None,
    "device": None,
    "dtype": None,
    "trust_remote_code": False,
    "attn_implementation": None,
    "frames": 8,
    "backend": "auto",
    "max_new_tokens": 1024,
}


@dataclass(frozen=True)
class Arguments:
    """What was asked for, checked as far as that goes without the model.

    Attributes:
        pretrained: name in the zoo, folder, or hub id.
        request: arguments of `vtc.attach`; None leaves the model dense.
        frames, backend: which frames of a video are read, and by what.
        max_new_tokens: of an answer, where the task says nothing.
    """

    pretrained: str
    request: Mapping[str, Any] | None
    device: str | None
    dtype: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    frames: Sampling
    backend: str
    max_new_tokens: int

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Arguments:
        """From names and values as a harness hands them over: text, numbers, booleans."""
        own = OWN | {name: value for name, value in given.items() if name in OWN}
        rest = {name: value for name, value in given.items() if name not in OWN}
        request = _request(rest)
        if not isinstance(own["pretrained"], str) or not own["pretrained"]:
            raise InvalidInput(
                "pretrained is missing: give the name of a zoo model, a folder or a hub id, such "
                "as pretrained=llava-hf/llava-1.5-7b-hf."
            )
        if not isinstance(own["trust_remote_code"], bool):
            raise InvalidInput(f"trust_remote_code={own['trust_remote_code']!r}: true or false.")
        if own["dtype"] not in (None, *DTYPES):
            raise InvalidInput(f"dtype={own['dtype']!r}: give one of {', '.join(DTYPES)}.")
        check_options(own["backend"])
        check_count("max_new_tokens", own["max_new_tokens"])
        return cls(**own | {"request": request, "frames": Sampling.parse(own["frames"])})

    def load(self) -> tuple[Any, Any]:
        """Model and processor, with the stock classes."""
        names = ("device", "dtype", "trust_remote_code")
        wanted = {name: getattr(self, name) for name in names}
        attention = self.attn_implementation
        more = {} if attention is None else {"attn_implementation": attention}
        model, processor = load_model(argparse.Namespace(model=self.pretrained, **wanted), **more)
        words = processor.tokenizer
        if words.pad_token is None:  # padding is masked: any token will do
            words.pad_token = words.eos_token
        return model, processor


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(f"{name}={value!r}: give a whole number from 1 on.")


def _request(given: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of `vtc.attach`, None where nothing was said."""
    method, recipe = given.get("method"), given.get("recipe")
    own = [f.name for f in dataclasses.fields(REDUCERS[method]) if f.init] if method else []
    shared = [f.name for f in dataclasses.fields(Step) if f.name != "params"]
    known = {*OWN, *shared, *own, "recipe", "seed"}
    for name in given:
        if name not in known:
            hint = "" if method else " With a method, its parameters too (see `vtc show METHOD`)."
            raise unknown("model argument", name, known, hint)
    if not given:
        return None
    if recipe is not None:
        others = [name for name in given if name != "recipe"]
        if others:
            raise InvalidRecipe(
                f"a recipe already says everything: leave out {', '.join(others)}, or the recipe."
            )
        return attach_request(Path(recipe) if isinstance(recipe, str) else recipe)
    if method is None:
        raise InvalidRecipe(f"{', '.join(given)} without a method: give method= or recipe= too.")
    return attach_request({name: _value(name, value) for name, value in given.items()})


def _value(name: str, value: Any) -> Any:
    """Text of a command line as what it stands for."""
    return value_of(name, value) if isinstance(value, str) and name != "method" else value
