# SPDX-License-Identifier: Apache-2.0
"""Train tiny-llava-shapes from nothing, on one CPU core.

Run as `python -m vtc_zoo.train_llava_shapes --out DIR [--smoke]`. Two stages, both of a fixed
number of steps with fixed seeds:

1. a CLIP vision tower learns, patch by patch, which object it shows and where its centre is, and
   from the class token which objects there are and how many;
2. that tower is frozen, its features are computed once, and a projector and a small Llama learn
   to answer questions, nine of them packed behind each image.

The scenes and the tower are kept in a work folder and used again when they are there.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vtc_zoo import load_folder, shapes
from vtc_zoo.eval_llava_shapes import evaluate
from vtc_zoo.training import (
    ATTENTION,
    BOS,
    EOS,
    IMAGE,
    PAD,
    PIXEL_MEAN,
    PIXEL_STD,
    Averages,
    accuracies,
    answer,
    arguments,
    normalise,
    pack,
    save,
    set_up,
    steps_of,
    tokenizer_of,
    vocabulary_of,
)

VOCABULARY = vocabulary_of(shapes.WORDS)

WIDTH = 128
PATCHES = (shapes.IMAGE_SIZE // shapes.PATCH_SIZE) ** 2
CLASSES = 1 + len(shapes.SHAPES) * len(shapes.COLORS)
BATCH = 32
QUESTIONS = 9  # packed behind one image
MIX = (*shapes.TYPES, *("left", "above", "extreme") * 2)
"""Types asked in training. Relations come three times: they are learnt last."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['role'] + ' ' + message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{{ message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


@dataclass(frozen=True)
class Plan:
    """How much is drawn, trained and tested."""

    scenes: int
    tower_steps: int
    llava_steps: int
    test_scenes: int


FULL = Plan(scenes=50_000, tower_steps=3500, llava_steps=5000, test_scenes=2000)
SMOKE = Plan(scenes=64, tower_steps=20, llava_steps=20, test_scenes=10)


@dataclass(frozen=True)
class Data:
    """Training scenes: pixels [N, 96, 96, 3] uint8, read from disk, and the objects of each."""

    pixels: np.ndarray
    objects: list[list[shapes.ShapeObject]]


def draw_data(work: Path, n: int) -> Data:
    """Draw the first `n` training scenes, or read them back."""
    pixel_file, object_file = work / f"scenes-{n}.npy", work / f"scenes-{n}.json"
    if not object_file.exists():
        pixels = np.lib.format.open_memmap(
            pixel_file, "w+", np.uint8, (n, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3)
        )
        rows = []
        for i in tqdm(range(n), "scenes", mininterval=2):
            scene = shapes.make_scene(random.Random(shapes.TRAIN_SEED + i))
            pixels[i] = np.asarray(scene.image)
            rows.append([astuple(item) for item in scene.objects])
        pixels.flush()
        object_file.write_text(json.dumps(rows))
    rows = json.loads(object_file.read_text())
    return Data(
        np.load(pixel_file, mmap_mode="r"),
        [[shapes.ShapeObject(*values) for values in row] for row in rows],
    )


def tower_config() -> CLIPVisionConfig:
    """A CLIP tower for 144 patches, with heads of 64 dimensions."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=shapes.IMAGE_SIZE,
        patch_size=shapes.PATCH_SIZE,
        hidden_act="gelu",
    )


class TowerTask(nn.Module):
    """The vision tower with the heads it is trained with; only the tower is kept."""

    def __init__(self) -> None:
        super().__init__()
        config = tower_config()
        config._attn_implementation = ATTENTION
        self.tower = CLIPVisionModel(config)
        self.patch_head = nn.Linear(WIDTH, CLASSES)
        self.centre_head = nn.Linear(WIDTH, 2)
        self.presence_head = nn.Linear(WIDTH, CLASSES)
        self.count_head = nn.Linear(WIDTH, 8)

    def forward(
        self, pixels: np.ndarray, objects: Sequence[Sequence[shapes.ShapeObject]]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and what the progress bar shows: how much is recognised."""
        targets = [shapes.patch_targets(items) for items in objects]
        labels = torch.from_numpy(np.stack([t[0] for t in targets]))
        centres = torch.from_numpy(np.stack([t[1] for t in targets]))
        counts = torch.tensor([len(items) for items in objects])
        present = torch.zeros(len(labels), CLASSES).scatter_(1, labels, 1.0)

        with torch.autocast("cpu", torch.bfloat16):
            out = self.tower(pixel_values=normalise(pixels), output_hidden_states=True)
            patches, pooled = out.hidden_states[-2][:, 1:], out.pooler_output
            logits = self.patch_head(patches).float()
            centre_error = F.mse_loss(self.centre_head(patches).float(), centres)
            presence = self.presence_head(pooled).float()
            count_logits = self.count_head(pooled).float()

        shown = labels > 0
        patch_loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (
            patch_loss[shown].mean()
            + patch_loss[~shown].mean()
            + 4 * centre_error
            + 4 * F.binary_cross_entropy_with_logits(presence, present)
            + 0.3 * F.cross_entropy(count_logits, counts)
        )
        recognised = (logits.argmax(-1) == labels)[shown].float().mean()
        return loss, {
            "patches": recognised.item(),
            "centre_px": centre_error.sqrt().item() * shapes.IMAGE_SIZE / 2,
            "count": (count_logits.argmax(-1) == counts).float().mean().item(),
        }


