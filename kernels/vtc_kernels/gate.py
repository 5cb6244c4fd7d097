"""Compile every kernel for GPUs that are not here, and refuse spills, narrow loads and growth.

The launches of the library run on CPU tensors; a stub driver lets Triton compile each kernel as
it would be compiled for those tensors, and nothing is executed. What the compiler made is read
from the machine code and compared with fixed rules and with the baseline gate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import CASES, VARIANTS, Case, chosen
from .traffic import map_tensors

BASELINE = Path(__file__).with_name("gate.json")
#: name -> backend, architecture, lanes of a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
#: registers that a kernel may use beyond the baseline
SLACK = 8
#: bytes of shared memory per program
SHARED = {"cuda": 48 * 1024, "hip": 64 * 1024}
#: rows of the batch while compiling
BATCH = 2
WIDE = 16
#: the most launches of a case whose graph is traced: tracing takes 50 ms per launch
TRACED = 8
UPDATE = "python -m vtc_kernels.gate --update"
FAILED, USAGE = 1, 2

_EPILOG = """examples:
  python -m vtc_kernels.gate                               everything, about 20 s per target
  python -m vtc_kernels.gate --targets sm_90 --cases merge one target, one operator
  python -m vtc_kernels.gate --cases 'gather/*' --update   take today's figures as the baseline
exit codes: 0 nothing violated, 1 a rule or the baseline is violated, 2 the gate cannot run"""


class CannotRun(RuntimeError):
    """The gate cannot compile here."""


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one kernel.

    Attributes:
        registers: per lane. spills: instructions that spill (NVIDIA) or registers spilled (AMD).
        stack: bytes. shared: bytes per program. load, store: bytes of the widest access to global
        memory per lane. narrow: instructions that access global memory with less than 16 bytes.
        matrix: the matrix instruction, "" without one. warps: of a program.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    load: int
    store: int
    narrow: int
    matrix: str
    warps: int


#: case key -> kernel -> figures
Found = dict[str, dict[str, Figures]]
#: shape, dtype, strides
Layout = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]


# -- compile ---------------------------------------------------------------------------------------


def check_environment() -> None:
    """Refuse to run where nothing would be compiled."""
    if find_spec("triton") is None:
        raise CannotRun(
            "the gate needs the Triton compiler, which is not installed (Linux only; no GPU is "
            "needed): pip install triton"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotRun(
            "TRITON_INTERPRET=1 is set: the interpreter runs kernels as Python and compiles "
            "nothing. Unset it: env -u TRITON_INTERPRET python -m vtc_kernels.gate"
        )


class _Stub:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def compiling(name: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, kernel[grid](...) compiles for the target `name` and runs nothing. Yields the list
    of (name of the kernel, compiled kernel), which grows. Everything is put back at the end."""
    check_environment()
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from .launch import rows

    made: list[tuple[str, Any]] = []
    used: dict[int, Any] = {}
    run, active, warps = JITFunction.run, driver._active, rows.WARP

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if id(self) not in used:
            used[id(self)] = self
            self.device_caches.clear()  # it may have been compiled for another target
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        made.append((self.__name__, kernel))
        return kernel

    backend, architecture, lanes = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="gate-") as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        rows.WARP = lanes
        JITFunction.run = compile_only  # type: ignore[method-assign]
        driver.set_active(_Stub(GPUTarget(backend, architecture, lanes)))  # type: ignore[arg-type]
        try:
            yield made
        finally:
            JITFunction.run = run  # type: ignore[method-assign]
            driver._active = active
            rows.WARP = warps
            for function in used.values():
                function.device_caches.clear()


def compile_cases(target: str, cases: Sequence[Case]) -> Found:
    """Compile what every case launches. A kernel that a case launches in several forms is listed
    as name, name#2, ..."""
    found: Found = {}
    read: dict[int, tuple[Any, Figures]] = {}
    with compiling(target) as made:
        for case in cases:
            made.clear()
            case.launch(case.tensors("cpu", torch.bfloat16, BATCH, values=False))
            forms: dict[str, list[Any]] = {}
            for name, kernel in made:
                seen = forms.setdefault(name, [])
                if not any(kernel is other for other in seen):
                    seen.append(kernel)
            found[case.key] = {}
            for name, kernels in forms.items():
                for i, kernel in enumerate(kernels):
                    if id(kernel) not in read:
                        read[id(kernel)] = kernel, figures(kernel)
                    form = name if i == 0 else f"{name}#{i + 1}"
                    found[case.key][form] = read[id(kernel)][1]
    return found


