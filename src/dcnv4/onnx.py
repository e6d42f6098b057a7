"""Export to ONNX: the operators become gathers and products, or standard operators of their kind.

`lower` rewrites an exported program, `export` goes all the way from a model to a file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import geometry, ops
from .arguments import check_choice
from .export import decompositions
from .geometry import Reference, Window, sum_dtype, unpacked

__all__ = ["export", "lower"]


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Mapping[str, Mapping[int, str] | Sequence[int]] | None = None,
    deform_conv: str = "gather",
    attention: str = "gather",
    opset_version: int | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """Write `model` as ONNX, in operators of the standard opset alone.

    Args:
        model: a module with any of this package's layers or operators; call `eval` on it first.
        args: example inputs. Sizes that may change must be 2 or more in them.
        path: the file to write. None: no file.
        kwargs: example inputs by name.
        dynamic_shapes: which sizes may change, as in `torch.export.export`; a string is a `Dim` of
            any size.
        dynamic_axes: the same in the form of PyTorch's old exporter: for the name of an input, in
            `input_names` or in `forward`, {axis: name} or a list of axes. Those of outputs follow.
        deform_conv: "gather": index arithmetic, `Gather` and `MatMul`. "DeformConv": the operator
            of that name, which fewer runtimes have.
        attention: the same for ms_deform_attn: "gather", or "grid_sample": one `GridSample` for
            each level, whose size must then be numbers in the model.
        opset_version: of the standard opset. None: the lowest, 18, or 19 with `DeformConv`.
        verbose: print the exporter's progress.
        options: more keywords of `torch.onnx.export`, such as `input_names`.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        ImportError: onnx or onnxscript is missing, or torch is older than 2.8.
        ValueError: an argument of the wrong range.
        TypeError: `dynamo` is among the options.

    Example:
        >>> import torch
        >>> import dcnv4.onnx
        >>> model = dcnv4.DCNv4Conv2d(3, 16, padding=1).eval()
        >>> image = torch.randn(1, 3, 32, 48)
        >>> program = dcnv4.onnx.export(model, (image,), "model.onnx", deform_conv="DeformConv")
        >>> sum(node.op_type == "DeformConv" for node in program.model.graph)
        1
    """
    _require_torch()
    opset_version = _opset(opset_version, deform_conv)
    _require_packages()
    if "dynamo" in options:
        raise TypeError(
            "dynamo must not be given, for the new exporter writes the file; got "
            f"{options['dynamo']!r}; torch.onnx.export(..., dynamo=False) is the old one"
        )
    if dynamic_axes is not None:
        if dynamic_shapes is not None:
            raise ValueError("dynamic_axes must be None beside dynamic_shapes; got both")
        inputs = inspect.signature(model.forward).bind(*args, **(kwargs or {}))
        dynamic_shapes = _from_axes(dynamic_axes, inputs.arguments, **options)
    with torch.no_grad():
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=tree_map(_dimension, dynamic_shapes)
        )
    saving = {save: options.pop(own) for own, save in _SAVING.items() if own in options}
    written: Any = torch.onnx.export(
        lower(program, deform_conv=deform_conv, attention=attention),
        dynamo=True,
        opset_version=opset_version,
        dynamic_shapes=tree_map(_dimension_name, dynamic_shapes),
        verbose=verbose,
        **options,
    )
    _forget_sizes(written)
    if path is not None:
        written.save(path, **{"external_data": True, **saving})
    return written


# What writes the file, by PyTorch's names, and by those of its program.
_SAVING = {
    "export_params": "include_initializers",
    "keep_initializers_as_inputs": "keep_initializers_as_inputs",
    "external_data": "external_data",
}


def _opset(version: int | None, deform_conv: str) -> int:
    """The version that is written."""
    check_choice("deform_conv", deform_conv, tuple(_DEFORM_CONV))
    if deform_conv == "DeformConv":
        if version is not None and version < 19:
            raise ValueError(
                f"opset_version must be >= 19, the first with DeformConv; got {version}; "
                'deform_conv="gather" needs 18'
            )
        return version or 19
    if version is not None and version < 18:
        raise ValueError(
            "opset_version must be >= 18, the lowest that PyTorch's new exporter writes; got "
            f"{version}; torch.onnx.export(..., dynamo=False) writes 16"
        )
    return version or 18


def _forget_sizes(program: Any) -> None:
    """Drop what is noted of the sizes of intermediate results.

    ONNX Runtime keeps a buffer for results of the same noted size until the last of them was used:
    without the notes, a portable layer takes half the memory. They can be inferred.
    """
    outputs = set(program.model.graph.outputs)
    for node in program.model.graph:
        for result in node.outputs:
            if result not in outputs:
                result.shape = None


def _from_axes(
    axes: Mapping[str, Mapping[int, str] | Sequence[int]],
    inputs: Mapping[str, Any],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The `dynamic_shapes` of the arguments of `forward` that mean these `dynamic_axes`."""
    leaves, structure = tree_flatten(dict(inputs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    names = input_names or [name for name, value in inputs.items() if isinstance(value, Tensor)]
    known = (*names, *(output_names or ()))
    if len(names) != len(tensors) or not set(axes) <= set(known):
        raise ValueError(
            "dynamic_axes must name inputs or outputs, and input_names each of the "
            f"{len(tensors)} tensors of nested inputs = {', '.join(known)}; got {', '.join(axes)}"
        )
    shapes: list[Any] = [None] * len(leaves)
    for i, name in zip(tensors, names, strict=True):
        given, rank = axes.get(name, ()), leaves[i].ndim
        if not all(-rank <= axis < rank for axis in given):
            raise ValueError(
                f"dynamic_axes of {name} must be in [{-rank}, {rank}); got {list(given)}"
            )
        sizes = given.values() if isinstance(given, Mapping) else [torch.export.Dim.DYNAMIC] * rank
        shapes[i] = {axis % rank: size for axis, size in zip(given, sizes, strict=False)}
    dynamic_shapes: dict[str, Any] = tree_unflatten(shapes, structure)
    return dynamic_shapes


def _dimension(size: Any) -> Any:
    """What `torch.export.export` takes for a size that has only a name."""
    return torch.export.Dim.DYNAMIC if isinstance(size, str) else size


def _dimension_name(size: Any) -> Any:
    """What names the axis of a size in the ONNX graph."""
    return size.__name__ if isinstance(size, torch.export.Dim) else size


def lower(
    program: torch.export.ExportedProgram,
    *,
    deform_conv: str = "gather",
    attention: str = "gather",
) -> Any:
    """An exported program in which operators of ONNX replace this package's.

    `torch.onnx.export(lowered, …, dynamo=True)` takes it as it is.

    Args:
        program: from `torch.export.export`.
        deform_conv, attention: as in `export`.

    Returns:
        The `torch.export.ExportedProgram`; with `DeformConv` it is not meant to be run in PyTorch.

    Raises:
        ImportError: torch is older than 2.8.
        TypeError: `program` is not an exported program.
        ValueError: an unknown `deform_conv` or `attention`, or level sizes that "grid_sample"
            cannot take.

    Example:
        >>> import torch
        >>> import dcnv4.onnx
        >>> model = dcnv4.DCNv4Conv2d(3, 16, padding=1).eval()
        >>> program = torch.export.export(model, (torch.randn(1, 3, 32, 48),))
        >>> lowered = dcnv4.onnx.lower(program)
        >>> onnx = torch.onnx.export(lowered, f="model.onnx", dynamo=True, verbose=False)
    """
    _require_torch()
    check_choice("deform_conv", deform_conv, tuple(_DEFORM_CONV))
    check_choice("attention", attention, tuple(_ATTENTION))
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(
            f"program must be what torch.export.export returns; got {type(program).__name__}"
        )
    table = decompositions() | _DEFORM_CONV[deform_conv] | _ATTENTION[attention]
    return program.run_decompositions(table)


def _require_torch() -> None:
    if not hasattr(getattr(torch.onnx, "ops", None), "symbolic"):
        raise ImportError(
            f"dcnv4.onnx needs torch >= 2.8; got {torch.__version__}; "
            "PyTorch's old exporter, the torch.onnx.export of torch >= 2.1, does without"
        )


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"dcnv4.onnx.export needs {' and '.join(missing)}: pip install onnx onnxscript"
        )


def _deform_conv(*arguments: Any) -> Tensor:
    _, value, offset_mask, window = ops.DeformConv.unflatten(*arguments)
    return _lowered_conv(value, offset_mask, window)


def _deform_conv_packed(*arguments: Any) -> Tensor:
    _, packed, channels, window = ops.DeformConvPacked.unflatten(*arguments)
    return _lowered_conv(*unpacked(packed, channels), window)


def _lowered_conv(value: Tensor, offset_mask: Tensor, window: Window) -> Tensor:
    """A depthwise `DeformConv` of ones, whose mask is the weights.

    It adds offsets to the points of the undeformed kernel, which run rows outermost, y before x.
    """
    (kh, kw), channels = window.kernel_size, value.shape[3]
    # The operator computes coordinates in its only dtype, which must hold them.
    dtype = _exact_dtype(value, offset_mask)
    offsets, weights = window.split(offset_mask.to(dtype))
    if window.softmax:
        weights = weights.softmax(-1)
    if window.remove_center:
        offsets = _with_zero(offsets, window.center_index(), -2)
        weights = _with_zero(weights, window.center_index(), -1)
    offsets = offsets.unflatten(-2, (kw, kh))
    if window.offset_scale != 1:
        # An integer times a power of two, because the exporter rounds numbers to float32.
        fraction, exponent = math.frexp(window.offset_scale)
        digits = torch.full((), int(fraction * 2**53), dtype=torch.int64, device=value.device)
        scale = digits.to(dtype) * 2.0 ** (exponent - 53)
        cells = window._replace(remove_center=False).cells_beside(offsets)
        offsets = scale * offsets + (scale - 1) * cells.unflatten(0, (kw, kh))
    output: Tensor = torch.onnx.ops.symbolic(
        "DeformConv",
        (
            value.to(dtype).permute(0, 3, 1, 2),
            torch.ones(channels, 1, kh, kw, dtype=dtype, device=value.device),
            offsets.flip(-1).permute(0, 3, 5, 4, 6, 1, 2).flatten(1, 4),
            None,
            weights.unflatten(-1, (kw, kh)).permute(0, 3, 5, 4, 1, 2).flatten(1, 3),
        ),
        {
            "kernel_shape": [kh, kw],
            "strides": list(window.stride),
            "pads": list(window.padding) * 2,
            "dilations": list(window.dilation),
            "group": channels,
            "offset_group": window.groups,
        },
        dtype=dtype,
        shape=(value.shape[0], channels, *offset_mask.shape[1:3]),
        version=19,
    )
    return output.to(value.device, value.dtype).permute(0, 2, 3, 1)


def _with_zero(points: Tensor, index: int, dim: int) -> Tensor:
    """The points with one more, of zeros, at `index`."""
    before, after = points.split((index, points.shape[dim] - index), dim)
    zero = torch.zeros_like(points.narrow(dim, 0, 1))
    return torch.cat((before, zero, after), dim)


def _exact_dtype(value: Tensor, coordinates: Tensor) -> torch.dtype:
    return torch.promote_types(sum_dtype(value.dtype), coordinates.dtype)


def _located_grid_sample(*arguments: Any) -> Tensor:
    _, *call = ops.DeformAttn.unflatten(*arguments)
    return _grid_sample(*call)


def _offset_grid_sample(*arguments: Any) -> Tensor:
    call = ops.DeformAttnFromOffsets.unflatten(*arguments)
    _, value, shapes, points, offsets, weights, box_normalizer, softmax, _ = call
    return _grid_sample(value, shapes, offsets, weights, softmax, Reference(points, box_normalizer))


def _grid_sample(
    value: Tensor,
    sizes: Any,
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    place: Reference | None = None,
) -> Tensor:
    if isinstance(sizes, Tensor):
        raise ValueError(
            "spatial_shapes must be numbers with attention = 'grid_sample'; got a tensor"
        )
    dtype = _exact_dtype(value, coordinates)
    locations = coordinates.to(dtype)
    if place is not None:
        place = place._replace(points=place.points.to(dtype))
        heights, widths, _ = geometry.levels(sizes, value.device)
        x, y = geometry.attn_points(locations, heights, widths, place)
        locations = torch.stack(((x + 0.5) / widths, (y + 0.5) / heights), -1)
    heads = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.to(dtype).flatten(3)
    weights = weights.softmax(-1) if softmax else weights
    levels = heads.split([height * width for height, width in sizes], -1)
    samples = [
        F.grid_sample(level.unflatten(-1, size), grids[:, :, i], align_corners=False)
        for i, (level, size) in enumerate(zip(levels, sizes, strict=True))
    ]
    counted = torch.cat(samples, -1) * weights.transpose(1, 2).flatten(0, 1)[:, None]
    output: Tensor = counted.sum(-1).unflatten(0, (value.shape[0], value.shape[2]))
    return output.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


# What is made of an operator other than what any runtime knows.
_DEFORM_CONV: dict[str, dict[Any, Callable[..., Tensor]]] = {
    "gather": {},
    "DeformConv": {
        torch.ops.dcnv4.deform_conv.default: _deform_conv,
        torch.ops.dcnv4.deform_conv_packed.default: _deform_conv_packed,
    },
}
_ATTENTION: dict[str, dict[Any, Callable[..., Tensor]]] = {
    "gather": {},
    "grid_sample": {
        torch.ops.dcnv4.ms_deform_attn.default: _located_grid_sample,
        torch.ops.dcnv4.ms_deform_attn_from_offsets.default: _offset_grid_sample,
    },
}
