"""torchvision's and timm's feature extraction from models with these layers in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcnv4 import DCNv4Conv2d

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

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    model.layer2[0].conv2 = DCNv4Conv2d(128, 128, padding=1)
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    extract = FeatureGraphNet(model, out_indices=(2, 4))
    torch.testing.assert_close(extract(x), [expected[2], expected[4]])
