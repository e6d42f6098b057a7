"""mmcv's deformable convolutions and attention, and the two functions that BEVFormer adds."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..arguments import check_divides, check_finite, check_flag, check_integer, check_tensor
from ..autocast import is_autocast
from ..layers import FlashDeformAttn
from ..tracing import as_leaf
from . import torchvision
from .deformable_detr import MSDeformAttnFunction, Shapes, Starts, ms_deform_attn_core_pytorch
from .torchvision import Size

MultiScaleDeformableAttnFunction = MSDeformAttnFunction
"""The same by the name that mmcv has for it."""


class _CastFunction:
    """`MSDeformAttnFunction` that under autocast takes the value in a dtype of its own."""

    _dtype: torch.dtype

    @classmethod
    def apply(
        cls,
        value: Tensor,
        value_spatial_shapes: Shapes,
        value_level_start_index: Starts,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """As `MultiScaleDeformableAttnFunction.apply`."""
        check_tensor("value", value, "[B, S, G, D]", (4,))
        rest = value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        if not is_autocast(value.device.type):
            return MSDeformAttnFunction.apply(value, *rest)
        with torch.autocast(value.device.type, enabled=False):
            return MSDeformAttnFunction.apply(value.to(cls._dtype), *rest)


class MultiScaleDeformableAttnFunction_fp32(_CastFunction):  # noqa: N801
    """`MultiScaleDeformableAttnFunction` that under autocast computes in float32, as BEVFormer's.

    Source: Li et al., BEVFormer, ECCV 2022, arXiv:2203.17270.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import MultiScaleDeformableAttnFunction_fp32
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value = torch.randn(2, 120, 8, 32)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> function = MultiScaleDeformableAttnFunction_fp32
        >>> function.apply(value, shapes, starts, locations, weights, 64).shape
        torch.Size([2, 50, 256])
    """

    _dtype = torch.float32


class MultiScaleDeformableAttnFunction_fp16(_CastFunction):  # noqa: N801
    """`MultiScaleDeformableAttnFunction` that under autocast takes the value in float16.

    Locations and weights stay as precise as they came, where BEVFormer's rounds them too.

    Source: as `MultiScaleDeformableAttnFunction_fp32`.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import MultiScaleDeformableAttnFunction_fp16
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value = torch.randn(2, 120, 8, 32)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> function = MultiScaleDeformableAttnFunction_fp16
        >>> function.apply(value, shapes, starts, locations, weights, 64).shape
        torch.Size([2, 50, 256])
    """

    _dtype = torch.float16


multi_scale_deformable_attn_pytorch = ms_deform_attn_core_pytorch
"""The same by the name that mmcv has for it."""


class MultiScaleDeformableAttention(FlashDeformAttn):
    """mmcv's layer: `FlashDeformAttn`, dropout and a residual, in mmcv's order of axes.

        output = dropout(attention(query + query_pos, value)) + identity

    Args:
        embed_dims: channels C of queries and values; `num_heads` must divide it.
        num_heads: G, attention heads.
        num_levels: L, feature levels.
        num_points: P, points a head samples in each level.
        im2col_step: ignored.
        dropout: the share of numbers that dropout zeroes.
        batch_first: tensors are [B, Q, C], not [Q, B, C].
        norm_cfg, init_cfg: kept as attributes, and read by nothing, as in mmcv.
        value_proj_ratio: the value's channels over `embed_dims`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: mmcv 2.2; Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159. Its checkpoints
    load.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import MultiScaleDeformableAttention
        >>> layer = MultiScaleDeformableAttention(embed_dims=64, num_levels=2, num_heads=4)
        >>> shapes = torch.tensor([(8, 8), (4, 4)])
        >>> query, pixels = torch.randn(10, 1, 64), torch.randn(80, 1, 64)
        >>> points = torch.rand(1, 10, 2, 2)
        >>> layer(query, value=pixels, reference_points=points, spatial_shapes=shapes).shape
        torch.Size([10, 1, 64])
    """

    is_init = _is_init = True
    """Tells mmengine that `init_weights` has been called."""

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        check_integer("embed_dims", embed_dims, 1)
        check_integer("num_heads", num_heads, 1)
        check_integer("num_levels", num_levels, 1)
        check_integer("num_points", num_points, 1)
        check_divides("num_heads", num_heads, embed_dims, f"embed_dims = {embed_dims}")
        width = int(embed_dims * check_finite("value_proj_ratio", value_proj_ratio))
        if width < 1 or width % num_heads:
            raise ValueError(
                f"value_proj_ratio must leave the value channels that num_heads = {num_heads} "
                f"divides; got {value_proj_ratio}, which leaves {width}"
            )
        if not 0 <= check_finite("dropout", dropout) <= 1:
            raise ValueError(f"dropout must be from 0 to 1; got {dropout}")
        super().__init__(embed_dims, num_levels, num_heads, num_points, value_proj_ratio)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.im2col_step = im2col_step
        self.dropout = nn.Dropout(dropout)
        self.batch_first = check_flag("batch_first", batch_first)
        self.norm_cfg = norm_cfg
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Initialise every parameter anew."""
        self.reset_parameters()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        level_start_index: Starts = None,
        **others: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [Q, B, C], or [B, Q, C] with `batch_first`, as all of these.
            key: not read, as in mmcv.
            value: [S, B, C], the levels' pixels one level after another; None: `query`.
            identity: what is added to the result; None: `query` as it came. `residual`, its former
                name, is taken too.
            query_pos: added to `query`.
            key_padding_mask: [B, S], True where a pixel is padding and counts as zeros.
            reference_points: [B, Q, L, 2] or [B, Q, L, 4], as in `FlashDeformAttn`.
            spatial_shapes: (H, W) of each level, an integer tensor [L, 2] or a sequence.
            level_start_index: not needed, as levels follow one another.
            others: not read, as in mmcv, whose callers pass what other layers want.

        Returns:
            [Q, B, C] or [B, Q, C].

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or device, by its name.
        """
        if isinstance(query, Proxy):
            tensors = (key, value, identity, query_pos, key_padding_mask, reference_points)
            levels = (spatial_shapes, level_start_index)
            return as_leaf(MultiScaleDeformableAttention, self, query, *tensors, *levels, **others)
        if "residual" in others:
            warnings.warn("residual is now identity", DeprecationWarning, stacklevel=2)
            identity = others.pop("residual")
        if reference_points is None or spatial_shapes is None:
            name = "reference_points" if reference_points is None else "spatial_shapes"
            raise TypeError(f"{name} must be given; got None")
        layout = "[B, length, C]" if self.batch_first else "[length, B, C]"
        value = query if value is None else value
        identity = query if identity is None else identity
        tensors = {"query": query, "value": value, "identity": identity, "query_pos": query_pos}
        for name, tensor in tensors.items():
            if tensor is not None or name == "query":
                check_tensor(name, tensor, layout, (3,))
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        output = super().forward(
            query, reference_points, value, spatial_shapes, level_start_index, key_padding_mask
        )
        if not self.batch_first:
            output = output.transpose(0, 1)
        dropped: Tensor = self.dropout(output)
        return dropped + identity


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """`torchvision.deform_conv2d` without a mask, in mmcv's order of arguments.

    Args:
        input, weight: as there, but taken in the dtype of `offset`, as mmcv does.
        offset: [B, 2·deform_groups·kh·kw, Ho, Wo], as there.
        stride, padding, dilation: an int or (height, width), in pixels.
        groups: of the kernel, as the weight's second size says.
        deform_groups: groups of channels with offsets of their own.
        bias: must be False, as in mmcv.
        im2col_step: ignored.

    Returns:
        [B, Co, Ho, Wo] in the dtype of `offset`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Dai et al., Deformable Convolutional Networks, ICCV 2017, arXiv:1703.06211.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import deform_conv2d
        >>> x, offset = torch.randn(1, 64, 14, 14), torch.randn(1, 18, 14, 14)
        >>> deform_conv2d(x, offset, torch.randn(32, 64, 3, 3), padding=1).shape
        torch.Size([1, 32, 14, 14])
    """
    if check_flag("bias", bias):
        raise ValueError("bias must be False, as mmcv's deform_conv2d has none; got True")
    settings = (stride, padding, dilation, groups, deform_groups)
    return _deform_conv2d(input, offset, None, weight, None, *settings)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """`torchvision.deform_conv2d` with a mask, in mmcv's order of arguments.

    Args:
        input, weight, bias, mask: as there, but taken in the dtype of `offset`, as mmcv does.
        offset to deform_groups: as in `deform_conv2d`.

    Returns:
        [B, Co, Ho, Wo] in the dtype of `offset`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Zhu et al., Deformable ConvNets v2, CVPR 2019, arXiv:1811.11168.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import modulated_deform_conv2d
        >>> x, offset = torch.randn(1, 64, 14, 14), torch.randn(1, 18, 14, 14)
        >>> mask, weight = torch.rand(1, 9, 14, 14), torch.randn(32, 64, 3, 3)
        >>> modulated_deform_conv2d(x, offset, mask, weight, padding=1).shape
        torch.Size([1, 32, 14, 14])
    """
    check_tensor("input", input, "[B, C, H, W]", (4,))
    check_tensor("mask", mask, "[B, G*kh*kw, Ho, Wo]", (4,), input)
    settings = (stride, padding, dilation, groups, deform_groups)
    return _deform_conv2d(input, offset, mask, weight, bias, *settings)


def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    deform_groups: int,
) -> Tensor:
    check_tensor("input", input, "[B, C, H, W]", (4,))
    check_tensor("offset", offset, "[B, 2*deform_groups*kh*kw, Ho, Wo]", (4,), input)
    check_tensor("weight", weight, "[Co, C / groups, kh, kw]", (4,), input)
    channels, points = input.shape[1], weight.shape[2] * weight.shape[3]
    if weight.shape[1] * check_integer("groups", groups, 1) != channels:
        raise ValueError(
            f"weight must be [Co, C / groups, kh, kw] with C = {channels} and groups = {groups}; "
            f"got {list(weight.shape)}"
        )
    if offset.shape[1] != 2 * points * check_integer("deform_groups", deform_groups, 1):
        raise ValueError(
            f"offset must be [B, 2*deform_groups*kh*kw = {2 * deform_groups * points}, Ho, Wo]; "
            f"got {list(offset.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, "[Co]", (1,), input)
        bias = bias.to(offset.dtype)
    mask = None if mask is None else mask.to(offset.dtype)
    image, kernel = input.to(offset.dtype), weight.to(offset.dtype)
    return torchvision.deform_conv2d(image, offset, kernel, bias, stride, padding, dilation, mask)


class _DeformConv2d(torchvision.DeformConv2d):
    """What mmcv's layers have and torchvision's has not."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
        *,
        deformable_groups: int | None = None,
    ) -> None:
        window = (kernel_size, stride, padding, dilation)
        has_bias = bias == "auto" or check_flag("bias", bias)
        super().__init__(in_channels, out_channels, *window, groups, has_bias)
        if deformable_groups is not None:
            warnings.warn(
                "deformable_groups is now deform_groups", DeprecationWarning, stacklevel=3
            )
            deform_groups = deformable_groups
        check_integer("deform_groups", deform_groups, 1)
        check_divides("deform_groups", deform_groups, in_channels, f"in_channels = {in_channels}")
        self.deform_groups = deform_groups
        # What mmcv's ConvModule reads of a convolution.
        self.transposed = False
        self.output_padding = (0,)

    def _settings(self) -> tuple[Any, ...]:
        """What follows the tensors of mmcv's two functions."""
        return self.stride, self.padding, self.dilation, self.groups, self.deform_groups

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}"


