"""Deformable convolution as torchvision has it: a kernel that mixes the sampled channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from ..arguments import check_flag, check_integer, check_tensor
from ..arguments import window as check_window
from ..autocast import autocast_dtype
from ..functional import deform_conv, windowed_conv
from ..geometry import Window
from ..tracing import as_leaf, is_traced, refuse_scripting

Size = int | Sequence[int]

MOST_SAMPLES = 2**26
"""The most sampled numbers that `deform_conv2d` holds at a time, where one row of one image of the
output does not need more: 256 MiB in float32."""


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    r"""torchvision's `deform_conv2d`: a convolution of what is sampled around every output pixel.

        out[b, o, oy, ox] = bias_o + sum_{c, i, j} weight[o, c, i, j] · m · sample
        sample = bilinear(input[b, c]; x, y)
        x = ox·s - p + j·d + δx,   y = oy·s - p + i·d + δy

    with m and δ of kernel point (i, j), row and column, and of c's group of channels.

    Args:
        input: [B, C, H, W]; float64, float32, bfloat16 or float16.
        offset: [B, 2·G·kh·kw, Ho, Wo], δ as (y, x) of each point in pixels, rows of the kernel
            outermost. G groups of channels have offsets of their own.
        weight: [Co, C / groups, kh, kw] in the dtype of `input`; its second size tells the groups,
            which must divide Co too.
        bias: [Co], added to the result.
        stride, padding, dilation: an int or (height, width), in pixels.
        mask: [B, G·kh·kw, Ho, Wo], the factors m; None: ones.

    Returns:
        [B, Co, Ho, Wo] in the dtype of `input` (under autocast, the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Note:
        The samples, kh·kw·C numbers an output pixel, are in memory for at most `MOST_SAMPLES`
        numbers at a time, and are computed anew for the gradients. A depthwise weight of ones that
        needs no gradient leaves nothing to multiply: `functional.deform_conv` adds the points up.
        To know it, the host reads the weight, and waits for an accelerator.

    Source: Zhu et al., Deformable ConvNets v2, CVPR 2019, arXiv:1811.11168.

    Example:
        >>> import torch
        >>> from dcnv4.compat.torchvision import deform_conv2d
        >>> x, weight = torch.randn(1, 64, 14, 14), torch.randn(32, 64, 3, 3)
        >>> offset, mask = torch.randn(1, 18, 14, 14), torch.rand(1, 9, 14, 14)
        >>> deform_conv2d(x, offset, weight, padding=1, mask=mask).shape
        torch.Size([1, 32, 14, 14])
    """
    settings = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    # Rows of the kernel are outermost in [B, G, kh, kw, Ho, Wo(, 2)], and y comes before x.
    grid = (settings.groups, *settings.kernel_size)
    points = offset.unflatten(1, (*grid, 2)).movedim(4, -1).flip(-1)
    factors = None if mask is None else mask.unflatten(1, grid)
    # For offsets' gradients `_added` takes an edge from the padding.
    is_edged = not offset.requires_grad or min(settings.padding) > 0
    if is_edged and _is_ones(weight, input.shape[1]):
        output = _added(input, points, factors, settings)
    else:
        output = _multiplied(input, points, factors, weight, settings)
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    return output.contiguous()


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    mask: Tensor | None,
) -> Window:
    """The checked settings of the deformable convolution, its groups those of the offsets."""
    check_tensor("input", input, "[B, C, H, W]", (4,))
    check_tensor("weight", weight, "[Co, C / groups, kh, kw]", (4,), input)
    check_tensor("offset", offset, "[B, 2*G*kh*kw, Ho, Wo]", (4,), input)
    batch, channels, height, width = input.shape
    outputs, per_group, kh, kw = weight.shape
    if 0 in weight.shape or channels % per_group or outputs % (channels // per_group):
        raise ValueError(
            "weight must be [Co, C / groups, kh, kw] with groups that divide Co and C = "
            f"{channels}; got {list(weight.shape)}"
        )
    if weight.dtype != input.dtype and autocast_dtype(weight) != autocast_dtype(input):
        raise TypeError(f"weight must be of input's dtype {input.dtype}; got {weight.dtype}")
    settings = check_window((kh, kw), stride, padding, dilation, groups=1)
    points, size = kh * kw, settings.output_size(height, width)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"weight must fit the padded input of {list(input.shape)}; got {list(weight.shape)}, "
            f"which leaves {size[0]} x {size[1]} pixels"
        )
    groups = offset.shape[1] // (2 * points)
    expected = (batch, 2 * groups * points, *size)
    if groups == 0 or offset.shape != expected or channels % groups:
        raise ValueError(
            f"offset must be [B, 2*G*kh*kw, Ho, Wo] = [{batch}, G*{2 * points}, {size[0]}, "
            f"{size[1]}] with G that divides C = {channels}; got {list(offset.shape)}"
        )
    if mask is not None:
        check_tensor("mask", mask, "[B, G*kh*kw, Ho, Wo]", (4,), input)
        if mask.shape != (expected := (batch, groups * points, *size)):
            raise ValueError(
                f"mask must be [B, G*kh*kw, Ho, Wo] = {list(expected)}; got {list(mask.shape)}"
            )
    if bias is not None:
        check_tensor("bias", bias, "[Co]", (1,), input)
        if len(bias) != outputs:
            raise ValueError(f"bias must be [Co] = [{outputs}]; got {list(bias.shape)}")
    return settings._replace(groups=groups)


def _is_ones(weight: Tensor, channels: int) -> bool:
    """Whether this weight is known to leave the samples of every channel as they are."""
    if weight.shape[:2] != (channels, 1) or is_traced(weight):
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool((weight == 1).all())


def _added(input: Tensor, points: Tensor, factors: Tensor | None, settings: Window) -> Tensor:
    """[B, C, Ho, Wo]: the sum of the points' samples.

    `points` is [B, G, kh, kw, Ho, Wo, 2], `factors` [B, G, kh, kw, Ho, Wo].
    """
    if factors is None:
        factors = torch.ones_like(points[..., 0])
    value = input.permute(0, 2, 3, 1)
    if points.requires_grad:
        value, settings = _edged(value, settings)
    # The kernel's columns are outermost in `offset_mask`.
    offsets = points.permute(0, 4, 5, 1, 3, 2, 6).flatten(4)
    weights = factors.permute(0, 4, 5, 1, 3, 2).flatten(4)
    offset_mask = torch.cat((offsets, weights), -1).flatten(3)
    return windowed_conv(value, offset_mask, settings).permute(0, 3, 1, 2)


def _edged(value: Tensor, settings: Window) -> tuple[Tensor, Window]:
    """The value with an edge of zeros, a pixel wide, and the window with so much less padding.

    The same is sampled. But at a coordinate of exactly -1, where the bend of a sample is, the
    derivative is now that towards the image, as torchvision takes it.
    """
    down, across = settings.padding
    return F.pad(value, (0, 0, 1, 1, 1, 1)), settings._replace(padding=(down - 1, across - 1))


def _multiplied(
    input: Tensor, points: Tensor, factors: Tensor | None, weight: Tensor, settings: Window
) -> Tensor:
    """[B, Co, Ho, Wo]: the weight times the samples; `points` and `factors` are as in `_added`."""
    batch, channels = input.shape[:2]
    rows, columns = points.shape[4:6]
    row = columns * channels * settings.points()
    part = partial(_part, weight=weight, settings=settings)
    traced = is_traced(input)  # then what is kept and what computed anew is the tracer's to decide
    if torch.is_grad_enabled() and not traced:
        part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    if traced or batch * rows * row <= MOST_SAMPLES:
        return part(input, points, factors, top=0)
    lines = min(rows, max(1, MOST_SAMPLES // row))
    images = max(1, MOST_SAMPLES // (lines * row))
    outputs = []
    for first in range(0, batch, images):
        some = slice(first, first + images)
        parts = []
        for top in range(0, rows, lines):
            at = (some, ..., slice(top, top + lines), slice(None))
            kept = None if factors is None else factors[at]
            parts.append(part(input[some], points[(*at, slice(None))], kept, top=top))
        outputs.append(torch.cat(parts, 2))
    return torch.cat(outputs)


def _part(
    input: Tensor,
    points: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    top: int,
    settings: Window,
) -> Tensor:
    """`_multiplied` for the output's rows from `top` on.

    Every point is an output pixel of its own of a 1 x 1 `deform_conv`, [B, Ho·kh, Wo·kw, C].
    """
    (kh, kw), (rows, columns) = settings.kernel_size, points.shape[4:6]
    value, settings = _edged(input.permute(0, 2, 3, 1), settings)
    down, across = (
        _axis(first, count, axis, settings, value)
        for axis, (first, count) in enumerate(((top, rows), (0, columns)))
    )
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    x = points[..., 0] + across.shift[:, None]
    y = points[..., 1] + down.shift[:, None, :, None]
    factors = torch.ones_like(x) if factors is None else factors
    offset_mask = torch.stack((x, y, factors), -1).permute(0, 4, 2, 5, 3, 1, 6)
    offset_mask = offset_mask.flatten(5).flatten(3, 4).flatten(1, 2)
    samples = deform_conv(
        value,
        F.pad(offset_mask, (0, 0, 0, across.left, 0, down.left)),
        kernel_size=1,
        stride=(down.stride, across.stride),
        padding=(down.padding, across.padding),
        groups=settings.groups,
    )[:, : rows * kh, : columns * kw]
    samples = samples.unflatten(3, (-1, weight.shape[1]))
    samples = samples.unflatten(2, (columns, kw)).unflatten(1, (rows, kh))
    kernels = weight.unflatten(0, (samples.shape[5], -1))
    return torch.einsum("byixjgc,gocij->bgoyx", samples, kernels).flatten(1, 2)


class _Axis(NamedTuple):
    """Down or across: the 1 x 1 window whose output has a pixel for each point of a kernel."""

    stride: int
    padding: int
    left: int
    """Pixels of that output at its end, which no point takes."""
    shift: Tensor
    """[k, n], from that output's pixels to the points, in input pixels."""


def _axis(first: int, count: int, axis: int, settings: Window, value: Tensor) -> _Axis:
    """For the output's pixels `first` to `first + count`, rows at axis 0 and columns at 1."""
    size, kernel = value.shape[1 + axis], settings.kernel_size[axis]
    stride = max(1, settings.stride[axis] // kernel)
    padding = max(0, -((size - 1 - (count * kernel - 1) * stride) // 2))
    left = (size + 2 * padding - 1) // stride + 1 - count * kernel
    pixel = torch.arange(count, device=value.device)
    point = torch.arange(kernel, device=value.device)[:, None]
    target = (first + pixel) * settings.stride[axis] + point * settings.dilation[axis]
    found = (pixel * kernel + point) * stride
    return _Axis(stride, padding, left, target - found + padding - settings.padding[axis])


class DeformConv2d(nn.Module):
    """torchvision's layer around `deform_conv2d`: its arguments, its parameters.

    Args:
        in_channels, out_channels: C and Co.
        kernel_size, stride, padding, dilation: an int or (height, width).
        groups: of the kernel; must divide C and Co.
        bias: add a learned bias.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: as `deform_conv2d`.

    Example:
        >>> import torch
        >>> from dcnv4.compat.torchvision import DeformConv2d
        >>> layer = DeformConv2d(64, 128, 3, padding=1)
        >>> x, offset, mask = (torch.rand(1, channels, 14, 14) for channels in (64, 18, 9))
        >>> layer(x, offset, mask).shape
        torch.Size([1, 128, 14, 14])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        settings = check_window(kernel_size, stride, padding, dilation, groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if check_integer(name, channels, 1) % groups:
                raise ValueError(f"{name} must be a multiple of groups = {groups}; got {channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = settings.kernel_size
        self.stride = settings.stride
        self.padding = settings.padding
        self.dilation = settings.dilation
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *settings.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if check_flag("bias", bias) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, as `nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """`deform_conv2d` of these arguments and the layer's own."""
        if isinstance(input, Proxy):
            return as_leaf(DeformConv2d, self, input, offset, mask)
        settings = (self.stride, self.padding, self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, *settings, mask)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