# -- read the machine code -------------------------------------------------------------------------


def figures(kernel: Any) -> Figures:
    """Read a compiled kernel."""
    nvidia = kernel.metadata.target.backend == "cuda"
    return _nvidia(kernel) if nvidia else _amd(kernel)


def _nvidia(kernel: Any) -> Figures:
    """Registers and stack from the binary; widths and matrix instructions from the PTX, which the
    assembler keeps. Spills live on the stack, so only a kernel with a stack is disassembled."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.kernel)
        file.flush()

        def dump(what: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
        stack = int(usage["STACK"]) + int(usage["LOCAL"])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", dump("-sass"))) if stack else 0
    text = kernel.asm["ptx"]
    load = [_width(*found) for found in re.findall(_PTX.format("ld"), text)]
    load += [int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\],\s*(\w+)", text)]
    store = [_width(*found) for found in re.findall(_PTX.format("st"), text)]
    matrix = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", text)
    return Figures(
        registers=int(usage["REG"]),
        spills=spills,
        stack=stack,
        shared=kernel.metadata.shared,
        load=max(load, default=0),
        store=max(store, default=0),
        narrow=sum(w < WIDE for w in load + store),
        matrix=matrix[0] if matrix else "",
        warps=kernel.metadata.num_warps,
    )


#: ld.global.L1::evict_last.v4.b32
_PTX = r"\b{}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bufs](\d+)\b"


def _width(vector: str, bits: str) -> int:
    return int(vector or 1) * int(bits) // 8


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


def _amd(kernel: Any) -> Figures:
    text = kernel.asm["amdgcn"]

    def number(word: str) -> int:
        found = re.search(rf"\.{word}:\s*(\d+)", text)
        if found is None:
            raise CannotRun(f"the AMD code of {kernel.name} does not say its {word}")
        return int(found[1])

    def widths(kind: str) -> list[int]:
        start = rf"\b(?:global|buffer|flat)_{kind}_(?:lds_)?[su]?"
        return [_AMD_WIDTHS[w] for w in re.findall(rf"{start}(dword(?:x\d)?|short|byte)", text)]

    load, store = widths("load"), widths("store")
    matrix = sorted(set(re.findall(r"\b(v_mfma_\w+)", text)))
    return Figures(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        shared=kernel.metadata.shared,
        load=max(load, default=0),
        store=max(store, default=0),
        narrow=sum(w < WIDE for w in load + store),
        matrix=matrix[0] if matrix else "",
        warps=kernel.metadata.num_warps,
    )


# -- judge -----------------------------------------------------------------------------------------


def read_baseline(path: Path = BASELINE) -> dict[str, Any]:
    """{"triton": version, "figures": {target: {case: {kernel: figures}}}}"""
    if not path.exists():
        return {"triton": "", "figures": {}}
    return json.loads(path.read_text())


def violations(
    target: str, cases: Sequence[Case], found: Found, baseline: dict[str, Any], whole: bool = True
) -> list[str]:
    """One line for everything that is wrong: what was found, what is allowed, what to do.

    whole: all cases were compiled, so entries of the baseline for other cases are stale.
    """
    known = baseline["figures"].get(target, {})
    lines = []
    for case in cases:
        kernels = found[case.key]
        before = known.get(case.key, {})
        for name in (*case.wide, *case.dots):
            if name not in kernels:
                lines.append(
                    f"{target} {case.key}: marked kernel {name} was not launched, only "
                    f"{', '.join(kernels) or 'nothing'} was. Correct the case in cases.py."
                )
        for name, now in kernels.items():
            where = f"{target} {case.key} {name}"
            lines += _rules(where, case, name.split("#")[0], now, TARGETS[target][0])
            lines += _growth(where, now, before.get(name), name.split("#")[0] in case.wide)
        for name in before.keys() - kernels.keys():
            lines.append(_stale(f"{target} {case.key} {name}", "is launched no more"))
    if whole:
        for key in known.keys() - found.keys():
            lines.append(_stale(f"{target} {key}", "is no case any more"))
    return lines


def _stale(where: str, why: str) -> str:
    return f"{where}: has a baseline but {why}. Remove it: {UPDATE}"


def _rules(where: str, case: Case, name: str, now: Figures, backend: str) -> Iterator[str]:
    if now.spills:
        yield (
            f"{where}: {now.spills} spills, none are allowed. Make its tile smaller or give it "
            f"more warps."
        )
    if now.stack:
        yield (
            f"{where}: {now.stack} bytes of stack, none are allowed. Make its tile smaller or "
            f"give it more warps."
        )
    side = case.wide.get(name, "")
    for kind, width in (("load", now.load), ("store", now.store)):
        if side in (kind, "both") and width < WIDE:
            yield (
                f"{where}: its widest {kind} is {width} bytes, rows must move {WIDE}. Pass strides "
                f"in units (launch/rows.py `unit`) and keep 16 bytes per lane (`warps`)."
            )
    if name in case.dots and not now.matrix:
        yield (
            f"{where}: no matrix instruction, but the case says it has a dot. Make the tile of "
            f"tl.dot at least 16 x 16 x 16."
        )
    if now.shared > SHARED[backend]:
        yield (
            f"{where}: {now.shared} bytes of shared memory, at most {SHARED[backend]} are "
            f"allowed. Make its tile smaller or use fewer stages."
        )


def _growth(where: str, now: Figures, before: dict[str, Any] | None, rows: bool) -> Iterator[str]:
    if before is None:
        yield f"{where}: has no baseline. Look at its figures, then write them: {UPDATE}"
        return
    if now.registers > before["registers"] + SLACK:
        yield (
            f"{where}: {now.registers} registers, at most {before['registers'] + SLACK} are "
            f"allowed (baseline + {SLACK}). If that is meant: {UPDATE}"
        )
    if now.shared > before["shared"]:
        yield (
            f"{where}: {now.shared} bytes of shared memory, at most {before['shared']} are "
            f"allowed (baseline). If that is meant: {UPDATE}"
        )
    if rows and now.narrow > before["narrow"] + SLACK:
        yield (
            f"{where}: {now.narrow} accesses to memory are narrower than {WIDE} bytes, at most "
            f"{before['narrow'] + SLACK} are allowed (baseline + {SLACK}). Find the tensor whose "
            f"rows lost their width; if that is meant: {UPDATE}"
        )


# -- torch.compile for a GPU -----------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A graph for a CUDA device. kernels: Triton kernels in it, in order. outputs: (shape, dtype,
    strides) of each tensor that comes out."""

    kernels: list[str]
    outputs: list[Layout]


