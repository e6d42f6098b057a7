"""How fast the parameters of a model learn."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

_DEFORMABLE = ("offset", "attention_weights", "center_feature_scale_proj")


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    deformable_scale: float = 0.1,
) -> list[dict[str, Any]]:
    """timm's parameter groups, in which what predicts points and weights learns more slowly.

    timm's optimizers and schedules multiply the learning rate by a group's `lr_scale`.

    Args:
        model: its `group_matcher` says what a layer is, its `no_weight_decay` what does not decay.
        weight_decay: of all parameters but biases, norms and scales.
        layer_decay: the rate of a layer divided by that of the next. None: all have the same.
        deformable_scale: the rate of `offset_mask`, `offset_mask_dw`, DCNv3's `offset`,
            `sampling_offsets`, `attention_weights` and the centre blend, divided by that of other
            parameters. FlashInternImage-L was fine-tuned with 0.1.

    Returns:
        Groups of parameters with `weight_decay` and `lr_scale`.

    Example:
        >>> from timm.optim import create_optimizer_v2
        >>> from dcnv4.models import InternImage, parameter_groups
        >>> model = InternImage(channels=16, depths=(1, 1, 1, 1))
        >>> optimizer = create_optimizer_v2(model, "adamw", lr=1.0, param_group_fn=parameter_groups)
        >>> sorted({group["lr_scale"] for group in optimizer.param_groups})
        [0.1, 1.0]
    """
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_weight_decay_list": getattr(model, "no_weight_decay", set)(),
    }
    if layer_decay is None:
        groups = param_groups_weight_decay(model, **settings)
    else:
        groups = param_groups_layer_decay(model, layer_decay=layer_decay, **settings)
    predicting = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(word in name for word in _DEFORMABLE)
    }
    divided = []
    for group in groups:
        for scale, slow in ((1.0, False), (deformable_scale, True)):
            params = [p for p in group["params"] if (id(p) in predicting) == slow]
            if params:
                divided.append(
                    {**group, "params": params, "lr_scale": group.get("lr_scale", 1.0) * scale}
                )
    return divided
