"""Other people's models with these layers in them: each is built, changed and trained a little."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcnv4
from dcnv4 import DCNv4Conv2d
from dcnv4.compat.ultralytics import multi_scale_deformable_attn_pytorch


def needed(package: str) -> Any:
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"needs {package}: pip install {package.partition('.')[0]}")
    return import_module(package)


@pytest.fixture(autouse=True)
def _on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # Ultralytics writes its settings there
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training_losses(model: nn.Module, loss_of: Any, steps: int) -> list[float]:
    """Losses on one batch; every parameter that needs a gradient got a finite one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for module in model.modules():
        if isinstance(module, DCNv4Conv2d):
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
            assert module.offset_mask.weight.grad.abs().max() > 0
    return losses


def classification(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4)
    return nn.functional.cross_entropy(model(images), labels)


TIMM = {
    "resnet18, last stage": ("resnet18", {}, {"names": "layer4", "kind": "dense"}, 4),
    "resnet26, conv2 of two stages": ("resnet26", {}, {"names": ["layer[34].*.conv2"]}, 4),
    "convnext, depthwise to 3x3": (
        "convnext_atto",
        {},
        {"kind": "depthwise", "names": "stages.[23]", "kernel_size": 3, "without_pointwise": True},
        8,
    ),
    "convnext, from its kernels": (
        "convnext_atto",
        {},
        {"kind": "depthwise", "names": "stages.3", "init": "kernel", "dw_kernel_size": 3},
        2,
    ),
}


@pytest.mark.parametrize("recipe", TIMM)
def test_timm_model_trains_after_convert(recipe: str) -> None:
    timm = needed("timm")
    name, options, arguments, count = TIMM[recipe]
    model = timm.create_model(name, num_classes=4, **options)
    replaced = dcnv4.convert(model, **arguments)
    assert len(replaced) == count
    assert sum(isinstance(m, DCNv4Conv2d) for m in model.modules()) == count
    losses = training_losses(model, classification, 4)
    assert losses[-1] < losses[0]
    features = timm.create_model(name, features_only=True)
    expected = [f.shape for f in features(torch.randn(1, 3, 64, 64))]
    backbone = copy.deepcopy(features)
    dcnv4.convert(backbone, where=lambda name, conv: conv.kernel_size != (4, 4))
    assert [f.shape for f in backbone(torch.randn(1, 3, 64, 64))] == expected


def test_convnext_from_its_kernels_is_the_same_network() -> None:
    """Until it is trained on."""
    timm = needed("timm")
    model = timm.create_model("convnext_atto", num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        dcnv4.convert(model, "stages.[23]", kind="depthwise", init="kernel")
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)


YOLO: dict[str, Any] = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "Conv", [32, 1, 1]],
        [-1, 1, "DCNv4Conv2d", [32, 32, 3, 1, 1]],
        [-1, 1, "nn.BatchNorm2d", []],
        [-1, 1, "nn.SiLU", []],
        [-1, 1, "Conv", [64, 3, 2]],
        [[-1, 6], 1, "Concat", [1]],
        [-1, 1, "Conv", [64, 1, 1]],
        [[12, 15], 1, "Detect", ["nc"]],
    ],
}
"""Detects at strides 8 and 16; the neck's deformable layer keeps its 32 channels."""


def yolo(monkeypatch: pytest.MonkeyPatch, model: Any) -> Any:
    tasks = needed("ultralytics.nn.tasks")
    # What a model's YAML may name.
    monkeypatch.setattr(tasks, "DCNv4Conv2d", DCNv4Conv2d, raising=False)
    detector = tasks.DetectionModel(copy.deepcopy(model), ch=3, nc=3, verbose=False)
    detector.args = needed("ultralytics.cfg").get_cfg()
    return detector


def detection(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "img": torch.rand(2, 3, 64, 64, generator=generator),
        "batch_idx": torch.tensor([0.0, 1.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.2], [0.6, 0.7, 0.3, 0.3]]),
    }
    loss: Tensor = model(batch)[0].sum()
    return loss


def test_yolo_with_a_deformable_neck_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built from its YAML, whose strides Ultralytics finds by running the model on the CPU."""
    model = yolo(monkeypatch, YOLO)
    assert model.stride.tolist() == [8, 16]
    assert sum(isinstance(m, DCNv4Conv2d) for m in model.modules()) == 1
    losses = training_losses(model, detection, 40)
    # It rises first, as the assignment finds more of its anchors to answer for the objects.
    assert losses[-1] < max(losses) / 2
    model.eval()
    images = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        found = model(images)[0]
        fused = model.fuse(verbose=False)(images)[0]
    torch.testing.assert_close(fused, found, rtol=1e-3, atol=1e-3)


def keep_norms(model: nn.Module, replaced: Iterable[str]) -> None:
    """Have `fuse` leave the blocks alone whose norm it cannot fold into a weight."""
    for name in replaced:
        block = model.get_submodule(name.rpartition(".")[0])
        block.conv = nn.Sequential(block.conv, block.bn)
        del block.bn
        block.forward = block.forward_fuse


def test_yolo_converted_trains_and_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fuse` folds each norm into a convolution's weight, so blocks without one fold first."""
    model = yolo(monkeypatch, "yolov8n.yaml")
    replaced = dcnv4.convert(model, ["model.12", "model.15"])
    assert list(replaced) == [f"model.{i}.m.0.cv{j}.conv" for i in (12, 15) for j in (1, 2)]
    losses = training_losses(model, detection, 4)
    assert all(torch.isfinite(torch.tensor(losses)))
    model.eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = model(images)[0]
        keep_norms(model, replaced)
        fused = model.fuse(verbose=False)(images)[0]
    torch.testing.assert_close(fused, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("numbers", [2, 4], ids=["points", "boxes"])
def test_ultralytics_attention(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own layer gives the same with our function in its module, with every gradient."""
    theirs = needed("ultralytics.nn.modules.transformer")
    layer = theirs.MSDeformAttn(32, 2, 4, 3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    query, pixels = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 60))
    places = torch.rand(2, 5, 1, numbers, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (query, places, pixels)]

    def results() -> list[Tensor]:
        y = layer(*leaves, [[8, 6], [4, 3]])
        return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *layer.parameters()])]

    expected, calls = results(), []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return multi_scale_deformable_attn_pytorch(*arguments)

    monkeypatch.setattr(theirs, "multi_scale_deformable_attn_pytorch", counted)
    torch.testing.assert_close(results(), expected)
    assert len(calls) == 1


def test_ultralytics_exports_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own exporter, which takes PyTorch's old one, for any batch and size of image."""
    needed("ultralytics")
    onnxruntime = needed("onnxruntime")
    from ultralytics import YOLO

    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    monkeypatch.chdir(tmp_path)
    yolo = YOLO("yolov8n.yaml")
    replaced = dcnv4.convert(yolo.model, ["model.12", "model.15"])
    keep_norms(yolo.model, replaced)
    path = yolo.export(format="onnx", imgsz=64, simplify=False, opset=16, dynamic=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((1, 3, 64, 64), (2, 3, 96, 64)):
        image = torch.rand(size)
        with torch.no_grad():
            expected = yolo.model.eval()(image)[0]
        (found,) = session.run(None, {"images": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
