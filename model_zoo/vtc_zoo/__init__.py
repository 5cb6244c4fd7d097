# SPDX-License-Identifier: Apache-2.0
"""Small trained models that ship with the library, and the data they were trained on.

They let a compression method be tried, tested and compared on a CPU with nothing to download.
Importing this package imports neither torch nor transformers.
"""

import difflib
from pathlib import Path
from typing import Any

__all__ = ["load", "load_folder", "names", "path", "prompt", "video_prompt"]

_WEIGHTS = Path(__file__).parent / "weights"
_TRAINERS = {
    "tiny-dit-digits": "vtc_zoo.train_dit_digits",
    "tiny-flexdit-digits": "vtc_zoo.train_flexdit_digits",
    "tiny-llava-shapes": "vtc_zoo.train_llava_shapes",
    "tiny-llava-video": "vtc_zoo.train_llava_video",
    "tiny-langdc-video": "vtc_zoo.train_langdc_video",
    "tiny-stts-video": "vtc_zoo.train_stts_video",
    "tiny-lookupvit-fmnist": "vtc_zoo.train_fmnist --model lookupvit",
    "tiny-vit-fmnist": "vtc_zoo.train_fmnist --model vit",
}


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
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"the weights of {name!r} are missing: there is no safetensors file in {folder}. "
            f"Train them on a CPU with: python -m {_TRAINERS[name]} --out {folder}"
        )
    return folder


def load(name: str, **from_pretrained_kwargs: Any) -> tuple[Any, Any]:
    """Load a model, in eval mode, and what turns its input into tensors.

    For tiny-llava-shapes these are stock transformers classes, and further arguments go to the
    model's `from_pretrained`. For tiny-dit-digits they are a diffusers transformer and scheduler,
    and `digits.sample` draws; tiny-flexdit-digits is the same, fine-tuned for few tokens, and wants
    `vtc.attach(model, **digits.flexdit())`. For the Fashion-MNIST models the second is
    `fmnist.preprocess`, from images to [B, 1, 32, 32], and `dtype` is the only further argument. It
    is float32 unless given.
    """
    return load_folder(path(name), **from_pretrained_kwargs)


def load_folder(folder: str | Path, **from_pretrained_kwargs: Any) -> tuple[Any, Any]:
    """Load a folder that a training script wrote, as `load` loads a shipped one.

    Raises:
        vtc.errors.InvalidWeights: a file is missing or damaged, or does not fit the others.
    """
    import torch

    from vtc.modules.weights import load_pretrained, read_settings

    options = {"dtype": torch.float32, **from_pretrained_kwargs}
    if (Path(folder) / "langdc.json").is_file():
        raise ValueError(
            f"{folder} holds LangDC, which is no model of its own: load tiny-llava-video and "
            f"vtc.attach(model, 'langdc', weights={str(folder)!r})"
        )
    about = read_settings(Path(folder) / "config.json")
    if about.get("model_type") in ("timm", "lookupvit"):
        further = sorted(set(options) - {"dtype"})
        if further:
            raise ValueError(f"{', '.join(further)}: this model takes no argument but dtype")
        from vtc_zoo import fmnist

        return _load_vit(Path(folder), about, options["dtype"]), fmnist.preprocess
    if "_diffusers_version" in about:
        return _load_dit(Path(folder), options)

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = load_pretrained(AutoModelForImageTextToText.from_pretrained, folder, **options)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def _load_dit(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """A diffusion transformer in eval mode and its scheduler."""
    try:
        from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ImportError(
            f"{folder.name} is a diffusers model: pip install diffusers "
            f"(or this package with [digits])"
        ) from error
    import torch

    from vtc.modules.weights import load_pretrained

    # only where weights are drawn first does diffusers tell which of them do not fit
    options = {"low_cpu_mem_usage": False, **options}
    with torch.random.fork_rng(devices=[]):
        model = load_pretrained(DiTTransformer2DModel.from_pretrained, folder, **options)
    return model.eval(), FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


def _load_vit(folder: Path, about: dict[str, Any], dtype: Any) -> Any:
    """A timm VisionTransformer or a LookupViT in eval mode."""
    if about["model_type"] == "lookupvit":
        from vtc.modules.lookupvit import LookupViT

        return LookupViT.from_pretrained(folder, dtype)
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError(
            f"{folder.name} is a timm model: pip install timm (or this package with [vision])"
        ) from error
    from vtc.modules.weights import building, load_weights

    with building(folder / "config.json"):
        model = VisionTransformer(**about["arguments"])
    load_weights(model, folder / "model.safetensors")
    return model.to(dtype).eval()


def prompt(question: str) -> str:
    """Wrap a question about one image as tiny-llava-shapes was trained to read it."""
    return f"<image> user {question} assistant"


def video_prompt(question: str) -> str:
    """Wrap a question about one clip as tiny-llava-video was trained to read it."""
    return f"<video> user {question} assistant"
