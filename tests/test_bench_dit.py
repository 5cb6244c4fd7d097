"""`vtc bench dit`, on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtc.bench import dit
from vtc.commands import cli


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dit, "WIDTH", 16)
    monkeypatch.setattr(dit, "HEADS", 2)
    out = tmp_path / "dit.json"
    assert cli.main(["bench", "dit", "--quick", "--json", str(out)]) == 0
    assert "DiT-XL/2 of 4 blocks, 256 pixels, 2 steps" in capsys.readouterr().out
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    assert {"dense", "dense again", "tomesd 50 %", "pooled 25 %", "random 50 %"} <= rows.keys()
    # of 4 blocks 2 work on half of 256 tokens: 12 N C^2 + 2 N^2 C each, C = 32, beside modulation
    n, c = 256, 32
    whole, half = (12 * m * c * c + 2 * m * m * c for m in (n, n // 2))
    expected = 4 * whole / (2 * whole + 2 * half)
    assert rows["random 50 %"]["flops_ratio"] == pytest.approx(expected, rel=0.05)
    assert rows["dense again"]["flops_ratio"] == 1.0
    early, always = (rows[name]["flops_ratio"] for name in ("pooled 25 %, early", "pooled 25 %"))
    assert 1.0 < early < always
    assert all(row["ms"] > 0 for row in rows.values())


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "dit", "--blocks", "2"]) == 2
    assert "2 is below 4" in capsys.readouterr().err
