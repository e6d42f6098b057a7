"""Who runs the cases: this library's backends, other implementations, and yardsticks.

A new peer is a function that makes a `Job` of a case, under `@contestant`. Other libraries get the
inputs in the layout that they want: their conversions are not timed. A `grid_sample` formulation is
the whole operator, from the contract's tensors to its output. Arithmetic that is a part of the
operator (grids from offsets, softmax) is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends
from ...layers import DCNv4, FlashDeformAttn
from .cases import TOLERANCE, Attention, AttentionLayer, Case, Conv, ConvLayer, Layer, Model


class Unable(Exception):  # noqa: N818
    """A contestant gets no time in a case; the text says why in few words."""


class Job:
    """One contestant on one case: `call(*leaves)` is what is timed.

    Args:
        inputs: the case's tensors.
        call: the contestant's function of `own(*inputs)` and `parameters`.
        own: from the case's tensors to the contestant's layout, differentiable.
        contract: from the contestant's output to the contract's layout, linear.
        parameters: further leaves, whose gradients are computed but not checked.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        call: Callable[..., Tensor],
        own: Callable[..., tuple[Tensor, ...]] = lambda *tensors: tensors,
        contract: Callable[[Tensor], Tensor] = lambda output: output,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        self._inputs = [t.detach().requires_grad_() for t in inputs]
        self._own = own
        self.call = call
        self.contract = contract
        converted = [t.detach().requires_grad_() for t in own(*self._inputs)]
        self._converted = len(converted)
        self.leaves = (*converted, *parameters)

    def run(self) -> Tensor:
        """The output in the contestant's layout, recorded for a backward where grad is enabled."""
        return self.call(*self.leaves)

    def own_gradient(self, output: Tensor, grad: Tensor) -> Tensor:
        """The output's gradient in the contestant's layout from that in the contract's."""
        leaf = output.detach().requires_grad_()
        return torch.autograd.grad(self.contract(leaf), leaf, grad)[0]

    def gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the case's inputs from those of the leaves."""
        with torch.enable_grad():
            converted = self._own(*self._inputs)
        return torch.autograd.grad(converted, self._inputs, grads[: self._converted])


@dataclass(frozen=True)
class Contestant:
    """Somebody who may run the cases of one operator."""

    name: str
    op: str
    kind: str
    """"backend": one of this library's. "peer": the same function by another implementation.
    "yardstick": another function, for comparison; its results are not checked."""
    make: Callable[[Any, tuple[Tensor, ...]], Job]
    requires: str | None = None
    """The module that must be importable."""
    device: str | None = None
    """The only type of device that this runs on."""

    def why_not(self, device: torch.device) -> str | None:
        """None where this can run anything on the device; otherwise the reason."""
        if self.kind == "backend":
            layers = (ConvLayer, AttentionLayer, Model)
            op = next((c.operator for c in layers if c.op == self.op), self.op)
            call = backends.Call(op, device, torch.float32)
            return backends.why_not(self.name.removeprefix("dcnv4 "), call)
        try:
            import_module(self.requires or "torch")
        except ModuleNotFoundError as error:
            return "not installed" if error.name == self.requires else describe(error)
        except Exception as error:
            return describe(error)
        return None


