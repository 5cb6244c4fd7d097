"""`vtc bench census` and `vtc bench vit`: what they check and count is right."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vtc
from vtc.adapters.encoder import pairs
from vtc.bench import census, records, vit
from vtc.commands.cli import main

timm = pytest.importorskip("timm", reason="image encoders need the extra 'vision'")


def run(command: ModuleType, *words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


# ---------------------------------------------------------------------- census

REFUSED = {
    "cait_xxs24_224",
    "convit_tiny",
    "deepseek_vit_412m_enc",
    "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p16_224",
}
#: blocks that hide their keys: tokens can be dropped, not merged by key
UNMERGED = {
    "vit_base_patch16_xp_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
}


def test_every_kind_of_encoder_is_exact_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "census.json"
    assert run(census, "--quick", "--json", path) == 0
    rows = {row["model"]: row for row in records.read(path)}
    assert list(rows) == list(census.QUICK)
    exact = set(rows) - REFUSED
    assert {n for n, row in rows.items() if row["result"] == "exact"} == exact
    assert {n for n in exact if rows[n]["tome"] != "exact"} == UNMERGED
    assert all(rows[n]["result"] == "refused" and rows[n]["reason"] for n in REFUSED)
    first = rows["beit_base_patch16_224"]
    assert first["tokens"] == 24 and first["timm"] == timm.__version__ and first["torch"]
    shown = capsys.readouterr().out
    assert "| VisionTransformer + Eva + Beit | 23 | 23 | 0 | 0 | 100.0% |" in shown
    assert "XCABlock also needs H, W" in shown


def test_a_wrong_table_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Biases of the first places instead of those that are left: right shapes, wrong numbers."""

    def first(units: Any, bias: Tensor) -> Tensor:
        k = units.index().shape[1]
        return bias[..., :k, :k]

    monkeypatch.setattr(pairs, "cut", first)
    assert run(census, "--models", "beit_base_patch16_224") == 1
    assert "from the oracle" in capsys.readouterr().out


def test_a_crash_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(subject: census.Subject) -> str:
        raise RuntimeError("boom")

    monkeypatch.setattr(census, "equals_masking", crash)
    row = census.examine("test_vit2", 0)
    assert (row["result"], row["reason"]) == ("inexact", "RuntimeError: boom")


def test_the_oracle_hides_tokens_as_a_mask_does() -> None:
    """Against attention masks handed to a model that takes them."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit2", depth=3, img_size=(64, 96)).eval()
    census.randomise(model)
    images = torch.randn(2, 3, 64, 96)
    keep = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, :2] = True
    keep[1] = keep[0].roll(3)  # equally many
    seen = F.pad(keep, (model.num_prefix_tokens, 0), value=True)
    mask = torch.where(seen, 0.0, float("-inf"))[:, None, None]

    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for i, block in enumerate(model.blocks):
            x = block(x, attn_mask=mask if i else None)
        short = torch.stack([t[k] for t, k in zip(model.norm(x), seen, strict=True)])
        expected = model.forward_head(short)
        ours, dense = census.oracle(model, images, keep), model(images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert census.distance(dense, expected) > census.SEEN
    assert not [h for m in model.modules() for h in m._forward_pre_hooks]


def test_registrations_are_those_of_transformers() -> None:
    names = census.registrations()
    assert set(census.QUICK) <= set(names) and len(names) > 500
    assert not {"resnet50", "convnext_tiny"} & set(names)


# ---------------------------------------------------------------------- vit


def test_encoders_are_timed_beside_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "vit.json"
    words = ("--quick", "--models", "vit_small_patch16_384", "--dtypes", "bfloat16")
    assert run(vit, *words, "--json", path) == 0
    rows = {row["case"]: row for row in records.read(path)}
    assert list(rows) == [
        *("dense", "dense again", "tome r=0", "tome r=23", "limit r=23", "tome r=40"),
        *("limit r=40", "random 50%", "limit 50%", "grid 50%"),
    ]
    assert all(row["dtype"] == "bfloat16" and row["ms"] > 0 for row in rows.values())
    assert all("speedup" in row for name, row in rows.items() if name != "dense")
    assert not any("passed" in row for row in rows.values())  # a rough look is not judged
    counted = {name: row["flops"] for name, row in rows.items()}
    assert counted["tome r=0"] == counted["dense again"] == counted["dense"]
    assert counted["random 50%"] == counted["limit 50%"] < counted["limit r=40"] < counted["dense"]
    assert rows["tome r=23"]["limit_ratio"] > 0 and rows["tome r=0"]["limit"] == "dense again"


def test_bars_are_judged() -> None:
    cases = vit.Cases(torch.zeros(1), {})
    model = torch.nn.Identity()
    for name, bar, seconds in (("dense", None, 3.0), ("quick", 1.4, 2.0), ("slow", 1.6, 2.0)):
        case = cases.add(name, model, bar=bar)
        case.seconds, case.fields["flops"] = [seconds] * 3, 1
        case.beside = [3.0] * 3 if bar else []
    dense, quick, slow = vit.summarise(cases, judged=True)
    assert "passed" not in dense and quick["speedup"] == 1.5
    assert quick["passed"] and not slow["passed"]
    assert not any("passed" in row for row in vit.summarise(cases, judged=False))


def test_widths_are_means_of_both_halves_of_a_block() -> None:
    model: Any = timm.create_model("test_vit2", depth=3, img_size=64).eval()
    with torch.no_grad(), vtc.attach(model, "tome", r=4) as session:
        model(torch.randn(1, 3, 64, 64))
    prefix = model.num_prefix_tokens
    assert vit.widths(session, model) == [prefix + n for n in (14, 10, 6)]
    seen: list[int] = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad(), vit.shortened(model, [20, 10, 5]):
        model(torch.randn(1, 3, 64, 64))
    assert seen == [16 + prefix, 10, 5]


def test_lookupvit_is_counted_by_the_formula(tmp_path: Path) -> None:
    path = tmp_path / "lookup.json"
    words = ("--quick", "--lookupvit", "--sizes", "224", "--dtypes", "float32")
    assert run(vit, *words, "--json", path) == 0
    rows = {row["case"]: row for row in records.read(path)}
    assert list(rows) == ["dense", "dense again", "M = 9", "M = 25"]
    n, d, depth, classes = 196, 768, 2, 1000
    ends = n * d * 768 + d * classes
    assert rows["dense"]["flops"] == 2 * (depth * (2 * n * n * d + 12 * n * d * d) + ends)
    for m in (9, 25):
        block = (3 * n * m + 2 * m * m) * d + (4 * n + 15 * m) * d * d
        more = m * n * d + d * classes  # the resize, and a second head
        row = rows[f"M = {m}"]
        assert row["flops"] == 2 * (depth * block + ends + more)
        assert row["share"] == pytest.approx(row["speedup"] / row["flops_ratio"])


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["census", "--models", "vit_base_patch16_223"], "Did you mean 'vit_base_patch16_224'"),
        (["vit", "--models", "resnet50"], "vit_base_patch16_224, vit_small_patch16_384"),
        (["vit", "--dtypes", "int8"], "bfloat16, float32"),
        (["vit", "--lookupvit", "--sizes", "100"], "224, 384"),
        (["vit", "--batch", "0"], "below 1"),
    ],
)
def test_wrong_usage(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", [census, vit])
def test_help(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert "examples:" in capsys.readouterr().out
