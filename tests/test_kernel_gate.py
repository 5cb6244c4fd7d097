"""The gate: production kernels compile within their limits for GPUs that are not here, and what
must be refused is refused. The interpreter and the compiler cannot share a process, so this file
runs itself as a script for everything that compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton", reason="the gate needs the Triton compiler")

import triton.language as tl  # noqa: E402
from vtc_kernels import cases, gate  # noqa: E402
from vtc_kernels.gate import Figures  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python <words>, without the interpreter of the tests."""
    paths = [str(ROOT / name) for name in ("kernels", "tests", "model_zoo", ".")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


# -- production ------------------------------------------------------------------------------------


def test_nothing_is_violated() -> None:
    """All cases, all four targets, and the graphs of torch.compile."""
    done = run("-m", "vtc_kernels.gate")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "nothing violated" in done.stdout
    for target in gate.TARGETS:
        assert f"\n{target}\n" in f"\n{done.stdout}"


def test_baseline_holds_every_case_once() -> None:
    figures = gate.read_baseline()["figures"]
    assert list(figures) == list(gate.TARGETS)
    for target, known in figures.items():
        assert known.keys() == {c.key for c in (*cases.CASES, *cases.VARIANTS)}, target
        for kernels in known.values():
            for f in kernels.values():
                assert Figures(**f).spills == 0 and f["stack"] == 0


@pytest.mark.parametrize(
    ("width", "operators"),
    [
        (72, {"gather", "expand", "merge", "match", "attention", "cache"}),
        (1152, {"gather", "expand", "merge", "norm", "pack", "pool", "temporal"}),
    ],
)
def test_rows_of_awkward_widths_have_cases(width: int, operators: set[str]) -> None:
    """Widths that are no powers of two are where 128-bit accesses get lost."""
    found = set()
    for case in cases.CASES:
        tensors = tree_leaves(case.tensors(batch=1, values=False))
        rows = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if case.wide and any(t.ndim > 2 and t.shape[-1] == width for t in rows):
            found.add(case.operator)
    assert operators <= found


# -- what it must refuse ---------------------------------------------------------------------------


@triton.jit
def hoarding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Needs all numbers twice: far too many for the registers of one warp."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i).to(tl.float32)
    x = x - tl.sum(x, 0) / N
    tl.store(y_ptr + i, x / tl.sqrt(tl.sum(x * x, 0)))


@triton.jit
def adding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1.0)


def _hoard(n: int) -> cases.Case:
    def launch(t: Any) -> Any:
        hoarding_kernel[(1,)](t["x"], torch.empty_like(t["x"]), N=n, num_warps=1)

    return _case("hoarding", launch, n)


def _case(name: str, launch: Any, n: int = 1024, **more: Any) -> cases.Case:
    base = cases.gather("base", 32, 8, 64, rotary=0)
    make = {"make": lambda m: {"x": m.rows(n, dtype=torch.float32)}}
    return replace(base, operator="control", name=name, launch=launch, wide={}, **(make | more))


def _plain(t: Any) -> Any:
    adding_kernel[(1,)](t["x"], torch.empty_like(t["x"]), N=1024, num_warps=4)


def _narrow_gather(offset: int, row: int) -> Any:
    """The launch of the library on rows of 1024 that begin at `offset` of rows of `row`."""

    def launch(t: Any) -> Any:
        store = torch.empty(2 * 32 * row + 64, dtype=torch.bfloat16)
        x = store[offset : offset + 2 * 32 * row].view(2, 1, 32, row)[..., :1024]
        return cases.launcher("gather").gather([x], t["index"])

    return launch


