"""What every test runs under: a seed, poisoned memory, a GPU where one is needed, each backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes; PyTorch asks when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

from dcnv4 import backends
from support.runner import Runner


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws is the same in every run."""
    torch.manual_seed(0)


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


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which not every environment has
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who has run its own tests takes another's: tests take from a millisecond to minutes. Unless
    another `--dist` is asked for."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run what is marked exhaustive, too: many more of what the other tests try",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.stash[_LEFT_OUT] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch sees none"))


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    left_out = config.stash.get(_LEFT_OUT, 0)
    if not left_out:
        return None
    return f"{left_out} tests are exhaustive and left out: `pytest --exhaustive` runs them, too"


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
