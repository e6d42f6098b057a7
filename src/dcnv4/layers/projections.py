"""The Linears around an operator as few products, and a layer as one node of autograd.

What PyTorch records of a layer call by call costs the host a dozen nodes, and the device casts and
sums between them. Where nobody but autograd, autocast and a backend is interested in a call, and
nobody could tell that the submodules were not called, a layer is a `Formula` instead: Linears of
the same input are one product, all parameters are cast at once, and gradients are made in the dtype
that they are wanted in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..autocast import is_autocast
from ..eager import below, needs_grad, plain_apply
from ..tracing import has_interested, is_compiling, remembered
from .base import are_bare

Call = Callable[[nn.Module, Tensor], Tensor]
"""What calls a submodule."""

Weights = list[tuple[Tensor, "Tensor | None"]]
"""Weight and bias of each product."""

_flatten = torch._C._nn.flatten_dense_tensors
# PyTorch 2.8 has products of halves that come out in float32, on CUDA.
_WIDENS = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None


class Parameters(NamedTuple):
    """What is read of the submodules behind some products: all weights, then all biases."""

    modules: list[nn.Module]
    tensors: list[Tensor]
    shapes: tuple[tuple[tuple[int, ...], bool], ...]
    """Of each product's weight, and whether it has a bias."""
    sizes: tuple[int, ...]
    """How many numbers the products' weights have, then their biases."""
    rows: tuple[tuple[int, ...], ...]
    """Of the weights that are a product's."""

    def dtype(self) -> torch.dtype | None:
        """That of all of them, or None."""
        first = self.tensors[0].dtype
        for tensor in self.tensors:
            if tensor.dtype is not first:
                return None
        return first

    def split(self, gradients: Weights) -> list[Tensor]:
        """The parameters' gradients, of those of products."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for rows, (weight, bias) in zip(self.rows, gradients, strict=True):
            weights += weight.split_with_sizes(rows) if rows[1:] else (weight,)
            if bias is not None:
                biases += bias.split_with_sizes(rows) if rows[1:] else (bias,)
        return weights + biases

    def caller(self, tensors: Sequence[Tensor]) -> Call:
        """How to call a submodule as if `tensors` were these, cast to the dtype of its input."""
        biases = iter(tensors[len(self.modules) :])
        held = {
            module: (weight, None if module.bias is None else next(biases))
            for module, weight in zip(self.modules, tensors, strict=False)
        }

        def call(module: nn.Module, x: Tensor) -> Any:
            weight, bias = (None if t is None else t.to(x.dtype) for t in held[module])
            if isinstance(module, nn.Conv2d):
                return module._conv_forward(x, weight, bias)
            if isinstance(module, nn.LayerNorm):
                return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
            return F.linear(x, weight, bias)

        return call


def join(many: Sequence[Parameters], dtype: torch.dtype) -> list[Weights]:
    """Weights and biases of the products of each, cast at once."""
    # Weights first: those behind others are aligned, those behind a bias may not be.
    weights = [tensor for one in many for tensor in one.tensors[: len(one.modules)]]
    biases = [tensor for one in many for tensor in one.tensors[len(one.modules) :]]
    flat = _flatten(weights + biases)
    if flat.dtype is not dtype:
        flat = flat.to(dtype)
    sizes = [size for one in many for size in one.sizes[: len(one.rows)]]
    count = len(sizes)
    sizes += [size for one in many for size in one.sizes[len(one.rows) :]]
    parts = flat.split_with_sizes(sizes)
    left, behind = iter(parts), iter(parts[count:])
    return [
        [(next(left).view(shape), next(behind) if biased else None) for shape, biased in one.shapes]
        for one in many
    ]


def packed(many: Sequence[Parameters], dtype: torch.dtype) -> list[Weights]:
    """The same, of parameters of like shapes, where a compiler sees it: copied is alone what is
    multiplied together, unless it has to be cast."""
    if any(one.dtype() is not dtype for one in many):
        return [join([one], dtype)[0] for one in many]
    first = many[0]
    made: list[Weights] = [[] for _ in many]
    count = len(first.modules)
    weights = [iter(one.tensors[:count]) for one in many]
    biases = [iter(one.tensors[count:]) for one in many]
    for rows, (_, biased) in zip(first.rows, first.shapes, strict=True):
        left = _next_of_each(weights, len(rows))
        behind = _next_of_each(biases, len(rows)) if biased else [None] * len(many)
        for one, weight, bias in zip(made, left, behind, strict=True):
            one.append((weight, bias))
    return made


def _next_of_each(many: Sequence[Iterator[Tensor]], count: int) -> Sequence[Tensor]:
    """The next so many of each, one after another in one tensor; all are copied at once."""
    tensors = [next(one) for one in many for _ in range(count)]
    return tensors if count == 1 else torch.cat(tensors).chunk(len(many))


def called(module: nn.Module, x: Tensor) -> Any:
    """The plain call, looked up when it is made: exporters replace `nn.Module.__call__` by one that
    records which module a node is of."""
    return module(x)


def read(*products: tuple[nn.Module | None, ...]) -> Parameters | None:
    """What to read of submodules, those of a product together; None where one has to be called."""
    modules = [module for product in products for module in product if module is not None]
    if not are_bare(modules):
        return None
    held = [module.__dict__["_parameters"] for module in modules]
    weights, biases = ([one[name] for one in held] for name in ("weight", "bias"))
    shapes = tuple([(w.shape, b is not None) for w, b in zip(weights, biases, strict=True)])
    layout = _layout(tuple(map(len, products)), shapes)
    if layout is None:
        return None
    return Parameters(modules, weights + [bias for bias in biases if bias is not None], *layout)


@remembered
def _layout(counts: tuple[int, ...], shapes: tuple[tuple[torch.Size, bool], ...]) -> Any:
    """`shapes`, `sizes` and `rows` of products of so many modules; None where some do not fit
    together."""
    left, joined, rows = list(shapes), [], []
    for count in counts:
        product, left = left[:count], left[count:]
        kinds = {(shape[1:], biased) for shape, biased in product}
        if len(kinds) > 1:
            return None
        ((inner, biased),) = kinds
        rows.append(tuple([shape[0] for shape, _ in product]))
        joined.append(((sum(rows[-1]), *inner), biased))
    sizes = [math.prod(shape) for shape, _ in joined]
    sizes += [shape[0] for shape, biased in joined if biased]
    return tuple(joined), tuple(sizes), tuple(rows)


def prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input as products read it: cast and contiguous, in one pass."""
    if x.dtype is dtype:
        return x.contiguous()
    return x.to(dtype, memory_format=torch.contiguous_format)


