"""Where whole modules that were saved before `layers` look for their classes."""

from .layers import DCNv4, DCNv4Conv2d, FlashDeformAttn

__all__ = ["DCNv4", "DCNv4Conv2d", "FlashDeformAttn"]
