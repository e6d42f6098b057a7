"""Fine-tune a model on a folder of images, in the words of timm's own training script.

    python examples/finetune.py --epochs 2
    python examples/finetune.py --data-dir photos --pretrained --amp --compile --model-ema
    torchrun --nproc-per-node 8 examples/finetune.py --data-dir photos --pretrained --amp

The folder has `train/CLASS/…` and `val/CLASS/…`; without one, synthetic pictures are learnt. Any
model of timm's does. Needs torch >= 2.8, timm and tqdm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm
from train import mean, processes, rank, world_size

from dcnv4.models import parameter_groups


class Synthetic(Dataset[tuple[Any, int]]):
    """One picture a class, and noise."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, classes: int, count: int, first: int) -> None:
        self.count, self.first = count, first
        self.pictures = np.random.default_rng(0).integers(0, 128, (classes, 32, 32, 3))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label = index % len(self.pictures)
        noise = np.random.default_rng(self.first + index).integers(0, 128, (32, 32, 3))
        image = Image.fromarray((self.pictures[label] + noise).astype(np.uint8))
        return self.transform(image), label


def load_data(args: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Images to learn from and to test on, and the number of their classes."""
    if args.data_dir is None:
        train = Synthetic(args.num_classes or 4, args.synthetic, 0)
        return train, Synthetic(len(train.pictures), args.synthetic // 4, args.synthetic), 4
    train, held_out = (
        create_dataset("", root=args.data_dir, split=split, is_training=split == "train")
        for split in ("train", "val")
    )
    return train, held_out, len(train.reader.class_to_idx)


def loader(args: argparse.Namespace, data: Dataset[Any], config: Any, train: bool) -> Any:
    return create_loader(
        data,
        config["input_size"],
        args.batch_size,
        is_training=train,
        use_prefetcher=False,
        no_aug=args.no_aug,
        re_prob=0.0 if args.no_aug else args.reprob,
        auto_augment=None if args.no_aug else args.aa,
        num_workers=args.workers,
        distributed=world_size() > 1,
        **{key: config[key] for key in ("interpolation", "mean", "std", "crop_pct")},
    )


class Precision:
    """Autocast, and the scaler that float16 needs."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
        self.autocast = partial(torch.autocast, device.type, self.dtype, enabled=args.amp)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=args.amp and self.dtype == torch.float16
        )


def train_epoch(
    model: nn.Module,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    average: ModelEmaV3 | None,
    precision: Precision,
    args: argparse.Namespace,
    epoch: int,
) -> float:
    """The mean loss of the last step of all processes."""
    device = next(model.parameters()).device
    model.train()
    if world_size() > 1:
        batches.sampler.set_epoch(epoch)
    bar = tqdm(batches, disable=rank() != 0, desc=f"epoch {epoch}")
    for step, (images, labels) in enumerate(bar, epoch * len(batches)):
        images = images.to(device, memory_format=torch.channels_last)
        with precision.autocast():
            scores = model(images)
        loss = F.cross_entropy(scores.float(), labels.to(device), label_smoothing=args.smoothing)
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
        if average is not None:
            average.update(getattr(model, "module", model), step=step)
    return mean(loss.detach())


@torch.no_grad()
def accuracy(model: nn.Module, batches: Any, precision: Precision) -> float:
    """The share of the images whose class has the highest score."""
    device = next(model.parameters()).device
    right = torch.zeros(2, device=device)
    model.eval()
    for images, labels in batches:
        with precision.autocast():
            found = model(images.to(device, memory_format=torch.channels_last)).argmax(1)
        right += torch.tensor([(found == labels.to(device)).sum(), len(labels)], device=device)
    share: Tensor = right[0] / right[1]
    return mean(share)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="a folder with train/ and val/")
    add("--synthetic", type=int, default=512, help="pictures where there is no folder")
    add("--model", default="flash_internimage_t")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    add("--pretrained", action="store_true")
    add("--num-classes", type=int, help="as many as the folder has, otherwise")
    add("--img-size", type=int)
    add("-b", "--batch-size", type=int, default=64, help="images a process and step")
    add("--epochs", type=int, default=10)
    add("--opt", default="adamw")
    add("--lr", type=float, default=1e-4)
    add("--warmup-epochs", type=int, default=0)
    add("--weight-decay", type=float, default=0.05)
    add("--layer-decay", type=float)
    add("--deformable-scale", type=float, default=0.1, help="of what predicts points and weights")
    add("--clip-grad", type=float, default=5.0)
    add("--smoothing", type=float, default=0.1)
    add("--drop-path", type=float, default=0.1)
    add("--no-aug", action="store_true")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="augmentation, by its name in timm")
    add("--reprob", type=float, default=0.25, help="share of images of which a part is erased")
    add("--model-ema", action="store_true", help="average the weights, and test the average")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--amp", action="store_true")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16")
    add("--compile", action="store_true")
    add("--grad-checkpointing", action="store_true")
    add("--workers", type=int, default=4)
    add("--seed", type=int, default=42)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--output", type=Path, metavar="FOLDER", help="for the best and the last weights")
    return parser.parse_args(arguments)


def create(args: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    model = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=classes,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model.to(device, memory_format=torch.channels_last)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with processes(args.device) as device:
        torch.manual_seed(args.seed)
        data, held_out, classes = load_data(args)
        model = create(args, args.num_classes or classes, device)
        size = {"img_size": args.img_size} if args.img_size else {}
        config = resolve_model_data_config(model, size)
        batches, tests = (loader(args, d, config, d is data) for d in (data, held_out))
        groups = partial(
            parameter_groups,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            deformable_scale=args.deformable_scale,
        )
        optimizer = create_optimizer_v2(model, args.opt, lr=args.lr, param_group_fn=groups)
        schedule, _ = create_scheduler_v2(
            optimizer,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=len(batches),
        )
        average = (
            ModelEmaV3(model, args.model_ema_decay, use_warmup=True) if args.model_ema else None
        )
        saver = None
        if args.output is not None and rank() == 0:
            args.output.mkdir(parents=True, exist_ok=True)
            saver = CheckpointSaver(
                model, optimizer, model_ema=average, checkpoint_dir=args.output, max_history=1
            )
        trained = model
        if args.compile:
            # Without its graphs, the host takes longer to launch kernels than they run.
            model.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        if world_size() > 1:
            trained = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        precision = Precision(args, device)
        for epoch in range(args.epochs):
            loss = train_epoch(
                trained, batches, optimizer, schedule, average, precision, args, epoch
            )
            tested = model if average is None else average.module
            share = accuracy(tested, tests, precision)
            if saver is not None:
                saver.save_checkpoint(epoch, share)
            if rank() == 0:
                print(f"epoch {epoch}, loss {loss:.9f}, accuracy {share:.3f}")


if __name__ == "__main__":
    main()