class _ToBeWritten(torch.autograd.Function):
    """A cast, contiguous, whose forward leaves the numbers to somebody else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)  # most go past it, to the source
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else grad.to(ctx.dtype), None


to_be_written = plain_apply(_ToBeWritten)


def are_computed_in(dtype: torch.dtype, device: str, parameters: Parameters) -> bool:
    """Whether products with these are made in the dtype of their input, cast by autocast; otherwise
    PyTorch shall refuse them."""
    own = parameters.dtype()
    if own is dtype:
        return True
    cast = own is not None and is_autocast(device)
    return cast and torch.float64 not in (own, dtype)


class Part(Protocol):
    """A layer that may be a part of a larger formula."""

    def _part(self, x: Tensor, wide: torch.dtype, *before: tuple[nn.Module, ...]) -> Formula | None:
        """The layer's; None where it has to be composed.

        Args:
            x: an input, as products read it.
            wide: the dtype that its gradient is wanted in.
            before: products whose parameters come before the layer's own.
        """


class Kept(list[Tensor]):
    """What a forward left for the backward; what is taken out of it is freed."""

    spent = False
    """Whether nobody will read it again, so that its memory may be used."""


class Formula:
    """How a layer makes its output of tensors, by hand; `composed` says the same to autograd.

    Args:
        parameters: of its products, in the order in which `forward` gets their weights.
        dtype: that everything is computed in.
        wide: the dtypes that the gradients of its inputs are wanted in.
        backend: what computes its operator.
    """

    def __init__(
        self,
        parameters: Parameters,
        dtype: torch.dtype,
        wide: tuple[torch.dtype, ...],
        backend: str = "",
    ) -> None:
        self.parameters, self.dtype, self.wide = parameters, dtype, wide
        self.backend = backend
        self.unrounded: dict[int, Tensor] = {}
        """The inputs of products that will cast what they read."""
        self.weights: Weights | None = None
        """Of the products, where `make_weights` made them."""
        self.ones: dict[int, Tensor] = {}
        """Rows of so many ones, which sums are made with."""

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward needs beside inputs and weights."""
        raise NotImplementedError

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Kept,
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        """The gradients of the inputs that need one and, where there are `sums` to make them with,
        those of the weights."""
        raise NotImplementedError

    def infer(self, inputs: Sequence[Tensor], weights: Weights) -> Tensor:
        """The output, where no backward will need anything."""
        return self.forward(inputs, weights)[0]

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        """The output, by operations that autograd knows."""
        raise NotImplementedError

    def prepared(self, product: int, x: Tensor) -> Tensor:
        """The input of a product as `forward` takes it, which is to read it by `project` alone."""
        (width, *_), _ = self.parameters.shapes[product]
        if x.dtype is self.dtype or not self._multiplies(x, width):
            return prepared(x, self.dtype)
        self.unrounded[product] = x
        return to_be_written(x, self.dtype) if torch.is_grad_enabled() else x

    def project(self, product: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, by the backend where that is faster."""
        given = self.unrounded.pop(product, x)
        if given is x and not self._multiplies(x, weight.shape[0]):
            return F.linear(x, weight, bias)
        cuda: Any = backends.load("cuda")
        output: Tensor = cuda.linear(given, weight, bias, None if given.dtype is x.dtype else x)
        return output.view(*x.shape[:-1], weight.shape[0])

    def _multiplies(self, x: Tensor, width: int) -> bool:
        """Whether the backend multiplies x by a weight for so many results sooner than PyTorch."""
        if self.backend != "cuda" or is_compiling():
            return False
        cuda: Any = backends.load("cuda")
        return bool(cuda.multiplies(x, width, self.dtype))

    def run(self, given: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The output.

        Args:
            given: what the inputs were made of, or they themselves; gradients are for these.
            inputs: recorded by autograd as made of what was given.
        """
        if is_compiling():
            weights = self.weights or self.compiled_weights([self.parameters])[0]
            if torch.is_grad_enabled():
                return self.forward(inputs, weights)[0]
            return self.infer(inputs, weights)
        tensors = (*inputs, *self.parameters.tensors)
        if needs_grad(tensors, range(len(tensors))):
            sources = [None if g is i else g for g, i in zip(given, inputs, strict=True)]
            output: Tensor = _apply(self, *sources, *tensors)
            return output
        return below(inputs[0].device.type, self._infer, inputs)

    def compiled_weights(self, many: Sequence[Parameters]) -> list[Weights]:
        """The weights where TorchDynamo compiles `forward`, and makes the backward by itself; for
        each of several formulas' parameters, of like shapes."""
        if torch.is_grad_enabled():  # gradients of parts would be gathered into those of the whole
            return [packed([one], self.dtype)[0] for one in many]
        return packed(many, self.dtype)

    def _made_weights(self) -> Weights:
        return self.weights or join([self.parameters], self.dtype)[0]

    def _infer(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.infer(inputs, self._made_weights())

    def _forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
        weights = self._made_weights()
        output, kept = self.forward(inputs, weights)
        return output, [weight for weight, _ in weights], kept

    def _backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        kept: Kept,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the inputs and of the parameters; `kept` begins with the weights."""
        count, products = len(inputs), len(self.parameters.rows)
        weights = kept[:products]
        del kept[:products]
        sums = None
        if any(needed[count:]):
            sums = Sums(tensors[0].dtype, self.parameters.shapes, self.ones)
        grads, made = self.backward(grad, inputs, weights, kept, sums, needed)
        if sums is None:
            return [*grads, *[None] * len(tensors)]
        found = zip(self.parameters.split(made), needed[count:], strict=True)
        return [*grads, *[gradient if needs else None for gradient, needs in found]]

    def _differentiated(
        self, grad: Tensor, inputs: Sequence[Tensor], tensors: Sequence[Tensor], needed: Any
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated, of the inputs and of the parameters."""
        create = torch.is_grad_enabled()
        every = [*inputs, *tensors]
        wanted = [tensor for tensor, needs in zip(every, needed, strict=True) if needs]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            output = self.composed(inputs, self.parameters.caller(tensors))
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create))
        return [next(found) if needs else None for needs in needed]


