"""Tiny models that answer questions about videos, with real processors, and clips for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from vtc.testing import families

WORDS = ("user", "assistant", "what", "moves", "left", "right", "first", "last", "red", "blue")
SPECIAL = {
    "<pad>": families.PAD,
    "<unk>": 1,
    "<image>": families.IMAGE,
    "<video>": families.VIDEO,
    "<start>": 502,
    "<end>": 503,
}
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'video' %}{{ VIDEO }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)
FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")


def tokenizer() -> Any:
    """One token a word; the rest of the vocabulary is `w12` and so on."""
    words = {word: 2 + i for i, word in enumerate(WORDS)}
    taken = {*words.values(), *SPECIAL.values()}
    vocabulary = {f"w{i}": i for i in range(families.VOCAB) if i not in taken} | words | SPECIAL
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=level,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_bos_token": "<start>",
            "vision_eos_token": "<end>",
        },
        clean_up_tokenization_spaces=False,
    )


def processor(name: str) -> Any:
    """The stock processor of a family, small enough for its tiny model."""
    words = tokenizer()
    if name == "llava_onevision":
        size = {"height": 56, "width": 56}
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(size=size),
            tokenizer=words,
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=CHAT.replace("VIDEO", "'<video> '"),
        )
    if name == "internvl":  # frames are images
        for key, token in (("start_image", "<start>"), ("end_image", "<end>")):
            setattr(words, f"{key}_token", token)
            setattr(words, f"{key}_token_id", SPECIAL[token])
        words.context_image_token, words.context_image_token_id = "<image>", families.IMAGE
        size = {"height": 56, "width": 56}
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(size=size),
            tokenizer=words,
            video_processor=transformers.InternVLVideoProcessor(size=size),
            image_seq_length=16,
            chat_template=CHAT.replace("VIDEO", "'<video> '"),
        )
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 112 * 84}
    if name == "qwen2_5_vl":
        return transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(size=pixels),
            tokenizer=words,
            video_processor=transformers.Qwen2VLVideoProcessor(
                size=pixels, cap_pixels_per_frame=False
            ),
            chat_template=CHAT.replace("VIDEO", "'<start><video><end> '"),
        )
    long = {"shortest_edge": 56 * 56, "longest_edge": 4 * 112 * 84}  # of all frames together
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels, patch_size=14),
        tokenizer=words,
        video_processor=transformers.Qwen3VLVideoProcessor(size=long, patch_size=14),
        chat_template=CHAT.replace("VIDEO", "'<start><video><end> '"),
    )


def model(name: str) -> Any:
    """The tiny model of a family, whose processor `processor` makes."""
    made: Any = families.make(name).model
    if name != "llava_onevision":
        made.config.vision_start_token_id = SPECIAL["<start>"]
        made.config.vision_end_token_id = SPECIAL["<end>"]
    return made


def save(name: str, folder: Path) -> Path:
    """As `from_pretrained` reads it."""
    model(name).save_pretrained(folder)
    processor(name).save_pretrained(folder)
    return folder


def frames(seed: int, count: int = 8, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [T, H, W, 3]: a bright square that moves over noise."""
    dice = np.random.default_rng(seed)
    out = dice.integers(0, 90, (count, height, width, 3), dtype=np.uint8)
    row, column = dice.integers(0, height - 16), dice.integers(0, width // 4)
    color = dice.integers(120, 255, 3)
    for t in range(count):
        left = (column + t * (width // 2) // count) % (width - 16)
        out[t, row : row + 16, left : left + 16] = color
    return out
