"""Triton's interpreter, made strict: bf16 as on hardware, every address checked, races found.

Plain Triton 3.8 interprets bf16 arithmetic on raw bits and casts by truncation, and neither reads
nor writes out of bounds are noticed. `install()` mends the first and refuses the second. Programs
run one after another and lanes in lock step, so a missing barrier inside a program is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class OutOfBounds(IndexError):
    """A lane that is not masked off touches memory of no tensor argument."""


class Race(RuntimeError):
    """Two lanes or programs store to one address, or one program reads what another stores."""


@dataclass
class Traffic:
    """What the launches inside `watch()` touched.

    Attributes:
        launches: number of launches.
        read, written: distinct bytes, summed over launches: memory traffic with a perfect cache.
        requested: bytes of all loads and stores, before any cache.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    requested: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


_spans: list[tuple[int, int]] = []
_reads: list[tuple[int, np.ndarray, int]] = []  # program, addresses, bytes per address
_writes: list[tuple[int, np.ndarray, int]] = []
_watched: Traffic | None = None


@contextmanager
def watch() -> Iterator[Traffic]:
    """Count the bytes that launches in this block touch."""
    global _watched
    _watched = Traffic()
    try:
        yield _watched
    finally:
        _watched = None


def install() -> None:
    """Make the interpreter strict, once per process."""
    if not getattr(interpreter, "_vtc_strict", False):
        _round_bf16_as_hardware()
        _check_addresses()
        interpreter._vtc_strict = True


# -- memory ----------------------------------------------------------------------------------------


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _collect(value: Any) -> None:
    if isinstance(value, tuple | list):
        for item in value:
            _collect(item)
    elif isinstance(value, torch.Tensor) and value.numel():
        _spans.append(_span(value))


def _addresses(pointers: Any, mask: Any, kind: str, program: Any) -> tuple[np.ndarray, int]:
    """Addresses of active lanes, after the check, and bytes per lane."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
    address = np.asarray(pointers.data)[active].astype(np.int64)
    inside = np.zeros(address.shape, bool)
    for low, high in _spans:
        inside |= (address >= low) & (address + size <= high)
    if not inside.all():
        raise OutOfBounds(
            f"{int((~inside).sum())} of {address.size} lanes of program {program} {kind} outside "
            f"of every tensor"
        )
    return address, size


def _program(index: tuple[int, int, int]) -> int:
    x, y, z = index
    return (x << 42) | (y << 21) | z


def _grouped(touched: list[tuple[int, np.ndarray, int]]) -> dict[int, tuple[Any, Any]]:
    """By bytes per access: every (address, program) once, sorted. A tensor has one access size."""
    programs = {program: i for i, program in enumerate(dict.fromkeys(p for p, _, _ in touched))}
    out = {}
    for size in {size for _, _, size in touched}:
        keys = [a * len(programs) + programs[p] for p, a, own in touched if own == size]
        keys = np.unique(np.concatenate(keys))
        ordinal = np.array(list(programs))[keys % len(programs)]
        out[size] = keys // len(programs), ordinal
    return out


def _check_races(read: dict[int, Any], written: dict[int, Any]) -> None:
    for size, (writes, writer) in written.items():
        if not writes.size:
            continue
        twice = int((writes[1:] == writes[:-1]).sum())
        if twice:
            raise Race(f"two programs store to one address ({twice} times)")
        reads, reader = read.get(size, (writes[:0], writer[:0]))
        at = np.searchsorted(writes, reads).clip(max=writes.size - 1)
        if bool(((writes[at] == reads) & (writer[at] != reader)).any()):
            raise Race("a program reads an address that another program stores to")


def _check_addresses() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, call = executor._init_args_hst, executor.__call__

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        address, size = _addresses(pointers, mask, "read", self.grid_idx)
        if _watched is not None:
            _watched.requested += address.size * size
        _reads.append((_program(self.grid_idx), np.unique(address), size))
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        address, size = _addresses(pointers, mask, "write", self.grid_idx)
        if np.unique(address).size != address.size:
            raise Race(f"two lanes of program {self.grid_idx} store to one address")
        if _watched is not None:
            _watched.requested += address.size * size
        _writes.append((_program(self.grid_idx), address, size))
        return store(self, pointers, value, mask, *rest)

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        positional, named = prepare(self, args, kwargs)
        for record in (_spans, _reads, _writes):
            record.clear()
        _collect(tuple(positional))
        _collect(tuple(named.values()))
        return positional, named

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        read, written = _grouped(_reads), _grouped(_writes)
        _check_races(read, written)
        if _watched is not None:
            _watched.launches += 1
            _watched.read += sum(size * np.unique(a).size for size, (a, _) in read.items())
            _watched.written += sum(size * a.size for size, (a, _) in written.items())
        return out

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
    executor._init_args_hst, executor.__call__ = init_args, run


# -- bf16 ------------------------------------------------------------------------------------------

BF16, F32 = tl.bfloat16, tl.float32


def _wide(handle: Any) -> np.ndarray:
    """bf16 bits as fp32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(value: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits, to nearest even; NaN stays NaN."""
    value = np.ascontiguousarray(value, np.float32)
    bits = value.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _round_bf16_as_hardware() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, reduce = builder.binary_op, interpreter.ReduceOps.apply_impl
    compare = {np.less, np.greater, np.less_equal, np.greater_equal, np.equal, np.not_equal}
    bitwise = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have == BF16 and want != BF16:
            wide = handle(_wide(source), F32)
            return wide if want == F32 else cast(self, wide, target)
        if want == BF16 and have != BF16:
            return handle(_narrow(source.data.astype(np.float32)), BF16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if BF16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        sides = [handle(_wide(t), F32) if t.dtype.scalar == BF16 else t for t in (a, b)]
        return dot(self, *sides, *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != BF16 or right.dtype.scalar != BF16 or op in bitwise:
            return binary(self, left, right, op)
        value = op(_wide(left), _wide(right))
        return handle(value, tl.int1) if op in compare else handle(_narrow(value), BF16)

    def apply_impl(self: Any, values: Any) -> Any:
        if any(t.dtype == BF16 for t in values):
            raise NotImplementedError("a kernel reduces bf16: cast to fp32 after the load")
        return reduce(self, values)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.create_dot, builder.binary_op = create_dot, binary_op
    interpreter.ReduceOps.apply_impl = apply_impl
