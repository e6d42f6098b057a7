"""Models that are exported to run where nobody knows the package, and what loads them there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dcnv4
from dcnv4.compat import DCNv3Function
from dcnv4.integrations.transformers import enable

Sizes = tuple[tuple[int, int, int], ...]


class Portable(NamedTuple):
    """A model, its inputs for (batch, height, width), and the sizes that it is run on.

    Other sizes than the first where the model's own code exports them.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    sizes: Sizes
    std: float = 0.2
    """Of the parameters of layers."""
    rows: int = 1
    """The axis of the image's height, before that of its width."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for layer in model.modules():
            if isinstance(layer, (dcnv4.DCNv4, dcnv4.DCNv4Conv2d, dcnv4.FlashDeformAttn)):
                for parameter in layer.parameters():
                    nn.init.normal_(parameter, std=self.std)
        return model.eval()

    def axes(self) -> tuple[dict[int, str], ...]:
        """The names of the sizes that change, by input; where any does, the batch."""
        axes = (0, "batch"), (self.rows, "height"), (self.rows + 1, "width")
        seen = zip(*self.sizes, strict=True)
        image = {axis: name for (axis, name), n in zip(axes, seen, strict=True) if len({*n}) > 1}
        return image, *({0: "batch"} for _ in self.inputs(*self.sizes[0])[1:])

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        return tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in self.axes())


class Conv2d(nn.Module):
    """`DCNv4Conv2d` on NHWC, as the other models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dcnv4.DCNv4Conv2d(4, 8, 3, 2, 1, groups=2, dw_kernel_size=3, softmax=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 3, 1, 2))


class Levels(nn.Module):
    """What attends to a map and to a quarter of it."""

    def forward(self, x: Tensor, references: Tensor) -> Tensor:
        small = x[:, : x.shape[1] // 2, : x.shape[2] // 2]
        value = torch.cat((x.flatten(1, 2), small.flatten(1, 2)), 1)
        return self.attend(value, [x.shape[1:3], small.shape[1:3]], references)

    def attend(self, value: Tensor, sizes: list[Any], references: Tensor) -> Tensor:
        raise NotImplementedError


class Attention(Levels):
    """`FlashDeformAttn`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dcnv4.FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=2)

    def attend(self, value: Tensor, sizes: list[Any], references: Tensor) -> Tensor:
        return self.layer(value[:, :3], references, value, sizes)


class ForkAttention(Levels):
    """`flash_deform_attn` of a fork, whose level sizes are a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Linear(8, 2 * 2 * 2 * 3)

    def attend(self, value: Tensor, sizes: list[Any], references: Tensor) -> Tensor:
        shapes = torch.stack([torch.as_tensor(n) for size in sizes for n in size]).view(2, 2)
        heads = value.view(*value.shape[:2], 2, 4)
        packed = self.predict(value[:, :3]).sigmoid() + references.flatten(2).repeat(1, 1, 6)
        return dcnv4.flash_deform_attn(heads, shapes, None, packed, 64, 2)


class DFineAttention(Levels):
    """The attention of a D-FINE of transformers, enabled, which has a list of points by level."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.d_fine import modeling_d_fine as d_fine

        config = d_fine.DFineConfig(
            d_model=8, decoder_attention_heads=2, num_feature_levels=2, decoder_n_points=[2, 2]
        )
        self.layer = enable(d_fine.DFineMultiscaleDeformableAttention(config))

    def attend(self, value: Tensor, sizes: list[Any], references: Tensor) -> Tensor:
        shapes = torch.stack([torch.as_tensor(n) for size in sizes for n in size]).view(2, 2)
        boxes = references.flatten(2)[:, :, None]
        return self.layer(value[:, :3], None, boxes, value, shapes, sizes)[0]


class Convolution(nn.Module):
    """A function of a map and of the offsets and weights that are predicted from it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.predict = nn.Linear(8, 54)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.predict(x))


class Detector(nn.Module):
    """A small Deformable DETR of transformers, with its attention enabled."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        resnet = {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        }
        config = transformers.DeformableDetrConfig(
            backbone_config=resnet,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=6,
        )
        self.detector = enable(transformers.DeformableDetrForObjectDetection(config))
        # From the second call on, TorchScript cannot record the model's own additions in place.
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.detector(image)
        return found.logits, found.pred_boxes


def classifier() -> nn.Module:
    import timm

    importlib.import_module("dcnv4.models")
    return timm.create_model("flash_internimage_t", depths=(1, 1, 2, 1), num_classes=5)


def maps(channels: int) -> Callable[[int, int, int], tuple[Tensor, ...]]:
    return lambda batch, height, width: (torch.randn(batch, height, width, channels),)


def queries(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, height, width, 8), torch.rand(batch, 3, 2, 2)


def images(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, height, width),)


ANY: Sizes = ((2, 6, 8), (1, 6, 8), (3, 9, 5))
LAYERS = {
    "DCNv4": Portable(lambda: dcnv4.DCNv4(8, group=2, center_feature_scale=True), maps(8), ANY),
    "DCNv4Conv2d": Portable(Conv2d, maps(4), ANY),
    "FlashDeformAttn": Portable(Attention, queries, ANY),
}
CALL = (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, 64, 0)
"""A 3 x 3 window and two groups of four channels."""
FUNCTIONS = {
    "dcnv4_forward": Portable(
        lambda: Convolution(lambda x, predicted: dcnv4.dcnv4_forward(x, predicted, *CALL)),
        maps(8),
        ANY,
    ),
    "DCNv3Function": Portable(
        lambda: Convolution(
            lambda x, predicted: DCNv3Function.apply(
                x, predicted[..., :36], predicted[..., 36:], *CALL
            )
        ),
        maps(8),
        ANY,
    ),
    "flash_deform_attn": Portable(ForkAttention, queries, ANY),
    "d_fine": Portable(DFineAttention, queries, ANY),
}
MODELS = {
    "deformable_detr": Portable(Detector, images, ((2, 96, 128), (1, 96, 128), (3, 96, 128))),
    # With larger parameters layers in a row make much of the last bit. The last map of the first
    # size has two pixels each way: a size of 1 would be a constant.
    "flash_internimage_t": Portable(
        classifier, images, ((2, 64, 64), (1, 64, 64), (3, 71, 45)), std=0.02, rows=2
    ),
}
NEEDS = {
    "d_fine": ("transformers",),
    "deformable_detr": ("transformers",),
    "flash_internimage_t": ("timm", "dcnv4.models"),
}


def get(name: str) -> Portable:
    for module in NEEDS.get(name, ()):
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:  # the latter: torchvision of another PyTorch
            pytest.skip(f"{name} needs {module}: {error}")
    return {**LAYERS, **FUNCTIONS, **MODELS}[name]


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def assert_same(name: str, model: nn.Module, exported: Callable[..., Any]) -> None:
    """That both give the same on every size."""
    portable = get(name)
    for size in portable.sizes:
        inputs = portable.inputs(*size)
        with torch.no_grad():
            expected = flat(model(*inputs))
        torch.testing.assert_close(flat(exported(*inputs)), expected, rtol=1e-4, atol=1e-4)
