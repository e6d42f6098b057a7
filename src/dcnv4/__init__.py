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


class _OfThePackage:
    """What the class says of a name that the package has: both may be called dcnv4."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: object, owner: type) -> None:
        raise AttributeError(
            f"{owner.__name__} is a layer, which has no {self.name}: write `import dcnv4`, and not "
            f"`from dcnv4 import dcnv4`, to use dcnv4.{self.name}"
        )


for _name in (
    *("DCNv4Conv2d", "FlashDeformAttn", "backends", "checkpoints", "compat", "convert", "flops"),
    *("functional", "integrations", "models", "onnx", "visualize"),
):
    setattr(DCNv4, _name, _OfThePackage(_name))
