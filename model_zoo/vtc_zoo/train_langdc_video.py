# SPDX-License-Identifier: Apache-2.0
"""Train LangDC in front of tiny-llava-video, on one CPU core.

Run as `python -m vtc_zoo.train_langdc_video --out DIR [--smoke]`. A clip of 8 frames is two clips
of four; captions say what happens in each, so that a richer one is longer. Fixed numbers of steps,
fixed seeds:

1. projectors: the small language model learns how captions go, from words alone; then, frozen, it
   teaches its projector to show it a clip;
2. captions: small model and projector learn to caption a clip and when to stop;
3. the host answers questions about a few pooled tokens and the states of given captions: what
   projects both, and LoRA in the host's language model, learn; all else is frozen.

Stage 3 runs again without captions, with more pooled tokens: average pooling for the same cost or
more, trained the same way. `DIR/langdc` and `DIR/pooling` are folders for
`vtc.attach(model, "langdc", weights=...)`, `DIR/metrics.json` compares them.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config, SiglipVisionModel

import vtc
import vtc_zoo
from vtc.hooks import Installed
from vtc.modules.langdc import DynamicCompressor, Settings, spread
from vtc.modules.lora import Lora
from vtc_zoo import moving
from vtc_zoo.eval_llava_video import evaluate
from vtc_zoo.shapes import Question
from vtc_zoo.train_llava_video import (
    PREFIX,
    TOKENS,
    VOCABULARY,
    WIDTH,
    build_llava,
    build_processor,
    clip_tokens,
    encode,
    tower_config,
)
from vtc_zoo.training import (
    ATTENTION,
    BOS,
    EOS,
    PAD,
    USER,
    Averages,
    accuracies,
    pack,
    set_up,
    steps_of,
)

INNER, DEPTH = 128, 3
SIDE = moving.GRID // 2
CLIP_FRAMES = 4
CLIPS = moving.FRAMES // CLIP_FRAMES
LONGEST = 16  # soft tokens of a clip; no caption is longer
BASE, POOLING = (2, 2), (3, 2)
"""Pooled tokens of a frame beside captions, and without them."""
RANK = 8
WORD_BATCH, CAPTION_BATCH, ANSWER_BATCH = 64, 16, 12
QUESTIONS = 8
MIX = (*moving.TYPES, *("direction",) * 2, "flashes")
CHUNK = 200  # clips that are drawn and encoded at once


@dataclass(frozen=True)
class Plan:
    """How much is drawn, trained and tested."""

    clips: int
    word_steps: int
    projector_steps: int
    caption_steps: int
    answer_steps: int
    test_clips: int


FULL = Plan(3000, 80, 80, 1400, 450, test_clips=300)
SMOKE = Plan(24, 20, 20, 20, 20, test_clips=4)


@dataclass(frozen=True)
class Clips:
    """Clips as the host's projector gives them [N, 8, 6, 6, 128], bfloat16, and their scenes."""

    tokens: Tensor
    scenes: list[moving.MovingScene]


@dataclass(frozen=True)
class Captions:
    """ids [C, L], padded on the right; written [C, L], which of them are words."""

    ids: Tensor
    written: Tensor


def captions_of(scenes: Sequence[moving.MovingScene]) -> list[list[str]]:
    """One caption for each four frames, scene by scene."""
    starts = range(0, moving.FRAMES, CLIP_FRAMES)
    return [
        moving.caption(scene, start, start + CLIP_FRAMES) for scene in scenes for start in starts
    ]


def as_ids(captions: Sequence[Sequence[str]]) -> Captions:
    """Empty captions get one padding word: a clip has at least one token."""
    rows = [torch.tensor([VOCABULARY[w] for w in words] or [PAD]) for words in captions]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in rows])
    return Captions(ids, torch.arange(ids.shape[1]) < lengths[:, None])


@torch.no_grad()
def see(host: Any, drawn: Iterable[tuple[moving.MovingScene, np.ndarray]]) -> Clips:
    """What the host's projector gives of clips."""
    drawn, tokens, scenes = iter(drawn), [], []
    while chunk := list(islice(drawn, CHUNK)):
        features = encode(host.model.vision_tower, np.stack([frames for _, frames in chunk]))
        for part in features.split(16):
            with torch.autocast("cpu", torch.bfloat16):
                tokens.append(clip_tokens(host, part)[:, :-1].bfloat16())
        scenes += [scene for scene, _ in chunk]
    return Clips(torch.cat(tokens).unflatten(1, (moving.FRAMES, SIDE, SIDE)), scenes)


