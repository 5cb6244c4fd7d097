"""tiny-dit-digits: its data, its sampler, its judges, its training script and the shipped model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vtc_zoo
from PIL import Image
from torch import Tensor, nn
from vtc_zoo import digits

pytest.importorskip("sklearn")
NAME = "tiny-dit-digits"


class Constant(nn.Module):
    """Velocity 2 for class 3, 5 for class 7 and -1 for no class; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.calls.append((x, timestep, class_labels))
        velocity = torch.tensor([0, 0, 0, 2, 0, 0, 0, 5, 0, 0, -1.0])[class_labels]
        return SimpleNamespace(sample=velocity.view(-1, 1, 1, 1).expand_as(x))


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    pytest.importorskip("diffusers")
    try:
        return vtc_zoo.load(NAME)
    except FileNotFoundError as error:
        pytest.skip(str(error))


# data


def test_the_split_is_fixed_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = digits.read("train"), digits.read("test")
    assert train.shape == (1437, 1, 16, 16) and test.shape == (360, 1, 16, 16)
    assert train.min() == -1 and train.max() == 1 and set(test_labels.tolist()) == set(range(10))
    assert torch.bincount(train_labels).add(torch.bincount(test_labels)).sum() == 1797
    small = [digits.read_small(split)[0].flatten(1) for split in ("train", "test")]
    rows = [{tuple(row) for row in part.tolist()} for part in small]
    assert not rows[0] & rows[1]
    everything = {tuple(row) for row in (load_digits().data / 8 - 1).tolist()}
    assert rows[0] | rows[1] == everything
    with pytest.raises(ValueError, match="no split 'dev': give 'train' or 'test'"):
        digits.read("dev")


def test_jitter_of_nothing_is_the_plain_picture_and_shifts_go_where_they_should() -> None:
    pytest.importorskip("diffusers")
    train = pytest.importorskip("vtc_zoo.train_dit_digits")
    small, _ = digits.read_small("test")
    still = torch.eye(2, 3).expand(len(small), 2, 3)
    assert torch.allclose(train.enlarge(small, still), digits.read("test")[0], atol=1e-6)
    aside = still + torch.tensor([[0, 0, 0.25], [0, 0, 0]])  # a quarter of half of 16: 2 pixels
    moved, plain = train.enlarge(small, aside), digits.read("test")[0]
    assert torch.allclose(moved[..., :-2], plain[..., 2:], atol=1e-5)
    changed = train.jitter(small, torch.Generator().manual_seed(0))
    assert changed.shape == plain.shape and 0.01 < (changed - plain).abs().mean() < 0.2


# drawing


def test_the_sampler_takes_euler_steps_of_guided_pairs() -> None:
    model = Constant()
    out = digits.sample(model, [3, 7], steps=4, guidance=1.5, seed=5)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    expected = torch.tensor([-1 + 1.5 * 3, -1 + 1.5 * 6]).view(2, 1, 1, 1)
    assert torch.allclose(out, noise - expected, atol=1e-5)
    assert [call[1][0].item() for call in model.calls] == [1000, 750, 500, 250]
    for x, timestep, labels in model.calls:
        assert torch.equal(x[:2], x[2:]) and len(set(timestep.tolist())) == 1
        assert labels.tolist() == [3, 7, 10, 10]


def test_the_sampler_says_what_is_wrong() -> None:
    wrong: Any = (
        (([0.5],), {}, r"labels are torch.float32 \[1\]: give whole numbers \[B\]"),
        (([[1]],), {}, r"labels are torch.int64 \[1, 1\]"),
        (([],), {}, r"labels are .* \[0\]: give whole numbers \[B\], at least one"),
        (([3, 11],), {}, "labels are 3..11: give 0..9, or 10 for no class"),
        (([3],), {"steps": 0}, "steps=0: give 1 or more"),
    )
    for args, options, text in wrong:
        with pytest.raises(ValueError, match=text):
            digits.sample(Constant(), *args, **options)


# judging


def test_the_judge_knows_real_digits_and_no_others() -> None:
    images, labels = digits.read("test")
    assert digits.judge_accuracy() == digits.recognised(images, labels) > 0.98
    assert digits.recognised(images, (labels + 1) % 10) < 0.02
    assert digits.recognised(images[:4], [*labels[:3], (labels[3] + 1) % 10]) == 0.75
    with pytest.raises(ValueError, match="360 pictures and 2 labels: give one for each"):
        digits.recognised(images, [1, 2])
    with pytest.raises(ValueError, match=r"pictures are \[360, 16, 16\]: give \[B, 1, 16, 16\]"):
        digits.recognised(images[:, 0], labels)


