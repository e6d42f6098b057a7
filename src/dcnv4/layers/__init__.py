"""The layers: parameters, initialisation, projections and layouts around the operators."""

from .attention import FlashDeformAttn
from .conv import DCNv4, DCNv4Conv2d
from .dcnv3 import DCNv3, DCNv3_pytorch

__all__ = ["DCNv3", "DCNv3_pytorch", "DCNv4", "DCNv4Conv2d", "FlashDeformAttn"]
