"""Bytes and launches: formulas of the cases against counts in the interpreter, and the commands
`report` and `bench` on small cases."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernels import GPU
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter as triton_interpreter
from vtc_kernels import bench, cases, report
from vtc_kernels.cases import CASES, Case
from vtc_kernels.traffic import EagerTraffic, count, distinct

#: the same functions as the production cases, in sizes that the interpreter finishes
SMALL: tuple[Case, ...] = (
    cases.gather("rows", 33, 9, 72, rotary=24),
    cases.gather("wide", 7, 3, 1152, rotary=0),
    cases.gather_heads("heads", 3, 17, 5, 72),
    cases.expand("rows", 33, 9, 72),
    cases.expand("wide", 7, 3, 1152),
    cases.unmerge("rows", 33, 9, 72),
    cases.merge("rows", 33, 9, 72),
    cases.merge("wide", 9, 2, 1152),
    cases.select("rows", 33, 9),
    cases.select("all", 7, 7),
    cases.pack_map("map", 33, 9),
    cases.pack_rows("rows", 33, 9, 72),
    cases.unpack_rows("back", 33, 9, 72),
    cases.cache("cache", 2, 33, 9, 72, prefix=3),
    cases.unpool("grid", 6, 2, 72),
    cases.attention("all rows", 4, 4, 33, 72, 3, 30, whole=True),
    cases.attention("grouped", 6, 2, 150, 64, 20, 150),
    cases.match("strided", 17, 17, 72),
    cases.match("apart", 65, 9, 40),
    cases.temporal("frames", 5, 7, 72, batch=2),
    cases.maxmin("given", 33, 9, batch=2),
    cases.maxmin_features("few", 33, 5, 72, batch=2),
    cases.maxmin_features("many", 40, 4, 8, batch=2),
    cases.norm("rms", 33, 9, 72, "rms"),
    cases.norm("layer", 7, 3, 1152, "layer"),
    cases.norm("adaptive", 33, 9, 72, "adaptive"),
    cases.probe("projector", 20, 3, 16, 64, 64),
)


def id_of(case: Case) -> str:
    return case.key


def test_every_operator_has_a_small_case() -> None:
    assert {case.operator for case in CASES} == {case.operator for case in SMALL}
    assert len({case.key for case in CASES}) == len(CASES)


@pytest.mark.skipif(GPU, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("case", SMALL, ids=id_of)
def test_formula_is_what_kernels_move(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: every kernel masks its tile edges, so no byte is moved beside the tensors."""
    from support.interpreter import watch

    call = triton_interpreter.GridExecutor.__call__

    def uncounted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # copies that the interpreter makes for itself
            return call(self, *args, **kwargs)

    monkeypatch.setattr(triton_interpreter.GridExecutor, "__call__", uncounted)
    tensors, around = case.tensors(batch=2), EagerTraffic()
    with torch.no_grad(), watch() as seen, around:
        case.launch(tensors)
    assert (seen.launches, seen.moved) == (case.kernels, case.moved(tensors))
    line = count(case, batch=2)
    assert line.launches == seen.launches + around.launches, around.operations
    assert line.ours == seen.moved + around.bytes, around.operations
    assert line.bound == case.bound(tensors) <= line.ours


@pytest.mark.parametrize("case", SMALL, ids=id_of)
def test_eager_formulation_computes_the_same(case: Case) -> None:
    """What is compared must be the same thing."""
    expected = case.eager(case.tensors(dtype=torch.float32, batch=2))
    found = case.ours(case.tensors(dtype=torch.float32, batch=2))
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    for ours, eager in pairs:
        torch.testing.assert_close(
            torch.as_tensor(ours).double(),
            torch.as_tensor(eager).double(),
            rtol=2e-3 if case.operator == "probe" else 1e-5,  # pushes of 0.01 cancel in fp32
            atol=1e-5,
        )


@pytest.mark.parametrize("case", SMALL, ids=id_of)
def test_tensors_are_the_same_every_time(case: Case) -> None:
    first, second = (tree_leaves(case.tensors(batch=2)) for _ in range(2))
    assert any(isinstance(t, Tensor) for t in first)
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


# -- counting eager operations ---------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def index(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "call", "launches", "moved"),
    [
        ("a view", lambda: meta(4, 8).t().reshape(8, 4)[1:], 0, 0),
        ("no storage", lambda: meta(4).new_empty(100), 0, 0),
        ("elementwise", lambda: meta(4, 8) + meta(4, 8), 1, 3 * 128),
        ("broadcast", lambda: meta(4, 8) * meta(1, 8).expand(4, 8), 1, 2 * 128 + 32),
        ("zeros", lambda: torch.zeros(4, 8, device="meta"), 1, 128),
        ("fill", lambda: meta(4, 8).zero_(), 1, 128),
        ("copy", lambda: meta(4, 8).copy_(meta(4, 8)), 1, 2 * 128),
        ("cast", lambda: meta(4, 8).to(torch.bfloat16), 1, 128 + 64),
        ("copying reshape", lambda: meta(4, 8).t().reshape(-1), 1, 2 * 128),
        ("gather of rows", lambda: meta(100, 8).index_select(0, index(3)), 1, 24 + 2 * 96),
        ("indexing", lambda: meta(100, 8)[index(3)], 1, 24 + 2 * 96),
        (
            "gather with an expanded index",
            lambda: meta(2, 50, 8).gather(1, index(2, 3, 1).expand(2, 3, 8)),
            1,
            48 + 2 * 192,
        ),
        ("scatter in place", lambda: meta(9, 8).index_copy_(0, index(3), meta(3, 8)), 1, 216),
        ("sum in place", lambda: meta(9, 8).index_add_(0, index(3), meta(3, 8)), 1, 24 + 3 * 96),
        ("scatter", lambda: meta(9).scatter(0, index(3), meta(3)), 1, 36 + 24 + 12 + 36),
        ("softmax", lambda: meta(4, 8).softmax(-1), 1, 2 * 128),
        ("layer norm", lambda: F.layer_norm(meta(4, 8), (8,)), 1, 2 * 128 + 2 * 16),
    ],
)  # fmt: skip
def test_counting_rules(name: str, call: Any, launches: int, moved: int) -> None:
    with EagerTraffic() as mode:
        call()
    assert (mode.launches, mode.bytes) == (launches, moved), mode.operations


