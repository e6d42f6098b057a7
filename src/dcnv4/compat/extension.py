"""The compiled extension of Deformable DETR, for code that imports it: nothing is compiled.

That is `MultiScaleDeformableAttention` of Deformable DETR and of its copies in DINO, Mask2Former,
ViT-Adapter and others, `groundingdino._C` of Grounding DINO, and `detrex._C`.
"""

from __future__ import annotations

import sys

from torch import Tensor

from .. import ops
from ..functional import attention_call
from .deformable_detr import MSDeformAttnFunction, _check_starts

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward", "stand_in"]


def stand_in(*names: str) -> None:
    """Be what `import` finds under these names, until the process ends.

    Args:
        names: of extensions that nobody has imported yet, such as "groundingdino._C".

    Raises:
        RuntimeError: a name is another module's that has been imported.

    Example:
        >>> from dcnv4.compat import extension
        >>> extension.stand_in("MultiScaleDeformableAttention", "groundingdino._C")
        >>> import MultiScaleDeformableAttention as MSDA
        >>> MSDA.ms_deform_attn_forward.__module__
        'dcnv4.compat.extension'
    """
    this = sys.modules[__name__]
    for name in names:
        if sys.modules.get(name, this) is not this:
            raise RuntimeError(
                f"{name} must not have been imported before; got {sys.modules[name]}"
            )
    sys.modules.update(dict.fromkeys(names, this))


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """`MSDeformAttnFunction.apply` of these arguments.

    Args:
        value to im2col_step: as in `MSDeformAttnFunction.apply`.

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159.

    Example:
        >>> import torch
        >>> from dcnv4.compat.extension import ms_deform_attn_forward
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value = torch.randn(2, 120, 8, 32)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> ms_deform_attn_forward(value, shapes, starts, locations, weights, 64).shape
        torch.Size([2, 50, 256])
    """
    return MSDeformAttnFunction.apply(
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The gradients of `ms_deform_attn_forward`.

    Args:
        value to attn_weight: as there.
        grad_output: [B, Q, G·D], the gradient of what it returned.
        im2col_step: ignored.

    Returns:
        Those of `value`, `sampling_loc` and `attn_weight`, each in their shape and dtype.

    Raises:
        TypeError, ValueError: as there.

    Source: as there.

    Example:
        >>> import torch
        >>> from dcnv4.compat.extension import ms_deform_attn_backward
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value, grad = torch.randn(2, 120, 8, 32), torch.randn(2, 50, 256)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> grads = ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, 64)
        >>> [tuple(grad.shape) for grad in grads]
        [(2, 120, 8, 32), (2, 50, 8, 2, 4, 2), (2, 50, 8, 2, 4)]
    """
    _check_starts(level_start_index, spatial_shapes)
    call = attention_call(value, spatial_shapes, sampling_loc, attn_weight)
    shape = ops.MS_DEFORM_ATTN.output_shape(*call)
    if grad_output.shape != shape:
        raise ValueError(f"grad_output must be {list(shape)}; got {list(grad_output.shape)}")
    grads = ops.MS_DEFORM_ATTN.dispatch_backward(grad_output.to(call[1].dtype), *call)
    inputs = value, sampling_loc, attn_weight
    return [g.to(t.dtype).view(t.shape) for g, t in zip(grads, inputs, strict=True)]
