"""What layers share: the window, its points, the centre blend, how projections begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_backend, check_flag, window
from ..geometry import Window, conv_points

Init = TypeVar("Init", bound=Callable[..., None])


def other_words(**right: str) -> Callable[[Init], Init]:
    """Have a layer's `__init__` name the right word where it is given another layer's."""

    def decorate(init: Init) -> Init:
        @wraps(init)
        def checked(self: nn.Module, *arguments: Any, **settings: Any) -> None:
            for wrong in right.keys() & settings.keys():
                raise TypeError(
                    f"{wrong} must be given to {type(self).__name__} as {right[wrong]}; "
                    f"got {wrong} = {settings[wrong]!r}"
                )
            init(self, *arguments, **settings)

        return checked  # type: ignore[return-value]

    return decorate


class WindowedLayer(nn.Module):
    """What every layer around `deform_conv` shares: its window, its points, its centre blend."""

    def __init__(
        self,
        channels: int,
        settings: Window,
        *,
        center_feature_scale: bool,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.window = settings
        self.backend = check_backend(backend)
        self.center_feature_scale = check_flag("center_feature_scale", center_feature_scale)
        if center_feature_scale:
            weight, bias = (settings.groups, channels), (settings.groups,)
            self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias = (
                nn.Parameter(torch.zeros(shape, **factory)) for shape in (weight, bias)
            )

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(Ho, Wo) of the output for an input of `shape` (H, W)."""
        return self.window.output_size(*shape)

    def extra_repr(self) -> str:
        defaults = window(groups=self.window.groups)._asdict()
        changed = {k: v for k, v in self.window._asdict().items() if v != defaults[k]}
        settings = {"kernel_size": self.window.kernel_size, "groups": self.window.groups, **changed}
        if self.center_feature_scale:
            settings["center_feature_scale"] = True
        if self.backend is not None:
            settings["backend"] = self.backend
        return ", ".join(f"{key}={setting!r}" for key, setting in settings.items())

    def _blend(self, y: Tensor, value: Tensor, source: Tensor) -> Tensor:
        """y·(1 - s) + value·s at the windows' centres, s = sigmoid(linear(source)) per group."""
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        scale = F.linear(source, weight, bias).sigmoid()[..., None]
        split = (self.window.groups, -1)
        center = self._at_centers(value).unflatten(-1, split)
        blended: Tensor = y.unflatten(-1, split) * (1 - scale) + center * scale
        return blended.flatten(-2)

    def _points(self, offset_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, Ho, Wo, G, K, 2] and weights [B, Ho, Wo, G, K] in `offset_mask`."""
        batch, rows, columns = offset_mask.shape[:3]
        device = offset_mask.device
        row = torch.arange(rows, device=device).repeat_interleave(columns).repeat(batch)
        column = torch.arange(columns, device=device).repeat(batch * rows)
        x, y, weights = conv_points(offset_mask.flatten(0, 2), self.window)
        origin_x, origin_y = (o[:, None, None] for o in self.window.origins(row, column))
        shape = (batch, rows, columns, *weights.shape[1:])
        positions = torch.stack((origin_x + x, origin_y + y), -1)
        return positions.view(*shape, 2), weights.reshape(shape)

    def _at_centers(self, x: Tensor) -> Tensor:
        """The pixels [B, Ho, Wo, C] at the centres of the windows, the nearest for one outside."""
        height, width = x.shape[1:3]
        rows, columns = self.window.output_size(height, width)
        if self.window.stride == (1, 1) and (rows, columns) == (height, width):
            return x
        column, row = self.window.origins(
            torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        )
        return x[:, row.clamp(0, height - 1)[:, None], column.clamp(0, width - 1)]


@torch.no_grad()
def reset_projection(projection: nn.Linear) -> None:
    nn.init.xavier_uniform_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
