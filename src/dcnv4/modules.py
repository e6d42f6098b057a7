"""The layers: parameters, initialisation, projections and layouts around the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    autocast_dtype,
    check_backend,
    check_tensor,
    is_traced,
    ms_deform_attn,
    window,
    windowed_conv,
)
from .geometry import Window, conv_points, sum_dtype


class WindowedLayer(nn.Module):
    """What every layer around `deform_conv` shares: its window, its points, its centre blend."""

    def __init__(
        self,
        channels: int,
        settings: Window,
        *,
        center_feature_scale: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        groups = settings.groups
        if channels < 1 or channels % groups:
            raise ValueError(f"group(s) must divide the {channels} channels; got {groups}")
        self.window = settings
        self.backend = check_backend(backend)
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(Ho, Wo) of the output for an input of `shape` (H, W)."""
        return self.window.output_size(*shape)

    def extra_repr(self) -> str:
        defaults = window(groups=self.window.groups)._asdict()
        changed = {k: v for k, v in self.window._asdict().items() if v != defaults[k]}
        settings = {"kernel_size": self.window.kernel_size, "groups": self.window.groups, **changed}
        if self.center_feature_scale:
            settings["center_feature_scale"] = True
        if self.backend is not None:
            settings["backend"] = self.backend
        return ", ".join(f"{key}={setting!r}" for key, setting in settings.items())

    def _blend(self, y: Tensor, value: Tensor, source: Tensor) -> Tensor:
        """y·(1 - s) + value·s at the windows' centres, s = sigmoid(linear(source)) per group."""
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        scale = F.linear(source, weight, bias).sigmoid()[..., None]
        split = (self.window.groups, -1)
        center = self._at_centers(value).unflatten(-1, split)
        blended: Tensor = y.unflatten(-1, split) * (1 - scale) + center * scale
        return blended.flatten(-2)

    def _points(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, Ho, Wo, G, K, 2] and weights [B, Ho, Wo, G, K] in fields [B, Ho, Wo, M]."""
        batch, rows, columns = fields.shape[:3]
        row = torch.arange(rows, device=fields.device).repeat_interleave(columns).repeat(batch)
        column = torch.arange(columns, device=fields.device).repeat(batch * rows)
        x, y, weights = conv_points(fields.flatten(0, 2), self.window)
        origin_x, origin_y = (o[:, None, None] for o in self.window.origins(row, column))
        shape = (batch, rows, columns, *weights.shape[1:])
        positions = torch.stack((origin_x + x, origin_y + y), -1)
        return positions.view(*shape, 2), weights.reshape(shape)

    def _at_centers(self, x: Tensor) -> Tensor:
        """The pixels [B, Ho, Wo, C] at the centres of the windows, the nearest for one outside."""
        height, width = x.shape[1:3]
        rows, columns = self.window.output_size(height, width)
        if self.window.stride == (1, 1) and (rows, columns) == (height, width):
            return x
        column, row = self.window.origins(
            torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        )
        return x[:, row.clamp(0, height - 1)[:, None], column.clamp(0, width - 1)]


class _DeformConv(WindowedLayer):
    """What `DCNv4` and `DCNv4Conv2d` share: all that happens between their layouts."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        settings: Window,
        *,
        dw_kernel_size: int | None,
        center_feature_scale: bool,
        output_bias: bool,
        without_pointwise: bool,
        init: str,
        backend: str | None,
    ) -> None:
        super().__init__(
            out_channels, settings, center_feature_scale=center_feature_scale, backend=backend
        )
        if init not in ("average", "zero"):
            raise ValueError(f"init must be 'average' or 'zero'; got {init!r}")
        if dw_kernel_size is not None and dw_kernel_size < 1:
            raise ValueError(f"dw_kernel_size must be None or >= 1; got {dw_kernel_size}")
        self.init = init
        fields = math.ceil(settings.fields() / 8) * 8
        self.offset_mask = nn.Linear(in_channels, fields)
        self.offset_mask_dw = (
            nn.Conv2d(in_channels, in_channels, dw_kernel_size, padding="same", groups=in_channels)
            if dw_kernel_size is not None
            else None
        )
        self.value_proj = None if without_pointwise else nn.Linear(in_channels, out_channels)
        self.output_proj = (
            None if without_pointwise else nn.Linear(out_channels, out_channels, bias=output_bias)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter anew, as `init` says."""
        points = self.window.points()
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        if self.init == "average":
            used = self.offset_mask.bias[: 3 * self.window.groups * points]
            used.view(-1, 3 * points)[:, 2 * points :] = 1 / points
        if self.offset_mask_dw is not None:
            self.offset_mask_dw.reset_parameters()
        for projection in (self.value_proj, self.output_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def _deform(self, x: Tensor) -> Tensor:
        """[B, Ho, Wo, C_out] from [B, H, W, C_in]."""
        if (dtype := autocast_dtype(x)) != x.dtype:
            x = x.to(dtype)  # once, not for each projection
        value_proj, output_proj = self.value_proj, self.output_proj
        value = x if value_proj is None else value_proj(x)
        y = windowed_conv(value, self._fields(x), self.window, self.backend)
        if self.center_feature_scale:
            y = self._blend(y, value, y)
        return y if output_proj is None else output_proj(y)

    def _fields(self, x: Tensor) -> Tensor:
        """The operator's `offset_mask` [B, Ho, Wo, M], predicted from the input [B, H, W, C_in]."""
        if self.offset_mask_dw is not None:
            x = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        fields: Tensor = self.offset_mask(self._at_centers(x))
        return fields


class DCNv4(_DeformConv):
    r"""Deformable Convolution v4 on channels-last maps, flattened or not.

    Every output pixel sums K points of each group of channels, at offsets and with weights that
    are predicted from the input there; the weights are unbounded unless `softmax` is set.

        value = value_proj(x);  offset_mask = offset_mask(offset_mask_dw(x))
        y = deform_conv(value, offset_mask);  output = output_proj(y)

    With `center_feature_scale`, y becomes y·(1 - s) + value·s, s = sigmoid(linear(y)) per group.

    Args:
        channels: C, of input and output.
        kernel_size: an int or (height, width).
        stride: an int or (height, width). Offsets are predicted at the output's resolution, from
            the pixel at each window's centre.
        pad: zero padding, an int or (height, width).
        dilation: an int or (height, width).
        group: G, groups of channels with offsets and weights of their own; must divide `channels`.
        offset_scale: scales the kernel grid and the offsets alike.
        dw_kernel_size: kernel of a depthwise convolution before `offset_mask`; None for none.
        center_feature_scale: blend each output with the value at its centre, as above.
        remove_center: drop the kernel's central point.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: no `value_proj` and no `output_proj`.
        softmax: normalise the K weights of a group, as DCNv3 does.
        init: "average": zero offsets and weights 1/K, so that a fresh layer is a box filter that
            passes gradients. "zero": all zero as in the paper, right inside a residual block;
            elsewhere it outputs zeros and passes no gradient. With `softmax`, either is a box
            filter.
        backend: as in `functional.deform_conv`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: Xiong et al., Efficient Deformable ConvNets, CVPR 2024, arXiv:2401.06197. Parameters
    are named as in its published checkpoints.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        softmax: bool = False,
        init: str = "average",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            channels,
            channels,
            window(kernel_size, stride, pad, dilation, group, offset_scale, remove_center, softmax),
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            output_bias=output_bias,
            without_pointwise=without_pointwise,
            init=init,
            backend=backend,
        )
        self.channels = channels

    def forward(self, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [B, H·W, C] or [B, H, W, C], in the dtype of the parameters; under autocast in any.
            shape: (H, W). None: the map is square, or x says it.

        Returns:
            [B, Ho·Wo, C] or [B, Ho, Wo, C], as x came; `output_shape` tells (Ho, Wo). In the dtype
            of x; under autocast in the autocast dtype.

        Raises:
            TypeError: x is no tensor of floating point, `shape` no pair.
            ValueError: x or `shape` does not fit the layer or each other.
            RuntimeError: the backend asked for cannot run here; the reasons are listed.
        """
        y = self._deform(self._as_map(x, shape))
        return y if x.dim() == 4 else y.flatten(1, 2)

    def sampling_points(
        self, x: Tensor, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where the layer looks: the points every output pixel sums, and what each counts.

        Args:
            x, shape: as `forward` takes them.

        Returns:
            positions [B, Ho, Wo, G, K, 2] in (x, y) order, in input pixels with integer centres,
            and weights [B, Ho, Wo, G, K].
        """
        return self._points(self._fields(self._as_map(x, shape)))

    def _as_map(self, x: Tensor, shape: Sequence[int] | None) -> Tensor:
        """[B, H, W, C] of what `forward` takes."""
        layout = "[B, H*W, C] or [B, H, W, C]"
        check_tensor("x", x, layout, (3, 4))
        if x.shape[-1] != self.channels:
            hint = "; permute an NCHW tensor, or use DCNv4Conv2d" if x.dim() == 4 else ""
            raise ValueError(
                f"x must be {layout} with C = {self.channels}; got {list(x.shape)}{hint}"
            )
        if shape is not None and not (isinstance(shape, (tuple, list)) and len(shape) == 2):
            raise TypeError(f"shape must be (H, W); got {shape!r}")
        if x.dim() == 4:
            if shape is not None and tuple(shape) != tuple(x.shape[1:3]):
                raise ValueError(f"shape must be x's {tuple(x.shape[1:3])}; got {tuple(shape)}")
            return x
        length = x.shape[1]
        height, width = (int(length**0.5),) * 2 if shape is None else shape
        if height * width != length:
            got = "None, which means a square map" if shape is None else f"{(height, width)}"
            raise ValueError(
                f"shape must be (H, W) with H*W = {length}, the length of x; got {got}"
            )
        return x.view(x.shape[0], height, width, self.channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"


class DCNv4Conv2d(_DeformConv):
    """Deformable Convolution v4 with the arguments and the layout of `torch.nn.Conv2d`.

    `DCNv4` with a `value_proj` from `in_channels` to `out_channels`, NCHW in and NCHW out. A
    `channels_last` tensor passes through without a copy and comes out `channels_last`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: an int or (height, width).
        stride: an int or (height, width).
        padding: an int, (height, width), or "same": what keeps the size at stride 1, and divides
            it by the stride otherwise; dilation·(kernel_size - 1) must then be even.
        dilation: an int or (height, width).
        groups: G, groups of channels with offsets and weights of their own; must divide
            `out_channels`. None: groups of 16 channels, or the next larger size that divides.
        bias: whether the output projection has a bias.
        without_pointwise: neither `value_proj` nor the output projection with its bias, as beside
            the pointwise convolutions of a depthwise block; `out_channels` must be `in_channels`.
        offset_scale, dw_kernel_size, center_feature_scale, remove_center, softmax, init, backend:
            as in `DCNv4`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: as `DCNv4`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        without_pointwise: bool = False,
        softmax: bool = False,
        init: str = "average",
        backend: str | None = None,
    ) -> None:
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"in_channels and out_channels must be >= 1; got {in_channels} and {out_channels}"
            )
        if without_pointwise and in_channels != out_channels:
            raise ValueError(
                f"out_channels must be in_channels = {in_channels} with without_pointwise; "
                f"got {out_channels}"
            )
        if groups is None:
            groups = next(
                g for g in range(max(out_channels // 16, 1), 0, -1) if out_channels % g == 0
            )
        same = padding == "same"
        settings = window(
            kernel_size,
            stride,
            0 if same else padding,  # type: ignore[arg-type]
            dilation,
            groups,
            offset_scale,
            remove_center,
            softmax,
        )
        if same:
            spans = [
                d * (k - 1) for d, k in zip(settings.dilation, settings.kernel_size, strict=True)
            ]
            if any(span % 2 for span in spans):
                raise ValueError(
                    "padding must be numbers where dilation*(kernel_size - 1) is odd; got 'same' "
                    f"with kernel_size {settings.kernel_size}, dilation {settings.dilation}"
                )
            settings = settings._replace(padding=settings.center())
        super().__init__(
            in_channels,
            out_channels,
            settings,
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            output_bias=bias,
            without_pointwise=without_pointwise,
            init=init,
            backend=backend,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        # What code that takes any convolution reads of it.
        self.kernel_size, self.stride, self.padding, self.dilation, self.groups = settings[:5]
        self.transposed, self.output_padding = False, (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [B, in_channels, H, W], contiguous or `channels_last`; dtypes as in `DCNv4.forward`.

        Returns:
            [B, out_channels, Ho, Wo] in the memory format of x.

        Raises:
            TypeError, ValueError, RuntimeError: as in `DCNv4.forward`.
        """
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        y = self._deform(self._as_map(x)).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()

    def sampling_points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the layer looks on x [B, in_channels, H, W]; returns as `DCNv4.sampling_points`."""
        return self._points(self._fields(self._as_map(x)))

    def _as_map(self, x: Tensor) -> Tensor:
        """[B, H, W, in_channels] of what `forward` takes."""
        check_tensor("x", x, "[B, in_channels, H, W]", (4,))
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be [B, in_channels, H, W] with in_channels = {self.in_channels}; "
                f"got {list(x.shape)}"
            )
        if (dtype := autocast_dtype(x)) != x.dtype:
            x = x.to(dtype, memory_format=torch.channels_last)  # in one pass
        return x.permute(0, 2, 3, 1).contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}"


class FlashDeformAttn(nn.Module):
    r"""Multi-scale deformable attention, with the meaning and parameters of Deformable DETR's.

    Every query looks at `n_points` points of each level, at offsets from its reference points;
    offsets and attention weights are predicted from the query, the softmax runs in the operator.

    Args:
        d_model: channels C of queries and values; `n_heads` must divide it.
        n_levels: L, feature levels.
        n_heads: G, attention heads.
        n_points: P, points a head samples in each level.
        backend: as in `functional.ms_deform_attn`.

    Raises:
        ValueError: an argument of the wrong range or shape, by its name.

    Note:
        Sampling locations are computed in float32 at least, also under autocast.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159; Xiong et al., CVPR 2024,
    arXiv:2401.06197. Checkpoints of Deformable DETR's MSDeformAttn load.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be >= 1; got {size}")
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model = {d_model}; got {n_heads}")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.backend = check_backend(backend)
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * samples)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise anew: head h looks in a direction of its own, point p at p + 1 pixels."""
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.n_points + 1)
        radial = directions[:, None, None] * distances[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(radial.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C], in the dtype of the parameters; under autocast in any.
            reference_points: [B, Q, L, 2], (x, y) in [0, 1] over each level; or [B, Q, L, 4],
                boxes (x, y, w, h), whose offsets are in half boxes per `n_points`.
            input_flatten: [B, S, C], the levels' pixels one level after another.
            input_spatial_shapes: (H, W) of each level, a sequence or an integer tensor [L, 2]; on
                an accelerator it stays there.
            input_level_start_index: not needed (levels follow one another); accepted because
                Deformable DETR's callers pass it.
            input_padding_mask: [B, S], True where a pixel is padding and counts as zeros.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: an argument is no tensor of floating point, or `input_spatial_shapes` no
                pairs of integers.
            ValueError: an argument of the wrong shape or device, by its name.
            RuntimeError: the backend asked for cannot run here; the reasons are listed.
        """
        locations, logits = self._locate(query, reference_points, input_spatial_shapes)
        self._check_rows("input_flatten", input_flatten)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            if input_padding_mask.shape != input_flatten.shape[:2]:
                raise ValueError(
                    f"input_padding_mask must be [B, S] = {list(input_flatten.shape[:2])}; "
                    f"got {list(input_padding_mask.shape)}"
                )
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        output = ms_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            locations,
            logits,
            softmax=True,
            backend=self.backend,
        )
        projected: Tensor = self.output_proj(output)
        return projected

    def sampling_points(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Where the layer looks: the points every query sums, and what each counts.

        Args:
            query, reference_points, input_spatial_shapes: as `forward` takes them.

        Returns:
            locations [B, Q, G, L, P, 2] in (x, y) order, from 0 to 1 over each level, edge to edge,
            and weights [B, Q, G, L, P], which add up to 1 over L·P.
        """
        locations, logits = self._locate(query, reference_points, input_spatial_shapes)
        return locations, _wide(logits).flatten(3).softmax(-1).view_as(logits)

    def _locate(
        self,
        query: Tensor,
        reference_points: Tensor,
        shapes: Tensor | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Locations [B, Q, G, L, P, 2] and the logits [B, Q, G, L, P] of their weights."""
        self._check_rows("query", query)
        check_tensor("reference_points", reference_points, "[B, Q, L, 2 or 4]", (4,))
        batch, queries = query.shape[:2]
        if reference_points.shape not in (
            expected := [(batch, queries, self.n_levels, size) for size in (2, 4)]
        ):
            raise ValueError(
                f"reference_points must be [B, Q, L, 2 or 4] = {list(expected[0])} or "
                f"{list(expected[1])}; got {list(reference_points.shape)}"
            )
        heads = (self.n_heads, self.n_levels, self.n_points)
        offsets = _wide(self.sampling_offsets(query)).unflatten(-1, (*heads, 2))
        size = reference_points.shape[3]
        centers = _wide(reference_points).reshape(batch, queries, 1, self.n_levels, 1, size)
        if size == 2:
            locations = centers + offsets / self._sizes(shapes, offsets)
        else:
            locations = centers[..., :2] + offsets * (centers[..., 2:] * (0.5 / self.n_points))
        return locations, self.attention_weights(query).unflatten(-1, heads)

    def _check_rows(self, name: str, argument: Tensor) -> None:
        check_tensor(name, argument, "[B, length, d_model]", (3,))
        if argument.shape[-1] != self.d_model:
            raise ValueError(
                f"{name} must be [B, length, d_model = {self.d_model}]; got {list(argument.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}"
        )

    @staticmethod
    def _sizes(shapes: Tensor | Sequence[Sequence[int]], offsets: Tensor) -> Tensor:
        """The levels' (W, H), [L, 1, 2], beside `offsets`."""
        if isinstance(shapes, Tensor):
            return shapes.flip(-1)[:, None].to(offsets.device, offsets.dtype)
        sizes = tuple((width, height) for height, width in shapes)
        make = _make_sizes if is_traced(offsets) else _kept_sizes
        return make(sizes, offsets.device, offsets.dtype)


def _wide(tensor: Tensor) -> Tensor:
    dtype = sum_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _make_sizes(
    sizes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.tensor(sizes, dtype=dtype, device=device)[:, None]


@lru_cache(maxsize=256)
def _kept_sizes(
    sizes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    # Kept, because copying numbers to an accelerator makes the host wait for it.
    with torch.inference_mode(False):
        return _make_sizes(sizes, device, dtype)
