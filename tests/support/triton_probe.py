"""A kernel that returns what a helper of the Triton kernels computes."""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from dcnv4.backends.triton.kernels import _around


@triton.jit
def around(x, origin, before, fraction, counts, size, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """`counts` has bit 0 where the pixel before a point counts and bit 1 where the next does."""
    at = tl.arange(0, COUNT)
    pixel, part, first, second = _around(tl.load(x + at), tl.load(origin + at), size)
    tl.store(before + at, pixel)
    tl.store(fraction + at, part)
    tl.store(counts + at, first.to(tl.int32) + 2 * second.to(tl.int32))
