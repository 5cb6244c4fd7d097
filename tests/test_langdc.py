"""LangDC: the captioning network against a slow one without cache, batch or hooks, and the method
in front of language models against the untouched model on embeddings that are put together here."""

from __future__ import annotations

import dataclasses
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vtc_zoo
from torch import Tensor, nn
from vtc_zoo import train_langdc_video as train
from vtc_zoo import train_llava_video

import vtc
from vtc.errors import InvalidInput, InvalidRecipe, UnsupportedModel, UnsupportedSite
from vtc.hooks import Installed
from vtc.modules.langdc import BasePruner, DynamicCompressor, Settings, pooled, rescaled
from vtc.modules.lora import Lora
from vtc.testing import batches, families, oracle
from vtc.testing.threads import in_threads

INNER, WIDTH, WORDS, DEPTH = 16, 12, 11, 3
TOLERANCE = 1e-4
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": INNER,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PROMPT: dict[str, Any] = {"before": (3, 4), "after": (5, 6, 7), "eos": (0, 1)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """Weights at a scale where every token matters."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            p.copy_(1 + 0.1 * noise if "norm" in name else noise / math.sqrt(p.shape[-1]))
            if "embed" in name or "lm_head" in name:
                p.copy_(noise)
    return module.eval()


def small_lm(kind: str = "qwen2") -> Any:
    config = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind]
    return transformers.AutoModelForCausalLM.from_config(config(**SMALL))


def compressor(kind: str = "qwen2", width: int = WIDTH, host: int = WIDTH, **options: Any) -> Any:
    made = {"max_len": 6, "pool": (2, 2), "base": (1, 2), "clip_frames": 2} | PROMPT | options
    return shaken(DynamicCompressor(small_lm(kind), width, host, Settings(**made)))


def slow(module: Any, visual: Tensor) -> tuple[list[int], Tensor]:
    """Caption ids and states [L, d_e] of one projected clip [n, d_e]: no cache, no batch."""
    s, lm = module.settings, module.lm
    table = lm.get_input_embeddings().weight
    start = torch.cat([table[list(s.before)], visual, table[list(s.after)]])
    ids: list[int] = []

    def run() -> Any:
        embeds = torch.cat([start, table[torch.tensor(ids, dtype=torch.long)]])
        return lm(inputs_embeds=embeds[None], output_hidden_states=True, use_cache=False)

    with torch.no_grad():
        while len(ids) < s.max_len:
            scores = run().logits[0, -1].clone()
            scores[list(s.eos)] += s.eos_bias
            if len(ids) < s.min_len:
                scores[list(s.eos)] = -torch.inf
            token = int(scores.argmax())
            if token not in s.eos or s.keep_eos:
                ids.append(token)
            if token in s.eos:
                break
        states = run().hidden_states[module.layer][0]
    first = len(start) - (s.position == "predict")
    return ids, states[first : first + len(ids)]


@cache
def clips(seed: int = 0, n: int = 8) -> Tensor:
    """More clips than lengths: some captions end early, some are cut."""
    return randn(n, 5, WIDTH, seed=seed)


# ---------------------------------------------------------------------- captions