def _controls() -> dict[str, Any]:
    """Violations of cases that are wrong on purpose, by name."""
    rows = cases.gather("rows", 32, 8, 1024, rotary=0)
    wide = {"gather_kernel": "both"}
    wrong = {
        "good": rows,
        "storage offset": replace(rows, launch=_narrow_gather(1, 1024)),
        "odd stride": replace(rows, launch=_narrow_gather(0, 1030)),
        "aligned stride": replace(rows, launch=_narrow_gather(8, 1032)),
        "no dot": _case("no dot", _plain, dots=("adding_kernel",)),
        "not launched": replace(rows, wide={**wide, "absent_kernel": "both"}),
    }
    out: dict[str, Any] = {}
    for target, numbers in (("sm_90", 8192), ("gfx942", 32768)):
        wrong["too large a tile"] = _hoard(numbers)
        for name, case in wrong.items():
            found = gate.compile_cases(target, [case])
            known = {k: {n: vars(f) for n, f in v.items()} for k, v in found.items()}
            baseline = {"triton": "", "figures": {target: known}}
            out[f"{target} {name}"] = gate.violations(target, [case], found, baseline)
            if name == "good":
                empty: dict[str, Any] = {"triton": "", "figures": {}}
                out[f"{target} no baseline"] = gate.violations(target, [case], found, empty)
    rows = replace(rows, name="unregistered", ours=lambda t: [t["xs"][0][:, :8].clone()])
    out["graph without a kernel"] = gate.graph_violations([rows], "sm_90")
    transposed = replace(
        rows,
        ours=lambda t: [y.mT if y.is_cpu else y for y in cases.gather_tokens(t["index"], *t["xs"])],
    )
    out["graph of another layout"] = gate.graph_violations([transposed], "sm_90")

    before = _state()
    try:
        with gate.compiling("gfx942"):
            inside = _state()
            raise KeyError
    except KeyError:
        pass
    out["restored"] = [before == _state(), before != inside]
    first, second = (gate.compile_cases("sm_90", [wrong["good"]]) for _ in range(2))
    out["repeats"] = first == second
    return out


def _state() -> list[Any]:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from vtc_kernels.launch import rows

    return [JITFunction.run, driver._active, knobs.cache.dir, rows.WARP]


@pytest.fixture(scope="module")
def controls() -> dict[str, Any]:
    done = run(__file__)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("good", []),
        ("aligned stride", []),
        ("too large a tile", ["spills, none are allowed", "bytes of stack, none are allowed"]),
        # what is left at 8 bytes is the index
        ("storage offset", ["widest load is 8 bytes, rows must move 16"]),
        ("odd stride", ["widest load is 8 bytes, rows must move 16"]),
        ("no dot", ["no matrix instruction, but the case says it has a dot"]),
        ("not launched", ["absent_kernel was not launched, only gather_kernel was"]),
        ("no baseline", ["gather_kernel: has no baseline"]),
    ],
)
def test_controls(controls: dict[str, Any], target: str, name: str, said: list[str]) -> None:
    lines = controls[f"{target} {name}"]
    assert bool(lines) == bool(said), lines
    for words in said:
        assert any(words in line for line in lines), lines


def test_graph_controls(controls: dict[str, Any]) -> None:
    (absent,) = controls["graph without a kernel"][:1]
    assert "has 0 kernels in its graph (none), the case says 1" in absent
    (layout,) = controls["graph of another layout"]
    assert "The launch must allocate what the torch formula returns" in layout


def test_gate_cleans_up_and_repeats(controls: dict[str, Any]) -> None:
    assert controls["restored"] == [True, True]
    assert controls["repeats"] is True


# -- judgement without compiling -------------------------------------------------------------------

GOOD = Figures(40, 0, 0, 1024, 16, 16, 2, "", 4)


