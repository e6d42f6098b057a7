"""Deformable Convolution v4 as a layer: on channels-last maps, and in place of `nn.Conv2d`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends, ops
from ..arguments import (
    check_choice,
    check_divides,
    check_flag,
    check_integer,
    check_shape,
    check_tensor,
    factory,
    window,
)
from ..autocast import autocast_dtype
from ..eager import compute, compute_backward
from ..functional import check_sizes_of_conv, windowed_conv
from ..geometry import Window
from ..initialization import Initializer, average
from ..tracing import as_leaf, is_compiling, may_read_past, remembered
from .base import (
    OriginalNames,
    WindowedLayer,
    check_dtype,
    known,
    original_window,
    other_words,
    pair,
    same_padding,
    width_read,
)
from .projections import (
    Call,
    Formula,
    Kept,
    Parameters,
    Sums,
    Weights,
    are_computed_in,
    called,
    multiplied,
    prepared,
    read,
)


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
        factory: dict[str, Any],
    ) -> None:
        super().__init__(
            out_channels,
            settings,
            center_feature_scale=center_feature_scale,
            backend=backend,
            factory=factory,
        )
        if check_flag("without_pointwise", without_pointwise) and in_channels != out_channels:
            raise ValueError(
                f"out_channels must be in_channels = {in_channels} with without_pointwise; "
                f"got {out_channels}"
            )
        self.init = check_choice("init", init, ("average", "zero"))
        if dw_kernel_size is not None:
            check_integer("dw_kernel_size", dw_kernel_size, 1)
        self.dw_kernel_size = dw_kernel_size
        width = math.ceil(settings.offset_mask_channels() / 8) * 8
        self.offset_mask = nn.Linear(in_channels, width, **factory)
        self.offset_mask_dw = self.value_proj = self.output_proj = None
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                in_channels,
                in_channels,
                dw_kernel_size,
                padding=same_padding(dw_kernel_size),
                groups=in_channels,
                **factory,
            )
        if not without_pointwise:
            self.value_proj = nn.Linear(in_channels, out_channels, **factory)
            self.output_proj = nn.Linear(out_channels, out_channels, bias=output_bias, **factory)
        self._initialize()

    def _initializers(self) -> Iterator[tuple[nn.Module | None, Initializer, Initializer]]:
        zeros = nn.init.zeros_
        first = partial(average, self.window) if self.init == "average" else zeros
        yield self.offset_mask, zeros, first
        for projection in (self.value_proj, self.output_proj):
            yield projection, nn.init.xavier_uniform_, zeros

    def _width(self, found: int) -> int:
        """Channels of the input, as the submodule that reads it tells, or as many as were found."""
        for reader in (self.value_proj, self.offset_mask_dw):
            if reader is not None:
                return width_read(reader, found)
        return width_read(self.offset_mask, found)

    def _run(self, x: Tensor, layout: _Layout) -> Tensor:
        """The output for x, which was checked: as one node of autograd where nobody can tell."""
        pixels = x if layout.channels_last else layout.as_map(x)
        dtype = autocast_dtype(x)
        if may_read_past(x):
            formula = self._formula(pixels, dtype, x.dtype, layout)
            if formula is not None:
                return formula.run((x,), (formula.input(pixels),))
        pixels = prepared(pixels, dtype)
        check_dtype("x", pixels, self.offset_mask)
        return layout.leave(self._deform(layout.enter(pixels)))

    def _formula(
        self,
        x: Tensor,
        dtype: torch.dtype,
        wide: torch.dtype,
        layout: _Layout,
        *before: tuple[nn.Module, ...],
    ) -> _ConvFormula | None:
        """The layer as one node of autograd, as a `Part`, of an x that is to be cast to `dtype`."""
        settings, size = self.window, layout.size
        held = self._modules  # a module's own way to its submodules is a slow one
        value_proj, offset_mask = held.get("value_proj"), held["offset_mask"]
        output_proj, depthwise = held.get("output_proj"), held.get("offset_mask_dw")
        if value_proj is None or output_proj is None or offset_mask is None:
            return None
        if self.center_feature_scale or settings.stride != (1, 1) or x.numel() == 0:
            return None
        if depthwise is None:
            parameters = read(*before, (value_proj, offset_mask), (output_proj,))
        elif _is_centered(depthwise):
            parameters = read(*before, (value_proj,), (offset_mask,), (depthwise,), (output_proj,))
        else:
            return None
        if parameters is None:
            return None
        if not are_computed_in(dtype, x.device.type, parameters):
            return None
        first = sum(map(len, before))
        value, predicted = (t.shape[0] for t in parameters.tensors[first : first + 2])
        if not _fits(size, value, predicted, settings):
            return None
        deterministic = ops.must_be_deterministic(x, *parameters.tensors)
        backend = backends.choose("deform_conv", x.device, dtype, deterministic, self.backend)
        return _ConvFormula(self, parameters, dtype, wide, backend, value, layout)

    def _deform(self, x: Tensor, call: Call = called) -> Tensor:
        """[B, Ho, Wo, C_out] from [B, H, W, C_in], contiguous and cast; `call` calls submodules."""
        value = x if self.value_proj is None else call(self.value_proj, x)
        y = windowed_conv(value, self._predict(x, call), self.window, self.backend)
        if self.center_feature_scale:
            y = self._blend(y, value, y)
        return y if self.output_proj is None else call(self.output_proj, y)

    def _predict(self, x: Tensor, call: Call = called) -> Tensor:
        """The operator's `offset_mask` [B, Ho, Wo, M], predicted from the input [B, H, W, C_in]."""
        if self.offset_mask_dw is not None:
            x = call(self.offset_mask_dw, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return call(self.offset_mask, self._at_centers(x))


class _Layout(NamedTuple):
    """How a layer's input and output lie: [B, H·W, C] and [B, H, W, C], or [B, C, H, W] and
    [C, H, W]."""

    channels_last: bool
    dimensions: int
    size: tuple[int, int, int]
    """B, H, W of the input."""
    dense: bool
    """Of an output that is not `channels_last`: whether it is contiguous."""

    def as_map(self, x: Tensor) -> Tensor:
        """[B, H, W, C] of the input."""
        if self.channels_last:
            return self.enter(x)
        return (x[None] if self.dimensions == 3 else x).permute(0, 2, 3, 1)

    def enter(self, pixels: Tensor) -> Tensor:
        """[B, H, W, C] of [B, H·W, C] or itself."""
        return pixels if pixels.dim() == 4 else pixels.view(*self.size, pixels.shape[2])

    def leave(self, y: Tensor) -> Tensor:
        """The output of [B, Ho, Wo, C]."""
        if self.channels_last:
            return y if self.dimensions == 4 else y.flatten(1, 2)
        y = y.permute(0, 3, 1, 2)
        if self.dimensions == 3:
            return y[0].contiguous()
        return y.contiguous() if self.dense else y


class _ConvFormula(Formula):
    """A `DCNv4` or `DCNv4Conv2d` whose output has the size of its input.

        [value, offset_mask] = one product of x;  output = output_proj(deform_conv_packed)

    With a depthwise convolution before `offset_mask`, they are products of different inputs.
    """

    def __init__(
        self,
        layer: _DeformConv,
        parameters: Parameters,
        dtype: torch.dtype,
        wide: torch.dtype,
        backend: str,
        channels: int,
        layout: _Layout,
    ) -> None:
        super().__init__(parameters, dtype, (wide,), backend)
        self.layer, self.window = layer, layer.window
        self.channels, self.layout = channels, layout

    def input(self, x: Tensor) -> Tensor:
        """That of `forward`, of a map [B, H, W, C] or [B, H·W, C]."""
        packed = len(self.parameters.rows) == 2
        return self.prepared(0, x) if packed else prepared(x, self.dtype)

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        return self.layout.leave(self.layer._deform(self.layout.enter(inputs[0]), call))

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, layout = self.layout.enter(inputs[0]), self.layout
        if len(weights) == 2:
            packed = self.project(0, x, *weights[0])
            y = compute(ops.DEFORM_CONV_PACKED, self.backend, packed, self.channels, self.window)
            return layout.leave(F.linear(y, *weights[1])), (y, packed)
        value_proj, offset_mask, depthwise, output_proj = weights
        seen = self._seen(x, *depthwise)
        value, predicted = F.linear(x, *value_proj), F.linear(seen, *offset_mask)
        y = compute(ops.DEFORM_CONV, self.backend, value, predicted, self.window)
        return layout.leave(F.linear(y, *output_proj)), (y, seen, value, predicted)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Kept,
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        (x,), y, last = inputs, kept.pop(0), len(weights) - 1
        grad = grad if self.layout.channels_last else self.layout.as_map(grad)
        grad = grad.reshape(-1, grad.shape[-1])
        of_last = [] if sums is None else [sums.of(last, grad, y.view(-1, y.shape[3]))]
        shape = y.shape
        del y
        rows = x.view(-1, x.shape[-1])
        step = self._packed_backward if last == 1 else self._depthwise_backward
        grad_x, made = step(
            torch.mm(grad, weights[last]).view(shape), rows, weights, kept, sums, needed[0]
        )
        if grad_x is None:
            return (None,), made + of_last
        if not self.layout.channels_last:
            grad_x = grad_x.view(x.shape).permute(0, 3, 1, 2)
            return (grad_x[0] if self.layout.dimensions == 3 else grad_x,), made + of_last
        return (grad_x.view(x.shape),), made + of_last

    def _packed_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        kept: Kept,
        sums: Sums | None,
        needed: bool,
    ) -> tuple[Tensor | None, Weights]:
        call = self.backend, kept.pop(), self.channels, self.window
        (grad,) = compute_backward(ops.DEFORM_CONV_PACKED, grad_y, *call, spent=kept.spent)
        del call, grad_y
        grad = grad.view(-1, grad.shape[3])
        grad_x = multiplied(grad, weights[0], self.wide[0]) if needed else None
        return grad_x, [] if sums is None else [sums.of(0, grad, x)]

    def _depthwise_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        kept: Sequence[Tensor],
        sums: Sums | None,
        needed: bool,
    ) -> tuple[Tensor | None, Weights]:
        seen, value, predicted = kept
        call = self.backend, value, predicted, self.window
        grads = compute_backward(ops.DEFORM_CONV, grad_y, *call)
        grad_value, grad_predicted = (g.view(-1, g.shape[3]) for g in grads)
        module = self._depthwise()
        biased = module.bias is not None
        grad_seen = torch.mm(grad_predicted, weights[1]).view(seen.shape)
        grad_x, *depthwise = ops.centered_conv_backward(
            *(grad_seen, x.view(*seen.shape[:3], -1), weights[2], module.dilation),
            (needed, sums is not None, sums is not None and biased),
        )
        if needed:
            grad_x = grad_x.reshape(x.shape)
            grad_x = torch.addmm(grad_x, grad_value, weights[0]).to(self.wide[0])
        if sums is None:
            return grad_x, []
        rows = seen.view(-1, seen.shape[3])
        weight, bias = depthwise[0].to(sums.dtype), depthwise[1].to(sums.dtype) if biased else None
        made = [sums.of(0, grad_value, x), sums.of(1, grad_predicted, rows), (weight, bias)]
        return grad_x, made

    def _seen(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `offset_mask` reads, contiguous."""
        module = self._depthwise()
        if not is_compiling():
            seen: Tensor = module._conv_forward(x.permute(0, 3, 1, 2), weight, bias)
            return seen.permute(0, 2, 3, 1).contiguous()
        seen = ops.CENTERED_CONV.dispatch(self.backend, x, weight, module.dilation)
        return seen if bias is None else seen + bias

    def _depthwise(self) -> Any:
        return self.layer._modules["offset_mask_dw"]


def _is_centered(depthwise: nn.Module) -> bool:
    """Whether this is a convolution whose output has the size of its input, padded with zeros alike
    on both sides."""
    return (
        type(depthwise) is nn.Conv2d
        and depthwise.padding_mode == "zeros"
        and depthwise.stride == (1, 1)
        and depthwise.padding
        in ("same", ops.centered_padding(depthwise.kernel_size, depthwise.dilation))
        and all(size % 2 for size in depthwise.kernel_size)
    )


@remembered
def _fits(size: tuple[int, int, int], value: int, predicted: int, window: Window) -> bool:
    """Whether a convolution of B, H, W and these channels has an output of the same size."""
    if window.output_size(*size[1:]) != size[1:]:
        return False
    check_sizes_of_conv((*size, value), (*size, predicted), window)
    return True


@known
class DCNv4(_DeformConv, OriginalNames):
    r"""Deformable Convolution v4 on channels-last maps, flattened or not.

    Every output pixel is a weighted sum of K points of each group of channels. Their offsets and
    weights are predicted from the input at that pixel. Without `softmax`, weights are unbounded.

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
        offset_scale: multiplies the kernel's grid and the offsets.
        dw_kernel_size: kernel of a depthwise convolution before `offset_mask`. None: there is none.
        center_feature_scale: blend each output with the value at its centre, as above.
        remove_center: leave out the kernel's central point.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: no `value_proj` and no `output_proj`.
        softmax: normalise the K weights of a group, as DCNv3 does.
        init: "average": offsets are 0 and weights 1/K, so a new layer is a box filter, and passes
            gradients. "zero": both are 0 as in the paper, for a residual block; elsewhere the layer
            outputs a constant and passes no gradient. With `softmax`, both are a box filter.
        backend: as in `functional.deform_conv`.
        device, dtype: of the parameters, as in PyTorch's layers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: Xiong et al., Efficient Deformable ConvNets, CVPR 2024, arXiv:2401.06197. Parameters
    are named as in its published checkpoints.

    Example:
        >>> import torch
        >>> from dcnv4 import DCNv4
        >>> layer = DCNv4(channels=64, kernel_size=3, group=4)
        >>> layer(torch.randn(2, 32 * 48, 64), shape=(32, 48)).shape
        torch.Size([2, 1536, 64])
    """

    @other_words(groups="group", padding="pad", bias="output_bias")
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
            softmax=softmax,
        )
        super().__init__(
            channels,
            channels,
            settings,
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            output_bias=check_flag("output_bias", output_bias),
            without_pointwise=without_pointwise,
            init=init,
            backend=backend,
            factory=factory(device, dtype),
        )
        self.channels = channels

    @property
    def K(self) -> int:  # noqa: N802, the original's name
        """G·K, points of all groups, as the original layer counts them."""
        return self.window.groups * self.window.points()

    @property
    def without_pointwise(self) -> bool:
        return self.value_proj is None

    def forward(self, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [B, H·W, C] or [B, H, W, C], in the dtype of the parameters; under autocast in any.
            shape: (H, W). None: x is [B, H, W, C], or its map is square.

        Returns:
            [B, Ho·Wo, C] or [B, Ho, Wo, C], like x; `output_shape` tells (Ho, Wo). In the dtype
            of x; under autocast in the autocast dtype.

        Raises:
            TypeError: x is not a floating-point tensor, or `shape` not a pair.
            ValueError: x or `shape` does not fit the layer or each other.
            RuntimeError: the backend asked for cannot run here; the reasons are listed.
        """
        if isinstance(x, Proxy):
            return as_leaf(DCNv4, self, x, shape)
        return self._run(x, self._layout(x, shape))

    def _part(self, x: Tensor, wide: torch.dtype, *before: tuple[nn.Module, ...]) -> Formula | None:
        """As `Part`, of a map."""
        return self._formula(x, x.dtype, wide, self._layout(x, None), *before)

    def sampling_points(
        self, x: Tensor, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where the layer looks: the points that every output pixel sums, and their weights.

        Args:
            x, shape: as `forward` takes them.

        Returns:
            positions [B, Ho, Wo, G, K, 2] in (x, y) order, in input pixels with integer centres,
            and weights [B, Ho, Wo, G, K].
        """
        return self._points(self._predict(self._layout(x, shape).as_map(x)))

    def _layout(self, x: Tensor, shape: Sequence[int] | None) -> _Layout:
        """Of what `forward` takes."""
        layout = "[B, H*W, C] or [B, H, W, C]"
        check_tensor("x", x, layout, (3, 4))
        if x.shape[-1] != (width := self._width(x.shape[-1])):
            hint = "; permute an NCHW tensor, or use DCNv4Conv2d" if x.dim() == 4 else ""
            raise ValueError(f"x must be {layout} with C = {width}; got {list(x.shape)}{hint}")
        if shape is not None:
            check_shape(shape)
        if x.dim() == 4:
            if shape is not None and tuple(shape) != tuple(x.shape[1:3]):
                raise ValueError(f"shape must be x's {tuple(x.shape[1:3])}; got {tuple(shape)}")
            return _Layout(True, 4, (*x.shape[:3],), False)
        length = x.shape[1]
        height, width = (int(length**0.5),) * 2 if shape is None else shape
        if height * width != length:
            got = "None, which means a square map" if shape is None else f"{(height, width)}"
            raise ValueError(
                f"shape must be (H, W) with H*W = {length}, the length of x; got {got}"
            )
        return _Layout(True, 3, (x.shape[0], height, width), False)

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"


class DCNv4Conv2d(_DeformConv):
    """Deformable Convolution v4 with the arguments, the defaults and the layout of `nn.Conv2d`.

    Only `groups` means something else: the groups of channels that share points. With any number of
    groups, every output channel depends on every input channel.

    It is a `DCNv4` whose `value_proj` leads from `in_channels` to `out_channels`, for [B, C, H, W].
    A `channels_last` tensor is not copied, and its output is `channels_last`, too.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: an int or (height, width).
        stride: an int or (height, width).
        padding: an int, (height, width), "valid" for 0, or "same", which keeps the size at stride 1
            and divides it by a larger stride (`nn.Conv2d` has no such). For "same",
            dilation·(kernel_size - 1) must be even.
        dilation: an int or (height, width).
        groups: G, groups of channels with offsets and weights of their own; must divide
            `out_channels`. None: groups of 16 channels, or the next larger size that divides.
        bias: whether the output projection has a bias.
        padding_mode: "zeros", the only one.
        device, dtype: of the parameters.
        without_pointwise: no `value_proj`, no output projection and no bias, for blocks that have
            pointwise convolutions of their own; `out_channels` must be `in_channels`.
        offset_scale, dw_kernel_size, center_feature_scale, remove_center, softmax, init, backend:
            as in `DCNv4`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Source: as `DCNv4`.

    Example:
        >>> import torch
        >>> from dcnv4 import DCNv4Conv2d
        >>> layer = DCNv4Conv2d(3, 64, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 64, 16, 24])
    """

    # What code that takes any convolution reads of it, and may change.
    stride, padding, dilation = pair("stride"), pair("padding"), pair("dilation")
    padding_mode, transposed, output_padding = "zeros", False, (0, 0)

    @other_words(group="groups", pad="padding", output_bias="bias", channels="in_channels")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
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
        check_integer("in_channels", in_channels, 1)
        check_integer("out_channels", out_channels, 1)
        check_choice("padding_mode", padding_mode, ("zeros",))
        settings = window(
            kernel_size,
            stride,
            _as_number(padding),
            dilation,
            _groups_of_16(out_channels) if groups is None else groups,
            offset_scale,
            remove_center,
            softmax,
        )
        check_divides("groups", settings.groups, out_channels, f"the {out_channels} channels")
        if padding == "same":
            settings = settings._replace(padding=_same_padding(settings))
        super().__init__(
            in_channels,
            out_channels,
            settings,
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            output_bias=check_flag("bias", bias),
            without_pointwise=without_pointwise,
            init=init,
            backend=backend,
            factory=factory(device, dtype),
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size, self.groups = settings.kernel_size, settings.groups

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [B, in_channels, H, W], contiguous or `channels_last`, or [in_channels, H, W]; dtypes
                as in `DCNv4.forward`.

        Returns:
            [B, out_channels, Ho, Wo] in the memory format of x, or [out_channels, Ho, Wo].

        Raises:
            TypeError, ValueError, RuntimeError: as in `DCNv4.forward`.
        """
        if isinstance(x, Proxy):
            return as_leaf(DCNv4Conv2d, self, x)
        return self._run(x, self._layout(x))

    def sampling_points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the layer looks on x, as `forward` takes it; returns as `DCNv4.sampling_points`.

        An x without a batch dimension counts as a batch of 1.
        """
        return self._points(self._predict(self._layout(x).as_map(x)))

    def _layout(self, x: Tensor) -> _Layout:
        """Of what `forward` takes."""
        layout = "[B, in_channels, H, W] or [in_channels, H, W]"
        check_tensor("x", x, layout, (4, 3))
        if x.shape[-3] != (width := self._width(x.shape[-3])):
            raise ValueError(f"x must be {layout} with in_channels = {width}; got {list(x.shape)}")
        size = x.shape[0] if x.dim() == 4 else 1, x.shape[-2], x.shape[-1]
        given = _Layout(False, x.dim(), size, False)
        return given._replace(dense=not given.as_map(x).is_contiguous())

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}"


def _groups_of_16(channels: int) -> int:
    """How many groups make them of 16 channels, or of the next larger size that divides."""
    return next(g for g in range(max(channels // 16, 1), 0, -1) if channels % g == 0)


def _as_number(padding: str | int | Sequence[int]) -> int | Sequence[int]:
    """The padding, 0 for one that is named."""
    if not isinstance(padding, str):
        return padding
    check_choice("padding", padding, ("valid", "same"))
    return 0


def _same_padding(window: Window) -> tuple[int, int]:
    """What keeps the size at stride 1."""
    spans = [d * (k - 1) for d, k in zip(window.dilation, window.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        raise ValueError(
            "padding must be numbers where dilation*(kernel_size - 1) is odd; got 'same' "
            f"with kernel_size {window.kernel_size}, dilation {window.dilation}"
        )
    return window.center()