@pytest.mark.parametrize("position", ["at", "predict"])
@pytest.mark.parametrize("keep_eos", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_captions_equal_a_loop_without_cache(kind: str, keep_eos: bool, position: str) -> None:
    for layer in range(DEPTH + 1):
        module = compressor(kind, layer=layer, keep_eos=keep_eos, position=position)
        soft = module(clips())
        assert len(set(soft.counts)) > 1, "captions of one length prove little"
        assert int(soft.mask.sum()) == sum(soft.counts)
        assert all(1 <= n <= 6 for n in soft.counts)
        for row, clip in enumerate(clips()):
            ids, states = slow(module, module.project(clip))
            assert soft.ids[row, : soft.counts[row]].tolist() == ids
            expected = module.post(states)
            assert torch.allclose(soft.tokens[row, : len(ids)], expected, atol=TOLERANCE)


@pytest.mark.parametrize("position", ["at", "predict"])
def test_given_captions_have_the_states_of_generated_ones(position: str) -> None:
    for layer in range(DEPTH + 1):
        module = compressor(layer=layer, position=position)
        visual = module.project(clips())
        made = module.caption(visual)
        given = module.soft_of(visual, made.ids, made.mask)
        worst = (given.tokens - made.tokens)[made.mask].abs().max()
        assert worst <= TOLERANCE
        assert given.counts == made.counts


def test_clips_are_independent_also_of_padding() -> None:
    module = compressor()
    together = module(clips())
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    turned = module(clips()[order])
    assert turned.counts == tuple(together.counts[i] for i in order)
    assert torch.allclose(turned.tokens[turned.mask], together.tokens[order][turned.mask])
    padded = torch.cat([clips(), randn(8, 3, WIDTH, seed=1)], 1)
    seen = torch.ones(8, 8, dtype=torch.bool)
    seen[::2, 5:] = False  # every other clip is shorter, and padded on the right
    ragged = module(padded, seen)
    front = module(
        torch.cat([randn(8, 2, WIDTH, seed=2), padded], 1), nn.functional.pad(seen, (2, 0))
    )
    for row in range(8):
        alone = module(padded[row : row + 1, : int(seen[row].sum())])
        for soft in (ragged, front):
            assert soft.counts[row] == alone.counts[0]
            got = soft.tokens[row, : soft.counts[row]]
            assert torch.allclose(got, alone.tokens[0], atol=TOLERANCE)


def test_the_bias_of_eos_shortens_every_caption() -> None:
    module, lengths = compressor(min_len=2), []
    for bias in (-torch.inf, -4.0, -1.0, 0.0, 1.0, 4.0, torch.inf):
        module.settings = Settings(**PROMPT, max_len=6, min_len=2, eos_bias=bias)
        lengths.append(module(clips()).counts)
    assert set(lengths[0]) == {6} and set(lengths[-1]) == {2}
    assert len(set(lengths)) > 3
    for longer, shorter in zip(lengths, lengths[1:], strict=False):
        assert all(a >= b for a, b in zip(longer, shorter, strict=True))


def test_layer_0_is_the_embedding_and_an_identity_passes_states() -> None:
    module = compressor(layer=0, host=INNER, post="identity", base_projector="linear")
    soft = module(clips())
    table = module.lm.get_input_embeddings().weight
    assert torch.equal(soft.tokens[soft.mask], table[soft.ids[soft.mask]])
    assert compressor().layer == 2  # two thirds of three
    assert compressor(layer=3).layer == 3


def test_only_what_is_trained_gets_gradients() -> None:
    module = compressor()
    visual = module.project(clips())
    made = module.caption(visual)
    for soft in (made, module.soft_of(visual, made.ids, made.mask)):
        module.zero_grad()
        soft.tokens[soft.mask].square().sum().backward()
        moved = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None}
        assert moved == {"post"}
    module.zero_grad()
    module.caption_loss(module.project(clips()), made.ids, made.mask).backward()
    moved = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None}
    assert moved == {"lm", "project"}


def test_caption_loss_is_the_mean_over_words_and_eos() -> None:
    module = compressor()
    ids = torch.tensor([[8, 9, 2], [10, 2, 2]])
    written = torch.tensor([[True, True, True], [True, False, False]])
    visual = module.project(clips()[:2])
    table, losses = module.lm.get_input_embeddings().weight, []
    for row, words in enumerate(([8, 9, 2], [10])):
        start = torch.cat([table[[3, 4]], visual[row], table[[5, 6, 7]]])
        logits = module.lm(inputs_embeds=torch.cat([start, table[words]])[None]).logits[0]
        said = logits[len(start) - 1 :].log_softmax(-1)
        losses += [-said[i, word] for i, word in enumerate([*words, 0])]
    expected = torch.stack(losses).mean()
    assert torch.allclose(module.caption_loss(visual, ids, written), expected, atol=1e-5)
    with pytest.raises(InvalidInput, match="padded on the right"):
        module.caption_loss(visual, ids, written.flip(1))