def trace_for_cuda(call: Callable[[Any], Any], tensors: Any, target: str = "sm_90") -> Trace:
    """What torch.compile sees of `call(tensors)` for tensors on a CUDA device, without one.

    AOTAutograd traces the call on fake CUDA tensors; the stub driver stands in for the device.
    """
    from torch._functorch.aot_autograd import aot_function
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    graphs: list[Any] = []

    def keep(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    with compiling(target), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = map_tensors(tensors, mode.from_tensor)
        given = map_tensors(fake, lambda t: t.to("cuda"))
        leaves: list[Tensor] = []
        map_tensors(given, leaves.append)

        def flat(*values: Tensor) -> Any:
            rest = iter(values)
            return tree_leaves(call(map_tensors(given, lambda _: next(rest))))

        with torch.no_grad():
            out = aot_function(flat, fw_compiler=keep)(*leaves)
    (graph,) = graphs
    kernels = [
        _kernel_name(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    return Trace(kernels, _layouts(out))


def graph_violations(cases: Sequence[Case], target: str, found: Found | None = None) -> list[str]:
    """One line for every case whose graph for a CUDA device is not what it must be: our kernels
    as often as the case says, the same that its launch compiled, and tensors of the shapes,
    dtypes and strides that a CPU gives. Left out: cases of more than `TRACED` launches, and those
    that a CPU takes too long for."""
    lines = []
    for case in cases:
        if case.kernels > TRACED or not case.on_cpu:
            continue
        call = case.graph or case.ours
        inputs = case.tensors("cpu", torch.bfloat16, BATCH, values=False)
        trace = trace_for_cuda(call, inputs, target)
        where = f"{target} {case.key}: torch.compile for CUDA"
        if len(trace.kernels) != case.kernels:
            lines.append(
                f"{where} has {len(trace.kernels)} kernels in its graph "
                f"({', '.join(trace.kernels) or 'none'}), the case says {case.kernels}. Launch "
                f"through wrap_triton in a registered operator, or correct the case."
            )
        names = {name.split("#")[0] for name in (found or {}).get(case.key, trace.kernels)}
        if set(trace.kernels) != names:
            lines.append(
                f"{where} has {', '.join(trace.kernels)} in its graph, the launch of the case "
                f"compiles {', '.join(sorted(names))}. Make them the same."
            )
        outputs = _layouts(call(inputs))
        if trace.outputs != outputs:
            lines.append(
                f"{where} returns {trace.outputs}, a CPU returns {outputs}. The launch must "
                f"allocate what the torch formula returns."
            )
    return lines


def _layouts(out: Any) -> list[Layout]:
    from torch.utils._pytree import tree_leaves

    return [
        (tuple(t.shape), t.dtype, t.stride()) for t in tree_leaves(out) if isinstance(t, Tensor)
    ]


def _kernel_name(kernel: Any) -> str:
    """Torch wraps a kernel that is launched with options such as num_warps."""
    while not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return kernel.__name__


# -- command ---------------------------------------------------------------------------------------

_HEAD = "case kernel warps registers spills shared load store narrow matrix"


def table(found: Found) -> str:
    """Figures as text, one kernel per line."""
    lines: list[tuple[str, ...]] = [tuple(_HEAD.split())]
    for key, kernels in found.items():
        for name, f in kernels.items():
            numbers = (f.warps, f.registers, f.spills, f.shared, f.load, f.store, f.narrow)
            lines.append((key, name, *map(str, numbers), f.matrix or "-"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(w) if i in (0, 1, 9) else word.rjust(w)
            for i, (word, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def update(
    found: dict[str, Found], baseline: dict[str, Any], whole: bool, path: Path = BASELINE
) -> list[str]:
    """Write the figures of `found` into the baseline. Returns what changed, one line each."""
    import triton

    changed = []
    all_figures = {target: dict(known) for target, known in baseline["figures"].items()}
    for target, cases in found.items():
        known = all_figures.setdefault(target, {})
        for key in known.keys() - cases.keys() if whole else ():
            changed.append(f"{target} {key}: removed")
        if whole:
            known = all_figures[target] = {k: v for k, v in known.items() if k in cases}
        for key, kernels in cases.items():
            new = {name: asdict(f) for name, f in kernels.items()}
            old = known.get(key, {})
            for name in sorted(old.keys() | new.keys()):
                changed += _change(f"{target} {key} {name}", old.get(name), new.get(name))
            known[key] = new
    order = {name: i for i, name in enumerate(TARGETS)}
    written = {
        "triton": triton.__version__,
        "figures": {
            target: dict(sorted(all_figures[target].items()))
            for target in sorted(all_figures, key=lambda t: order.get(t, len(order)))
        },
    }
    path.write_text(json.dumps(written, indent=1) + "\n")
    return changed


def _change(where: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    if old == new:
        return []
    if new is None:
        return [f"{where}: removed"]
    if old is None:
        return [f"{where}: new, {new['registers']} registers, {new['shared']} bytes shared"]
    words = [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]
    return [f"{where}: {', '.join(words)}"]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vtc_kernels.gate",
        description="Compile every kernel for GPUs that are not here, and refuse spills, stack, "
        "narrow loads and stores of rows, a missing matrix instruction, growth, and graphs of "
        "torch.compile without our kernels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="keys, operators or names; * works",
    )
    parser.add_argument(
        "--update", action="store_true", help="write the figures to gate.json and say what changed"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the gate. 0: nothing violated, 1: violated, 2: it cannot run."""
    args = _arguments(words)
    try:
        check_environment()
        picked = chosen(args.cases, (*CASES, *VARIANTS))
    except (CannotRun, ValueError) as error:
        print(f"gate: {error}", file=sys.stderr)
        return USAGE
    import triton

    whole, baseline = not args.cases, read_baseline()
    found = {}
    for target in args.targets:
        found[target] = compile_cases(target, picked)
        print(f"{target}\n{table(found[target])}\n", flush=True)
    if args.update:
        changed = update(found, baseline, whole)
        print("\n".join(changed) or "nothing changed")
        baseline = read_baseline()
    lines = [
        line
        for target in args.targets
        for line in violations(target, picked, found[target], baseline, whole)
    ]
    for target in [t for t in args.targets if TARGETS[t][0] == "cuda"][:1]:
        traced = [case for case in picked if case in CASES]
        lines += graph_violations(traced, target, found[target])
    for line in lines:
        print(line)
    if lines and baseline["triton"] != triton.__version__:
        print(
            f"The baseline was written with Triton {baseline['triton'] or 'nothing'}, this is "
            f"{triton.__version__}: figures may differ for that reason alone."
        )
    if not lines:
        kernels = sum(len(k) for f in found.values() for k in f.values())
        print(f"{kernels} kernels of {len(picked)} cases, nothing violated")
    return FAILED if lines else 0


if __name__ == "__main__":
    sys.exit(main())