def build(base: tuple[int, int], max_len: int, host: Any) -> DynamicCompressor:
    """An untrained compressor for the host, with LoRA for its language model."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=INNER,
        intermediate_size=3 * INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = ATTENTION
    settings = Settings(
        before=(BOS,),
        after=(USER,),
        eos=(EOS,),
        base_projector="linear",
        pool=(SIDE, SIDE),
        base=base,
        clip_frames=CLIP_FRAMES,
        max_len=max_len,
    )
    lora = Lora.beside(host.model.language_model.layers, RANK)
    made = DynamicCompressor(AutoModelForCausalLM.from_config(config), WIDTH, WIDTH, settings, lora)
    with torch.no_grad():  # pooled tokens start as they are
        nn.init.eye_(made.base.project.weight)  # type: ignore[arg-type]
        nn.init.zeros_(made.base.project.bias)  # type: ignore[arg-type]
    return made


class Learning(nn.Module):
    """The parts of a module that learn; all others are frozen until the next one is made."""

    def __init__(self, module: nn.Module, *parts: nn.Module) -> None:
        super().__init__()
        module.requires_grad_(False)
        self.parts = nn.ModuleList(parts).requires_grad_(True)


def learn_words(module: DynamicCompressor, clips: Clips, steps: int) -> None:
    """Stage 1, first half: captions as text, with nothing to see."""
    rng, mean = random.Random(2), Averages()
    nothing = torch.zeros(WORD_BATCH, 0, INNER)
    for bar, optimiser in steps_of(Learning(module, module.lm), steps, 20, "stage 1: words"):
        said = as_ids(rng.sample(captions_of(rng.choices(clips.scenes, k=WORD_BATCH)), WORD_BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.caption_loss(nothing, said.ids, said.written)
        optimiser.step(loss)
        bar.set_postfix_str(mean.update({"loss": loss.item()}), refresh=False)


def learn_captions(
    module: DynamicCompressor, clips: Clips, steps: int, parts: Sequence[nn.Module], label: str
) -> None:
    """Stage 1, second half, and stage 2: cross entropy of captions and of their end."""
    rng, mean = random.Random(3), Averages()
    for bar, optimiser in steps_of(Learning(module, *parts), steps, 50, label):
        chosen = [rng.randrange(len(clips.scenes)) for _ in range(CAPTION_BATCH)]
        said = as_ids(captions_of([clips.scenes[i] for i in chosen]))
        with torch.autocast("cpu", torch.bfloat16):
            visual = torch.cat([module.clips(clips.tokens[i]) for i in chosen])
            loss = module.caption_loss(visual, said.ids, said.written)
        optimiser.step(loss)
        bar.set_postfix_str(mean.update({"loss": loss.item()}), refresh=False)


def written(module: DynamicCompressor, tokens: Tensor, scenes: Sequence[Any]) -> list[Tensor]:
    """What stands for the visual tokens [B, 8, 6, 6, 128] of each clip, its true captions given."""
    base = [module.base(video).flatten(0, 1) for video in tokens]
    if module.settings.max_len == 0:
        return base
    said = as_ids(captions_of(scenes))
    with torch.no_grad():
        visual = torch.cat([module.clips(video) for video in tokens])
    soft = module.soft_of(visual, said.ids, said.written).per_video([CLIPS] * len(tokens))
    return [torch.cat(pair) for pair in zip(base, soft, strict=True)]


def learn_answers(
    module: DynamicCompressor, host: Any, clips: Clips, steps: int, label: str
) -> None:
    """Stage 3: `steps` batches of questions; the host's own weights stay."""
    rng, mean = random.Random(4), Averages()
    assert module.lora is not None
    learns = Learning(module, module.post, module.base, module.lora)
    module.lora.install(host.model.language_model.layers, installed := Installed())
    try:
        for bar, optimiser in steps_of(learns, steps, 50, label):
            chosen = [rng.randrange(len(clips.scenes)) for _ in range(ANSWER_BATCH)]
            scenes = [clips.scenes[i] for i in chosen]
            asked = [moving.ask(scene, rng, QUESTIONS, MIX) for scene in scenes]
            with torch.autocast("cpu", torch.bfloat16):
                rows = written(module, clips.tokens[chosen], scenes)
                logits, targets = read(host, rows, asked)
            optimiser.step(F.cross_entropy(logits.float(), targets))
            right = (logits.argmax(-1) == targets)[targets != EOS].tolist()
            bar.set_postfix_str(mean.update(accuracies(asked, right)), refresh=False)
    finally:
        installed.remove()


def read(
    host: Any, rows: Sequence[Tensor], asked: Sequence[Sequence[Question]]
) -> tuple[Tensor, Tensor]:
    """Logits [n, V] of the host where answers are learnt, and the answers [n]: `asked[i]` about
    the tokens rows[i] [M, D], at the places that the method gives them."""
    most, embed = max(map(len, rows)), host.get_input_embeddings()
    packed = pack(asked, 2 + most, VOCABULARY)
    mask, places = fit(packed.mask, packed.positions, [len(row) for row in rows])
    start = embed(torch.full((len(rows), 1), BOS))
    newline = host.model.image_newline.detach().expand(len(rows), 1, -1)
    tokens = pad_sequence(list(rows), batch_first=True)
    hidden = host.model.language_model(
        inputs_embeds=torch.cat([start, tokens, newline, embed(packed.ids)], 1),
        attention_mask=mask.to(start.dtype),
        position_ids=places,
        use_cache=False,
    ).last_hidden_state
    learnt = packed.targets >= 0
    return host.lm_head(hidden[:, 2 + most :][learnt]), packed.targets[learnt]


