"""The layers: parameters, initialisation, projections and layouts around the operators."""

from .attention import FlashDeformAttn
from .conv import DCNv4, DCNv4Conv2d
from .dcnv3 import DCNv3

__all__ = ["DCNv3", "DCNv4", "DCNv4Conv2d", "FlashDeformAttn"]
