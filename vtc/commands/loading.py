"""Models, images and prompts, as commands are given them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel, VtcError

#: image encoders of the zoo, which answer no prompts
ENCODERS = ("tiny-lookupvit-fmnist", "tiny-vit-fmnist")
#: models of the zoo that draw pictures, and answer no prompts either
DRAWERS = ("tiny-dit-digits", "tiny-flexdit-digits")


def value_of(name: str, text: str) -> Any:
    """What the text of a parameter stands for: `[0.1, 0.2]` is a list, as it is in a recipe."""
    import yaml  # not needed for `vtc --help`

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRecipe(
            f"{name}={text!r} is no value that YAML can read: write a number, a word, or a list "
            f"such as [projector, decoder.2]."
        ) from error


class UsageError(VtcError):
    """The command was typed wrongly: exit code 2."""


class BadImage(UsageError, InvalidInput):
    """A file that is no image, or a damaged one."""


def model_structure(args: argparse.Namespace) -> Any:
    """The model without its weights."""
    with _loading(args.model):
        return _structure(args.model, args.trust_remote_code)


def _structure(name: str, trust: bool) -> Any:
    """A model without its weights."""
    import torch

    library, _, rest = name.partition("/")
    if library == "timm":
        import timm

        architecture = rest.partition(".")[0]  # the rest is a tag of weights
        _known(library, architecture, timm.list_models())
        with torch.device("meta"):
            return timm.create_model(architecture, pretrained=False)
    if library == "open_clip":
        import open_clip

        _known(library, rest, open_clip.list_models())
        with torch.device("meta"):
            return open_clip.create_model(rest, device="meta")
    source = source_of(name)
    if name in (*ENCODERS, *DRAWERS):
        import vtc_zoo

        model = vtc_zoo.load(name)[0]
        if hasattr(model, "grid_of_step"):
            raise UsageError(
                f"{name!r} is a LookupViT, which compresses by itself: call it as "
                f"model(images, grid=(3, 3)). There is nothing to attach."
            )
        return model
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    own = getattr(config, "auto_map", None) or {}  # code of the repository
    answers = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    answers = answers or "AutoModelForImageTextToText" in own
    kind = AutoModelForImageTextToText if answers else AutoModel
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust)


def load_model(args: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    """Model and processor, with the stock classes. options: more for `from_pretrained`."""
    source, trust = source_of(args.model), {"trust_remote_code": args.trust_remote_code}
    if args.model in ENCODERS:
        raise UsageError(
            f"{args.model!r} is an image encoder and answers no prompts: attach a method in Python "
            f"(docs/use/encoders.md), or see `vtc describe {args.model}`."
        )
    if args.model in DRAWERS:
        raise UsageError(
            f"{args.model!r} draws pictures and answers no prompts: load it in Python and call "
            f"vtc_zoo.digits.sample (model_zoo/README.md), or see `vtc describe {args.model}`."
        )
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    own = "auto" if source == args.model else "float32"  # the zoo is stored in bfloat16
    dtype = getattr(args, "dtype", None) or own
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _loading(args.model):
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, **trust, **options
        )
        return model.eval().to(device), AutoProcessor.from_pretrained(source, **trust)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot load into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise VtcError(f"cannot load {name!r}: {first[0]}") from error


def source_of(name: str) -> str:
    """What from_pretrained takes, for a model of the zoo, a folder or a hub id."""
    import vtc_zoo

    names = vtc_zoo.names()
    if name in names:
        with _loading(name):
            return str(vtc_zoo.path(name))
    if Path(name).is_dir() or (name.count("/") == 1 and name[0] not in "./~"):
        return name
    close = difflib.get_close_matches(name, names, n=1)
    raise UsageError(
        f"unknown model {name!r}: not in the zoo ({', '.join(names)}), not a folder, not a hub id "
        f"such as org/name.{f' Did you mean {close[0]!r}?' if close else ''}"
    )


def _known(library: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3)
    more = f" Did you mean {', '.join(close)}?" if close else ""
    raise UsageError(f"{library} has no model {name!r}.{more}")


def open_image(path: Path) -> Any:
    """Upright RGB."""
    import struct

    from PIL import Image

    if not path.is_file():
        raise BadImage(f"no such image: {path}")
    try:
        with Image.open(path) as image:
            return upright(image)
    except BadImage:
        raise
    # readers of damaged files raise all of these
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise BadImage(f"not an image that can be read: {path}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"this image is too large to be decoded: {path}") from error


def upright(image: Any) -> Any:
    """RGB, turned as the camera noted in the file that it was held. 16 bits become 8."""
    from PIL import ImageOps

    if image.mode == "F":
        raise BadImage("an image of floating point numbers, whose range is not known: give 8 bits.")
    if image.mode.startswith("I"):  # a plain conversion would cut at 255
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")


def prompted(processor: Any, prompt: str, kind: str, count: int = 1) -> str:
    """Chat models get their template, others the raw prompt behind its placeholders, or with as
    many of them as there are media."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": kind} for _ in range(count)), {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return processor.apply_chat_template(chat, add_generation_prompt=True)
    token = getattr(processor, f"{kind}_token", None)
    if token is None:
        raise UnsupportedModel(
            f"{type(processor).__name__} has neither a chat template nor a placeholder for "
            f"{'an image' if kind == 'image' else f'a {kind}'}."
        )
    token = str(token)
    held = prompt.count(token)
    if held not in (0, count):
        raise InvalidInput(
            f"the prompt holds {token!r} {held} times, but the number of {kind}s is {count}: write "
            f"as many, or none."
        )
    return prompt if held else token * count + prompt


def encode(processor: Any, prompt: str, images: list[Any]) -> Any:
    """What the processor makes of one prompt about these images."""
    text = prompted(processor, prompt, "image", len(images))
    return processor(images=images, text=text, return_tensors="pt")