def test_a_total_is_shared_evenly() -> None:
    assert rescaled([10, 4, 1], 20) == (10, 4, 1)
    assert rescaled([10, 4, 1], 9) == (6, 2, 1)  # 1 + 9 * 6 / 12 = 5.5, 1 + 3 * 6 / 12 = 2.5, 1
    assert rescaled([7, 7, 7], 3) == (1, 1, 1)
    for total in range(4, 40):
        kept = rescaled([9, 1, 20, 5], total)
        assert sum(kept) == min(total, 35)
        assert all(1 <= a <= b for a, b in zip(kept, [9, 1, 20, 5], strict=True))
    with pytest.raises(InvalidInput, match="total=2 is less than one token for each of 3 clips"):
        rescaled([1, 1, 1], 2)


# ---------------------------------------------------------------------- frames


def test_base_tokens_are_means_of_cells() -> None:
    frames = randn(16, 24, 24, 5)
    video, image = (
        BasePruner(5, 5, grid, "identity")(frames[:, :side, :side])
        for side, grid in ((16, (4, 4)), (24, (6, 6)))
    )
    assert video.flatten(0, 1).shape[0] + image.flatten(0, 1).shape[0] == 832
    assert torch.allclose(video[3, 6], frames[3, 4:8, 8:12].mean((0, 1)), atol=1e-6)
    still = torch.full((2, 8, 8, 5), 0.5)
    assert torch.equal(pooled(still, (3, 3)), torch.full((2, 9, 5), 0.5))
    assert torch.equal(pooled(frames, (99, 99)), frames.flatten(1, 2))  # at most what is there


def test_a_video_is_cut_into_clips() -> None:
    module = compressor(width=INNER, host=INNER, projector="identity", clip_frames=4)
    frames = randn(6, 4, 4, INNER)
    cut = module.clips(frames)
    assert cut.shape == (2, 4 * 4, INNER)
    cells = pooled(frames, (2, 2))
    assert torch.equal(cut[0], cells[:4].flatten(0, 1))
    assert torch.equal(cut[1], torch.cat([cells[4], cells[5], cells[5], cells[5]]))
    assert module.clips(frames[:1]).shape == (1, 4, INNER)  # a picture is a clip of one frame


# ---------------------------------------------------------------------- keeping


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_holds_everything(tmp_path: Path, tied: bool) -> None:
    config = transformers.Qwen2Config(**SMALL, tie_word_embeddings=tied)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    settings = Settings(**PROMPT, max_len=6, layer=1, base_projector="mlp")
    module = shaken(DynamicCompressor(lm, WIDTH, 20, settings))
    module.save(tmp_path / "new")
    before = torch.get_rng_state()
    again = DynamicCompressor.load(tmp_path / "new")
    assert torch.equal(before, torch.get_rng_state())
    assert again.settings == module.settings
    assert torch.equal(again(clips()).tokens, module(clips()).tokens)
    assert set(DynamicCompressor.load(tmp_path / "new", max_len=2, min_len=2)(clips()).counts) == {
        2
    }
    assert not again.training
    with pytest.raises(InvalidInput, match=r"langdc\.json.*Give a folder as it was saved"):
        DynamicCompressor.load(tmp_path)


def test_errors_of_settings() -> None:
    with pytest.raises(InvalidInput, match="min_len=0: from 1 on"):
        Settings(**PROMPT, min_len=0)
    with pytest.raises(InvalidInput, match="max_len=2 is below min_len=3"):
        Settings(**PROMPT, min_len=3, max_len=2)
    with pytest.raises(InvalidInput, match=r"eos=\(\)"):
        Settings(before=(), after=(), eos=())
    with pytest.raises(InvalidInput, match="layer=4, but the small model has 3 layers"):
        compressor(layer=4)
    with pytest.raises(InvalidInput, match="post='identity', which cannot bring tokens from 16"):
        compressor(post="identity", host=INNER + 1, base_projector="mlp")
    with pytest.raises(InvalidInput, match="use 'at' or 'predict'"):
        compressor(position="behind")


