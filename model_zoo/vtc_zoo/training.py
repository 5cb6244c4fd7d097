# SPDX-License-Identifier: Apache-2.0
"""What the training scripts of the small models share: words, optimiser, packed questions."""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from vtc_zoo.shapes import Question

PIXEL_MEAN, PIXEL_STD = 0.3, 0.25
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, _, IMAGE, USER, ASSISTANT = range(7)
ATTENTION = "vtc_zoo_train"


def vocabulary_of(words: Sequence[str]) -> dict[str, int]:
    """One token per word, behind the special ones."""
    return {w: i for i, w in enumerate((*SPECIAL_TOKENS, "user", "assistant", *words))}


def tokenizer_of(
    vocabulary: Mapping[str, int], placeholders: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Splits at spaces; `placeholders` are never split."""
    words = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=list(placeholders),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def set_up() -> None:
    """One thread, which is faster than two for matrices this small, and the plain attention."""
    torch.set_num_threads(1)
    AttentionInterface.register(ATTENTION, plain_attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention as three plain operations; the backward of SDPA is 2-5x slower on a CPU."""
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def normalise(pixels: np.ndarray) -> Tensor:
    """Pixels [B, H, W, 3] as the shipped processors turn them into model input."""
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - PIXEL_MEAN) / PIXEL_STD


def steps_of(
    module: nn.Module, n: int, warmup: int, label: str, rate: float = 2e-3
) -> Iterator[tuple[tqdm, "Optimiser"]]:
    """Yield `n` times the progress bar and the optimiser, its rate (at most `rate`) set for the
    step."""
    optimiser = Optimiser(module)
    with tqdm(range(n), label, mininterval=5) as bar:
        for step in bar:
            optimiser.set_rate(rate * schedule(step, n, warmup))
            yield bar, optimiser


def schedule(step: int, n: int, warmup: int) -> float:
    """Share of the highest rate at a step of `n`: a linear start, then a cosine down to 2 %."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / n)
    return min(1, (step + 1) / warmup) * (0.98 * cosine + 0.02)


class Optimiser:
    """Muon for the matrices inside the blocks, AdamW for everything else."""

    def __init__(self, module: nn.Module) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "head" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named]
        self.parts = (
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
        )

    def set_rate(self, rate: float) -> None:
        """Use this learning rate from now on."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def step(self, loss: Tensor) -> None:
        """Move the weights down the gradient of `loss`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()
            part.zero_grad()


class Averages:
    """Running averages of named numbers, for the progress bar."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def update(self, numbers: dict[str, float]) -> str:
        """Take in new numbers and return all averages as text."""
        for name, number in numbers.items():
            self.values[name] = 0.98 * self.values.get(name, number) + 0.02 * number
        return " ".join(f"{name}={value:.3f}" for name, value in self.values.items())


@dataclass(frozen=True)
class Packed:
    """Questions behind what they are about, one row per image or clip.

    ids, positions: [B, T]; mask: [B, 1, N, N] added to the attention scores, N = prefix + T;
    targets: [B, T], the next token where it is learnt, else -100.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor


def pack(batch: Sequence[Sequence[Question]], prefix: int, vocabulary: Mapping[str, int]) -> Packed:
    """Put the questions about one image in one row, each as if it stood alone behind the `prefix`
    tokens of start and image.

    Every question sees the image and itself only (a block-diagonal mask) and its positions start
    again right after the image, so one row teaches the same as one row per question would.
    """
    length = max(sum(len(q.text.split()) + 4 for q in questions) for questions in batch)
    ids = torch.full((len(batch), length), PAD)
    positions = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    block = torch.full((len(batch), prefix + length), -1)
    block[:, :prefix] = 0
    for row, questions in enumerate(batch):
        start = 0
        for number, q in enumerate(questions, 1):
            words = [vocabulary[w] for w in q.text.split()]
            turn = torch.tensor([USER, *words, ASSISTANT, vocabulary[q.answer], EOS])
            end = start + len(turn)
            ids[row, start:end] = turn
            positions[row, start:end] = torch.arange(prefix, prefix + len(turn))
            targets[row, end - 3 : end - 1] = turn[-2:]
            block[row, prefix + start : prefix + end] = number
            start = end
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    mask = torch.where(seen.tril()[:, None], 0.0, -1e9).bfloat16()
    image_positions = torch.arange(prefix).expand(len(batch), -1)
    return Packed(ids, torch.cat([image_positions, positions], 1), mask, targets)


@dataclass(frozen=True)
class Answers:
    """hidden: [B, prefix + T, D] all states; logits: [n, V] and targets: [n] of what is learnt."""

    hidden: Tensor
    logits: Tensor
    targets: Tensor

    @property
    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits, self.targets)

    @property
    def right(self) -> list[bool]:
        """One for each question."""
        return (self.logits.argmax(-1) == self.targets)[self.targets != EOS].tolist()


def answer(model: Any, decoder: Any, media: Tensor, packed: Packed) -> Answers:
    """The questions packed behind what the projector made of their images or clips [B, N, D];
    `decoder` is the model's language model, perhaps compiled."""
    embed = model.get_input_embeddings()
    start = embed(torch.full((len(media), 1), BOS))
    hidden = decoder(
        inputs_embeds=torch.cat([start, media, embed(packed.ids)], 1),
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    learnt = packed.targets >= 0
    logits = model.lm_head(hidden[:, 1 + media.shape[1] :][learnt]).float()
    return Answers(hidden, logits, packed.targets[learnt])


def save(model: Any, processor: Any, out: Path) -> None:
    """Write weights (bfloat16), configuration and processor, as `from_pretrained` reads them."""
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


def arguments(model: str, work: str) -> argparse.Namespace:
    """Command line of a script that trains a model from nothing."""
    parser = argparse.ArgumentParser(description=f"Train {model}.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for what is kept")
    parser.add_argument(
        "--compile", action="store_true", help="stage 2 twice as fast; needs a C++ compiler"
    )
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def accuracies(asked: Iterable[Iterable[Question]], right: Iterable[bool]) -> dict[str, float]:
    """Share of right answers by question type."""
    hits: dict[str, list[bool]] = {}
    questions = (q for row in asked for q in row)
    for q, hit in zip(questions, right, strict=True):
        hits.setdefault(q.type, []).append(hit)
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}
