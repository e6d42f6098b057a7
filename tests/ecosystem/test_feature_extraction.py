"""torchvision's and timm's feature extraction from models with these layers in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dcnv4 import DCNv4Conv2d
from dcnv4.layers import DCNv3

try:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    from torchvision.models.resnet import resnet18
except (ImportError, RuntimeError) as error:  # the latter beside another build of PyTorch
    pytest.skip(
        f"needs torchvision for torch {torch.__version__}: {error}", allow_module_level=True
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.deform = nn.Sequential(DCNv4Conv2d(8, 16, padding=1), nn.ReLU())
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.deform(self.stem(x)))
        return y


def test_torchvision() -> None:
    model, x = Model().eval(), torch.randn(2, 3, 9, 8)
    assert "deform.0" in get_graph_node_names(model)[0]
    extract = create_feature_extractor(model, {"deform.0": "points", "deform": "features"})
    found = extract(x)
    points = model.deform[0](model.stem(x))
    torch.testing.assert_close(found, {"points": points, "features": points.relu()})
    found["features"].sum().backward()
    assert all(p.grad is not None for p in model.deform.parameters())


def test_a_model_of_torchvision() -> None:
    model = resnet18().eval()
    model.layer2[0].conv1 = DCNv4Conv2d(64, 128, stride=2, padding=1)
    x = torch.randn(1, 3, 32, 32)
    found = create_feature_extractor(model, ["layer2.0.conv1", "fc"])(x)
    assert found["layer2.0.conv1"].shape == (1, 128, 4, 4)
    torch.testing.assert_close(found["fc"], model(x))


def test_a_model_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    from timm.models._features_fx import FeatureGraphNet

    model = timm.create_model("resnet10t", pretrained=False).eval()
    model.layer2[0].conv2 = DCNv4Conv2d(128, 128, padding=1)
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    extract = FeatureGraphNet(model, out_indices=(2, 4))
    torch.testing.assert_close(extract(x), [expected[2], expected[4]])


SETTINGS: list[dict[str, Any]] = [
    {},
    {"post_norm": True, "layer_scale": 0.5, "dw_kernel_size": 3, "drop_path_rate": 0.2},
    {"layer": DCNv3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_model_of_ours(settings: dict[str, Any]) -> None:
    """By torchvision, for evaluation and for training."""
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    from dcnv4.models import InternImage

    model = InternImage(channels=16, depths=(1, 2, 1, 1), num_classes=5, **settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 64, 64)
    names = {model.feature_info[1]["module"]: "map", "levels.1.blocks.0.mlp": "hidden"}
    # torchvision leaves out what changes a tensor in place, as `DropPath` does.
    leaves = {"leaf_modules": [layers.DropPath]}
    extract = create_feature_extractor(model, {**names, "head": "logits"}, tracer_kwargs=leaves)
    for mode in (True, False):
        model.train(mode), extract.train(mode)
        torch.manual_seed(1)
        found = extract(x)
        torch.manual_seed(1)
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        torch.testing.assert_close(found["map"], maps[1])
        assert found["hidden"].shape == maps[1].shape
    torch.testing.assert_close(found["logits"], model(x))
    found["logits"].sum().backward()
    named = dict(extract.named_parameters())
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(parameter.grad is not None for parameter in named.values())


@pytest.mark.parametrize("way", ["getter", "hook", "fx"])
@pytest.mark.parametrize("name", ["flash_internimage_t", "flash_internimage_b"])
def test_a_model_of_ours_by_timm(name: str, way: str) -> None:
    """As its features are told, NCHW where timm asks the model and NHWC where it looks inside."""
    timm = pytest.importorskip("timm", reason="needs timm")
    import dcnv4.models  # noqa: F401

    small = {"channels": 16, "depths": (1, 1, 1, 1)}
    model = timm.create_model(name, **small).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(
        x, intermediates_only=True, output_fmt="NCHW" if way == "getter" else "NHWC"
    )
    features = timm.create_model(name, features_only=True, feature_cls=way, **small).eval()
    (own,) = features.children()
    own.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(features(x), expected)