# ---------------------------------------------------------------------- in front of a host


STEPS = 5
Grid = tuple[int, int, int, int]  # frames, height, width, tail
#: grids of the images and videos in each sample of a family
GRIDS: dict[str, list[list[Grid]]] = {
    "llava": [[(1, 8, 8, 0)], [(1, 8, 8, 0)]],
    "internvl": [[(1, 4, 4, 0)], [(1, 4, 4, 0)]],
    "qwen2_5_vl": [[(1, 4, 6, 0)], [(1, 6, 4, 0), (3, 4, 4, 0)]],
    "qwen2_vl": [[(1, 4, 6, 0)], [(1, 6, 4, 0), (3, 4, 4, 0)]],
    "llava_onevision": [[(4, 2, 2, 1)], [(4, 2, 2, 1)] * 2],
}


def made(name: str, attn: str = "sdpa") -> families.Family:
    """A family: where pictures could be the frames of a video, one per prompt; of LLaVA-OneVision
    the videos, as its tiled images have no grid."""
    if name in ("llava", "internvl"):
        return families.make(name, attn, images_per_row=[1, 1])
    fam = families.make(name, attn)
    if name != "llava_onevision":
        return fam
    assert fam.recipe.video is not None
    gen = torch.Generator().manual_seed(5)
    videos = [fam.recipe.video(0, gen) for _ in range(3)]
    words = [batches.words(n, gen) for n in (4, 3, 6, 5, 2)]
    rows = (words[0], videos[0], words[1]), (words[2], videos[1], words[4], videos[2], words[3])
    fam = dataclasses.replace(fam, rows=rows, inputs={})
    fam.inputs.update(fam.padded("left"))
    return fam


