"""Train a small classifier of DCNv4 layers: on one CPU, one GPU, or many, stopping and going on.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py --sharding fsdp --amp --compile
    torchrun --nproc-per-node 2 examples/train.py --checkpoints runs/digits

With `--checkpoints`, the same command started again goes on after the last checkpoint: model,
optimizer, schedule, place in the epoch and random numbers are restored. Needs torch >= 2.8, tqdm
and, for `--data digits`, scikit-learn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset
from tqdm import tqdm

from dcnv4 import DCNv4Conv2d

KEPT = 2
"""How many checkpoints stay on the disk."""


class Block(nn.Module):
    """x + DCNv4(x), then x + MLP(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv = DCNv4Conv2d(channels, channels, padding=1, dw_kernel_size=3)
        self.mlp = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(self.norm(x))
        return x + self.mlp(x)


class Classifier(nn.Module):
    """Of images that it enlarges to `size` x `size` pixels."""

    def __init__(self, size: int, channels: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.size = size
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def load_data(name: str) -> tuple[TensorDataset, TensorDataset]:
    """Images [N, 1, 8, 8] in 0 to 1 with labels, to learn from and to test on."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, numbers = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        labels = torch.tensor(numbers)
    else:
        # One picture a class, and noise.
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(8, (640,), generator=generator)
        pictures = torch.rand(8, 1, 8, 8, generator=generator)
        images = pictures[labels] + torch.rand(640, 1, 8, 8, generator=generator) / 2
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    held_out = len(images) // 5
    return (
        TensorDataset(images[held_out:], labels[held_out:]),
        TensorDataset(images[:held_out], labels[:held_out]),
    )


def shifted(images: Tensor) -> Tensor:
    """The images moved by up to one pixel."""
    down, right = torch.randint(3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def distribute(model: Classifier, sharding: str, device: torch.device) -> nn.Module:
    """The model as every process runs it."""
    if sharding == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if sharding == "ddp":
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    return model


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Offsets learn ten times slower: they decide where every other gradient comes from."""
    offsets = [p for name, p in model.named_parameters() if "offset_mask" in name]
    others = [p for name, p in model.named_parameters() if "offset_mask" not in name]
    return [{"params": others, "lr": rate}, {"params": offsets, "lr": rate / 10}]


class Training:
    """All that a checkpoint holds."""

    def __init__(self, model: nn.Module, rate: float, steps: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.optimizer = torch.optim.AdamW(parameter_groups(model, rate), weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Random numbers differ between processes; the rest is the same, or shards of it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            f"random_{rank()}": random,
        }

    def restore(self, folder: Path) -> None:
        state, own = self.state(), f"random_{rank()}"
        if f"{own}.cpu" not in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata:
            del state[own]  # there are more processes than before
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        if own in state:
            torch.set_rng_state(state[own]["cpu"])
        if "cuda" in state.get(own, {}):
            torch.cuda.set_rng_state(state[own]["cuda"], self.device)


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first: the metadata is written last."""
    found = (path.parent for path in folder.glob("step_*/.metadata"))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save(training: Training, folder: Path) -> None:
    dcp.save(training.state(), checkpoint_id=folder / f"step_{training.step}")
    if rank() == 0:
        for old in checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train(training: Training, data: TensorDataset, args: argparse.Namespace) -> tuple[float, float]:
    """The loss of the last step, the mean of all processes', and images a second of all, after the
    first step, which compiles."""
    images, labels = data.tensors
    sampler = DistributedSampler(
        data, world_size(), rank(), shuffle=True, seed=args.seed, drop_last=True
    )
    batches = len(sampler) // args.batch
    steps = args.epochs * batches
    loss = torch.zeros(())
    first, start = training.step, time.perf_counter()
    bar = tqdm(total=steps, initial=training.step, disable=rank() != 0, unit="step")
    while training.step < steps:
        epoch, done = divmod(training.step, batches)
        sampler.set_epoch(epoch)
        chosen = torch.tensor(list(sampler))[: batches * args.batch].view(batches, args.batch)
        for batch in chosen[done:]:
            x = shifted(images[batch]).to(training.device)
            with torch.autocast(training.device.type, torch.bfloat16, enabled=args.amp):
                scores = training.model(x)
            loss = F.cross_entropy(scores.float(), labels[batch].to(training.device))
            training.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
            training.optimizer.step()
            training.schedule.step()
            training.step += 1
            bar.update()
            bar.set_postfix_str(f"epoch {epoch}, loss {loss.item():.3f}", refresh=False)
            if training.step == first + 1:
                start = time.perf_counter()
            if args.checkpoints and (training.step % args.every == 0 or training.step == steps):
                save(training, args.checkpoints)
    bar.close()
    images_after_first = max(0, training.step - first - 1) * args.batch * world_size()
    return mean(loss.detach()), images_after_first / (time.perf_counter() - start)


def mean(number: Tensor) -> float:
    """Of all processes'."""
    if dist.is_initialized():
        dist.all_reduce(number)
    return number.item() / world_size()


@torch.no_grad()
def accuracy(training: Training, data: TensorDataset, amp: bool) -> float:
    """Every process tests the whole set, since sharded models run together."""
    images, labels = data.tensors
    training.model.eval()
    with torch.autocast(training.device.type, torch.bfloat16, enabled=amp):
        scores = training.model(images.to(training.device))
    training.model.train()
    return (scores.argmax(1).cpu() == labels).float().mean().item()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", choices=("digits", "synthetic"), default="digits", help="what to learn"
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the images")
    parser.add_argument("--batch", type=int, default=32, help="images a process and step")
    parser.add_argument("--size", type=int, default=8, help="pixels to which images are enlarged")
    parser.add_argument("--channels", type=int, default=32, help="of every block")
    parser.add_argument("--depth", type=int, default=3, help="blocks")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if there is one",
    )
    parser.add_argument(
        "--sharding", choices=("ddp", "fsdp"), default="ddp", help="how processes share the model"
    )
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="to keep them in and resume from"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def processes(wanted: str) -> Iterator[torch.device]:
    """The device of this process, which can talk to torchrun's others meanwhile."""
    cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with processes(args.device) as device:
        torch.manual_seed(args.seed)
        data, held_out = load_data(args.data)
        model = Classifier(args.size, args.channels, args.depth).to(device)
        # As the gradients of its convolutions come: DistributedDataParallel wants one layout.
        model = model.to(memory_format=torch.channels_last)
        if args.compile:
            for block in model.blocks:
                block.compile(fullgraph=True)
        steps = args.epochs * (len(data) // world_size() // args.batch)
        model = distribute(model, args.sharding if dist.is_initialized() else "none", device)
        training = Training(model, args.rate, steps, device)
        torch.manual_seed(args.seed + rank())
        if args.checkpoints and (found := checkpoints(args.checkpoints)):
            training.restore(found[-1])
            if rank() == 0:
                print(f"Resumes after step {training.step}, from {found[-1]}.")
        first = training.step
        loss, speed = train(training, data, args)
        share = accuracy(training, held_out, args.amp)
        if rank() == 0:
            print(
                f"steps {first} to {training.step}, loss {loss:.9f}, accuracy {share:.3f}, "
                f"{speed:.0f} images/s on {world_size()} x {device.type}"
            )


if __name__ == "__main__":
    main()
