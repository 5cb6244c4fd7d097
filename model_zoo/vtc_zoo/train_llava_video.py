# SPDX-License-Identifier: Apache-2.0
"""Train tiny-llava-video from nothing, on one CPU core.

Run as `python -m vtc_zoo.train_llava_video --out DIR [--smoke]`. Two stages, both of a fixed number
of steps with fixed seeds:

1. a SigLIP vision tower learns, frame by frame and patch by patch, which object it shows and where
   its centre is;
2. that tower is frozen, its features are computed once, and the projector and a small Qwen2 learn
   to answer questions, eight of them packed behind each clip.

The clips and the tower are kept in a work folder and used again when they are there.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vtc_zoo import load_folder, moving
from vtc_zoo.eval_llava_video import evaluate
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

VOCABULARY = vocabulary_of(["<video>", *moving.WORDS])
VIDEO = VOCABULARY["<video>"]

WIDTH = 128
PATCHES = moving.GRID**2
TOKENS = moving.FRAMES * (moving.GRID // 2) ** 2 + 1
"""Visual tokens of a clip: 36 per frame and the newline token."""
PREFIX = 1 + TOKENS
TOWER_CLIPS, TOWER_FRAMES = 12, 4  # clips in a batch of stage 1, and frames of each
BATCH = 24
QUESTIONS = 8  # packed behind one clip
MIX = (*moving.TYPES, *("direction",) * 3, "flashes")
"""Types asked in training. Directions come four times: they are learnt last."""


@dataclass(frozen=True)
class Plan:
    """How much is drawn, trained and tested."""

    clips: int
    tower_steps: int
    llava_steps: int
    test_clips: int


FULL = Plan(clips=12_000, tower_steps=3000, llava_steps=3000, test_clips=1000)
SMOKE = Plan(clips=32, tower_steps=20, llava_steps=20, test_clips=4)


@dataclass(frozen=True)
class Data:
    """Training clips: pixels [N, 8, 96, 96, 3] uint8, read from disk, and their scenes."""

    pixels: np.ndarray
    scenes: list[moving.MovingScene]


def draw_data(work: Path, n: int) -> Data:
    """Draw the first `n` training clips, or read their pixels back."""
    file = work / f"clips-{n}.npy"
    shape = (n, moving.FRAMES, moving.FRAME_SIZE, moving.FRAME_SIZE, 3)
    if file.exists():
        scenes = [
            moving.make_scene(random.Random(moving.TRAIN_SEED + i))
            for i in tqdm(range(n), "scenes")
        ]
        return Data(np.load(file, mmap_mode="r"), scenes)
    unfinished = file.with_suffix(".part")
    pixels = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
    scenes = []
    for i in tqdm(range(n), "clips", mininterval=2):
        scene, pixels[i] = moving.training_scene(i)
        scenes.append(scene)
    pixels.flush()
    unfinished.rename(file)
    return Data(np.load(file, mmap_mode="r"), scenes)


def tower_config() -> SiglipVisionConfig:
    """A SigLIP tower for 144 patches, with heads of 64 dimensions."""
    return SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=moving.FRAME_SIZE,
        patch_size=moving.PATCH_SIZE,
        hidden_act="gelu",
        vision_use_head=False,
    )


class TowerTask(nn.Module):
    """The vision tower with the heads it is trained with; only the tower is kept."""

    def __init__(self) -> None:
        super().__init__()
        config = tower_config()
        config._attn_implementation = ATTENTION
        self.tower = SiglipVisionModel(config)
        self.patch_head = nn.Linear(WIDTH, moving.CLASSES)
        self.centre_head = nn.Linear(WIDTH, 2)

    def forward(
        self, pixels: np.ndarray, labels: Tensor, centres: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Frames [B, 96, 96, 3], classes [B, 144] and centres [B, 144, 2] of their patches. Return
        the loss and what the progress bar shows: how much is recognised."""
        with torch.autocast("cpu", torch.bfloat16):
            out = self.tower(pixel_values=normalise(pixels), output_hidden_states=True)
            patches = out.hidden_states[-1]
            logits = self.patch_head(patches).float()
            error = (self.centre_head(patches).float() - centres).square().mean(-1)
        shown = labels > 0
        patch_loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = patch_loss[shown].mean() + patch_loss[~shown].mean()
        loss = loss + 4 * error.mean() + 8 * error[shown].mean()
        recognised = (logits.argmax(-1) == labels)[shown].float().mean()
        return loss, {
            "patches": recognised.item(),
            "centre_px": error[shown].mean().sqrt().item() * moving.FRAME_SIZE / 2,
        }


