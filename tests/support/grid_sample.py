"""The classic functions in their own layouts, composed of `grid_sample`; how results compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check(found: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """Both functions of the leaves must agree, in their output and in every gradient."""
    torch.testing.assert_close(found, expected)
    grad, tensors = torch.randn_like(expected), list(leaves.values())
    grads = [torch.autograd.grad(output, tensors, grad) for output in (found, expected)]
    for name, *pair in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(*pair, msg=lambda m, n=name: f"{n}: {m}")
        assert float(pair[1].abs().max()) > 0, name


def ms_deform_attn(
    shapes: list[tuple[int, int]], value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """[B, Q, G·D]: grid_sample on every level, head after head."""
    batch, _, heads, depth = value.shape
    levels = value.split([h * w for h, w in shapes], 1)
    heads_out = []
    for g in range(heads):
        head = torch.zeros(batch, depth, locations.shape[1], dtype=value.dtype)
        for level, (h, w) in enumerate(shapes):
            image = levels[level][:, :, g].transpose(1, 2).reshape(batch, depth, h, w)
            grid = 2 * locations[:, :, g, level] - 1
            sampled = F.grid_sample(image, grid, align_corners=False)
            head = head + (sampled * weights[:, None, :, g, level]).sum(-1)
        heads_out.append(head)
    return torch.cat(heads_out, 1).transpose(1, 2)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Point after point: rows outermost, (y, x)."""
    (kh, kw), (height, width) = weight.shape[2:], input.shape[2:]
    offset_groups = offset.shape[1] // (2 * kh * kw)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in offset.shape[2:]), indexing="ij")
    output = torch.zeros(())
    for k, (i, j) in enumerate((i, j) for i in range(kh) for j in range(kw)):
        parts = []
        for g, part in enumerate(input.chunk(offset_groups, 1)):
            at = g * kh * kw + k
            y = rows * stride[0] - padding[0] + i * dilation[0] + offset[:, 2 * at]
            x = columns * stride[1] - padding[1] + j * dilation[1] + offset[:, 2 * at + 1]
            grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
            sampled = F.grid_sample(part, grid, align_corners=False)
            parts.append(sampled * (1 if mask is None else mask[:, at, None]))
        groups = input.shape[1] // weight.shape[1]
        output = output + F.conv2d(
            torch.cat(parts, 1), weight[:, :, i : i + 1, j : j + 1], groups=groups
        )
    return output if bias is None else output + bias[:, None, None]


def sampling_locations(
    references: Tensor,
    offsets: Tensor,
    shapes: Sequence[tuple[int, int]],
    box_normalizer: str = "points",
) -> Tensor:
    """Deformable DETR's locations [B, Q, G, L, P, 2] of offsets from points or boxes, or with
    boxes and "size" those of DINO's variants."""
    sizes = torch.tensor([(width, height) for height, width in shapes]).to(offsets)[:, None]
    place = references[:, :, None, :, None]
    if place.shape[-1] == 2:
        return place + offsets / sizes
    parts = offsets / (offsets.shape[4] if box_normalizer == "points" else sizes)
    return place[..., :2] + parts * place[..., 2:] * 0.5