class _Pack(_DeformConv2d):
    """What mmcv's two layers share that predict their points, by `conv_offset`."""

    _version = 2
    _numbers: int
    """That are predicted of each point."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        points = self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        self.conv_offset = nn.Conv2d(self.in_channels, self._numbers * points, *window)
        self.init_offset()

    def init_offset(self) -> None:
        """Let `conv_offset` predict zeros."""
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def reset_parameters(self) -> None:
        """Initialise every parameter anew."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):  # not while the weight alone is there
            self.init_offset()

    def _former_names(self, prefix: str) -> dict[str, str]:
        """What parameters are called now, by their names in mmcv's first version, in which they
        lay beside the layer and not in it."""
        kinds = ("weight", "bias")
        return {f"{prefix[:-1]}_offset.{kind}": f"{prefix}conv_offset.{kind}" for kind in kinds}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # `dcnv4.checkpoints.load` has done so before; PyTorch's own loader shows a layer no names
        # outside it since 1.13.
        if (local_metadata.get("version") or 1) < self._version:
            for former, name in self._former_names(prefix).items():
                if former in state_dict and name not in state_dict:
                    state_dict[name] = state_dict.pop(former)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class DeformConv2d(_DeformConv2d):
    """mmcv's layer around its `deform_conv2d`: the kernel is learned, the offsets are given.

    Args:
        in_channels, out_channels: C and Co.
        kernel_size, stride, padding, dilation: an int or (height, width).
        groups: of the kernel; must divide C and Co.
        deform_groups: groups of channels with offsets of their own; must divide C.
        bias: must be False, as in mmcv. `torchvision.DeformConv2d` has one.
        im2col_step: ignored.
        deformable_groups: `deform_groups` by its former name.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: mmcv 2.2; as `deform_conv2d`. Its checkpoints load.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import DeformConv2d
        >>> layer = DeformConv2d(64, 128, 3, padding=1)
        >>> layer(torch.randn(1, 64, 14, 14), torch.randn(1, 18, 14, 14)).shape
        torch.Size([1, 128, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
        *,
        deformable_groups: int | None = None,
    ) -> None:
        if check_flag("bias", bias):
            raise ValueError("bias must be False, as mmcv's DeformConv2d has none; got True")
        settings = (kernel_size, stride, padding, dilation, groups, deform_groups, bias)
        super().__init__(in_channels, out_channels, *settings, deformable_groups=deformable_groups)
        self.im2col_step = im2col_step

    def reset_parameters(self) -> None:
        """Initialise the weight anew."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        """`deform_conv2d` of x [B, C, H, W], `offset` and the layer's weight."""
        if isinstance(x, Proxy):
            return as_leaf(DeformConv2d, self, x, offset)
        return deform_conv2d(x, offset, self.weight, *self._settings())


