"""The field's functions and layers by their own signatures, computed by this package's operators.

A repository written for one of them runs after changing its import. There is a module for each
origin, and all names are here too, but for those of `extension`, `lwdetr` and `ultralytics`, which
others have as well; `deform_conv2d` is here torchvision's, `DeformConv2d` mmcv's.
The classes that are named after autograd functions have their `apply` and nothing else of them;
gradients of any order come from the operators. `im2col_step` is accepted and ignored.
"""

from . import (
    deformable_detr,
    extension,
    fork,
    lwdetr,
    mmcv,
    opengvlab,
    rtdetr,
    torchvision,
    ultralytics,
)
from .deformable_detr import MSDeformAttn, MSDeformAttnFunction, ms_deform_attn_core_pytorch
from .fork import (
    compute_offset_mask_channels,
    dcnv4_forward,
    dcnv4_forward_pytorch,
    flash_deform_attn,
)
from .mmcv import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    MultiScaleDeformableAttnFunction_fp16,
    MultiScaleDeformableAttnFunction_fp32,
    modulated_deform_conv2d,
    multi_scale_deformable_attn_pytorch,
)
from .opengvlab import DCNv3Function, DCNv4Function, FlashDeformAttnFunction, dcnv3_core_pytorch
from .rtdetr import deformable_attention_core_func, deformable_attention_core_func_v2
from .torchvision import deform_conv2d

__all__ = [
    "DCNv3Function",
    "DCNv4Function",
    "DeformConv2d",
    "DeformConv2dPack",
    "FlashDeformAttnFunction",
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "MultiScaleDeformableAttnFunction_fp16",
    "MultiScaleDeformableAttnFunction_fp32",
    "compute_offset_mask_channels",
    "dcnv3_core_pytorch",
    "dcnv4_forward",
    "dcnv4_forward_pytorch",
    "deform_conv2d",
    "deformable_attention_core_func",
    "deformable_attention_core_func_v2",
    "deformable_detr",
    "extension",
    "flash_deform_attn",
    "fork",
    "lwdetr",
    "mmcv",
    "modulated_deform_conv2d",
    "ms_deform_attn_core_pytorch",
    "multi_scale_deformable_attn_pytorch",
    "opengvlab",
    "rtdetr",
    "torchvision",
    "ultralytics",
]
