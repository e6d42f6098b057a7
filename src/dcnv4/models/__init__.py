"""FlashInternImage and InternImage in timm's registry, once this module is imported:

    import timm, dcnv4.models
    model = timm.create_model("flash_internimage_t", pretrained=True)

It needs timm: `pip install ".[models]"` in a checkout.
"""

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise ImportError(f"dcnv4.models needs timm (pip install timm); got {error}") from error

from .internimage import InternImage
from .rates import parameter_groups

__all__ = ["InternImage", "parameter_groups"]