def judged(now: Figures, before: Figures | None = GOOD, **more: Any) -> list[str]:
    case = replace(cases.gather("rows", 32, 8, 64), **more)
    known = {} if before is None else {case.key: {"gather_kernel": vars(before)}}
    baseline = {"triton": "", "figures": {"sm_80": known}}
    return gate.violations("sm_80", [case], {case.key: {"gather_kernel": now}}, baseline)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"registers": 48}, None),
        ({"registers": 20, "shared": 0, "narrow": 0}, None),
        ({"registers": 49}, "49 registers, at most 48 are allowed (baseline + 8)"),
        ({"shared": 1028}, "1028 bytes of shared memory, at most 1024 are allowed (baseline)"),
        ({"narrow": 11}, "11 accesses to memory are narrower than 16 bytes, at most 10"),
        ({"spills": 3}, "3 spills, none are allowed"),
        ({"stack": 8}, "8 bytes of stack, none are allowed"),
        ({"load": 8}, "widest load is 8 bytes, rows must move 16"),
        ({"store": 4}, "widest store is 4 bytes, rows must move 16"),
        ({"load": 32}, None),
    ],
)
def test_rules(change: dict[str, int], said: str | None) -> None:
    lines = judged(replace(GOOD, **change))
    assert len(lines) == (said is not None)
    for line in lines:
        assert said and said in line and "sm_80 gather/rows gather_kernel" in line


def test_shared_memory_has_a_limit_of_its_own() -> None:
    large = replace(GOOD, shared=48 * 1024 + 4)
    (line,) = judged(large, large)
    assert "49156 bytes of shared memory, at most 49152 are allowed" in line


def test_baselines_that_are_missing_or_stale() -> None:
    (missing,) = judged(GOOD, None)
    assert "has no baseline" in missing and "--update" in missing
    case = cases.gather("rows", 32, 8, 64)
    known = {case.key: {"gather_kernel": vars(GOOD), "old_kernel": vars(GOOD)}, "gone/case": {}}
    baseline = {"triton": "", "figures": {"sm_80": known}}
    found = {case.key: {"gather_kernel": GOOD}}
    lines = gate.violations("sm_80", [case], found, baseline)
    assert [line.split(": has")[0] for line in lines] == [
        "sm_80 gather/rows old_kernel",
        "sm_80 gone/case",
    ]
    only = gate.violations("sm_80", [case], found, baseline, whole=False)
    assert [line.split(": has")[0] for line in only] == ["sm_80 gather/rows old_kernel"]


def test_update_says_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    found = {"sm_80": {"gather/rows": {"gather_kernel": GOOD}}}
    first = gate.update(found, gate.read_baseline(path), True, path)
    assert first == ["sm_80 gather/rows gather_kernel: new, 40 registers, 1024 bytes shared"]
    assert gate.update(found, gate.read_baseline(path), True, path) == []
    found["sm_80"]["gather/rows"]["gather_kernel"] = replace(GOOD, registers=44)
    changed = gate.update(found, gate.read_baseline(path), True, path)
    assert changed == ["sm_80 gather/rows gather_kernel: registers 40 -> 44"]
    other = {"sm_80": {"merge/rows": {"merge_kernel": GOOD}}}
    kept = gate.update(other, gate.read_baseline(path), False, path)
    assert len(kept) == 1 and len(gate.read_baseline(path)["figures"]["sm_80"]) == 2
    gone = gate.update(other, gate.read_baseline(path), True, path)
    assert gone == ["sm_80 gather/rows: removed"]
    assert list(gate.read_baseline(path)["figures"]["sm_80"]) == ["merge/rows"]


# -- where it cannot run ---------------------------------------------------------------------------


def test_interpreter_is_refused() -> None:
    done = run("-m", "vtc_kernels.gate", TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stdout == ""
    assert "TRITON_INTERPRET=1 is set" in done.stderr and "env -u" in done.stderr


def test_missing_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "find_spec", lambda name: None)
    assert gate.main([]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_unknown_cases_and_targets_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gate.main(["--cases", "gahter"]) == 2
    assert "no case is called 'gahter'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        gate.main(["--targets", "sm_70"])
    assert stop.value.code == 2 and "sm_80" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gate.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--update" in shown and "examples:" in shown


if __name__ == "__main__":
    print(json.dumps(_controls()))
