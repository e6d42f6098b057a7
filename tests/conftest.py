"""What every test runs under: poisoned memory, GPU tests where there is a GPU, each backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from dcnv4 import backends

# Multiplications beyond which an interpreted kernel would take seconds for one case.
INTERPRETED_WORK = 4_000


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to holds NaN (the largest integer), so that it cannot pass."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            compiler = getattr(torch, "compiler", None)
            if compiler is not None and getattr(compiler, "is_compiling", lambda: False)():
                return tensor
            if type(tensor) is not Tensor or tensor.is_meta or tensor.is_quantized:
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return create

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch sees none"))


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
        """The case's output and gradients."""
        wide = torch.float64 if torch.float64 in case.dtypes(dtype) else dtype
        self.require("deform_conv" if isinstance(case, cases.ConvCase) else "ms_deform_attn", wide)
        if self.interpreted and case.work > INTERPRETED_WORK:
            pytest.skip(
                f"Triton's interpreter takes too long: work must be <= {INTERPRETED_WORK}; "
                f"got {case.work}"
            )
        return case.run(dtype, self.device, self.backend)


@pytest.fixture(
    params=[
        pytest.param((name, device), id=f"{name}-{device}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for name in backends.NAMES
        if (name, device) not in (("cuda", "cpu"), ("cpu", "cuda"))
    ]
)
def backend(request: pytest.FixtureRequest) -> Runner:
    """Every backend on every kind of device that it is made for."""
    return Runner(*request.param)
