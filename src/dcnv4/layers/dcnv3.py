"""InternImage's DCNv3 as a layer on the operator of DCNv4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_tensor,
    factory,
)
from ..functional import windowed_conv
from ..initialization import Initializer
from ..tracing import as_leaf, may_read_past
from .base import (
    OriginalNames,
    WindowedLayer,
    check_dtype,
    original_window,
    other_words,
    same_padding,
    width_read,
)
from .projections import read

_ACTIVATIONS: dict[str, type[nn.Module]] = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class DCNv3(WindowedLayer, OriginalNames):
    """InternImage's DCNv3 on the operator of DCNv4, with its arguments and parameters' names.

    It differs from `DCNv4` in what predicts the points, and no `DCNv4` can compute the same:

        features = act(norm(depthwise_conv(x)))
        value = input_proj(x);  y = deform_conv(value, [offset(features), mask(features)])
        output = output_proj(y)

    with the K weights of a group normalised by softmax. With `center_feature_scale`, y becomes
    y·(1 - s) + value·s, s = sigmoid(linear(features)) per group.

    Args:
        channels, kernel_size, stride, pad, dilation, group, offset_scale, remove_center: as in
            `DCNv4`.
        dw_kernel_size: kernel of the depthwise convolution. None: `kernel_size`.
        act_layer: "GELU", "ReLU" or "SiLU".
        norm_layer: "LN" or "BN".
        center_feature_scale: blend each output with the value at its centre, as above.
        use_dcn_v4_op: has no effect here. InternImage's detectors choose an operator by it.
        backend: as in `functional.deform_conv`.
        device, dtype: of the parameters, as in PyTorch's layers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: Wang et al., InternImage, CVPR 2023, arXiv:2211.05778. Its checkpoints load.

    Example:
        >>> import torch
        >>> from dcnv4.checkpoints import DCNv3
        >>> layer = DCNv3(channels=64, kernel_size=3, dw_kernel_size=5, group=4)
        >>> layer(torch.randn(2, 14, 14, 64)).shape
        torch.Size([2, 14, 14, 64])
    """

    @other_words(groups="group", padding="pad")
    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        dw_kernel_size: int | None = None,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        use_dcn_v4_op: bool = False,
        backend: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        settings = original_window(
            channels,
            pad,
            group,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
            softmax=True,
        )
        made = factory(device, dtype)
        super().__init__(
            channels,
            settings,
            center_feature_scale=center_feature_scale,
            backend=backend,
            factory=made,
        )
        self.channels = channels
        self.use_dcn_v4_op = check_flag("use_dcn_v4_op", use_dcn_v4_op)
        if dw_kernel_size is None:
            self.dw_kernel_size = self.kernel_size
        else:
            self.dw_kernel_size = check_integer("dw_kernel_size", dw_kernel_size, 1)
        padding = same_padding(self.dw_kernel_size)
        depthwise = nn.Conv2d(
            channels, channels, self.dw_kernel_size, padding=padding, groups=channels, **made
        )
        norm = _norm(norm_layer, channels, made)
        activation = _ACTIVATIONS[check_choice("act_layer", act_layer, tuple(_ACTIVATIONS))]
        self.dw_conv = nn.Sequential(depthwise, norm, activation())
        samples = settings.groups * settings.points()
        self.offset = nn.Linear(channels, 2 * samples, **made)
        self.mask = nn.Linear(channels, samples, **made)
        self.input_proj = nn.Linear(channels, channels, **made)
        self.output_proj = nn.Linear(channels, channels, **made)
        self._initialize()

    def _initializers(self) -> Iterator[tuple[nn.Module | None, Initializer, Initializer]]:
        for prediction in (self.offset, self.mask):
            yield prediction, nn.init.zeros_, nn.init.zeros_
        for projection in (self.input_proj, self.output_proj):
            yield projection, nn.init.xavier_uniform_, nn.init.zeros_

    def forward(self, x: Tensor) -> Tensor:
        """[B, Ho, Wo, C] from [B, H, W, C]."""
        if isinstance(x, Proxy):
            return as_leaf(DCNv3, self, x)
        features = self._features(x)
        value = self.input_proj(x)
        y = windowed_conv(value, self._predict(features), self.window, self.backend)
        if self.center_feature_scale:
            y = self._blend(y, value, features)
        projected: Tensor = self.output_proj(y)
        return projected

    def sampling_points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the layer looks on x [B, H, W, C]; returns as `DCNv4.sampling_points`."""
        return self._points(self._predict(self._features(x)))

    def _features(self, x: Tensor) -> Tensor:
        """What the points are predicted from, [B, Ho, Wo, C]."""
        check_tensor("x", x, "[B, H, W, C]", (4,))
        if x.shape[-1] != (width := width_read(self.input_proj, x.shape[-1])):
            raise ValueError(f"x must be [B, H, W, C = {width}]; got {list(x.shape)}")
        check_dtype("x", x, self.input_proj)
        return self._at_centers(self.dw_conv(x.permute(0, 3, 1, 2)))

    def _predict(self, features: Tensor) -> Tensor:
        """The operator's `offset_mask`, [B, Ho, Wo, 3·G·K]."""
        parameters = read((self.offset, self.mask)) if may_read_past(features) else None
        if parameters is None:
            return self._interleave(self.offset(features), self.mask(features), -1)
        # One product, and nothing of its size is copied.
        offset, mask, *biases = parameters.tensors
        bias = self._interleave(biases[0], biases[1], -1) if biases else None
        return F.linear(features, self._interleave(offset, mask, -2), bias)

    def _interleave(self, offset: Tensor, mask: Tensor, dim: int) -> Tensor:
        """A group's 2K of `offset`, then its K of `mask`, group after group, along `dim` < 0."""
        groups = self.window.groups
        # Not `unflatten`, after which PyTorch's old exporter takes sizes for constants.
        parts = [
            part.reshape(
                *part.shape[:dim], groups, part.shape[dim] // groups, *part.shape[dim:][1:]
            )
            for part in (offset, mask)
        ]
        return torch.cat(parts, dim).flatten(dim - 1, dim)

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"


DCNv3_pytorch = DCNv3
"""What InternImage computes without its kernels: the same."""


def _norm(norm_layer: str, channels: int, made: dict[str, Any]) -> nn.Sequential:
    """NHWC from NCHW, normalised."""
    if check_choice("norm_layer", norm_layer, ("LN", "BN")) == "LN":
        return nn.Sequential(_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6, **made))
    return nn.Sequential(nn.BatchNorm2d(channels, **made), _ChannelsLast())


class _ChannelsLast(nn.Module):
    """NHWC from NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)
