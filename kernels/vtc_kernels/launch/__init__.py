"""Triton kernels and their launches, one file per operator. Imported where Triton is installed.

Rules, each learned from compiled code: addresses in int64; arithmetic in fp32; no atomics, no
autotuning, no tuples of pointers; explicit rules for ties; strides are passed in units of 16 bytes
where they allow it, so that rows move 128 bits at a time (Triton alone sees no further than
"divisible by 16 elements", which a bf16 row of 72 is not).
"""
