"""InternImage's DCNv3 as a layer on the operator of DCNv4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..arguments import check_tensor, window
from ..eager import as_leaf
from ..functional import windowed_conv
from .base import WindowedLayer, reset_projection

_ACTIVATIONS: dict[str, type[nn.Module]] = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class DCNv3(WindowedLayer):
    """InternImage's DCNv3 on the operator of DCNv4, with its arguments and parameters' names.

    It differs from `DCNv4` in what predicts the points, and no `DCNv4` can compute the same:

        features = act(norm(depthwise convolution(x)))
        value = input_proj(x);  y = deform_conv(value, [offset(features), mask(features)])
        output = output_proj(y)

    with the K weights of a group normalised by softmax. With `center_feature_scale`, y becomes
    y·(1 - s) + value·s, s = sigmoid(linear(features)) per group.

    Args:
        channels, kernel_size, stride, pad, dilation, group, offset_scale, remove_center: as in
            `DCNv4`.
        dw_kernel_size: of the depthwise convolution; None for `kernel_size`.
        act_layer: "GELU", "ReLU" or "SiLU".
        norm_layer: "LN" or "BN".
        center_feature_scale: blend each output with the value at its centre, as above.
        backend: as in `functional.deform_conv`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: Wang et al., InternImage, CVPR 2023, arXiv:2211.05778. Its checkpoints load.
    """

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
        backend: str | None = None,
    ) -> None:
        settings = window(
            kernel_size, stride, pad, dilation, group, offset_scale, remove_center, softmax=True
        )
        super().__init__(
            channels, settings, center_feature_scale=center_feature_scale, backend=backend
        )
        if act_layer not in _ACTIVATIONS:
            raise ValueError(f"act_layer must be one of GELU, ReLU, SiLU; got {act_layer!r}")
        if norm_layer not in ("LN", "BN"):
            raise ValueError(f"norm_layer must be 'LN' or 'BN'; got {norm_layer!r}")
        self.channels = channels
        depthwise = nn.Conv2d(
            channels,
            channels,
            dw_kernel_size if dw_kernel_size is not None else settings.kernel_size,
            padding="same",
            groups=channels,
        )
        norm = (
            nn.Sequential(_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6))
            if norm_layer == "LN"
            else nn.Sequential(nn.BatchNorm2d(channels), _ChannelsLast())
        )
        self.dw_conv = nn.Sequential(depthwise, norm, _ACTIVATIONS[act_layer]())
        samples = settings.groups * settings.points()
        self.offset = nn.Linear(channels, 2 * samples)
        self.mask = nn.Linear(channels, samples)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        for zeroed in (self.offset, self.mask):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        for projection in (self.input_proj, self.output_proj):
            reset_projection(projection)

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
        if x.shape[-1] != self.channels:
            raise ValueError(f"x must be [B, H, W, C = {self.channels}]; got {list(x.shape)}")
        return self._at_centers(self.dw_conv(x.permute(0, 3, 1, 2)))

    def _predict(self, features: Tensor) -> Tensor:
        """The operator's `offset_mask`, [B, Ho, Wo, 3·G·K]."""
        weight = self._interleave(self.offset.weight, self.mask.weight)
        return F.linear(features, weight, self._interleave(self.offset.bias, self.mask.bias))

    def _interleave(self, offset: Tensor, mask: Tensor) -> Tensor:
        """A group's 2K rows of `offset`, then its K of `mask`, group after group."""
        parts = [rows.unflatten(0, (self.window.groups, -1)) for rows in (offset, mask)]
        return torch.cat(parts, 1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"


class _ChannelsLast(nn.Module):
    """NHWC from NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)