class DeformConv2dPack(_Pack, DeformConv2d):
    """`DeformConv2d` that predicts its offsets by a convolution of its input, `conv_offset`.

    Args:
        in_channels to im2col_step: as in `DeformConv2d`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: as `DeformConv2d`.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import DeformConv2dPack
        >>> layer = DeformConv2dPack(64, 128, 3, padding=1, deform_groups=4)
        >>> layer(torch.randn(1, 64, 14, 14)).shape
        torch.Size([1, 128, 14, 14])
    """

    _numbers = 2

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, Co, Ho, Wo] from x [B, C, H, W]."""
        if isinstance(x, Proxy):
            return as_leaf(DeformConv2dPack, self, x)
        return super().forward(x, self.conv_offset(x))


class ModulatedDeformConv2d(_DeformConv2d):
    """mmcv's layer around its `modulated_deform_conv2d`: offsets and mask are given.

    Args:
        in_channels to deform_groups: as in `DeformConv2d`.
        bias: add a learned bias; "auto" means True, as in mmcv.
        deformable_groups: `deform_groups` by its former name.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: mmcv 2.2; as `modulated_deform_conv2d`. Its checkpoints load.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import ModulatedDeformConv2d
        >>> layer = ModulatedDeformConv2d(64, 128, 3, padding=1)
        >>> x, offset, mask = (torch.rand(1, channels, 14, 14) for channels in (64, 18, 9))
        >>> layer(x, offset, mask).shape
        torch.Size([1, 128, 14, 14])
    """

    def init_weights(self) -> None:
        """Initialise every parameter anew."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter anew."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """`modulated_deform_conv2d` of x [B, C, H, W], `offset`, `mask` and the layer's weight."""
        if isinstance(x, Proxy):
            return as_leaf(ModulatedDeformConv2d, self, x, offset, mask)
        tensors = (x, offset, mask, self.weight, self.bias)
        return modulated_deform_conv2d(*tensors, *self._settings())


class ModulatedDeformConv2dPack(_Pack, ModulatedDeformConv2d):
    """`ModulatedDeformConv2d` that predicts offsets and mask from its input, by `conv_offset`.

    The mask is the sigmoid of what `conv_offset` makes.

    Args:
        in_channels to bias: as in `ModulatedDeformConv2d`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by its name.

    Source: as `ModulatedDeformConv2d`.

    Example:
        >>> import torch
        >>> from dcnv4.compat.mmcv import ModulatedDeformConv2dPack
        >>> layer = ModulatedDeformConv2dPack(64, 128, 3, padding=1, deform_groups=4)
        >>> layer(torch.randn(1, 64, 14, 14)).shape
        torch.Size([1, 128, 14, 14])
    """

    _numbers = 3

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.init_weights()  # a second time, as mmcv does

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, Co, Ho, Wo] from x [B, C, H, W]."""
        if isinstance(x, Proxy):
            return as_leaf(ModulatedDeformConv2dPack, self, x)
        predicted = self.conv_offset(x)
        points = predicted.shape[-3] // 3
        offset, mask = predicted.split((2 * points, points), -3)
        return super().forward(x, offset, mask.sigmoid())