def test_distinct_bytes() -> None:
    assert distinct(torch.zeros(4, 8)) == 128
    assert distinct(torch.zeros(1, 8).expand(4, 8)) == 32
    assert distinct(torch.zeros(0, 8)) == 0


# -- commands --------------------------------------------------------------------------------------


def test_report_says_what_is_beyond_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    small = cases.gather("rows", 33, 9, 72)
    assert report.main([], [small]) == 0
    shown = capsys.readouterr().out
    assert "gather/rows" in shown and "1.000" in shown and "Beyond" not in shown

    greedy = replace(small, moved=lambda t: 2 * small.moved(t))
    assert report.main([], [greedy]) == 1
    shown = capsys.readouterr()
    assert "gather/rows moves 2.000" in shown.err and "at most 1.10" in shown.err

    excused = replace(greedy, limit=2.5, reason="it writes everything twice")
    assert report.main(["--markdown"], [excused]) == 0
    shown = capsys.readouterr().out
    assert "| 2.000 [1] |" in shown and "[1] gather/rows: it writes everything twice" in shown


def test_production_cases_are_within_their_limits() -> None:
    """Every case moves at most 1.10 of its compulsory bytes, or states why it cannot."""
    for case in CASES:
        line = count(case)
        assert 1 <= line.ratio <= case.limit, case.key
        assert case.limit <= 1.10 or case.reason, case.key


@pytest.mark.parametrize("main", [report.main, bench.main])
def test_unknown_cases_are_refused(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "gahter"]) == 2
    shown = capsys.readouterr()
    assert "no case is called 'gahter', did you mean 'gather'?" in shown.err
    assert "Operators: attention, maxmin" in shown.err
    assert shown.out == ""


def test_patterns_choose_cases() -> None:
    assert {c.operator for c in cases.chosen(["merge"])} == {"merge"}
    assert cases.chosen(["gather_tokens"]) == cases.chosen(["gather"])
    assert [c.key for c in cases.chosen(["dit-xl"])] == ["expand/dit-xl", "pool/dit-xl"]
    assert cases.chosen([]) == list(CASES)


def test_bench_measures_and_marks(capsys: pytest.CaptureFixture[str]) -> None:
    small = (cases.gather("rows", 33, 9, 72, most=1e-6), cases.cache("cache", 2, 33, 9, 72))
    words = ["--rounds", "1", "--dtype", "float32"]
    threads = torch.get_num_threads()
    assert bench.main(words, small) == 1  # a target was missed
    shown = capsys.readouterr()
    (line,) = (line for line in shown.out.splitlines() if line.startswith("gather/rows"))
    assert "copy 1e-06" in line and "MISSED ours/copy <= 1e-06" in line
    assert "bench" in shown.err  # the progress bar
    assert torch.get_num_threads() == threads

    assert bench.main([*words, "--json"], small) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["dtype"] == "float32" and measured["rounds"] == 1
    assert [t["case"] for t in measured["times"]] == ["gather/rows", "cache/cache"]
    assert all(t[k] > 0 for t in measured["times"] for k in ("ours", "eager", "copy"))


def test_bench_targets() -> None:
    case = cases.maxmin("given", 33, 9, most_eager=0.05)
    times = bench.Times(case.key, ours=1.0, eager=10.0, copy=1.0, copied=1, bound=1)
    assert bench.missed(case, times) == ["ours/eager <= 0.05"]
    assert bench.missed(case, replace(times, eager=20.0)) == []
    gather = cases.gather("rows", 33, 9, 72, rotary=0)
    assert bench.missed(gather, replace(times, ours=2.0)) == ["ours/copy <= 1.3"]


def test_bench_leaves_slow_cases_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    slow = cases.gather("slow", 33, 9, 72, on_cpu=False)
    assert bench.main(["--rounds", "1"], [slow]) == 0  # nothing was measured, nothing missed
    assert "take minutes on a CPU: gather/slow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(
            ["--device", "cuda"],
            "no GPU that torch can use. Try --device cpu",
            marks=pytest.mark.skipif(GPU, reason="there is a GPU"),
        ),
        (["--rounds", "0"], "--rounds 0: at least one"),
    ],
)
def test_bench_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == ""