def train_tower(data: Data, steps: int) -> SiglipVisionModel:
    """Stage 1. The weights are rounded to bfloat16, as they will ship, before stage 2 uses them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    task = TowerTask()
    mean = Averages()
    for bar, optimiser in steps_of(task, steps, 80, "stage 1: tower"):
        pixels, labels, centres = [], [], []
        for clip in np.sort(rng.integers(len(data.scenes), size=TOWER_CLIPS)):
            frames = rng.choice(moving.FRAMES, TOWER_FRAMES, replace=False)
            classes, middles = moving.patch_targets(data.scenes[clip])
            pixels.append(data.pixels[clip][frames])
            labels.append(classes[frames])
            centres.append(middles[frames])
        targets = (torch.from_numpy(np.concatenate(t)) for t in (labels, centres))
        loss, numbers = task(np.concatenate(pixels), *targets)
        optimiser.step(loss)
        bar.set_postfix_str(mean.update(numbers), refresh=False)
    return task.tower.bfloat16().float().eval()


@torch.inference_mode()
def encode(tower: SiglipVisionModel, pixels: np.ndarray) -> Tensor:
    """Features of all clips [N, 8 * 144, 128] bfloat16, from the layer LLaVA-OneVision reads."""
    features = torch.empty(len(pixels), moving.FRAMES * PATCHES, WIDTH, dtype=torch.bfloat16)
    for start in tqdm(range(0, len(pixels), 16), "features", mininterval=5):
        x = normalise(pixels[start : start + 16].reshape(-1, *pixels.shape[2:]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(pixel_values=x, output_hidden_states=True).hidden_states[-1]
        features[start : start + 16] = hidden.bfloat16().reshape(-1, *features.shape[1:])
    return features


def build_llava(tower: SiglipVisionModel) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision with a fresh language model around the given tower, which is frozen."""
    text = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaOnevisionConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[moving.FRAME_SIZE, moving.FRAME_SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION
    model = LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


def clip_tokens(model: LlavaOnevisionForConditionalGeneration, features: Tensor) -> Tensor:
    """What the language model reads of tower features [B, 8 * 144, 128]: [B, 289, 128]."""
    base = model.model
    frames = base.multi_modal_projector(
        features.unflatten(1, (moving.FRAMES, PATCHES)).flatten(0, 1)
    )
    pooled = base.apply_pooling(frames).reshape(len(features), TOKENS - 1, WIDTH)
    newline = base.image_newline.to(pooled.dtype).expand(len(features), 1, -1)
    return torch.cat([pooled, newline], 1)


class Sight(nn.Module):
    """Heads on what the language model makes of visual tokens: what a token shows, which way that
    has moved, how many flashes there were. One word of answer per question teaches little about
    motion and counting; this is thrown away when the model has learnt to look."""

    def __init__(self) -> None:
        super().__init__()
        self.class_head = nn.Linear(WIDTH, moving.CLASSES)
        self.direction_head = nn.Linear(WIDTH, len(moving.DIRECTIONS))
        self.flash_head = nn.Linear(WIDTH, 1 + moving.MOST_FLASHES)

    def forward(self, hidden: Tensor, scenes: Sequence[moving.MovingScene]) -> Tensor:
        """The loss, of the states [B, 288, 128] of visual tokens."""
        found = zip(*map(moving.cell_targets, scenes), strict=True)
        cells, directions, flashes = (torch.from_numpy(np.stack(t)) for t in found)
        frames = hidden.unflatten(1, (moving.FRAMES, -1))
        shown, moved = cells > 0, directions >= 0
        ground = ~shown & (torch.rand(shown.shape) < 0.1)
        class_loss = F.cross_entropy(self.class_head(frames[shown]).float(), cells[shown])
        ground_loss = F.cross_entropy(self.class_head(frames[ground]).float(), cells[ground])
        way = F.cross_entropy(self.direction_head(frames[moved]).float(), directions[moved])
        counted = self.flash_head(frames[:, :, -1]).float()
        return class_loss + ground_loss + way + F.cross_entropy(counted.mT, flashes)


def train_llava(
    model: LlavaOnevisionForConditionalGeneration,
    features: Tensor,
    data: Data,
    steps: int,
    compiled: bool = False,
) -> None:
    """Stage 2: learn the projector and the language model in place."""
    qwen = model.model.language_model
    if compiled:
        qwen = torch.compile(qwen, dynamic=True)
    rng = random.Random(1)
    mean = Averages()
    sight = Sight()
    learner = nn.ModuleList([model, sight])
    for bar, optimiser in steps_of(learner, steps, 150, "stage 2: llava"):
        chosen = sorted(rng.randrange(len(data.scenes)) for _ in range(BATCH))
        asked = [moving.ask(data.scenes[i], rng, QUESTIONS, MIX) for i in chosen]
        packed = pack(asked, PREFIX, VOCABULARY)
        with torch.autocast("cpu", torch.bfloat16):
            told = answer(model, qwen, clip_tokens(model, features[chosen]), packed)
            looked = sight(told.hidden[:, 1 : PREFIX - 1], [data.scenes[i] for i in chosen])
        optimiser.step(told.loss + 0.5 * looked)
        bar.set_postfix_str(mean.update(accuracies(asked, told.right)), refresh=False)


def build_processor() -> LlavaOnevisionProcessor:
    """The stock LLaVA-OneVision processor, with one token per word."""
    side = {"height": moving.FRAME_SIZE, "width": moving.FRAME_SIZE}
    pixels = {"size": side, "image_mean": [PIXEL_MEAN] * 3, "image_std": [PIXEL_STD] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            **pixels, image_grid_pinpoints=[[moving.FRAME_SIZE, moving.FRAME_SIZE]]
        ),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=tokenizer_of(VOCABULARY, ["<image>", "<video>"]),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['role'] + ' ' + message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ '<' + part['type'] + '> ' }}{% endfor %}"
    "{{ message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def main() -> None:
    args = arguments("tiny-llava-video", "llava-video-work")
    plan = SMOKE if args.smoke else FULL
    set_up()
    began = time.monotonic()

    data = draw_data(args.work, plan.clips)
    tower_folder = args.work / f"tower-{plan.clips}-{plan.tower_steps}"
    if not tower_folder.exists():
        train_tower(data, plan.tower_steps).save_pretrained(tower_folder)
    tower = SiglipVisionModel.from_pretrained(tower_folder, attn_implementation=ATTENTION)
    features = encode(tower, data.pixels)
    torch.manual_seed(1)
    model = build_llava(tower)
    train_llava(model, features, data, plan.llava_steps, args.compile)
    save(model, build_processor(), args.out)

    print(f"trained in {(time.monotonic() - began) / 60:.1f} min, saved in {args.out}")
    print(evaluate(*load_folder(args.out), n_clips=plan.test_clips).table(moving.TYPES))


if __name__ == "__main__":
    main()
