"""Deformable Convolution v4 and multi-scale deformable attention for PyTorch."""

from . import backends, flops, functional, sharding  # noqa: F401, the last makes itself known
from .compat.fork import dcnv4_forward, dcnv4_forward_pytorch, flash_deform_attn
from .conversion import convert
from .layers import DCNv4, DCNv4Conv2d, FlashDeformAttn

dcnv4 = DCNv4

__version__ = "0.2.0"
__all__ = [
    "DCNv4",
    "DCNv4Conv2d",
    "FlashDeformAttn",
    "backends",
    "convert",
    "dcnv4",
    "dcnv4_forward",
    "dcnv4_forward_pytorch",
    "flash_deform_attn",
    "flops",
    "functional",
]