TOGETHER = 4
"""Formulas whose weights are made at once; of more tensors, TorchInductor stacks one by one."""


def make_weights(formulas: Sequence[Formula]) -> None:
    """Make the weights of formulas that will run, up to `TOGETHER` of like settings, at once, and
    have them share what is the same for all."""
    parameters = [formula.parameters for formula in formulas]
    first, made = formulas[0], []
    if not is_compiling():
        made = below(parameters[0].tensors[0].device.type, join, parameters, first.dtype)
    elif all(one.shapes == parameters[0].shapes for one in parameters[1:]):
        made = first.compiled_weights(parameters)
    for formula in formulas:
        formula.ones = first.ones
    for formula, weights in zip(formulas, made, strict=False):
        formula.weights = weights


def _is_saving_watched() -> bool:
    """Whether hooks get what is saved for a backward; as far as PyTorch tells."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):  # before PyTorch 2.5
        return True


# In a backward, whether it may run once more; as far as PyTorch tells.
_is_graph_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Node(torch.autograd.Function):
    """What autograd records of a formula."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Tensor) -> Tensor:
        count = len(formula.wide)
        inputs = tensors[count : 2 * count]
        output, weights, kept = below(inputs[0].device.type, formula._forward, inputs)
        ctx.formula, ctx.is_watched = formula, _is_saving_watched()
        ctx.save_for_backward(*tensors[count:], *weights, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        formula: Formula = ctx.formula
        count, saved, needed = len(formula.wide), Kept(ctx.saved_tensors), ctx.needs_input_grad
        # What the backward has done with shall make room, unless the graph is run once more.
        getattr(ctx, "maybe_clear_saved_tensors", bool)()
        saved.spent = not (ctx.is_watched or _is_graph_kept())
        inputs = saved[:count]
        tensors = saved[count : count + len(formula.parameters.tensors)]
        del saved[: count + len(tensors)]
        through, needed = needed[1 : 1 + count], needed[1 + count :]
        if torch.is_grad_enabled() or has_interested((grad,), (0,)):
            grads = formula._differentiated(grad, inputs, tensors, needed)
            return None, *[None] * count, *grads
        grads = below(
            *(grad.device.type, formula._backward),
            *(grad, inputs, tensors, saved, needed),
        )
        # To the source past what made the input of it, which would cast the gradient once more.
        sources: list[Tensor | None] = [None] * count
        for i, source in enumerate(through):
            if source:
                sources[i], grads[i] = grads[i], None
        return None, *sources, *grads


_apply = plain_apply(_Node)


# Products.


class Sums:
    """Makes the gradients of products' weights and biases.

    PyTorch's sum of a tall, narrow matrix takes a GPU several times what a product with ones does.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shapes: Sequence[tuple[tuple[int, ...], bool]],
        ones: dict[int, Tensor],
    ) -> None:
        self.dtype, self.shapes, self.ones = dtype, shapes, ones

    def after(self, products: int) -> Sums:
        """Those of the products behind so many."""
        return Sums(self.dtype, self.shapes[products:], self.ones)

    def has_bias(self, product: int) -> bool:
        return self.shapes[product][1]

    def of(
        self, product: int, grad: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Those of one product, from its input `x` [N, C], the gradient [N, M] of its output and,
        where it is known, that of its bias."""
        weight = multiplied(grad.t(), x, self.dtype)
        if not self.has_bias(product):
            return weight, None
        return weight, self._rows(grad) if bias is None else bias.to(self.dtype)

    def _rows(self, grad: Tensor) -> Tensor:
        """The sum [M] over the rows of a gradient [N, M]."""
        if grad.device.type == "cpu" or (grad.dtype is torch.float32 and _is_rounding()):
            return grad.sum(0).to(self.dtype)
        ones = self.ones.get(rows := grad.shape[0])
        if ones is None:
            ones = self.ones[rows] = _ones(grad)
        return multiplied(ones, grad, self.dtype)[0]


def _ones(grad: Tensor) -> Tensor:
    """What times a gradient [N, M] has the sum over its rows in each of its own: as cuBLAS reads it
    fast, one row or, of a number N that 8 does not divide, eight that lie side by side."""
    rows = grad.shape[0]
    return grad.new_ones((rows, 8)).t() if rows % 8 else grad.new_ones((1, rows))


def _is_rounding() -> bool:
    """Whether PyTorch may round float32 numbers before a GPU multiplies them."""
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return bool(chosen == "tf32")


def multiplied(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in this dtype."""
    if a.dtype is dtype:
        return torch.mm(a, b)
    if _WIDENS and dtype is torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