@cache
def family(name: str, attn: str = "sdpa") -> families.Family:
    return made(name, attn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compressor for hosts of width 64, whose captions have different lengths."""
    path = tmp_path_factory.mktemp("langdc")
    compressor(width=families.HIDDEN, host=families.HIDDEN, eos=(0, 1, 2, 3, 4)).save(path)
    return str(path)


def generate(model: Any, inputs: families.Inputs, **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "output_logits": True} | options
    with torch.no_grad():
        return model.generate(**inputs, return_dict_in_generate=True, **options)


def cell_means(frame: Tensor, rows: int, columns: int) -> Tensor:
    """[h, w, D] -> [rows * columns, D], by loops over cells whose edges are whole places."""
    h, w, _ = frame.shape
    assert h % rows == 0 and w % columns == 0
    a, b = h // rows, w // columns
    cells = [(y * a, x * b) for y in range(rows) for x in range(columns)]
    return torch.stack([frame[y : y + a, x : x + b].mean((0, 1)) for y, x in cells])


def written(module: Any, x: Tensor, grid: Grid) -> Tensor:
    """What a run of visual tokens x [N, D] becomes."""
    frames, h, w, tail = grid
    video = x[: frames * h * w].reshape(frames, h, w, -1)
    base = [module.base.project(cell_means(frame, 1, 2)) for frame in video]
    small = [cell_means(module.project(frame), 2, 2) for frame in video]
    length = 2 if frames > 1 else 1
    while len(small) % length:
        small.append(small[-1])
    soft = []
    for start in range(0, len(small), length):
        _, states = slow(module, torch.cat(small[start : start + length]))
        soft.append(module.post(states))
    return torch.cat([*base, *soft, x[len(x) - tail :]])


def prompt_by_hand(
    fam: families.Family, sample: int, module: Any, grids: list[Grid]
) -> tuple[Tensor, Tensor]:
    """Embeddings [K, D] of one sample with tokens written into it, and their places [axes, K]."""
    model, inputs = fam.model, fam.single(sample)
    prompt = oracle.encode(model, inputs)
    embeds, places = prompt.embeds[0], prompt.positions.reshape(-1, prompt.embeds.shape[1])
    visual = fam.visual(inputs)[0].tolist()
    parts, index, column, left = [], [], 0, list(grids)
    while column < len(visual):
        if not visual[column]:
            parts.append(embeds[column : column + 1])
            index.append(column)
            column += 1
            continue
        frames, h, w, tail = grid = left.pop(0)
        n = frames * h * w
        new = written(module, embeds[column : column + n + tail], grid)
        parts.append(new)
        m = len(new) - tail
        index += [column + int((j + 0.5) * n / m) for j in range(m)]
        index += range(column + n, column + n + tail)
        column += n + tail
    assert not left
    return torch.cat(parts), places[:, index]


def by_hand(
    fam: families.Family, sample: int, module: Any, tokens: Tensor, grids: list[Grid], text: bool
) -> list[Tensor]:
    """Logits of every step for one sample: the untouched model on embeddings put together here."""
    model = fam.model
    with torch.no_grad():
        hidden, at = prompt_by_hand(fam, sample, module, grids)
    following = oracle.encode(model, fam.single(sample)).positions.reshape(len(at), -1)[:, -1:]
    if text:
        at = torch.arange(len(hidden)).expand_as(at)
    out = []
    table = model.get_input_embeddings()
    following = at[:, -1:] if text else following
    with torch.no_grad():
        for step in range(len(tokens)):
            full = torch.cat([hidden, table(tokens[:step])])[None]
            later = following + torch.arange(1, step + 1)
            where = torch.cat([at, later], 1)
            where = where[:, None] if len(where) > 1 else where
            masked = torch.ones(full.shape[:2], dtype=torch.long)
            states = oracle.text_model(model)(
                inputs_embeds=full, attention_mask=masked, position_ids=where, use_cache=False
            ).last_hidden_state
            out.append(model.lm_head(states[:, -1]))
    return out


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("name", GRIDS)
def test_tokens_are_written_into_the_prompt(name: str, positions: str, folder: str) -> None:
    fam, ref = family(name), made(name)
    with vtc.attach(fam.model, "langdc", weights=folder, positions=positions) as session:
        run = generate(fam.model, fam.inputs)
        module = session.modules["projector"]
    tokens = run.sequences[:, fam.inputs["input_ids"].shape[1] :]
    (seen,) = session.trace
    if len({grid for grids in GRIDS[name] for grid in grids}) > 1:
        assert len(set(seen.n_out)) > 1
    for sample, grids in enumerate(GRIDS[name]):
        text = positions == "renumber"
        expected = by_hand(ref, sample, module, tokens[sample], grids, text)
        for step in range(STEPS):
            worst = (run.logits[step][sample] - expected[step][0]).abs().max()
            assert worst <= TOLERANCE, (sample, step)


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "output_scores": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 5},
}


@pytest.mark.parametrize("mode", MODES)
def test_ways_to_generate(mode: str, folder: str) -> None:
    """Each sample alone gives what it gives in a left-padded batch, and beams what a model gives
    that is handed the same embeddings."""
    fam, ref = family("llava"), made("llava")
    options = MODES[mode]
    with vtc.attach(fam.model, "langdc", weights=folder) as session:
        torch.manual_seed(0)
        run = generate(fam.model, fam.single(1), **options)
        module = session.modules["projector"]
        if mode == "no cache":
            batch = generate(fam.model, fam.inputs, **options)
            for a, b in zip(batch.logits, run.logits, strict=True):
                assert (a[1] - b[0]).abs().max() <= TOLERANCE
    tokens = run.sequences[0, fam.single(1)["input_ids"].shape[1] :]
    expected = by_hand(ref, 1, module, tokens, GRIDS["llava"][1], False)
    if mode != "beams":
        worst = max((a - b).abs().max() for a, b in zip(run.logits, expected, strict=True))
        assert worst <= TOLERANCE
        return
    scores = [x.log_softmax(-1)[0, t] for x, t in zip(expected, tokens, strict=True)]
    assert abs(sum(scores) / len(scores) - run.sequences_scores[0]) <= TOLERANCE


def test_beams_and_turns_on_renumbered_axes(folder: str) -> None:
    fam, ref = family("qwen2_5_vl"), made("qwen2_5_vl")
    inputs, grids = fam.single(1), GRIDS["qwen2_5_vl"][1]
    with vtc.attach(fam.model, "langdc", weights=folder, positions="renumber") as session:
        run = generate(fam.model, inputs, num_beams=3, output_scores=True)
        module = session.modules["projector"]
        first = generate(fam.model, inputs)
        asked = torch.cat([first.sequences, torch.tensor([[9, 8]])], 1)
        second = generate(
            fam.model,
            {"input_ids": asked, "attention_mask": torch.ones_like(asked)},
            past_key_values=first.past_key_values,
        )
    start = inputs["input_ids"].shape[1]
    tokens = run.sequences[0, start:]
    expected = by_hand(ref, 1, module, tokens, grids, True)
    scores = [x.log_softmax(-1)[0, t] for x, t in zip(expected, tokens, strict=True)]
    assert abs(sum(scores) / len(scores) - run.sequences_scores[0]) <= TOLERANCE
    expected = by_hand(ref, 1, module, second.sequences[0, start:], grids, True)
    for got, wanted in zip(second.logits, expected[STEPS + 2 :], strict=True):
        assert (got - wanted).abs().max() <= TOLERANCE


def test_labels_and_gradients(folder: str) -> None:
    """The loss is that of the text, visual columns are never learnt; the small model learns
    nothing, what projects its states does."""
    fam, ref = family("llava", "eager"), made("llava", "eager")
    inputs = fam.single(1)
    labels = inputs["input_ids"].masked_fill(fam.visual(inputs), -100)
    fam.model.requires_grad_(False)
    with vtc.attach(fam.model, "langdc", weights=folder) as session:
        module = session.modules["projector"]
        out = fam.model(**inputs, labels=labels)
        out.loss.backward()
    fam.model.requires_grad_(True)
    learnt = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None}
    assert learnt == {"post"}
    assert out.logits.shape[1] == labels.shape[1]
    text = ~fam.visual(inputs)[0]
    visual = [i for i, t in enumerate(text) if not t]
    assert bool((labels[0, visual] == -100).all())
    hidden, at = prompt_by_hand(ref, 1, module, GRIDS["llava"][1])
    logits = ref.model.lm_head(
        oracle.text_model(ref.model)(
            inputs_embeds=hidden[None],
            attention_mask=torch.ones(1, len(hidden), dtype=torch.long),
            position_ids=at,
        ).last_hidden_state
    )[0]
    column = {int(c): i for i, c in enumerate(at[0])}  # where text went
    said = [
        -logits[max(i for c, i in column.items() if c < t)].log_softmax(-1)[labels[0, t]]
        for t in range(1, len(text))
        if text[t]
    ]
    assert torch.allclose(out.loss, torch.stack(said).mean(), atol=TOLERANCE)


def test_threads_do_not_mix(folder: str) -> None:
    fam = family("qwen2_5_vl")
    with vtc.attach(fam.model, "langdc", weights=folder):
        jobs = [lambda p=p: generate(fam.model, p) for p in (fam.single(0), fam.single(1))] * 2
        alone = [job() for job in jobs]
        together = in_threads(jobs)
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one.logits, other.logits))


def test_later_steps_drop_written_tokens(folder: str) -> None:
    fam = family("llava")
    steps = (
        vtc.Step("langdc", "projector", "auto", params={"weights": folder, "base": (3, 3)}),
        vtc.Step("random", "decoder.1", 0.1),
    )
    with vtc.attach(fam.model, vtc.Recipe(steps)) as session:
        generate(fam.model, fam.inputs)
    first, second = session.trace
    assert second.n_in == first.n_out
    assert second.n_out == tuple(min(6, n) for n in first.n_out)


def test_low_rank_changes_of_the_host_end_with_the_session(tmp_path: Path) -> None:
    fam, ref = family("llava"), made("llava")
    before = generate(fam.model, fam.inputs)
    layers: Any = oracle.text_model(fam.model).layers
    module = compressor(width=families.HIDDEN, host=families.HIDDEN, eos=(0, 1, 2, 3, 4))
    module.lora = Lora.beside(layers, rank=2, scale=0.5)
    shaken(module.lora, 7)
    module.save(tmp_path)
    blocks: Any = oracle.text_model(ref.model).layers
    with torch.no_grad():
        for name, down, up in zip(module.lora.sizes, module.lora.down, module.lora.up, strict=True):
            blocks.get_submodule(name).weight += 0.5 * up @ down
    with vtc.attach(fam.model, "langdc", weights=str(tmp_path)) as session:
        run = generate(fam.model, fam.inputs)
        module = session.modules["projector"]
    tokens = run.sequences[:, fam.inputs["input_ids"].shape[1] :]
    expected = by_hand(ref, 0, module, tokens[0], GRIDS["llava"][0], False)
    assert max((a[0] - b[0]).abs().max() for a, b in zip(run.logits, expected, strict=True)) < 1e-4
    after = generate(fam.model, fam.inputs)
    assert all(map(torch.equal, before.logits, after.logits))
    assert not any("Lora" in repr(hook) for m in fam.model.modules() for hook in hooks_of(m))

    with pytest.raises(InvalidInput, match=r"14 of its layers do not fit this model, .* missing"):
        module.lora.check(layers[:2])
    with pytest.raises(InvalidInput, match="rank=0"):
        Lora.beside(layers, rank=0)


def hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def test_no_captions_leave_average_pooling() -> None:
    fam = family("qwen2_5_vl")
    options: dict[str, Any] = {"base": (2, 2), "max_len": 0}
    with vtc.attach(fam.model, "langdc", **options) as session:
        generate(fam.model, fam.inputs)
    assert session.trace[0].n_out == (4, 4, 12)
    module = session.modules["projector"]
    assert module.caption_videos([randn(4, 2, 2, families.HIDDEN)])[1] == 0.0


def test_a_total_bounds_the_captions_of_a_video(folder: str) -> None:
    fam = family("qwen2_5_vl")
    counts = []
    for options in ({"min_len": 3}, {"min_len": 3, "total": 4}):
        with vtc.attach(fam.model, "langdc", weights=folder, **options) as session:
            generate(fam.model, fam.inputs)
        counts.append([n - base for n, base in zip(session.trace[0].n_out, (2, 2, 6), strict=True)])
    assert all(n >= 3 for n in counts[0]) and counts[0][2] > 4
    assert counts[1] == [min(n, 4) for n in counts[0]]


def test_compiled_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = vtc.REDUCERS["langdc"]()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedModel, match="torch.compile cannot trace: run it uncompiled"):
        method.start(None, None)


def test_report_and_flops(folder: str) -> None:
    fam = family("llava")
    with vtc.attach(fam.model, "langdc", **{"base": (1, 2), "max_len": 2}) as session:
        generate(fam.model, fam.inputs)
    assert "untrained stand-in" in session.report()
    with vtc.attach(fam.model, "langdc", weights=folder) as trained:
        generate(fam.model, fam.inputs)
    assert "stand-in" not in trained.report()
    (tokens,) = set(trained.trace[0].n_out)
    with vtc.attach(fam.model, "grid", keep=tokens) as plain:
        generate(fam.model, fam.inputs)
    module = trained.modules["projector"]
    written = 2 * (tokens - 2)
    weights = sum(p.numel() for p in module.lm.model.layers.parameters())
    beside = 2 * weights * (2 * (4 + 2 + 3) + written)
    assert trained.stats()["flops"] == pytest.approx(plain.stats()["flops"] + beside)


def test_errors_in_front_of_a_host(folder: str, tmp_path: Path) -> None:
    fam = family("llava")
    many = r"langdc: (6[5-9]|70) tokens for image 0, which has 64 itself"
    with (
        pytest.raises(InvalidInput, match=many),
        vtc.attach(fam.model, "langdc", weights=folder, base=(8, 8)),
    ):
        fam.model(**fam.inputs)
    tiles = family("llava_next")
    with (
        pytest.raises(InvalidInput, match="grid of image 0 .* is not known here"),
        vtc.attach(tiles.model, "langdc", weights=folder),
    ):
        generate(tiles.model, tiles.inputs)
    compressor(width=7, host=7).save(tmp_path)
    with pytest.raises(InvalidInput, match="trained for tokens 7 wide and a host of 7, but"):
        vtc.attach(fam.model, "langdc", weights=str(tmp_path))
    with pytest.raises(InvalidRecipe, match="clip_frames=0: from 1 on"):
        vtc.attach(fam.model, "langdc", clip_frames=0)
    with pytest.raises(UnsupportedSite, match="works at projector"):
        vtc.attach(fam.model, "langdc", at="decoder.1")
    steps = (
        vtc.Step("langdc", "projector", "auto", positions="renumber"),
        vtc.Step("random", "decoder.1", 0.5),
    )
    with pytest.raises(UnsupportedModel, match="multimodal positions"):
        vtc.attach(family("qwen2_5_vl").model, vtc.Recipe(steps))


# ---------------------------------------------------------------------- training


def test_training_reads_what_the_method_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 3 packs questions behind the tokens of its own forward; a session gives the same."""
    for module in (train, train_llava_video):
        monkeypatch.setattr(module, "ATTENTION", "eager")  # its own is never registered here
    host, processor = train.load_host(None, True)
    module = shaken(train.build((1, 2), 6, host))
    module.lm.set_attn_implementation("sdpa")
    module.save(tmp_path)
    drawn = [train.moving.training_scene(i) for i in range(2)]
    questions = [train.moving.ask(scene, random.Random(0), 2) for scene, _ in drawn]
    inputs = processor(
        videos=[list(frames) for (_, frames), _ in zip(drawn, questions, strict=True)],
        text=[vtc_zoo.video_prompt(asked[-1].text) for asked in questions],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad(), vtc.attach(host, "langdc", weights=str(tmp_path)) as session:
        got = host(**inputs, logits_to_keep=1).logits[:, 0]
    rows = session.trace[0].n_out
    with torch.no_grad():
        pixels = inputs["pixel_values_videos"]
        features = host.model.get_video_features(pixels).pooler_output[:, :-1]
        grids = features.unflatten(1, (8, 6, 6))
        written = []
        for grid, count in zip(grids, rows, strict=True):
            soft, _ = module.caption_videos([grid])
            written.append(torch.cat([module.base(grid).flatten(0, 1), soft[0]]))
            assert len(written[-1]) == count  # and a newline, which is in no budget
        module.lora.install(host.model.language_model.layers, installed := Installed())
        logits, targets = train.read(host, written, questions)
        installed.remove()
    last = [i for i, t in enumerate(targets) if t != train.EOS][1::2]  # the second of each clip
    assert torch.allclose(logits[last], got, atol=TOLERANCE)


def test_padding_of_shorter_rows_is_not_seen() -> None:
    packed = torch.zeros(2, 1, 9, 9), torch.arange(9).expand(2, -1)  # start, 5 tokens, newline, 2
    mask, places = train.fit(*packed, [2, 5])
    assert mask[0, 0, 8].tolist() == [0, 0, 0, -1e9, -1e9, -1e9, 0, 0, 0]
    assert not mask[1].any()
    assert places[0, [0, 1, 2, 6, 7, 8]].tolist() == [0, 1 + 72, 1 + 216, 289, 290, 291]
    assert places[1].tolist() == [0, 1 + 28, 1 + 86, 1 + 144, 1 + 201, 1 + 259, 289, 290, 291]


def test_rank_correlation() -> None:
    assert train.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert train.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert train.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert train.spearman([1, 1], [1, 2]) == 0.0