def describe(error: BaseException) -> str:
    """An exception in few words."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 100 else f"{text[:97]}..."


CONTESTANTS: list[Contestant] = []


def contestant(
    name: str,
    op: str,
    kind: str = "peer",
    requires: str | None = None,
    device: str | None = None,
) -> Callable[[Callable[..., Job]], Callable[..., Job]]:
    """Enter a function (case, inputs) -> Job under this name; it may raise `Unable`."""

    def enter(make: Callable[..., Job]) -> Callable[..., Job]:
        CONTESTANTS.append(Contestant(name, op, kind, make, requires, device))
        return make

    return enter


def layer(case: ConvLayer | AttentionLayer, backend: str) -> DCNv4 | FlashDeformAttn:
    """The layer of a case on a backend, with the same parameters on each."""
    module: DCNv4 | FlashDeformAttn
    if isinstance(case, ConvLayer):
        module = DCNv4(case.channels, group=case.channels // 16, backend=backend)
        # Offsets and weights vary from pixel to pixel by half a pixel and 1.
        predicted = [(module.offset_mask, 0.5)]
    else:
        sizes = case.channels, len(case.levels), case.heads, case.points
        module = FlashDeformAttn(*sizes, backend=backend)
        # Offsets vary by 2 pixels, logits by 1.
        predicted = [(module.sampling_offsets, 2), (module.attention_weights, 1)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear, spread in predicted:
            linear.weight.normal_(0, spread / case.channels**0.5, generator=generator)
        for projection in (module.value_proj, module.output_proj):
            assert projection is not None
            bound = (3 / case.channels) ** 0.5
            projection.weight.uniform_(-bound, bound, generator=generator)
    return module


def _enter_backend(name: str) -> None:
    def usable(op: str, inputs: tuple[Tensor, ...]) -> None:
        reason = backends.why_not(name, backends.Call(op, inputs[0].device, inputs[0].dtype))
        if reason:
            raise Unable(f"cannot: {reason}")

    def operator(case: Conv | Attention, inputs: tuple[Tensor, ...]) -> Job:
        usable(case.op, inputs)
        return Job(inputs, case.operator(name))

    def conv_layer(case: ConvLayer, inputs: tuple[Tensor, ...]) -> Job:
        usable(case.operator, inputs)
        return _layer_job(case, inputs, layer(case, name))

    def attention_layer(case: AttentionLayer, inputs: tuple[Tensor, ...]) -> Job:
        usable(case.operator, inputs)
        places = case.reference_points(inputs[0].device)
        return _layer_job(case, inputs, layer(case, name), others=(places, case.levels))

    def model(case: Model, inputs: tuple[Tensor, ...]) -> Job:
        usable(case.operator, inputs)
        return _model_job(case, inputs, case.model, backend=name)

    contestant(f"dcnv4 {name}", "deform_conv", "backend")(operator)
    contestant(f"dcnv4 {name}", "ms_deform_attn", "backend")(operator)
    contestant(f"dcnv4 {name}", "layer", "backend")(conv_layer)
    contestant(f"dcnv4 {name}", "attention layer", "backend")(attention_layer)
    contestant(f"dcnv4 {name}", "model", "backend")(model)


def _layer_job(
    case: Layer,
    inputs: tuple[Tensor, ...],
    module: nn.Module,
    nchw: bool = False,
    others: tuple[Any, ...] = (),
) -> Job:
    """`others`: arguments of the module, one between the inputs and those behind them."""
    device = inputs[0].device
    module = module.to(device)
    if nchw:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(*leaves: Tensor) -> Any:
        first, *rest = leaves[: len(inputs)]
        with case.autocast(device):
            return module(first, *others[:1], *rest, *others[1:])

    if not nchw:
        return Job(inputs, call, parameters=tuple(module.parameters()))
    return Job(
        inputs,
        call,
        lambda x: (x.permute(0, 3, 1, 2),),  # in memory, channels_last
        lambda y: y.permute(0, 2, 3, 1),
        tuple(module.parameters()),
    )


def created(name: str, **settings: Any) -> Any:
    """A model of timm's registry, always the same, its offsets about half a pixel.

    Blocks that change little of their input, as trained ones do, keep rounding errors small.
    """
    import timm

    from ... import models  # noqa: F401, which registers ours

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = timm.create_model(name, **settings)
        for layer in module.modules():
            if isinstance(layer, DCNv4) and layer.output_proj is not None:
                nn.init.normal_(layer.offset_mask.weight, 0, 0.5 / layer.channels**0.5)
                nn.init.xavier_uniform_(layer.output_proj.weight, 0.03)
    return module


def _model_job(case: Model, inputs: tuple[Tensor, ...], name: str, **settings: Any) -> Job:
    """A model of timm's registry."""
    try:
        module = created(name, **settings).eval()
    except (ImportError, RuntimeError) as error:
        raise Unable(f"cannot: needs timm; {describe(error)}") from error
    device = inputs[0].device
    module = module.to(device, memory_format=torch.channels_last)

    def call(images: Tensor, *_: Tensor) -> Any:
        with case.autocast(device):
            return module(images)

    return Job(inputs, call, parameters=tuple(module.parameters()))