def train_tower(data: Data, steps: int) -> CLIPVisionModel:
    """Stage 1. The weights are rounded to bfloat16, as they will ship, before stage 2 uses them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    task = TowerTask()
    mean = Averages()
    for bar, optimiser in steps_of(task, steps, 80, "stage 1: tower"):
        chosen = np.sort(rng.integers(len(data.objects), size=BATCH))
        loss, numbers = task(data.pixels[chosen], [data.objects[i] for i in chosen])
        optimiser.step(loss)
        bar.set_postfix_str(mean.update(numbers), refresh=False)
    return task.tower.bfloat16().float().eval()


@torch.inference_mode()
def encode(tower: CLIPVisionModel, pixels: np.ndarray) -> Tensor:
    """Features of all scenes [N, 144, 128] bfloat16, from the layer LLaVA reads."""
    features = torch.empty(len(pixels), PATCHES, WIDTH, dtype=torch.bfloat16)
    for start in tqdm(range(0, len(pixels), 100), "features", mininterval=5):
        x = normalise(pixels[start : start + 100])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(pixel_values=x, output_hidden_states=True).hidden_states[-2]
        features[start : start + 100] = hidden[:, 1:].bfloat16()
    return features


def build_llava(tower: CLIPVisionModel) -> LlavaForConditionalGeneration:
    """A LLaVA with a fresh language model around the given tower, which is frozen."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


def train_llava(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    data: Data,
    steps: int,
    compiled: bool = False,
) -> None:
    """Stage 2: learn the projector and the language model in place."""
    llama = model.model.language_model
    if compiled:
        llama = torch.compile(llama, dynamic=True)
    rng = random.Random(1)
    mean = Averages()
    for bar, optimiser in steps_of(model, steps, 150, "stage 2: llava"):
        chosen = sorted(rng.randrange(len(data.objects)) for _ in range(BATCH))
        asked = [shapes.ask(data.objects[i], rng, QUESTIONS, MIX) for i in chosen]
        packed = pack(asked, 1 + PATCHES, VOCABULARY)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.model.multi_modal_projector(features[chosen])
            told = answer(model, llama, image, packed)
        optimiser.step(told.loss)
        bar.set_postfix_str(mean.update(accuracies(asked, told.right)), refresh=False)


def build_processor() -> LlavaProcessor:
    """The stock LLaVA processor, with one token per word."""
    side = shapes.IMAGE_SIZE
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer_of(VOCABULARY, ["<image>"]),
        patch_size=shapes.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    args = arguments("tiny-llava-shapes", "llava-shapes-work")
    plan = SMOKE if args.smoke else FULL
    set_up()
    began = time.monotonic()

    data = draw_data(args.work, plan.scenes)
    tower_folder = args.work / f"tower-{plan.scenes}-{plan.tower_steps}"
    if not tower_folder.exists():
        train_tower(data, plan.tower_steps).save_pretrained(tower_folder)
    tower = CLIPVisionModel.from_pretrained(tower_folder, attn_implementation=ATTENTION)
    features = encode(tower, data.pixels)
    torch.manual_seed(1)
    model = build_llava(tower)
    train_llava(model, features, data, plan.llava_steps, args.compile)
    save(model, build_processor(), args.out)

    print(f"trained in {(time.monotonic() - began) / 60:.1f} min, saved in {args.out}")
    print(evaluate(*load_folder(args.out), n_scenes=plan.test_scenes).table())


if __name__ == "__main__":
    main()
