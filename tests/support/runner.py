"""A backend on a device, as tests run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from dcnv4 import backends
from support import cases, launches

# Multiplications beyond which an interpreted kernel would take seconds for one case.
INTERPRETED_WORK = 4_000


@contextmanager
def deterministic(chosen: bool = True) -> Iterator[None]:
    """PyTorch's deterministic algorithms, if they are chosen; any algorithms after it."""
    torch.use_deterministic_algorithms(chosen)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Runner:
    """A backend on a device; `case` and `call` skip with the backend's reason what it cannot run
    here."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def require(self, op: str, dtype: torch.dtype = torch.float32) -> None:
        reason = backends.why_not(self.backend, backends.Call(op, torch.device(self.device), dtype))
        if reason is not None:
            pytest.skip(f"{self.backend} on {self.device}: {reason}")

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    def run(self, case: cases.Case, dtype: torch.dtype) -> dict[str, Tensor]:
        """The case's output and gradients, from this backend alone; on a GPU, CUDA's from the
        kernels for small calls."""
        wide = torch.float64 if torch.float64 in case.dtypes(dtype) else dtype
        self.require("deform_conv" if isinstance(case, cases.ConvCase) else "ms_deform_attn", wide)
        if self.interpreted and case.work > INTERPRETED_WORK:
            pytest.skip(
                f"Triton's interpreter takes too long: work must be <= {INTERPRETED_WORK}; "
                f"got {case.work}"
            )
        with ExitStack() as stack:
            stack.enter_context(launches.computing(self.backend, case))
            if self.backend == "cuda":
                order = torch.are_deterministic_algorithms_enabled()
                names = launches.expected(case, dtype, deterministic=order)
                stack.enter_context(launches.launching(*names))
            return case.run(dtype, self.device, self.backend)