for _name in backends.NAMES:
    _enter_backend(_name)


@contestant("grid_sample", "deform_conv")
def _grid_sample_conv(case: Conv, inputs: tuple[Tensor, ...]) -> Job:
    """One grid_sample of all K points with the groups as images; a half is sampled in float32."""
    groups, points = case.groups, case.kernel**2
    height, width, device = case.height, case.width, inputs[0].device
    size = torch.tensor([width, height], device=device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    x, y = case.window.origins(rows, columns)
    origin = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1)
    cells = torch.tensor(case.window.cells(), device=device)
    pixels = (origin + cells[:, None, None]).flatten(0, 1)
    base, scale = (2 * pixels + 1) / size - 1, 2 / size

    def own(value: Tensor, offset_mask: Tensor) -> tuple[Tensor, ...]:
        offsets, weights = case.window.split(offset_mask)
        return (
            value.unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1).contiguous(),
            offsets.permute(0, 3, 4, 1, 2, 5).flatten(2, 3).flatten(0, 1).contiguous(),
            weights.permute(0, 3, 4, 1, 2).flatten(3).flatten(0, 1).unsqueeze(1).contiguous(),
        )

    def call(value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        grid = torch.addcmul(base, offsets.float(), scale)
        sampled: Tensor = F.grid_sample(value.float(), grid, align_corners=False)
        sampled = sampled.unflatten(2, (points, height)).flatten(3)
        return (sampled * weights).sum(2).to(value.dtype)

    def contract(output: Tensor) -> Tensor:
        split: Tensor = output.unflatten(0, (-1, groups)).unflatten(3, (height, width))
        return split.permute(0, 3, 4, 1, 2).flatten(3)

    return Job(inputs, lambda *tensors: contract(call(*own(*tensors))))


@contestant("grid_sample", "ms_deform_attn")
def _grid_sample_attention(case: Attention, inputs: tuple[Tensor, ...]) -> Job:
    """A grid_sample a level with the heads as images; a half is sampled in float32."""
    count, points = len(case.levels), case.points

    def own(value: Tensor, locations: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        levels = value.split([h * w for h, w in case.levels], 1)
        images = [
            level.unflatten(1, size).permute(0, 3, 4, 1, 2).flatten(0, 1).contiguous()
            for level, size in zip(levels, case.levels, strict=True)
        ]
        grids = [grid.transpose(1, 2).flatten(0, 1).contiguous() for grid in locations.unbind(3)]
        return *images, *grids, logits.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]

    def call(*tensors: Tensor) -> Tensor:
        images, grids, logits = tensors[:count], tensors[count : 2 * count], tensors[-1]
        weights = logits.float().softmax(-1).split(points, -1)
        parts: list[Tensor] = [
            (F.grid_sample(i.float(), 2 * g.float() - 1, align_corners=False) * w).sum(-1)
            for i, g, w in zip(images, grids, weights, strict=True)
        ]
        return torch.stack(parts).sum(0).to(images[0])

    def contract(output: Tensor) -> Tensor:
        split: Tensor = output.unflatten(0, (-1, case.heads))  # [B, G, D, Q]
        return split.permute(0, 3, 1, 2).flatten(2)

    return Job(inputs, lambda *tensors: contract(call(*own(*tensors))))


@contestant("torchvision", "deform_conv", requires="torchvision")
def _torchvision(case: Conv, inputs: tuple[Tensor, ...]) -> Job:
    """`deform_conv2d` with the identity of each group as its weight."""
    from torchvision.ops import deform_conv2d

    groups, kernel = case.groups, case.kernel
    identity = torch.eye(case.depth, dtype=case.dtype, device=inputs[0].device)
    weight = identity.repeat(groups, 1)[..., None, None].expand(-1, -1, kernel, kernel).contiguous()

    def own(value: Tensor, offset_mask: Tensor) -> tuple[Tensor, ...]:
        offsets, weights = case.window.split(offset_mask)
        square = (kernel, kernel)
        # Points with rows outermost, (y, x).
        offsets = offsets.unflatten(4, square).transpose(4, 5).flip(-1)
        weights = weights.unflatten(4, square).transpose(4, 5)
        return tuple(
            t.flatten(3).permute(0, 3, 1, 2).contiguous() for t in (value, offsets, weights)
        )

    def call(value: Tensor, offsets: Tensor, weights: Tensor) -> Any:
        return deform_conv2d(value, offsets, weight, padding=kernel // 2, mask=weights)

    return Job(inputs, call, own, lambda output: output.permute(0, 2, 3, 1))


@contestant("deformops triton", "deform_conv", requires="deformops", device="cuda")
@contestant("deformops eager", "deform_conv", requires="deformops", device="cpu")
def _deformops_conv(case: Conv, inputs: tuple[Tensor, ...]) -> Job:
    from deformops.registry import attn

    groups, kernel = case.groups, case.kernel

    def own(value: Tensor, offset_mask: Tensor) -> tuple[Tensor, ...]:
        offsets, weights = case.window.split(offset_mask)
        by_point = torch.cat((offsets, weights[..., None]), -1).flatten(3)
        return value, F.pad(by_point, (0, -by_point.shape[3] % 8))

    call = partial(
        attn,
        kernel_size=(kernel, kernel),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        group_dims=case.depth,
    )
    return Job(inputs, call, own)


def _levels(case: Attention, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes [L, 2] and first rows [L] of the levels."""
    shapes = torch.tensor(case.levels, device=device)
    areas = shapes.prod(1)
    return shapes, areas.cumsum(0) - areas


@contestant("deformops triton", "ms_deform_attn", requires="deformops", device="cuda")
@contestant("deformops eager", "ms_deform_attn", requires="deformops", device="cpu")
def _deformops_attention(
    case: Attention, inputs: tuple[Tensor, ...], backend: str | None = None
) -> Job:
    from deformops.registry import Backend, msda

    shapes, starts = _levels(case, inputs[0].device)
    options = {"method": "softmax", "backend": None if backend is None else Backend(backend)}
    return Job(inputs, lambda value, *rest: msda(value, shapes, starts, *rest, **options))


@contestant("deformops cuda", "ms_deform_attn", requires="deformops", device="cuda")
def _deformops_cuda(case: Attention, inputs: tuple[Tensor, ...]) -> Job:
    return _deformops_attention(case, inputs, "cuda")


@contestant("transformers", "ms_deform_attn", requires="transformers")
def _transformers(case: Attention, inputs: tuple[Tensor, ...]) -> Job:
    """Deformable DETR's own function of PyTorch operations, under either of its names."""
    from transformers.models.deformable_detr import modeling_deformable_detr as detr

    shapes, starts = _levels(case, inputs[0].device)
    if hasattr(detr, "MultiScaleDeformableAttention"):
        between: tuple[Any, ...] = (shapes, list(case.levels), starts)
        after: tuple[int, ...] = (64,)
        attend = detr.MultiScaleDeformableAttention()
    else:
        between, after = (shapes,), ()
        attend = detr.multi_scale_deformable_attention

    def call(value: Tensor, locations: Tensor, logits: Tensor) -> Any:
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        return attend(value, *between, locations, weights, *after)

    return Job(inputs, call)


@contestant("DCNv4 original", "deform_conv", requires="DCNv4", device="cuda")
def _original_conv(case: Conv, inputs: tuple[Tensor, ...]) -> Job:
    from DCNv4.functions import DCNv4Function

    k = case.kernel
    settings = (k, k, 1, 1, k // 2, k // 2, 1, 1, case.groups, case.depth, 1.0, 256, 0)

    return Job(inputs, lambda *tensors: DCNv4Function.apply(*tensors, *settings))


@contestant("DCNv4 original", "ms_deform_attn", requires="DCNv4", device="cuda")
def _original_attention(case: Attention, inputs: tuple[Tensor, ...]) -> Job:
    from DCNv4.functions import FlashDeformAttnFunction

    shapes, starts = _levels(case, inputs[0].device)

    def own(value: Tensor, locations: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        return value, torch.cat((locations.flatten(3), logits.flatten(3)), -1)

    def call(value: Tensor, locations_logits: Tensor) -> Any:
        settings = 64, case.points
        return FlashDeformAttnFunction.apply(value, shapes, starts, locations_logits, *settings)

    return Job(inputs, call, own)


@contestant("depthwise conv2d", "deform_conv", "yardstick")
def _depthwise(case: Conv, inputs: tuple[Tensor, ...]) -> Job:
    """The same window without offsets (cuDNN or oneDNN), channels_last."""
    channels = case.groups * case.depth
    weight = torch.randn(
        channels, 1, case.kernel, case.kernel, dtype=case.dtype, device=inputs[0].device
    ).requires_grad_()

    def call(value: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(value, weight, padding=case.kernel // 2, groups=channels)

    return Job(
        inputs[:1],
        call,
        lambda value: (value.permute(0, 3, 1, 2),),
        lambda output: output.permute(0, 2, 3, 1),
        (weight,),
    )


@contestant("Conv2d 3x3", "layer", "yardstick")
def _conv2d_layer(case: ConvLayer, inputs: tuple[Tensor, ...]) -> Job:
    module = nn.Conv2d(case.channels, case.channels, 3, padding=1)
    return _layer_job(case, inputs, module, nchw=True)


@contestant("depthwise + pointwise", "layer", "yardstick")
def _separable_layer(case: ConvLayer, inputs: tuple[Tensor, ...]) -> Job:
    channels = case.channels
    module = nn.Sequential(
        nn.Conv2d(channels, channels, 1),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, channels, 1),
    )
    return _layer_job(case, inputs, module, nchw=True)


@contestant("Linear", "layer", "yardstick")
def _linear_layer(case: ConvLayer, inputs: tuple[Tensor, ...]) -> Job:
    return _layer_job(case, inputs, nn.Linear(case.channels, case.channels))


@contestant("ConvNeXt-T", "model", "yardstick", requires="timm")
def _convnext(case: Model, inputs: tuple[Tensor, ...]) -> Job:
    return _model_job(case, inputs, "convnext_tiny")


class Expected:
    """What a case must give: the output, and the gradients of its inputs for one random gradient.

    An operator's come from the reference backend in float64. A layer's or a model's come from the
    same one with the reference backend in the same dtypes, so that only the operator differs; of a
    model, those of the first images.
    """

    def __init__(self, case: Case, inputs: tuple[Tensor, ...]) -> None:
        batch = len(inputs[0])
        if isinstance(case, Layer):
            reference = next(
                c for c in CONTESTANTS if (c.name, c.op) == ("dcnv4 reference", case.op)
            )
            if isinstance(case, Model):
                inputs = tuple(t[: case.checked] for t in inputs)
            job = reference.make(case, inputs)
        else:
            assert isinstance(case, (Conv, Attention))
            exact = tuple(t.double() for t in inputs)
            job = Job(exact, case.operator("reference"))
        output = job.run()
        self._tolerance = TOLERANCE[case.precision]
        self.output = output.detach()
        self.grad = torch.randn(
            (batch, *output.shape[1:]), device=output.device, generator=case.random(output.device)
        ).to(case.dtype)
        grad = self.grad[: len(output)].to(output.dtype)
        grads = torch.autograd.grad(output, job.leaves, grad)
        self.gradients = job.gradients(grads)

    def output_error(self, job: Job, output: Tensor) -> float:
        """The relative error of a job's output."""
        return relative_error((job.contract(output),), (self.output,))

    def gradients_error(self, job: Job, grads: Sequence[Tensor]) -> float:
        """The largest relative error among the case's inputs of a job's gradients."""
        return relative_error(job.gradients(grads), self.gradients)

    def verify(self, error: float) -> float:
        """The error, where it is small enough."""
        if not error <= self._tolerance:
            raise Unable(f"WRONG: relative error {error:.1e}, allowed {self._tolerance:.0e}")
        return error


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative L2 error; infinite for a wrong shape or anything not finite."""
    worst = 0.0
    for result, exact in zip(got, wanted, strict=True):
        result = result[: len(exact)]
        if result.shape != exact.shape:
            return float("inf")
        exact = exact.double()
        error = (result.double() - exact).norm() / exact.norm().clamp_min(1e-300)
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst
