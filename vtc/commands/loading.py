"""Models, images and prompts, as commands are given them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel, VtcError, storage

#: endings of pictures that are read, and what Pillow calls their formats
FORMATS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"},
    **{".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF"},
}
READ = tuple(dict.fromkeys(FORMATS.values()))
#: of a picture: those where Pillow begins to warn
MOST_PIXELS = 2**30 // 12
#: image encoders of the zoo, which answer no prompts
ENCODERS = ("tiny-lookupvit-fmnist", "tiny-vit-fmnist")
#: models of the zoo that draw pictures, and answer no prompts either
DRAWERS = ("tiny-dit-digits", "tiny-flexdit-digits")


def value_of(name: str, text: str) -> Any:
    """What the text of a parameter stands for: `[0.1, 0.2]` is a list, as it is in a recipe."""
    from ..strict_yaml import read, shown  # not needed for `vtc --help`

    try:
        return read(text, "the value")
    except InvalidRecipe as error:
        raise InvalidRecipe(
            f"{name}={shown(text)} is no value that YAML can read: write a number, a word, or a "
            f"list such as [projector, decoder.2] ({error})"
        ) from error


class UsageError(VtcError):
    """The command was typed wrongly: exit code 2."""


class BadInput(UsageError, InvalidInput):
    """What was typed names an input that is missing, or of no use."""


class BadImage(BadInput):
    """A file that is no image, or a damaged one, or too large."""


@contextmanager
def typed() -> Iterator[None]:
    """Inside, input that is of no use is the fault of what was typed."""
    try:
        yield
    except InvalidInput as error:
        raise BadInput(str(error)) from error


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
    answers(args.model)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..modules.weights import load_pretrained

    own = "auto" if source == args.model else "float32"  # the zoo is stored in bfloat16
    dtype = getattr(args, "dtype", None) or own
    device = usable(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _loading(args.model):
        load = AutoModelForImageTextToText.from_pretrained
        model = load_pretrained(load, source, dtype=dtype, **trust, **options)
        return model.eval().to(device), AutoProcessor.from_pretrained(source, **trust)


def answers(name: str) -> None:
    """Refuse models of the zoo that answer no prompts."""
    if name in ENCODERS:
        raise UsageError(
            f"{name!r} is an image encoder and answers no prompts: attach a method in Python "
            f"(docs/use/encoders.md), or see `vtc describe {name}`."
        )
    if name in DRAWERS:
        raise UsageError(
            f"{name!r} draws pictures and answers no prompts: load it in Python and call "
            f"vtc_zoo.digits.sample (model_zoo/README.md), or see `vtc describe {name}`."
        )


def usable(name: str) -> Any:
    """The torch device of this name; refuses what is no device, or is not in this machine."""
    import torch

    try:
        device = torch.device(name)
        if device.type != "meta":  # which computes nothing
            torch.empty(1, device=device)
            return device
        why = "it holds no numbers"
    # what the backends of torch raise for what is not there
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        why = "torch knows no such kind" if why.startswith("Expected one of") else why
    known, found = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        known += [f"{found.type}:{number}" for number in range(torch.accelerator.device_count())]
    raise UsageError(f"no device {name!r} here ({why}): give one of {', '.join(known)}.")


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot load into one line."""
    try:
        yield
    except VtcError:
        raise
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


def open_image(path: Path, formats: Sequence[str] = READ) -> Any:
    """Upright RGB of a file."""
    if path.is_dir():
        raise BadImage(f"{path} is a folder: name the pictures in it.")
    if not path.is_file():
        raise BadImage(f"no such image: {path}")
    return read_image(path, str(path), formats)


def read_image(
    source: Any,
    name: str,
    formats: Sequence[str] = READ,
    most: int = MOST_PIXELS,
) -> Any:
    """Upright RGB of a path or an open file, called `name` in errors.

    Only these formats are tried, whatever the name ends in: others may start a program (EPS is
    drawn by Ghostscript). More than `most` pixels are refused before they are decoded.
    """
    import struct
    import warnings

    from PIL import Image

    large = BadImage(f"{name} has more than {most / 1e6:.0f} million pixels: scale it down first.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `most` is for that
            with Image.open(source, formats=tuple(formats)) as image:
                if image.width * image.height > most:
                    raise large
                image.load()
                return upright(image, name)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise large from error
    # readers of damaged files raise all of these
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadImage(storage(error, "read", name)) from error
        known = ", ".join(formats)
        raise BadImage(
            f"not an image that can be read: {name}. It is damaged, or none of {known}."
        ) from error


def upright(image: Any, name: str = "the image") -> Any:
    """RGB, turned as the camera noted in the file that it was held. 16 bits become 8."""
    from PIL import ImageOps

    if image.mode == "F":
        raise BadImage(
            f"{name} holds floating point numbers, whose range is not known: give 8 bits."
        )
    if image.mode.startswith("I"):  # a plain conversion would cut at 255
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")


def prompted(processor: Any, prompt: str, kind: str, count: int = 1) -> str:
    """Chat models get their template, others the raw prompt after its placeholders; media stand
    where the prompt itself holds placeholders, one for each of them."""
    token = getattr(processor, f"{kind}_token", None)
    held = 0 if token is None else prompt.count(str(token))
    if held not in (0, count):
        raise BadInput(
            f"the prompt holds {str(token)!r} {held} times, but the number of {kind}s is {count}: "
            f"write as many, or none."
        )
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [] if held else [{"type": kind}] * count
        for number, text in enumerate(prompt.split(str(token)) if held else [prompt]):
            content += [{"type": kind}] * bool(number)
            content += [{"type": "text", "text": text}] * bool(text or not held)
        return templated(processor, [{"role": "user", "content": content}])
    if token is None:
        raise UnsupportedModel(
            f"{type(processor).__name__} has neither a chat template nor a placeholder for "
            f"{'an image' if kind == 'image' else f'a {kind}'}."
        )
    return prompt if held else str(token) * count + prompt


def templated(processor: Any, chat: list[dict[str, Any]]) -> str:
    """What the chat template writes for turns of text and media. A template for text alone fails on
    them, or writes them down as Python does."""
    from jinja2 import TemplateError

    why = "it writes them down as they are"
    try:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        if not any(str(turn["content"]) in text for turn in chat):
            return text
    except (TemplateError, TypeError) as error:
        why = str(error).partition("\n")[0]
    raise UnsupportedModel(
        f"the chat template of {type(processor).__name__} is for text alone, and cannot place "
        f"images or videos ({why}). Use a model folder whose chat_template.jinja takes lists of "
        f"content, or one without it: then placeholders and prompt go as they are."
    )


def encode(processor: Any, prompt: str, images: list[Any]) -> Any:
    """What the processor makes of one prompt about these images."""
    text = prompted(processor, prompt, "image", len(images))
    try:
        return processor(images=images, text=text, return_tensors="pt")
    except ValueError as error:
        if isinstance(error, VtcError):
            raise
        given = f"this prompt with {len(images)} image{'s' * (len(images) > 1)}"
        raise InvalidInput(f"{type(processor).__name__} cannot read {given}: {error}") from error
