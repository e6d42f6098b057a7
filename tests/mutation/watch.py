"""A plugin of pytest: which test has begun is written down, and memory is bounded."""

from __future__ import annotations

import os
import resource

_BYTES = 6 << 30  # a mutant may ask for any


def pytest_configure() -> None:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pytest_runtest_logstart(nodeid: str) -> None:
    with open(os.environ["MUTATION_TEST"], "w", encoding="utf-8") as file:
        file.write(nodeid)
