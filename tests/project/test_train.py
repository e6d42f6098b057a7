"""The examples in processes of their own: many at once, killed, and going on."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train.py"
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(VERSION < (2, 8), reason=f"the example needs torch >= 2.8; got {VERSION}"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the examples folder of a checkout"),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
]
pytest.importorskip("tqdm", reason="needs tqdm; pip install tqdm")

COMMON = ("--data", "synthetic", "--device", "cpu", "--epochs", "1", "--batch", "32")
STEPS = 8
# Process 1 dies when it has saved step 3, like a machine that is lost.
KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import train
save = train.save
def save_and_die(training, folder):
    save(training, folder)
    if training.step == 3 and train.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
train.save = save_and_die
train.main(sys.argv[1:])
"""


def start(processes: int, *arguments: str, code: str | None = None) -> list[tuple[int, str]]:
    """Exit status and what was written, of each process of `train.py`."""
    program = [str(EXAMPLE)] if code is None else ["-c", code]
    return run(processes, *program, *COMMON, *arguments)


def run(processes: int, *command: str) -> list[tuple[int, str]]:
    """Exit status and what was written, of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        running.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        written = [process.communicate(timeout=100)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, written, strict=True)]


def result(finished: list[tuple[int, str]]) -> tuple[int, int, float]:
    """The first and the last step and the loss, of processes that must have succeeded."""
    for status, text in finished:
        assert status == 0, text
        assert "Grad strides do not match" not in text
    found = re.search(r"steps (\d+) to (\d+), loss ([\d.]+)", finished[0][1])
    assert found, finished[0][1]
    return int(found[1]), int(found[2]), float(found[3])


CHECKPOINTS = "--every", "3", "--checkpoints"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss of two processes that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    first, last, loss = result(start(2, *CHECKPOINTS, str(folder)))
    assert (first, last) == (0, STEPS)
    assert sorted(path.name for path in folder.iterdir()) == ["step_6", f"step_{STEPS}"]
    return loss


def test_a_killed_run_goes_on(tmp_path: Path, expected: float) -> None:
    killed = (*CHECKPOINTS, str(tmp_path))
    finished = start(2, *killed, code=KILLED.format(folder=str(EXAMPLE.parent)))
    assert finished[1][0] == -9, finished[1][1]
    assert finished[0][0] != 0, finished[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]

    finished = start(2, *killed)
    assert f"Resumes after step 3, from {tmp_path / 'step_3'}." in finished[0][1]
    assert "Resumes" not in finished[1][1]
    first, last, loss = result(finished)
    assert (first, last) == (3, STEPS)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_sharded_run_agrees_and_its_checkpoint_serves_one_process(
    tmp_path: Path, expected: float
) -> None:
    arguments = (*CHECKPOINTS, str(tmp_path))
    first, last, loss = result(start(2, "--sharding", "fsdp", *arguments))
    assert (first, last) == (0, STEPS)
    assert loss == pytest.approx(expected, rel=1e-4)
    # One process has twice the steps to do.
    assert result(start(1, "--amp", *arguments))[:2] == (STEPS, 2 * STEPS)


SMALL = (
    *(str(EXAMPLE.with_name("finetune.py")), "--device", "cpu", "--workers", "0", "--epochs", "2"),
    *("--img-size", "32", "--batch-size", "8", "--no-aug", "--lr", "3e-3", "--layer-decay", "0.9"),
    *("--model-kwargs", "channels=16", "depths=(1,1)"),
)


def needs_timm() -> None:
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # the latter of torchvision beside another PyTorch
        pytest.skip(f"needs timm, and torchvision for torch {torch.__version__}: {error}")


def losses(finished: list[tuple[int, str]]) -> list[float]:
    for status, text in finished:
        assert status == 0, text
    return [float(loss) for loss in re.findall(r"epoch \d+, loss ([\d.]+)", finished[0][1])]


def test_finetuning_in_two_processes(tmp_path: Path) -> None:
    needs_timm()
    options = ("--synthetic", "64", "--model-ema", "--amp", "--amp-dtype", "bfloat16")
    first, last = losses(run(2, *SMALL, *options, "--output", str(tmp_path)))
    assert last < first
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    assert saved["epoch"] == 1
    assert saved["state_dict"].keys() == saved["state_dict_ema"].keys()


def test_finetuning_on_a_folder(tmp_path: Path) -> None:
    needs_timm()
    from PIL import Image

    for split in ("train", "val"):
        for color in ("red", "green", "blue"):
            folder = tmp_path / split / color
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40 + i, 36), color).save(folder / f"{i}.png")
    options = ("--data-dir", str(tmp_path), "--grad-checkpointing", "--model-ema")
    first, last = losses(run(1, *SMALL, *options))
    assert last < first
