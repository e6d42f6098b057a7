"""One list of calls of each operator, with inputs, expected results and an error budget.

The inputs are made in float64 on the CPU from a seed of the case's own and then cast, so that every
backend sees the same numbers; the oracle is fed the cast ones. Points are placed at 1/8 to 7/8
between pixels: the rounding of an offset or a location to bfloat16 (2⁻⁹ of at most 32 pixels) and
the arithmetic of a backend (2⁻²⁴) cannot carry one over a pixel centre, where the gradient jumps.
The `integer` cases lie on the pixel centres exactly: every operand is a small multiple of a power
of two, so that every dtype represents it and no operation rounds.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcnv4 import functional
from support import oracle

Array = np.ndarray
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Expected(NamedTuple):
    """What a result must be, and how far each element may lie from it."""

    result: Array
    budget: Array


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    `layout`: "plain"; "sliced", value and coordinates are parts of wider tensors; "packed", the
    same on whole 16 bytes, or of a convolution where they can be, parts of the same tensor, as a
    layer's one projection has them; "permuted", channels are not innermost; "expanded", the
    output's gradient has strides of 0. `integer`: every point lies on a pixel centre.
    `coordinates`: dtypes of the arguments after value, instead of value's own.
    """

    id: str
    batch: int = 1
    groups: int = 2
    depth: int = 4
    sigma: float = 1.0
    softmax: bool = False
    integer: bool = False
    layout: str = "plain"
    coordinates: tuple[torch.dtype, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The differentiable arguments, value first."""
        raise NotImplementedError

    @property
    def exact(self) -> tuple[Array, ...]:
        """The differentiable arguments and the output's gradient, in float64."""
        raise NotImplementedError

    @property
    def points(self) -> int:
        """How many points the call samples."""
        raise NotImplementedError

    def call(self, *inputs: Tensor, backend: str | None = None) -> Tensor:
        """The operator's output from the differentiable arguments."""
        raise NotImplementedError

    def loops(self, *arrays: Array) -> tuple[Array, ...]:
        """Output and gradients by the oracle, from `exact` or what it was cast to."""
        raise NotImplementedError

    def vectors(self, *arrays: Array) -> Iterator[tuple[Any, ...]]:
        """For each output vector: its points, their weights, the size [K, 2] of the numbers that
        each (x, y) is the sum of, in pixels; and its places: in the output, of each point's image
        in value, in the gradients of coordinates and of weights."""
        raise NotImplementedError

    @property
    def work(self) -> int:
        """Multiplications of the forward, about: what an interpreted kernel's time grows with."""
        return 4 * self.points * self.depth

    @cached_property
    def _seed(self) -> int:
        return zlib.crc32(self.id.encode())

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of the differentiable arguments and the output's gradient, for a value of `dtype`."""
        coordinates = self.coordinates or (dtype,) * (len(self.names) - 1)
        return dtype, *coordinates, dtype

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
        """The differentiable arguments, as leaves, and the output's gradient."""
        pairs = zip(self.exact, self.dtypes(dtype), strict=True)
        *arguments, grad = [torch.from_numpy(a).to(d).to(device) for a, d in pairs]
        if self.layout == "sliced":
            arguments = [_slice(argument, 2, 3) for argument in arguments]
        elif self.layout == "packed":
            arguments = [_slice(argument, 8, 8) for argument in arguments]
        elif self.layout == "permuted":
            arguments = [_permute(argument) for argument in arguments]
            grad = _permute(grad)
        elif self.layout == "expanded":
            grad = grad[:1, :1].contiguous().expand_as(grad)
        return *(argument.requires_grad_() for argument in arguments), grad

    def run(
        self, dtype: torch.dtype, device: str = "cpu", backend: str | None = None
    ) -> dict[str, Tensor]:
        """Output and gradients, by name, of the operator on `inputs`."""
        *arguments, grad = self.inputs(dtype, device)
        output = self.call(*arguments, backend=backend)
        grads = torch.autograd.grad(output, arguments, grad)
        return {"output": output.detach(), **self._named(grads)}

    def expected(self, dtype: torch.dtype) -> dict[str, Expected]:
        """Output and gradients by the oracle, each with its budget."""
        return _expected(self, dtype)

    def check(
        self, results: dict[str, Tensor], dtype: torch.dtype, finite: Array | None = None
    ) -> None:
        """Every result of `run` must have its argument's dtype, be finite where it should be and
        lie within the budget there.

        Args:
            finite: where the value's gradient is, instead of where the oracle's is.
        """
        dtypes = dict(zip(results, (dtype, *self.dtypes(dtype)), strict=False))
        for name, (result, budget) in self.expected(dtype).items():
            tensor = results[name].detach()
            assert tensor.dtype == dtypes[name], f"{self.id} {name}: {tensor.dtype}"
            assert tensor.shape == result.shape, f"{self.id} {name}: {tuple(tensor.shape)}"
            got, legal = tensor.cpu().double().numpy(), np.isfinite(result)
            if name == "grad_value" and finite is not None:
                legal = finite
            either = legal & np.isnan(budget)
            wrong = np.argwhere((np.isfinite(got) != legal) & ~either)
            assert not len(wrong), (
                f"{self.id} {name} {dtype}: {len(wrong)} of {got.size} elements should be finite "
                f"or should not be; at {tuple(map(int, wrong[0]))} {got[tuple(wrong[0])]:.6g}, "
                f"expected {result[tuple(wrong[0])]:.6g}"
            )
            result, budget = result.copy(), budget.copy()
            result[~legal | either] = got[~legal | either] = 0.0
            budget[~legal | either] = 1.0
            error = np.abs(got - result)
            excess = error / budget
            worst = np.unravel_index(excess.argmax(), excess.shape) if excess.size else ()
            assert (error <= budget).all(), (
                f"{self.id} {name} {dtype}: {np.count_nonzero(~(error <= budget))} of {error.size} "
                f"elements are outside the budget; at {tuple(map(int, worst))} error "
                f"{error[worst]:.3g}, budget {budget[worst]:.3g}, expected {result[worst]:.6g}"
            )

    def _named(self, grads: Iterable[Any]) -> dict[str, Any]:
        return {f"grad_{name}": grad for name, grad in zip(self.names, grads, strict=True)}


@dataclass(frozen=True)
class ConvCase(Case):
    """A call of `deform_conv`; `window` holds its keywords, `extra` the padding channels of M.

    `outside`: numbers put in place of every `every`th offset, in turn. `spoilt`: a tensor,
    "value", "weights" (of points inside the image) or "grad", and numbers, each of which is put
    somewhere in every second image. `weight_scale`: what weights are multiplied with.
    """

    size: tuple[int, int] = (4, 5)
    window: dict[str, Any] = field(default_factory=dict, hash=False)
    extra: int = 0
    outside: tuple[float, ...] = ()
    every: int = 5
    spoilt: tuple[str, tuple[float, ...]] = ("value", ())
    weight_scale: float = 1.0

    names = ("value", "offset_mask")

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.window, "groups": self.groups}

    @property
    def output_size(self) -> tuple[int, int]:
        """From the contract's formula; the oracle asserts that it is right."""
        defaults = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
        chosen = [self.window.get(name, default) for name, default in defaults.items()]
        k, s, p, d = [(one, one) if isinstance(one, int) else one for one in chosen]
        rows, columns = [
            max(0, (self.size[i] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1) for i in (0, 1)
        ]
        return rows, columns

    @property
    def is_one_tensor(self) -> bool:
        """Whether value and offset_mask are parts of what `deform_conv_packed` takes."""
        keeps_size = self.output_size == self.size
        return self.layout == "packed" and keeps_size and not self.coordinates

    @property
    def points_per_group(self) -> int:
        k = self.window.get("kernel_size", 3)
        kh, kw = (k, k) if isinstance(k, int) else k
        return kh * kw - self.window.get("remove_center", False)

    @property
    def points(self) -> int:
        rows, columns = self.output_size
        return self.batch * rows * columns * self.groups * self.points_per_group

    @cached_property
    def exact(self) -> tuple[Array, ...]:
        rng = np.random.default_rng(self._seed)
        value = rng.standard_normal((self.batch, *self.size, self.groups * self.depth))
        outer = self.batch, *self.output_size
        channels = 3 * self.groups * self.points_per_group + self.extra
        offset_mask = rng.standard_normal((*outer, channels))
        scale = self.window.get("offset_scale", 1.0)
        undeformed = offset_mask.copy()
        undeformed[...] = 0
        places = []
        numbers = cycle(self.outside)
        windows = oracle.conv_windows(value, undeformed, **self.settings)
        for n, (at, _, offsets, weights, points) in enumerate(windows):
            start = np.array([(point.x, point.y) for point in points])
            origin = np.array([point.origin for point in points])
            end = _place(rng, start, self.sigma, self.integer)
            own = ((end - start) / scale).reshape(-1)
            if self.outside:
                for i in range(-n * len(own) % self.every, len(own), self.every):
                    own[i] = next(numbers)
            offset_mask[at][offsets] = own
            offset_mask[at][weights] *= self.weight_scale
            inside = ((origin + end > -1) & (origin + end < self.size[::-1])).all(1)
            places += [(*at, weights.start + k) for k in np.flatnonzero(inside)]
        grad = rng.standard_normal((*outer, value.shape[3]))
        where, spoilers = self.spoilt
        for image in range(0, self.batch, 2):
            for spoiler in spoilers:
                if where == "weights":
                    of_image = [place for place in places if place[0] == image]
                    offset_mask[of_image[rng.integers(len(of_image))]] = spoiler
                else:
                    of_image = {"value": value, "grad": grad[:, :1]}[where][image]
                    of_image[tuple(rng.integers(of_image.shape))] = spoiler
        if self.layout == "expanded":
            grad[...] = grad[:1, :1]
        return value, offset_mask, grad

    def call(self, *inputs: Tensor, backend: str | None = None) -> Tensor:
        settings = {**self.settings, "softmax": self.softmax, "backend": backend}
        if not self.is_one_tensor:
            return functional.deform_conv(*inputs, **settings)
        packed, channels = torch.cat(inputs, 3), self.groups * self.depth
        return functional.deform_conv_packed(packed, channels, **settings)

    def loops(self, *arrays: Array) -> tuple[Array, ...]:
        *inputs, grad = arrays
        settings = {**self.settings, "softmax": self.softmax}
        output = oracle.deform_conv(*inputs, **settings)
        return output, *oracle.deform_conv_backward(grad, *inputs, **settings)

    def vectors(self, *arrays: Array) -> Iterator[tuple[Any, ...]]:
        value, offset_mask, _ = arrays
        kernel, dilation = (
            max(a) if isinstance(a := self.window.get(name, default), tuple) else a
            for name, default in (("kernel_size", 3), ("dilation", 1))
        )
        scale, half_span = abs(self.window.get("offset_scale", 1.0)), dilation * (kernel - 1) / 2
        windows = oracle.conv_windows(value, offset_mask, **self.settings)
        for at, owned, offsets, weights, points in windows:
            reach = scale * (half_span + 0.5 + np.abs(offset_mask[at][offsets].reshape(-1, 2)))
            image = at[0], slice(None), slice(None), owned
            places = (*at, owned), [image] * len(points), (*at, offsets), (*at, weights)
            yield points, offset_mask[at][weights], reach, places


@dataclass(frozen=True)
class AttnCase(Case):
    """A call of `ms_deform_attn`; `flat`: weights are [B, Q, G, L·P]; `tensor`: shapes are one."""

    queries: int = 5
    shapes: tuple[tuple[int, int], ...] = ((4, 5), (2, 3))
    per_level: int = 4
    flat: bool = False
    tensor: bool = False

    names = ("value", "locations", "weights")

    @property
    def points(self) -> int:
        return self.batch * self.queries * self.groups * len(self.shapes) * self.per_level

    @cached_property
    def exact(self) -> tuple[Array, ...]:
        rng = np.random.default_rng(self._seed)
        length = sum(h * w for h, w in self.shapes)
        value = rng.standard_normal((self.batch, length, self.groups, self.depth))
        heads = self.batch, self.queries, self.groups, len(self.shapes)
        sizes = np.array([(w, h) for h, w in self.shapes], np.float64)[:, None]
        start = rng.uniform(0, 1, (self.batch, self.queries, 1, 1, 1, 2)) * sizes
        start = np.broadcast_to(start, (*heads, self.per_level, 2))
        end = _place(rng, start, self.sigma, self.integer)
        locations = (end + 0.5) / np.maximum(sizes, 1)
        weights = rng.standard_normal((*heads, self.per_level))
        if self.flat:
            weights = weights.reshape(*heads[:3], -1)
        grad = rng.standard_normal((*heads[:2], self.groups * self.depth))
        if self.layout == "expanded":
            grad[...] = grad[:1, :1]
        return value, locations, weights, grad

    def call(self, *inputs: Tensor, backend: str | None = None) -> Tensor:
        value, locations, weights = inputs
        shapes = torch.tensor(self.shapes, device=value.device) if self.tensor else self.shapes
        return functional.ms_deform_attn(
            value, shapes, locations, weights, softmax=self.softmax, backend=backend
        )

    def loops(self, *arrays: Array) -> tuple[Array, ...]:
        value, locations, weights, grad = arrays
        inputs = value, self.shapes, locations, weights
        output = oracle.ms_deform_attn(*inputs, softmax=self.softmax)
        return output, *oracle.ms_deform_attn_backward(grad, *inputs, softmax=self.softmax)

    def vectors(self, *arrays: Array) -> Iterator[tuple[Any, ...]]:
        value, *_, weights, _ = arrays
        levels, points_of = oracle.split_levels(value, self.shapes), self._points_of(*arrays[1:-2])
        starts = np.cumsum([0, *(h * w for h, w in self.shapes)])
        for b, q, g in np.ndindex(weights.shape[:3]):
            points = points_of(levels, b, q, g)
            images = [
                (b, slice(start, stop), g)
                for start, stop in pairwise(starts)
                for _ in range(self.per_level)
            ]
            owned = slice(g * self.depth, (g + 1) * self.depth)
            places = (b, q, owned), images, (b, q, g), (b, q, g)
            reach = self._reach(points, *arrays[1:-2], (b, q, g))
            yield points, weights[b, q, g].reshape(-1), reach, places

    def _points_of(self, *coordinates: Array) -> oracle.PointsOf:
        return oracle.at_locations(*coordinates)

    def _reach(self, points: list[oracle.Point], *rest: Any) -> Array:
        """As `vectors` has it, of the points of one head."""
        return np.abs([(point.x, point.y) for point in points]) + 0.5


@dataclass(frozen=True)
class OffsetsCase(AttnCase):
    """A call of `ms_deform_attn_from_offsets`; `shared`: which of B, Q and L are 1 in the reference
    points, by their places."""

    boxes: bool = False
    box_normalizer: str = "points"
    shared: tuple[int, ...] = ()

    names = ("value", "reference_points", "offsets", "weights")

    @cached_property
    def exact(self) -> tuple[Array, ...]:
        """Every dtype holds the reference points."""
        value, locations, weights, grad = super().exact
        rng = np.random.default_rng(self._seed + 1)
        whole = self.batch, self.queries, len(self.shapes)
        sizes = np.array([(w, h) for h, w in self.shapes], np.float64)[:, None]
        own = (1 if i in self.shared and n else n for i, n in enumerate(whole))
        references = rng.integers(0, 65, (*own, 4 if self.boxes else 2)) / 64
        scale: Any = 1.0
        if self.boxes:
            references[..., 2:] = rng.integers(1, 9, references[..., 2:].shape) / 8
            half = (
                0.5 if self.box_normalizer == "size" else np.maximum(sizes, 1) / self.per_level / 2
            )
            scale = references[:, :, None, :, None, 2:] * half
        start = references[:, :, None, :, None, :2] * sizes - 0.5
        offsets = (locations * np.maximum(sizes, 1) - 0.5 - start) / scale
        return value, references, offsets, weights, grad

    def call(self, *inputs: Tensor, backend: str | None = None) -> Tensor:
        value, *others = inputs
        shapes = torch.tensor(self.shapes, device=value.device) if self.tensor else self.shapes
        return functional.ms_deform_attn_from_offsets(
            *(value, shapes, *others),
            box_normalizer=self.box_normalizer,
            softmax=self.softmax,
            backend=backend,
        )

    def loops(self, *arrays: Array) -> tuple[Array, ...]:
        value, *others, grad = arrays
        inputs = value, self.shapes, *others
        settings: Any = {"softmax": self.softmax, "box_normalizer": self.box_normalizer}
        output = oracle.ms_deform_attn_from_offsets(*inputs, **settings)
        grads = oracle.ms_deform_attn_from_offsets_backward(grad, *inputs, **settings)
        return output, *grads

    def _points_of(self, *coordinates: Array) -> oracle.PointsOf:
        return oracle.at_offsets(*coordinates, self.box_normalizer)

    def _reach(self, points: list[oracle.Point], *rest: Any) -> Array:
        _, offsets, at = rest
        scaled = offsets[at].reshape(-1, 2) * [point.scale for point in points]
        ends = np.array([(point.x, point.y) for point in points])
        # What is scaled is rounded once more, with its scale.
        return np.abs(ends - scaled) + 1.25 * np.abs(scaled) + 0.5

    def summed(self, by_offsets: Sequence[Array], *inputs: Array) -> Iterator[Array]:
        """Of arrays that belong to the offsets' gradient, what their absolute values come to in
        that of the reference points.

        Args:
            by_offsets: the arrays, [B, Q, G, L, P, 2].
            inputs: value, reference points, offsets.
        """
        value, references, offsets = inputs
        levels, points_of = oracle.split_levels(value, self.shapes), self._points_of(*inputs[1:])
        scales = np.zeros(offsets.shape)
        for at in np.ndindex(offsets.shape[:3]):
            of_head = np.array([point.scale for point in points_of(levels, *at)])
            scales[at] = of_head.reshape(offsets.shape[3:])
        sizes = np.array([(w, h) for h, w in self.shapes], np.float64)[:, None]
        factors = [sizes / scales]
        if self.boxes:
            factors.append(np.abs(offsets / references[:, :, None, :, None, 2:]))
        shared = tuple(axis for axis in self.shared if offsets.shape[(0, 1, 3)[axis]])
        for array in by_offsets:
            sums = [(factor * np.abs(array)).sum((2, 4)) for factor in factors]
            yield np.concatenate(sums, -1).sum(shared, keepdims=True)


def _place(rng: np.random.Generator, start: Array, sigma: float, integer: bool) -> Array:
    """Where points [..., 2] end, about sigma pixels from where they start."""
    cells = np.floor(start + sigma * rng.standard_normal(start.shape))
    return cells if integer else cells + rng.uniform(1 / 8, 7 / 8, start.shape)


def _slice(tensor: Tensor, before: int, after: int) -> Tensor:
    """The same numbers as the middle of a tensor whose last axis is longer."""
    wide = torch.full((*tensor.shape[:-1], before + tensor.shape[-1] + after), 99.0).to(tensor)
    part = wide[..., before:-after]
    return part.copy_(tensor).detach()


def _permute(tensor: Tensor) -> Tensor:
    """The same numbers with the last axis outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def _spacing(dtype: torch.dtype) -> tuple[float, float]:
    """Half the distance from 1 to the next number (the largest relative error of one rounding),
    and the smallest positive number."""
    info = torch.finfo(dtype)
    return info.eps / 2, info.tiny * info.eps


@lru_cache(maxsize=512)
def _expected(case: Case, dtype: torch.dtype) -> dict[str, Expected]:
    """Results of the oracle, and per element the error that correct arithmetic can make.

    Let u be the relative error of one rounding where sums are made (2⁻⁵³ beside a float64, 2⁻²⁴
    otherwise), and terms the absolute values of what an element is the sum of. Its budget adds

    - (n + 8)·u·Σ|terms|: a sum of n products in any order, 8 operations inside a term;
    - 5·h·Σ|terms| for a half-precision value, h its own rounding: a backend may round a corner's
      coefficient to that dtype (1), and multiply (1) and add a point's four corners (3) in it, and
      must add the points in float32; or, in a convolution, (3 + n)·h·Σ|terms|, where n points at
      most share a pixel: it may multiply a coefficient's factors in that dtype (3) and add the
      coefficients of a pixel (n);
    - e·Σ|d terms/d(x, y)|, with e = u·(4·reach + 1): what is lost in computing a coordinate, at
      most 4 roundings of numbers of the size reach that it is the sum of (of a convolution, those
      of the point's distance from its window's pixel) and one of the fraction; in a convolution
      where all is in half precision also 2⁻¹² in a corner's share, which may be made in float16;
    - with softmax, (K + 8 + 2·(max - min))·u·Σ|terms|: the error of exp(logit - max), which is
      relative to the logit, and of the normalising sum;
    - one rounding of the result to its own dtype, and an underflow in each operation.

    It is NaN where zero times what is not finite may count or not: for a point outside.

    These are bounds, so nothing in them was measured on any backend.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _within_budgets(case, dtype)


def _within_budgets(case: Case, dtype: torch.dtype) -> dict[str, Expected]:
    dtypes = case.dtypes(dtype)
    arrays = [t.detach().double().numpy() for t in case.inputs(dtype)]
    results = dict(zip(("output", *case._named(case.names)), case.loops(*arrays), strict=True))
    accumulator = torch.float64 if torch.float64 in dtypes else torch.float32
    unit, _ = _spacing(accumulator)
    half = _spacing(dtype)[0] if torch.finfo(dtype).bits == 16 else 0.0
    tiled = isinstance(case, ConvCase) and {torch.finfo(own).bits for own in dtypes} == {16}

    *inputs, grad = arrays
    count = 0
    error = {name: np.zeros(result.shape) for name, result in results.items()}
    value_terms, value_count = np.zeros(inputs[0].shape), np.zeros(inputs[0].shape)
    _, *others = case._named(case.names)
    grad_coordinates, grad_weights = others[-2:][0], others[-1]  # a convolution's are one
    grad = grad.reshape(results["output"].shape)
    for points, logits, reach, (out_at, image_at, coordinates_at, weights_at) in case.vectors(
        *arrays
    ):
        count = len(points)
        used = oracle.normalise(logits, case.softmax)
        grad_here = np.abs(grad[out_at])
        depth = len(grad_here)
        relative = 0.0
        if case.softmax:
            finite = logits[np.isfinite(logits)]  # exp(-inf) is exact
            spread = np.ptp(finite) if len(finite) else 0.0
            relative = (count + 8 + 2 * float(spread)) * unit
        lost_xy = unit * (4 * reach + 1)
        sampled = [oracle.bilinear(image, x, y, origin) for image, x, y, _, origin in points]
        pixels_read = ((row, column) for corners in sampled for row, column, *_ in corners if tiled)
        inside = half * max(5, 3 + max(Counter(pixels_read).values(), default=0))
        out_error = np.zeros(depth)
        by_points, by_weights = np.zeros((count, 2)), np.zeros(count)
        dots = np.zeros(count)
        for k, (image, x, y, scale, _) in enumerate(points):
            corners = sampled[k]
            if not corners:
                by_points[k] = 0 * used[k]
                continue
            lost_x, lost_y = lost_xy[k]
            assert case.integer or min(abs(x - round(x)), abs(y - round(y))) > 1 / 32, (x, y)
            weight = abs(used[k])
            share, by_x, by_y = np.abs(np.array(corners)[:, 2:]).T
            pixels = np.abs([image[row, column] for row, column, *_ in corners])
            lost = lost_x * by_x + lost_y * by_y
            lost_of_share = lost + 2**-12 * tiled * (by_x + by_y)
            rounding = (4 * count + 8) * unit + inside + relative
            out_error += weight * ((rounding * share + lost_of_share) @ pixels)
            dot = pixels @ grad_here
            rounding = (depth + 8) * unit + inside
            dots[k] = share @ dot
            by_weights[k] = (rounding * share + lost) @ dot
            slopes = np.array([by_x @ dot, by_y @ dot])
            bends = np.array([lost_y, lost_x]) * dot.sum()
            by_points[k] = np.abs(scale) * weight * ((rounding + relative) * slopes + bends)
            target = [
                array[image_at[k]] for array in (error["grad_value"], value_terms, value_count)
            ]
            if target[0].ndim == 2:
                target = [array.reshape(image.shape) for array in target]
            for corner, (row, column, *_) in enumerate(corners):
                rounding = (relative + inside) * share[corner] + lost_of_share[corner]
                target[0][row, column] += weight * rounding * grad_here
                target[1][row, column] += weight * share[corner] * grad_here
                target[2][row, column] += 1
        if case.softmax:
            terms = (2 * relative + (count + 8) * unit) * dots + by_weights
            by_weights = used * (terms + used @ terms)
        error["output"][out_at] = out_error
        shape = error[grad_coordinates][coordinates_at].shape
        error[grad_coordinates][coordinates_at] = by_points.reshape(shape)
        shape = error[grad_weights][weights_at].shape
        error[grad_weights][weights_at] = by_weights.reshape(shape)
    error["grad_value"] += value_terms * (value_count + 8) * unit

    expected = {}
    for (name, result), own in zip(results.items(), (dtype, *dtypes), strict=False):
        rounding, smallest = _spacing(own)
        smallest = max(smallest, _spacing(dtype)[1])
        terms = {"output": 4 * count, "grad_value": value_count}.get(name, 4 * case.depth)
        budget = 1.01 * error[name] + 8 * smallest * (terms + 1)
        if name == grad_coordinates:
            by_coordinates = Expected(result, budget)
        expected[name] = Expected(result, budget + rounding * np.abs(result))
    if isinstance(case, OffsetsCase):
        name = "grad_reference_points"
        terms, errors = case.summed(by_coordinates, *arrays[:3])
        summed = errors + (arrays[2].size + 8) * unit * terms
        expected[name] = Expected(results[name], expected[name].budget + summed)
    return expected


CONV = (
    ConvCase("1x1", window={"kernel_size": 1, "padding": 0}, sigma=0.5, depth=8),
    ConvCase("2x2", window={"kernel_size": 2}, groups=1, depth=3),
    ConvCase("3x3", batch=2, depth=16),
    ConvCase("5x5", size=(3, 4), window={"kernel_size": 5, "padding": 2}),
    ConvCase("7x7", size=(2, 3), window={"kernel_size": 7, "padding": 3}, groups=1, depth=8),
    ConvCase("3x5", size=(3, 4), window={"kernel_size": (3, 5), "padding": (1, 2)}, depth=3),
    ConvCase("no_padding", size=(5, 4), window={"padding": 0}),
    ConvCase("wide_padding", size=(2, 3), window={"padding": (3, 2)}),
    ConvCase("stride", size=(7, 6), window={"stride": 2}, depth=8),
    ConvCase("stride_pair", size=(5, 7), window={"stride": (3, 2)}),
    ConvCase("dilation", size=(4, 5), window={"dilation": 2, "padding": 2}),
    ConvCase(
        "all_pairs",
        batch=2,
        size=(6, 7),
        window={"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (3, 2)},
        groups=3,
        depth=1,
    ),
    ConvCase("half_scale", window={"offset_scale": 0.5}),
    ConvCase("odd_scale", size=(3, 4), window={"offset_scale": 1.7}),
    ConvCase("negative_scale", size=(3, 3), window={"offset_scale": -1.0}),
    ConvCase("remove_center", window={"remove_center": True}),
    ConvCase("remove_center_even", size=(3, 3), window={"kernel_size": 2, "remove_center": True}),
    ConvCase("softmax", softmax=True, depth=8),
    ConvCase("softmax_padded", size=(3, 3), window={"remove_center": True}, softmax=True, extra=5),
    ConvCase("one_channel", groups=1, depth=1),
    ConvCase("one_channel_groups", size=(3, 3), groups=7, depth=1),
    ConvCase("depth_3", size=(3, 3), groups=4, depth=3),
    ConvCase("depth_16", size=(3, 4), groups=4, depth=16, extra=4),
    ConvCase("depth_17", size=(3, 3), groups=3, depth=17),
    ConvCase("depth_32", size=(3, 3), groups=2, depth=32, extra=2),
    ConvCase("depth_64", size=(2, 3), groups=1, depth=64, extra=5),
    ConvCase("groups_7", size=(2, 3), groups=7, depth=16, extra=3),
    ConvCase("batch_3", batch=3, size=(2, 3), depth=8, extra=2),
    ConvCase("one_pixel", batch=2, size=(1, 1), depth=8),
    ConvCase("one_row", size=(1, 9)),
    ConvCase("one_column", size=(9, 1)),
    ConvCase("tall", size=(11, 3), groups=1, depth=16),
    ConvCase("empty_batch", batch=0),
    ConvCase("no_rows", size=(0, 3)),
    ConvCase("no_columns", batch=2, size=(3, 0)),
    ConvCase("no_pixels_but_output", size=(0, 3), window={"padding": 2}),
    ConvCase("far", size=(5, 5), sigma=8.0, depth=16),
    ConvCase("far_softmax", size=(5, 5), sigma=300.0, softmax=True),  # offsets above all logits
    ConvCase("not_finite", size=(4, 4), outside=(np.inf, -np.inf, np.nan, 1e30, -1e30)),
    ConvCase("still", size=(3, 4), sigma=0.0, integer=True, depth=8),
    ConvCase("integer", size=(5, 4), sigma=2.0, integer=True),
    ConvCase("integer_half_scale", sigma=2.0, integer=True, window={"offset_scale": 0.5}),
    ConvCase("integer_softmax", sigma=2.0, integer=True, softmax=True),
    ConvCase("sliced", batch=2, layout="sliced", depth=8, extra=2),
    ConvCase("permuted", batch=2, size=(3, 4), layout="permuted", depth=8),
    ConvCase("expanded", batch=2, size=(3, 4), layout="expanded", depth=8),
    ConvCase("packed", batch=2, size=(1, 3), layout="packed", groups=1, depth=16, extra=2),
    ConvCase("packed_odd", size=(3, 3), groups=3, depth=3, layout="packed", softmax=True, extra=1),
    ConvCase("packed_pair", size=(3, 4), layout="packed", window={"remove_center": True}),
    ConvCase("packed_empty", batch=0, layout="packed"),
    ConvCase("float_coordinates", coordinates=(torch.float32,), depth=16),
    ConvCase("half_coordinates", coordinates=(torch.float16,), softmax=True),
    ConvCase("double_coordinates", coordinates=(torch.float64,)),
    ConvCase("long_row", size=(1, 8192), window={"stride": (1, 1170)}),
    ConvCase("long_column", size=(8192, 1), window={"stride": (1170, 1)}, softmax=True),
)

_F16, _F32, _F64 = torch.float16, torch.float32, torch.float64
ATTENTION = (
    AttnCase("two_levels", batch=2, depth=8),
    AttnCase("one_level", shapes=((5, 4),), depth=16),
    AttnCase("three_levels", shapes=((4, 3), (1, 5), (2, 2)), per_level=1, groups=3, depth=3),
    AttnCase("four_levels", shapes=((8, 7), (4, 4), (2, 2), (1, 1)), per_level=4, softmax=True),
    AttnCase("softmax", softmax=True, depth=8, batch=2, queries=3),
    AttnCase("softmax_flat", softmax=True, flat=True, per_level=3, queries=3),
    AttnCase("flat", flat=True, per_level=3, depth=1),
    AttnCase("eight_points", per_level=8, queries=3, depth=32, softmax=True),
    AttnCase("one_point", shapes=((3, 3),), per_level=1, groups=1, depth=1),
    AttnCase("depth_17", groups=3, depth=17, queries=3),
    AttnCase("depth_64", groups=1, depth=64, queries=4),
    AttnCase("groups_7", groups=7, depth=3, queries=2),
    AttnCase("many_queries", shapes=((3, 4),), queries=40, per_level=1),
    AttnCase("no_queries", queries=0),
    AttnCase("empty_batch", batch=0),
    AttnCase("empty_level", shapes=((0, 5), (3, 4), (0, 0), (2, 0)), softmax=True, queries=3),
    AttnCase("empty_levels", shapes=((0, 5), (2, 0)), queries=2, per_level=1),
    AttnCase("one_pixel", shapes=((1, 1), (1, 1)), batch=3, queries=2),
    AttnCase("far", sigma=8.0, queries=8, softmax=True),
    AttnCase("integer", sigma=2.0, integer=True, shapes=((4, 8), (2, 1)), queries=6),
    AttnCase("shapes_tensor", tensor=True, batch=2, queries=3, softmax=True),
    AttnCase("sliced", batch=2, layout="sliced", queries=3, depth=8),
    AttnCase("permuted", batch=2, layout="permuted", queries=3, softmax=True),
    AttnCase("expanded", batch=2, layout="expanded", queries=3),
    AttnCase("float_coordinates", coordinates=(_F32, _F32), depth=16, softmax=True),
    AttnCase("half_coordinates", coordinates=(_F16, _F16), queries=3),
    AttnCase("float_locations", coordinates=(_F32, _F16), softmax=True, queries=3),
    AttnCase("double_locations", coordinates=(_F64, _F32), queries=3),
)


OFFSETS = (
    OffsetsCase("points", batch=2, queries=3, depth=8),
    OffsetsCase("softmax", softmax=True, batch=2, queries=2, depth=16, shared=(2,)),
    OffsetsCase("one_for_all", batch=2, shared=(0, 1, 2), flat=True, queries=3, per_level=3),
    OffsetsCase("boxes", boxes=True, softmax=True, batch=2, shapes=((8, 7), (4, 4), (2, 2))),
    OffsetsCase("boxes_of_queries", boxes=True, batch=2, shared=(0, 2), per_level=3, queries=3),
    OffsetsCase(
        "boxes_by_size", boxes=True, box_normalizer="size", batch=2, shared=(1,), depth=3, groups=3
    ),
    OffsetsCase("one_box", boxes=True, box_normalizer="size", shared=(0, 1, 2), per_level=1),
    OffsetsCase("depth_32", groups=1, depth=32, queries=4, softmax=True, per_level=8),
    OffsetsCase("no_queries", queries=0, boxes=True),
    OffsetsCase("empty_batch", batch=0, shared=(1,)),
    OffsetsCase("empty_level", shapes=((0, 5), (3, 4), (0, 0), (2, 0)), boxes=True, queries=3),
    OffsetsCase("far", sigma=8.0, queries=8, softmax=True),
    OffsetsCase("integer", sigma=2.0, integer=True, shapes=((4, 8), (2, 1)), queries=6),
    OffsetsCase("shapes_tensor", tensor=True, boxes=True, batch=2, queries=3, softmax=True),
    OffsetsCase("sliced", batch=2, layout="sliced", queries=3, boxes=True),
    OffsetsCase("packed", batch=2, layout="packed", queries=3, depth=8, softmax=True),
    OffsetsCase("permuted", batch=2, layout="permuted", queries=3),
    OffsetsCase("float_points", coordinates=(_F32, _F16, _F16), depth=16, softmax=True),
    OffsetsCase("half_points", coordinates=(_F16, _F32, _F32), boxes=True, queries=3),
    OffsetsCase("double_points", coordinates=(_F64, _F32, _F32), queries=3),
)


def name(case: Case) -> str:
    """Unique among all operators' cases."""
    if isinstance(case, ConvCase):
        return f"conv-{case.id}"
    return f"{'offsets' if isinstance(case, OffsetsCase) else 'attn'}-{case.id}"


CASES = tuple((name(case), case) for case in (*CONV, *ATTENTION, *OFFSETS))
"""Every case of all operators, `(id, case)`."""
