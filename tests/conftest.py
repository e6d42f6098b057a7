"""What every test runs under: poisoned memory, GPU tests where there is a GPU, each backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnv4 import backends
from support.runner import Runner


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
