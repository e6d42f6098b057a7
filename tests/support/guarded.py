"""Tensors that end where memory ends: a kernel that reads beyond one ends its process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from unittest import mock

import torch
from torch import Tensor

from dcnv4.backends.cuda import choice
from support import cases, launches
from support.emulated import emulated
from support.kernel_cases import plain_tiles, sorted_cases, sorted_conv_cases

_PAGE = mmap.PAGESIZE
_kept: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy behind which nothing can be read."""
    if tensor.numel() == 0:
        return tensor.detach()
    size = tensor.numel() * tensor.element_size()
    room = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, room + _PAGE)
    _kept.append(memory)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory, room))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), _PAGE, 0):
        raise OSError("mprotect failed")
    numbers = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return numbers.view(tensor.shape).copy_(tensor.detach())


def normalize() -> None:
    """Forward and backward of layer normalisation, on such tensors."""
    for channels, dtype in ((64, torch.float16), (112, torch.float16), (100, torch.float32)):
        x, grad, added = (guarded(torch.randn(9, channels).to(dtype)) for _ in range(3))
        weight, bias = (guarded(torch.randn(channels)) for _ in range(2))
        with emulated() as cuda, launches.recorded() as launched:
            cuda.norm_forward(x, weight, bias, 1e-6)
            cuda.norm_backward(grad, x, weight, 1e-6, added)
        print(*launched.names, flush=True)


def multiply() -> None:
    """The product of rows, on such tensors."""
    weight, bias = (guarded(torch.randn(*shape).half()) for shape in ((72, 32), (72,)))
    rounded = guarded(torch.zeros(70, 32).half())
    for x in (guarded(torch.randn(70, 32)), guarded(torch.randn(70, 32).half())):
        with (
            mock.patch.object(choice, "_TALL", 0),
            emulated() as cuda,
            launches.recorded() as launched,
        ):
            cuda.linear(x, weight, bias, rounded if x.dtype == torch.float32 else None)
        print(*launched.names, flush=True)


def branch() -> None:
    """The residual branch of an MLP, on such tensors."""
    shapes = (70, 64), (64,), (64,), (64, 64), (64,), (64, 64), (64,)
    x, *weights = (guarded(torch.randn(shape).half()) for shape in shapes)
    with emulated() as cuda, launches.recorded() as launched:
        cuda.mlp(x, 1e-6, weights[:2], weights[2:4], weights[4:])
    print(*launched.names, flush=True)


def main() -> int:
    """Forward and backward of every technique, on such tensors."""
    normalize()
    multiply()
    branch()
    for pays_from, chosen in (
        (launches.DIRECT, [case for _, case in cases.CASES[::5]]),
        (launches.SORTED, sorted_conv_cases()[::4]),
        (launches.EVERY, [plain_tiles(), *sorted_cases()[::4]]),
    ):
        for number, case in enumerate(chosen):
            dtype = (torch.float16, torch.float32)[number % 2]
            *arguments, grad = map(guarded, case.inputs(dtype, "cpu"))
            arguments = [argument.requires_grad_() for argument in arguments]
            with emulated(pays_from=pays_from), launches.recorded() as launched:
                output = case.call(*arguments, backend="cuda")
                torch.autograd.grad(output, arguments, grad)
            print(*launched.names, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
