"""What six repositories do with the layers that they define, done with those of this package.

The calls are theirs, of `tests/data/surfaces.json`'s commits; the code around them is not.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcnv4
from dcnv4 import checkpoints
from dcnv4.compat import MSDeformAttn

SEEDED = torch.Generator().manual_seed(0)
MAP = torch.randn(2, 6, 8, 32, generator=SEEDED)
ROWS = torch.randn(2, 48, 32, generator=SEEDED)
SHAPES = torch.tensor([(6, 8), (3, 4)])
STARTS = torch.tensor([0, 48])
PYRAMID = torch.randn(2, 60, 32, generator=SEEDED)
QUERIES = torch.randn(2, 5, 32, generator=SEEDED)
PADDING = torch.zeros(2, 60, dtype=torch.bool)


def grid() -> Tensor:
    """ViT-Adapter's reference points [1, Q, 1, 2]: the same for all images and levels."""
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    points = torch.stack(((columns + 0.5) / 8, (rows + 0.5) / 6), -1)
    return points.reshape(1, -1, 1, 2)


ATTENTION = (PYRAMID, SHAPES, STARTS)
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "DCNv4: FlashInternImage": (
        lambda: getattr(dcnv4, "DCNv4")(  # noqa: B009, by its name, as there
            channels=32, group=2, offset_scale=0.5, dw_kernel_size=3, output_bias=False
        ),
        lambda layer: layer(ROWS, shape=(6, 8)),
    ),
    "InternImage: classification": (
        lambda: checkpoints.DCNv3(
            channels=32,
            kernel_size=3,
            stride=1,
            pad=1,
            dilation=1,
            group=2,
            offset_scale=1.0,
            act_layer="GELU",
            norm_layer="LN",
            dw_kernel_size=5,
            center_feature_scale=True,
            remove_center=True,
        ),
        lambda layer: layer(MAP),
    ),
    "InternImage: detection and segmentation": (
        lambda: checkpoints.DCNv3_pytorch(
            channels=32, kernel_size=3, group=2, dw_kernel_size=None, use_dcn_v4_op=True
        ),
        lambda layer: layer(MAP),
    ),
    "Deformable-DETR": (
        lambda: MSDeformAttn(32, 2, 4, 3),
        lambda layer: layer(QUERIES, torch.rand(2, 5, 2, 4), *ATTENTION, PADDING),
    ),
    "DINO": (
        lambda: MSDeformAttn(32, 2, 4, 3, use_4D_normalizer=True),
        lambda layer: layer(QUERIES, torch.rand(2, 5, 2, 4), *ATTENTION, PADDING),
    ),
    "Mask2Former": (
        lambda: MSDeformAttn(32, 2, 4, 3),
        lambda layer: layer(PYRAMID, torch.rand(2, 60, 2, 2), *ATTENTION, PADDING),
    ),
    "ViT-Adapter: injector": (
        lambda: MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3, ratio=0.5),
        lambda layer: layer(ROWS, grid(), *ATTENTION, None),
    ),
}


def initialise(model: nn.Module) -> None:
    """As the repositories do: every Linear their way, then every layer that was replaced."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, (dcnv4.DCNv4, MSDeformAttn, checkpoints.DCNv3)):
            module._reset_parameters()


@pytest.mark.parametrize("repository", CALLS)
def test_repository(repository: str) -> None:
    """It begins as a fresh layer, trains, and comes back from its state."""
    make, run = CALLS[repository]
    torch.manual_seed(0)
    model = make()
    initialise(model)
    for prediction in ("offset_mask", "offset", "mask", "sampling_offsets", "attention_weights"):
        if hasattr(model, prediction):
            assert (getattr(model, prediction).weight == 0).all()
    assert any(parameter.abs().max() > 0.1 for parameter in model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        torch.manual_seed(1)
        loss = (run(model) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], t) for name, t in model.state_dict().items())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = make()
    state: dict[str, Any] = torch.load(buffer)
    other.load_state_dict(state, strict=True)
    outputs = []
    for one in (model, other):
        torch.manual_seed(2)
        outputs.append(run(one))
    assert torch.equal(*outputs)
