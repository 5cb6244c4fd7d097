# SPDX-License-Identifier: Apache-2.0
"""Small trained models that ship with the library, and the data they were trained on.

They let a compression method be tried, tested and compared on a CPU with nothing to download.
Importing this package imports neither torch nor transformers.
"""

import difflib
from pathlib import Path
from typing import Any

__all__ = ["load", "load_folder", "names", "path", "prompt"]

_WEIGHTS = Path(__file__).parent / "weights"
_TRAINERS = {"tiny-llava-shapes": "vtc_zoo.train_llava_shapes"}


def names() -> list[str]:
    """Names of the models, for `path` and `load`."""
    return sorted(_TRAINERS)


def path(name: str) -> Path:
    """Folder with the files of a model, as `from_pretrained` takes it."""
    if name not in _TRAINERS:
        close = difflib.get_close_matches(str(name), names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no zoo model {name!r}{hint} Available: {', '.join(names())}")
    folder = _WEIGHTS / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of {name!r} are missing: there is no {folder / 'model.safetensors'}. "
            f"Train them on a CPU with: python -m {_TRAINERS[name]} --out {folder}"
        )
    return folder


def load(name: str, **from_pretrained_kwargs: Any) -> tuple[Any, Any]:
    """Load a model, in eval mode, and its processor with the stock transformers classes.

    Further arguments go to the model's `from_pretrained`; `dtype` is float32 unless given.
    """
    return load_folder(path(name), **from_pretrained_kwargs)


def load_folder(folder: str | Path, **from_pretrained_kwargs: Any) -> tuple[Any, Any]:
    """Load a folder that a training script wrote, as `load` loads a shipped one."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    options = {"dtype": torch.float32, **from_pretrained_kwargs}
    model = LlavaForConditionalGeneration.from_pretrained(folder, **options)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def prompt(question: str) -> str:
    """Wrap a question about one image as tiny-llava-shapes was trained to read it."""
    return f"<image> user {question} assistant"