def test_the_frechet_distance_against_its_formula() -> None:
    """The same number from sklearn's PCA and a matrix square root."""
    from scipy.linalg import sqrtm
    from sklearn.decomposition import PCA

    train, test = (
        digits.read(split)[0].view(-1, 8, 2, 8, 2).mean((2, 4)).flatten(1).double() / 2 + 0.5
        for split in ("train", "test")
    )
    axes = PCA(20, svd_solver="full").fit(train.numpy())
    one, two = (axes.transform(x.numpy()) for x in (train, test))
    c1, c2 = np.cov(one.T), np.cov(two.T)
    gap = ((one.mean(0) - two.mean(0)) ** 2).sum()
    expected = gap + np.trace(c1 + c2 - 2 * np.asarray(sqrtm(c1 @ c2)).real)
    images = digits.read("test")[0]
    assert digits.frechet(images) == pytest.approx(expected, rel=1e-4)
    assert digits.frechet(digits.read("train")[0]) == pytest.approx(0, abs=1e-4)
    blurred = 0.5 * images + 0.5 * images.mean(0)
    assert digits.frechet(blurred) > 5 * digits.frechet(images)
    with pytest.raises(ValueError, match="20 pictures: give more than 20"):
        digits.frechet(images[:20])


def test_a_sheet_of_pictures(tmp_path: Path) -> None:
    images = torch.full((3, 1, 16, 16), -1.0)
    images[1] = 2.0  # more than black
    digits.write_sheet(images, tmp_path / "deep" / "sheet.png", columns=2, scale=3)
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (96, 96)
    assert (pixels[:48, 48:] == 0).all() and (pixels[48:] == 255).all()
    with pytest.raises(ValueError, match="columns=0, scale=4: give 1 or more"):
        digits.write_sheet(images, tmp_path / "x.png", columns=0)


# the model


def test_labels_are_dropped_in_one_place_in_training() -> None:
    """Every block of a stock model would draw its own; ours must see the labels it is given."""
    pytest.importorskip("diffusers")
    train = pytest.importorskip("vtc_zoo.train_dit_digits")
    torch.manual_seed(0)
    model = train.build().train()
    embedders = [block.norm1.emb.class_embedder for block in model.transformer_blocks]
    labels = torch.arange(11).repeat(20)
    for embedder in embedders:
        assert torch.equal(embedder(labels), embedder.embedding_table.weight[labels])
    assert embedders[0].embedding_table.num_embeddings == 11
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1000.0, 0.5])
    assert not model(x, timestep=t, class_labels=torch.tensor([3, 10])).sample.any()


def test_the_shipped_model(shipped: tuple[Any, Any]) -> None:
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    model, scheduler = shipped
    assert type(model) is DiTTransformer2DModel and not model.training
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert vtc_zoo.load(NAME, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert NAME in vtc_zoo.names()
    assert sum(f.stat().st_size for f in vtc_zoo.path(NAME).iterdir()) < 4.5e6


def test_what_the_shipped_model_draws(shipped: tuple[Any, Any]) -> None:
    labels = torch.arange(60) % 10
    images = digits.sample(shipped[0], labels)
    assert images.shape == (60, 1, 16, 16) and images.dtype == torch.float32
    assert digits.recognised(images, labels) >= 0.9
    assert digits.frechet(images) < 0.5 * digits.frechet(torch.randn(60, 1, 16, 16))


def test_drawing_again_and_with_the_scheduler(shipped: tuple[Any, Any]) -> None:
    """Same seed, same digits; the global generator is left alone; diffusers' loop is the same."""
    model, scheduler = shipped
    labels = torch.tensor([0, 4, 10])
    before = torch.get_rng_state()
    images = digits.sample(model, labels, steps=4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, digits.sample(model, labels, steps=4, seed=1))
    assert not torch.allclose(images, digits.sample(model, labels, steps=4, seed=2), atol=0.1)

    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(sigmas=digits.times(4))
    for t in scheduler.timesteps:
        with torch.no_grad():
            own = model(x, timestep=t.expand(3), class_labels=labels).sample
            none = model(x, timestep=t.expand(3), class_labels=torch.full((3,), 10)).sample
        x = scheduler.step(none + 1.5 * (own - none), t, x).prev_sample
    assert torch.allclose(images, x, atol=1e-4)


def test_the_table_of_the_evaluation(shipped: tuple[Any, Any]) -> None:
    from vtc_zoo import eval_digits

    four = eval_digits.row("four", shipped[0], 30, (0, 1), steps=4)
    images, labels = eval_digits.draw(shipped[0], 30, 1, steps=4)
    assert four.recognised[1] == digits.recognised(images, labels)
    assert four.frechet[1] == digits.frechet(images) and labels[:12].tolist() == [*range(10), 0, 1]
    assert eval_digits.flops(shipped[0], steps=2) * 2 == four.flops
    made = eval_digits.Row("made", (0.98, 1.0), (0.25, 0.75), four.flops // 2)
    text = eval_digits.table([four, made], four)
    assert re.search(r"\| made \| 99.0 ± 1.4 % \| 0.500 ± 0.354 \| [\d.]+ \| 50 % \|", text)


def test_the_training_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    train = pytest.importorskip("vtc_zoo.train_dit_digits")
    words = ["train", "--out", str(tmp_path), "--smoke", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["drawn"] == 50
    assert json.loads(capsys.readouterr().out) == metrics
    model, _ = vtc_zoo.load_folder(tmp_path)
    assert digits.sample(model, [1], steps=1).shape == (1, 1, 16, 16)