def fit(mask: Tensor, places: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask and places of packed questions behind start, tokens padded on the right, and newline:
    padding is not seen, and all else has the places that the method gives it."""
    most = max(counts)
    mask, places = mask.clone(), places.clone()
    places[:, 2 + most :] += PREFIX - 2 - most
    places[:, 1 + most] = PREFIX - 1
    for row, count in enumerate(counts):
        mask[row, :, :, 1 + count : 1 + most] = -1e9
        places[row, 1 : 1 + count] = 1 + spread(count, TOKENS - 1)
    return mask, places


@torch.inference_mode()
def caption_report(module: DynamicCompressor, clips: Clips) -> dict[str, Any]:
    """How soft tokens follow what clips show: rank correlation of their number with the length of
    the true caption, share of captions that are right word by word, and how many clips have how
    many."""
    made: list[list[int]] = []
    for video in clips.tokens.float():
        soft = module.caption(module.clips(video))
        made += [ids[:n].tolist() for ids, n in zip(soft.ids, soft.counts, strict=True)]
    true = [[VOCABULARY[w] for w in words] or [PAD] for words in captions_of(clips.scenes)]
    counts, lengths = [len(ids) for ids in made], [len(ids) for ids in true]
    whole = [sum(counts[i : i + CLIPS]) for i in range(0, len(counts), CLIPS)]
    events = [len(scene.objects) + len(scene.flashes) for scene in clips.scenes]
    return {
        "spearman_caption_length": spearman(counts, lengths),
        "spearman_events_of_video": spearman(whole, events),
        "captions_right": sum(a == b for a, b in zip(made, true, strict=True)) / len(true),
        "soft_tokens_per_video": sum(whole) / len(whole),
        "clips_by_soft_tokens": dict(sorted(Counter(counts).items())),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def answers(host: Any, processor: Any, clips: int, folder: Path | None) -> dict[str, Any]:
    """Exact match of stock `generate()` and visual tokens per clip, dense or with a folder."""
    if folder is None:
        score, tokens = evaluate(host, processor, clips), float(TOKENS)
    else:
        with vtc.attach(host, "langdc", weights=str(folder)) as session:
            score = evaluate(host, processor, clips)
        site = session.stats()["sites"][0]
        tokens = TOKENS * site["tokens_out"] / site["tokens_in"]
    kinds = {kind: score.right[kind] / n for kind, n in sorted(score.asked.items())}
    total = sum(score.right.values()) / sum(score.asked.values())
    return {"visual_tokens": tokens, "exact_match": total, "by_type": kinds}


def load_host(name: str | None, smoke: bool) -> tuple[Any, Any]:
    """The host and its processor: a zoo name or a folder; for --smoke alone a random one."""
    if name is None and smoke:
        torch.manual_seed(0)
        host = build_llava(SiglipVisionModel(tower_config())).eval()
        host.set_attn_implementation("sdpa")
        return host, build_processor()
    chosen = name or "tiny-llava-video"
    return vtc_zoo.load(chosen) if chosen in vtc_zoo.names() else vtc_zoo.load_folder(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LangDC in front of tiny-llava-video.")
    parser.add_argument("--out", type=Path, required=True, help="folder for both compressors")
    parser.add_argument("--host", help="name or folder of the host; default: tiny-llava-video")
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else FULL
    set_up()
    began = time.monotonic()
    host, processor = load_host(args.host, args.smoke)
    host.requires_grad_(False)
    clips = see(host, map(moving.training_scene, range(plan.clips)))

    torch.manual_seed(0)
    modules = {"langdc": build(BASE, LONGEST, host), "pooling": build(POOLING, 0, host)}
    captioner = modules["langdc"]
    learn_words(captioner, clips, plan.word_steps)
    steps, parts = plan.projector_steps, [captioner.project]
    learn_captions(captioner, clips, steps, parts, "stage 1: projector")
    parts = [captioner.lm, captioner.project]
    learn_captions(captioner, clips, plan.caption_steps, parts, "stage 2: captions")
    host.set_attn_implementation(ATTENTION)
    for name, module in modules.items():
        learn_answers(module, host, clips, plan.answer_steps, f"stage 3: {name}")
    host.set_attn_implementation("sdpa")

    shown = moving.test_set(plan.test_clips)
    test = see(host, ((scene, frames) for scene, frames, _ in shown))
    metrics: dict[str, Any] = {}
    for name, module in modules.items():
        module.lm.set_attn_implementation("sdpa")
        module.requires_grad_(False).bfloat16().save(args.out / name)
        metrics[name] = answers(host, processor, plan.test_clips, args.out / name)
    metrics["dense"] = answers(host, processor, plan.test_clips, None)
    metrics["captions"] = caption_report(DynamicCompressor.load(args.out / "langdc"), test)
    metrics["minutes"] = (time.monotonic() - began) / 60
    text = json.dumps(metrics, indent=1)
    (args.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
