"""Deformable Convolution v4 and multi-scale deformable attention for PyTorch."""

from . import backends, flops, functional
from .conversion import convert
from .layers import DCNv4, DCNv4Conv2d, FlashDeformAttn

dcnv4 = DCNv4

__version__ = "0.1.0"
__all__ = [
    "DCNv4",
    "DCNv4Conv2d",
    "FlashDeformAttn",
    "backends",
    "convert",
    "dcnv4",
    "flops",
    "functional",
]
