"""FlashInternImage and InternImage: a pyramid of residual blocks around DCNv4 or DCNv3.

Maps are [B, H, W, C] from the stem to the last block, so that nothing between them moves memory.
Modules are named as in the published files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints import as_named, state_of
from ..layers import DCNv3, DCNv4
from ..layers.base import are_unwatched, known
from ..layers.projections import TOGETHER, make_weights
from . import branch
from .mlp import Mlp
from .norm import LayerNorm

__all__ = ["InternImage", "checkpoint_filter_fn"]  # and the models by their names

_GROUP_CHANNELS = 16
"""D, channels of a group, in every published model."""


def _norm(channels: int, place: str, made: dict[str, Any]) -> nn.Sequential:
    """A norm at its published place, which is 1 where a change of layout was 0."""
    return nn.Sequential(OrderedDict({place: LayerNorm(channels, eps=1e-6, **made)}))


class Stem(nn.Module):
    """[B, H/4, W/4, C] from images [B, 3, H, W]."""

    def __init__(self, in_chans: int, channels: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1, **made)
        self.norm1 = _norm(channels // 2, "1", made)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, **made)
        self.norm2 = _norm(channels, "1", made)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"x must be images [B, in_chans, H, W]; got {list(x.shape)}")
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.act(self.norm1(x.permute(0, 2, 3, 1)))
        x = self.conv2(x.permute(0, 3, 1, 2))
        y: Tensor = self.norm2(x.permute(0, 2, 3, 1))
        return y


class Downsample(nn.Module):
    """[B, H/2, W/2, 2·C] from [B, H, W, C]."""

    def __init__(self, channels: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False, **made)
        self.norm = _norm(2 * channels, "1", made)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return y


@known
class Block(nn.Module):
    """x + dcn(x), then x + mlp(x), each with a norm before or after it, and scaled or not."""

    def __init__(
        self,
        channels: int,
        dcn: nn.Module,
        *,
        mlp_ratio: float,
        mlp_fc2_bias: bool,
        post_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = _norm(channels, "0", made)
        self.dcn = dcn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = _norm(channels, "0", made)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), mlp_fc2_bias, made)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1, self.gamma2 = (
                nn.Parameter(torch.full((channels,), float(layer_scale), **made)) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Tensor:
        for parts in self._branches():
            formula = self._formula(x, *parts)
            x = self._composed(x, *parts) if formula is None else formula.call(x)
        return x

    def _formulas(self, x: Tensor) -> list[branch.Branch]:
        """Of both branches for an input like x; none where one has to be composed."""
        found = []
        for parts in self._branches():
            formula = self._formula(x, *parts)
            if formula is None:
                return []
            found.append(formula)
        return found

    def _branches(self) -> Sequence[tuple[nn.Sequential, nn.Module, Tensor | None]]:
        """Norm, layer and scale of each."""
        return (self.norm1, self.dcn, self.gamma1), (self.norm2, self.mlp, self.gamma2)

    def _formula(
        self, x: Tensor, norm: nn.Sequential, layer: nn.Module, gamma: Tensor | None
    ) -> branch.Branch | None:
        return branch.formula(x, norm, layer, self.drop_path, gamma, self.post_norm)

    def _composed(
        self, x: Tensor, norm: nn.Sequential, layer: nn.Module, gamma: Tensor | None
    ) -> Tensor:
        if self.post_norm and gamma is not None and (only := branch.norm_in(norm)) is not None:
            y = only(layer(x), gamma)
        else:
            y = norm(layer(x)) if self.post_norm else layer(norm(x))
            if gamma is not None:
                y = y * gamma.to(y.dtype)
        added: Tensor = x + self.drop_path(y)
        return added


class Level(nn.Module):
    """Blocks of one resolution, [B, H, W, C] from [B, H, W, C], and what leads to the next."""

    def __init__(
        self,
        channels: int,
        blocks: Sequence[nn.Module],
        *,
        norm: bool,
        downsample: bool,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(channels, "0", made) if norm else None
        self.downsample = Downsample(channels, made) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        formulas = [] if checkpointed else self._formulas(x)
        for formula in formulas:
            x = formula.call(x)
        for block in () if formulas else self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x if self.norm is None else self.norm(x)

    def _formulas(self, x: Tensor) -> list[branch.Branch]:
        """Of all branches, the weights of several blocks made together; none where somebody would
        miss a call."""
        blocks = [block for block in self.blocks if type(block) is Block]
        if len(blocks) < len(self.blocks) or not are_unwatched(blocks):
            return []
        made: list[list[branch.Branch]] = []
        for block in blocks:
            formulas = block._formulas(x)
            if not formulas:
                return []
            made.append(formulas)
        for i in range(0, len(made), TOGETHER):
            for alike in zip(*made[i : i + TOGETHER], strict=True):
                make_weights(alike)
        return [formula for formulas in made for formula in formulas]


class InternImage(nn.Module):
    """FlashInternImage, with `layer=DCNv4`, or InternImage, with `layer=DCNv3`.

    Args:
        in_chans: channels of the images.
        num_classes: of the classifier. 0: no classifier.
        global_pool: timm's name of how the last map is pooled.
        channels: C of the first level; it doubles from level to level.
        depths: blocks of each level.
        layer: the deformable layer's class.
        offset_scale: as in `DCNv4`.
        dw_kernel_size: as in the class of the layer.
        output_bias: whether DCNv4's `output_proj` has a bias.
        mlp_fc2_bias: whether the second Linear of a block's MLP has a bias.
        mlp_ratio: hidden channels of a block's MLP, divided by C.
        post_norm: norms after layers, not before them.
        layer_scale: start of the learned factors of layers' outputs, one a channel. None: there are
            no such factors.
        cls_scale: channels before the classifier, divided by those of the last level.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly towards it.
        backend: as in `functional.deform_conv`.
        device, dtype: of the parameters.

    Source: Xiong et al., CVPR 2024, arXiv:2401.06197; Wang et al., CVPR 2023, arXiv:2211.05778.

    Example:
        >>> import torch
        >>> from dcnv4.models import InternImage
        >>> model = InternImage(channels=16, depths=(1, 1, 2, 1), num_classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        layer: type[DCNv4] | type[DCNv3] = DCNv4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        output_bias: bool = False,
        mlp_fc2_bias: bool = False,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        layer_scale: float | None = None,
        cls_scale: float = 1.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        dcn: dict[str, Any] = {"offset_scale": offset_scale, "dw_kernel_size": dw_kernel_size}
        if layer is DCNv4:
            dcn |= {"output_bias": output_bias, "init": "zero"}
        dcn |= {"backend": backend, **made}
        block: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "mlp_fc2_bias": mlp_fc2_bias,
            "post_norm": post_norm,
            "layer_scale": layer_scale,
            "made": made,
        }
        self.patch_embed = Stem(in_chans, channels, made)
        self.levels = nn.ModuleList()
        self.feature_info = []
        self.output_fmt = "NHWC"  # to timm: of what hooks see
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for i, depth in enumerate(depths):
            width, last = channels << i, i == len(depths) - 1
            blocks = []
            for _ in range(depth):
                deformable = layer(width, group=width // _GROUP_CHANNELS, **dcn)
                blocks.append(Block(width, deformable, drop_path=next(rates), **block))
            level = Level(width, blocks, norm=not post_norm, downsample=not last, made=made)
            self.levels.append(level)
            last_of_level = f"levels.{i}." + (f"blocks.{depth - 1}" if post_norm else "norm")
            where = {"num_chs": width, "reduction": 4 << i, "module": last_of_level}
            self.feature_info.append(where)
        self.num_features, self.head_hidden_size = width, int(width * cls_scale)
        self.conv_head: nn.Module = _conv_head(width, self.head_hidden_size, made)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for name, module in self.named_modules():
            # A deformable layer has initialised its own.
            if isinstance(module, nn.Linear) and ".dcn." not in name:
                _initialize(module)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_classes] from images [B, in_chans, H, W] of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's map, [B, 8·C, H/32, W/32]."""
        features: list[Tensor] = self.forward_intermediates(x, 1, intermediates_only=True)
        return features[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The classifier's output for `forward_features`, or with `pre_logits` its input."""
        x = self.head_drop(self.global_pool(self.conv_head(x)))
        y: Tensor = x if pre_logits else self.head(x)
        return y

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after each level, and the last one.

        Args:
            x: [B, in_chans, H, W].
            indices: which levels. A number: as many of the last ones. None: all.
            norm: has no effect. If a level has a norm, it is a part of the level.
            stop_early: compute no level after those asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns:
            The last map and the list of maps [B, C, H, W], or that list; strides 4, 8, 16, 32.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC; got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.levels), indices)
        if not (stop_early or intermediates_only):
            last = len(self.levels) - 1
        maps, x = [], self.patch_embed(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            y = x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x
            if i in taken:
                maps.append(y)
            if i == last:
                break
            x = level.downsample(x)  # type: ignore[operator]
        return maps if intermediates_only else (y, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of these levels do not need, and return which levels they are."""
        kept: list[int]
        kept, last = feature_take_indices(len(self.levels), indices)
        pruned = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        self.levels[last].downsample = None
        if pruned or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.conv_head = nn.Identity()
            self.reset_classifier(0, "")
        return kept

    def get_classifier(self) -> nn.Module:
        classifier: nn.Module = self.head
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier (0 classes: none), and take another pooling if it is given."""
        self.num_classes = num_classes
        parameter = next(self.parameters())
        pool, self.head = create_classifier(
            self.head_hidden_size,
            num_classes,
            pool_type="avg" if global_pool is None else global_pool,
        )
        self.head.to(parameter.device, parameter.dtype)
        if global_pool is not None:
            self.global_pool = pool
        if num_classes:
            _initialize(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """For the backward pass keep only the inputs of blocks, and compute the blocks again."""
        for level in self.levels:
            level.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters have one learning rate under layer decay: the original's groups.

        A group is a block. To the first block of a level belongs what leads to the level, to the
        first of all the stem, to the last the head.
        """
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)"}
        between: list[tuple[str, tuple[int, ...] | None]] = [
            (rf"^levels\.{i}\.(?:norm|downsample)", (i + 1, 0)) for i in range(len(self.levels) - 1)
        ]
        return {
            "blocks": [
                (r"^patch_embed", (0, 0)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                *between,
                (r"", (99999,)),
            ]
        }

    def no_weight_decay(self) -> set[str]:
        """No more than timm leaves out for all models: biases, norms and scales."""
        return set()


def _conv_head(channels: int, hidden: int, made: dict[str, Any]) -> nn.Sequential:
    """What makes the last map ready to be pooled."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1, bias=False, **made),
        nn.Sequential(nn.BatchNorm2d(hidden, **made)),
        nn.GELU(),
    )


def _initialize(linear: nn.Linear) -> None:
    """As the original does."""
    trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


# Weights.


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The weights that a published file has for the model, by the model's names.

    Args:
        state_dict: what the file holds. If it has averaged weights, these are taken; of a detector
            or a segmenter, the backbone.
        model: an `InternImage`.

    Raises:
        ValueError: blocks of the file have parameters that the model does not have.

    Example:
        >>> from dcnv4.models.internimage import InternImage, checkpoint_filter_fn
        >>> model = InternImage(channels=16, depths=(1, 1, 1, 1))
        >>> file = {"model_ema": {f"module.{n}": t for n, t in model.state_dict().items()}}
        >>> checkpoint_filter_fn(file, model).keys() == model.state_dict().keys()
        True
    """
    own = model.state_dict()
    state, _ = as_named(state_of(state_dict)[0], own)
    strange = [name for name in state if name.startswith("levels.") and name not in own]
    if strange:
        raise ValueError(
            "the weights' names must be the model's (the FlashInternImage-T of detectors needs "
            f"layer_scale=1.0); got {', '.join(strange[:3])}{', ...' if strange[3:] else ''}"
        )
    return state


def _weights(family: str, file: str, size: int = 224, classes: int = 1000) -> dict[str, Any]:
    return {
        "url": f"https://huggingface.co/OpenGVLab/{family}/resolve/main/{file}",
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "num_classes": classes,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        "license": "mit",
        "origin_url": f"https://github.com/OpenGVLab/{family}",
        "paper_ids": "arXiv:2401.06197" if family == "DCNv4" else "arXiv:2211.05778",
    }


# The first tag of a model is what `pretrained=True` means.
default_cfgs = generate_default_cfgs(
    {
        "flash_internimage_t.in1k": _weights("DCNv4", "flash_intern_image_t_1k_224.pth"),
        "flash_internimage_s.in1k": _weights("DCNv4", "flash_intern_image_s_1k_224.pth"),
        "flash_internimage_b.in1k": _weights("DCNv4", "flash_intern_image_b_1k_224.pth"),
        "flash_internimage_l.in22k_ft_in1k": _weights(
            "DCNv4", "flash_internimage_l_22kto1k_384.pth", 384
        ),
        "flash_internimage_l.in22k": _weights(
            "DCNv4", "flash_intern_image_l_22k_384.pth", 384, 21841
        ),
        "internimage_t.in1k": _weights("InternImage", "internimage_t_1k_224.pth"),
        "internimage_s.in1k": _weights("InternImage", "internimage_s_1k_224.pth"),
        "internimage_b.in1k": _weights("InternImage", "internimage_b_1k_224.pth"),
        "internimage_l.in22k_ft_in1k": _weights(
            "InternImage", "internimage_l_22kto1k_384.pth", 384
        ),
        "internimage_l.in22k": _weights(
            "InternImage", "internimage_l_22k_192to384.pth", 384, 21841
        ),
        "internimage_xl.in22k_ft_in1k": _weights(
            "InternImage", "internimage_xl_22kto1k_384.pth", 384
        ),
        "internimage_xl.in22k": _weights(
            "InternImage", "internimage_xl_22k_192to384.pth", 384, 21841
        ),
    }
)


# Models.

_T: dict[str, Any] = {"channels": 64, "depths": (4, 4, 18, 4)}
_SCALED: dict[str, Any] = {"post_norm": True, "layer_scale": 1e-5}
_S: dict[str, Any] = {"channels": 80, "depths": (4, 4, 21, 4), **_SCALED}
_B: dict[str, Any] = {"channels": 112, "depths": (4, 4, 21, 4), **_SCALED}
_L: dict[str, Any] = {
    "channels": 160,
    "depths": (5, 5, 22, 5),
    "offset_scale": 2.0,
    "mlp_fc2_bias": True,
    **_SCALED,
}
_V3: dict[str, Any] = {"layer": DCNv3, "mlp_fc2_bias": True}

_SETTINGS: dict[str, dict[str, Any]] = {
    "flash_internimage_t": _T,
    "flash_internimage_s": {**_S, "dw_kernel_size": 3},
    "flash_internimage_b": {**_B, "dw_kernel_size": 3, "offset_scale": 0.5},
    "flash_internimage_l": {**_L, "dw_kernel_size": 3, "output_bias": True},
    "internimage_t": {**_T, **_V3},
    "internimage_s": {**_S, **_V3},
    "internimage_b": {**_B, **_V3},
    "internimage_l": {**_L, **_V3},
    "internimage_xl": {**_L, **_V3, "channels": 192, "depths": (5, 5, 24, 5)},
}


def _register(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls to make the model, which is in its registry then."""

    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        try:
            model: nn.Module = build_model_with_cfg(
                InternImage,
                name,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
                **{**_SETTINGS[name], **settings},
            )
        except OSError as error:
            overlay = settings.get("pretrained_cfg_overlay")
            source = resolve_pretrained_cfg(name, settings.get("pretrained_cfg"), overlay)
            raise RuntimeError(
                f"the weights of {name} must be readable at {source.file or source.url} (a file "
                "of them is given by pretrained_cfg_overlay={'file': ...} with pretrained=True); "
                f"got {type(error).__name__}: {error}"
            ) from error
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""`InternImage` as published under the name of {name}.

    Args:
        pretrained: load the published weights.
        settings: of `InternImage`, and those that `timm.create_model` has for all models.

    Example:
        >>> import timm, torch, dcnv4.models
        >>> backbone = timm.create_model("{name}", depths=(1, 1, 1, 1), features_only=True)
        >>> [each.shape[2:] for each in backbone(torch.randn(1, 3, 64, 96))][-1]
        torch.Size([2, 3])
    """
    register_model(create)
    return create


for _name in _SETTINGS:
    globals()[_name] = _register(_name)
    if _name not in __all__:  # where timm has not put it
        __all__.append(_name)
