"""The parts of a model's blocks as nodes of autograd: what they compute, and when they are one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcnv4.backends.cuda import choice
from dcnv4.layers import projections
from dcnv4.layers.projections import Formula
from support import emulated, launches
from support.autograd import nodes

try:
    import timm

    from dcnv4.models import InternImage, branch, mlp
    from dcnv4.models.mlp import Mlp
    from dcnv4.models.norm import LayerNorm
except (ImportError, RuntimeError) as error:  # the latter: torchvision of another PyTorch
    pytest.skip(
        f"needs timm, and torchvision for torch {torch.__version__}: {error}",
        allow_module_level=True,
    )

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "is_dynamo_compiling"),
    reason=f"layers are composed before torch 2.3; got {torch.__version__}",
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def counting(made: nn.Module) -> nn.Module:
    """In float64, with parameters that all count."""
    with torch.no_grad():
        for parameter in made.double().parameters():
            parameter.normal_(std=0.3)
    return made


def block(drop_path: float = 0.0, **settings: Any) -> nn.Module:
    """A block in training, of 16 channels, every parameter of which counts."""
    torch.manual_seed(0)
    model = InternImage(channels=16, depths=(2, 1, 1, 1), drop_path_rate=4 * drop_path, **settings)
    return counting(model.levels[0].blocks[1])


def watch(module: nn.Module) -> list[str]:
    """Have a module called; the list grows with each call."""
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append(type(module).__name__))
    return calls


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name, whatever is drawn being the same in every call."""
    torch.manual_seed(4)
    y = module(x)
    leaves = {"x": x, **dict(module.named_parameters())}
    seed = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return {
        "y": y,
        **dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], seed), strict=True)),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerances: float) -> None:
    for name, right in wanted.items():
        torch.testing.assert_close(
            found[name], right, msg=lambda m, n=name: f"{n}: {m}", **tolerances
        )


# Branches.


WHOLE: list[dict[str, Any]] = [
    {},
    {"layer_scale": 0.5},
    {"post_norm": True},
    {"post_norm": True, "layer_scale": 0.5, "dw_kernel_size": 3},
]


@pytest.mark.parametrize("settings", [*WHOLE, {"dw_kernel_size": 3, "output_bias": True}])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_branch_is_its_submodules(drop_path: float, settings: dict[str, Any]) -> None:
    """In its output and in every gradient; what stochastic depth drops is what timm would drop."""
    made, x = block(drop_path, **settings), random(6, 3, 4, 16).requires_grad_()
    assert nodes(made(x)) == ["_NodeBackward"] * 2
    found = gradients(made, x)
    calls = [watch(made.norm1[0]), watch(made.norm2[0])]
    wanted = gradients(made, x)
    assert calls == [["LayerNorm"]] * 2
    same(found, wanted)
    torch.manual_seed(4)
    middle = made._composed(x, made.norm1, made.dcn, made.gamma1)
    dropped = [bool((middle[i] == x[i]).all()) for i in range(6)]
    assert any(dropped) is (drop_path > 0)


@pytest.mark.parametrize("settings", WHOLE)
def test_a_block_that_drops_nothing_anew(settings: dict[str, Any]) -> None:
    """In evaluation, and where every path is dropped."""
    made, x = block(0.4, **settings), random(2, 3, 4, 16)
    evaluated = made.eval()(x)
    made.drop_path.drop_prob = 0.0
    torch.testing.assert_close(made.train()(x), evaluated)
    made.drop_path.drop_prob = 1.0
    torch.testing.assert_close(made(x), x)


@pytest.mark.parametrize(
    "name", ["norm1", "norm1.0", "dcn", "drop_path", "norm2", "mlp", "mlp.fc1"]
)
@pytest.mark.parametrize("settings", WHOLE)
def test_a_part_that_somebody_watches_is_called(name: str, settings: dict[str, Any]) -> None:
    made, x = block(0.4, **settings), random(6, 3, 4, 16).requires_grad_()
    found = gradients(made, x)
    calls = watch(made.get_submodule(name))
    same(gradients(made, x), found)
    assert calls


def test_what_a_block_cannot_know_is_called() -> None:
    made, x = block(), random(2, 3, 4, 16)
    made.dcn, made.mlp = nn.Identity(), nn.Tanh()
    middle = x + made.norm1(x)
    torch.testing.assert_close(made(x), middle + made.norm2(middle).tanh())
    made = block()
    for norm1, norm2 in (
        (nn.Sequential(nn.LayerNorm(16, bias=False).double()), nn.Identity()),
        (nn.Sequential(made.norm1[0], nn.Tanh()), nn.Sequential()),
    ):
        made.norm1, made.norm2 = norm1, norm2
        middle = x + made.dcn(norm1(x))
        torch.testing.assert_close(made(x), middle + made.mlp(norm2(middle)))


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 0), ({"output_bias": True, "mlp_fc2_bias": True}, 0), ({"dw_kernel_size": 3}, 1)],
)
def test_a_compiled_branch_has_its_norm_in_a_product(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kept: int, drop_path: float
) -> None:
    """Weight and bias of the norm, but for a norm that two products read, and without gradients; it
    has those of the submodules."""
    monkeypatch.undo()  # the poison of memory, which the tracer of torch 2.11 cannot look through
    made, x = block(drop_path, **settings), random(6, 3, 4, 16).requires_grad_()
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(made, backend=record, fullgraph=True)
    found = gradients(compiled, x)
    with torch.no_grad():
        compiled(x)
    nodes = [[n for n in graph.nodes if "layer_norm" in str(n.target)] for graph in graphs]
    norms = [[node.args[2] for node in of_one] for of_one in nodes]
    # [B, H·W, C]: the tracer's maps of four dimensions are TorchInductor's to lay out.
    assert {node.args[0].meta["example_value"].dim() for of_one in nodes for node in of_one} == {3}
    assert [[weight is None for weight in of_one] for of_one in norms] == [
        [not kept, True],
        [False, False],
    ]
    watch(made.norm1[0]), watch(made.norm2[0])
    same({name.removeprefix("_orig_mod."): t for name, t in found.items()}, gradients(made, x))


@pytest.mark.parametrize("settings", WHOLE)
def test_second_derivatives_of_a_block(settings: dict[str, Any]) -> None:
    made, x = block(0.4, **settings), random(2, 2, 2, 16).requires_grad_()

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(4)
        y: Tensor = made(x)
        return y

    assert torch.autograd.gradgradcheck(call, (x,), atol=1e-4, nondet_tol=1e-9, fast_mode=True)
    # Also by what is no weight of a product.
    leaves = [p for n, p in made.named_parameters() if n.startswith(("norm1", "gamma1"))]
    grads = torch.autograd.grad(call(x).square().sum(), [x, *leaves], create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *leaves])
    watch(made.norm1[0]), watch(made.norm2[0])
    grads = torch.autograd.grad(call(x).square().sum(), [x, *leaves], create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *leaves])
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        *[(settings, name) for settings in WHOLE for name in ("norm1", "norm2", "dcn", "mlp", "x")],
        *[
            (settings, name)
            for settings in (WHOLE[1], WHOLE[3])
            for name in ("gamma1", "norm1 dcn", "norm1 gamma1", "norm dcn x", "norm dcn mlp x")
        ],
    ],
)
def test_only_what_is_needed_of_a_block(settings: dict[str, Any], frozen: str) -> None:
    made, x = block(0.4, **settings), random(3, 3, 4, 16).requires_grad_()
    wanted = gradients(made, x)
    for name, leaf in {"x": x, **dict(made.named_parameters())}.items():
        leaf.requires_grad_(not name.startswith(tuple(frozen.split())))
    torch.manual_seed(4)
    y = made(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    for name, leaf in {"x": x, **dict(made.named_parameters())}.items():
        if not leaf.requires_grad:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted[name])


@pytest.mark.parametrize("settings", WHOLE)
def test_a_checkpointed_block_drops_the_same_twice(settings: dict[str, Any]) -> None:
    made, x = block(0.4, **settings), random(6, 3, 4, 16).requires_grad_()
    wanted = gradients(made, x)
    kept: Callable[..., Any] = made.forward

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in (*made.named_children(), *made.named_parameters(recurse=False)):
                setattr(self, name, child)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(kept, x, use_reentrant=False)

    same(gradients(Checkpointed(), x), wanted)


@pytest.mark.parametrize("settings", WHOLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_under_autocast(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """As exact as the calls that it is made of; a float32 map is not cast by the branch."""
    if dtype == torch.float16 and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip(f"torch {torch.__version__} has no float16 autocast on the CPU")
    made, x = block(0.4, **settings).float(), random(6, 3, 4, 16)
    x = x.to(dtype).double().requires_grad_()
    exact = gradients(made.double(), x)
    made.float()
    results = []
    for watched in (False, True):
        calls = [watch(made.norm1), watch(made.norm2)] if watched else []
        half = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            found = gradients(made, half)
        assert all(calls)
        assert found["y"].dtype == dtype
        assert {found[n].dtype for n, _ in made.named_parameters()} == {torch.float32}
        results.append(found)
    for name, right in exact.items():
        node, composed = ((r[name].double() - right).norm() / right.norm() for r in results)
        assert node <= 2 * composed + 8 * torch.finfo(dtype).eps, name
    with torch.autocast("cpu", dtype):
        assert made(x.detach().float()).dtype == torch.float32


@pytest.mark.parametrize("settings", WHOLE)
def test_a_branch_that_forgets_its_input_is_noticed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_PostNormFormula" if "post_norm" in settings else "_PreNormFormula"
    kind = getattr(branch, name)
    right = kind.backward

    def wrong(self: Formula, grad: Tensor, *rest: Any) -> Any:
        (x, *others), made = right(self, grad, *rest)  # type: ignore[arg-type]
        return (x - grad, *others), made

    monkeypatch.setattr(kind, "backward", wrong)
    with pytest.raises(AssertionError, match="x: "):
        test_a_branch_is_its_submodules(0.0, settings)


@pytest.mark.parametrize("settings", [WHOLE[1], WHOLE[3]])
def test_a_scale_that_is_more_than_numbers_is_multiplied_by(settings: dict[str, Any]) -> None:
    """A parameter of another class, of which only its own functions know what it is."""

    class Twice(nn.Parameter):
        @classmethod
        def __torch_function__(
            cls, function: Any, kinds: Any, given: Any, named: Any = None
        ) -> Any:
            if function is Tensor.mul:
                given = [2 * g.as_subclass(Tensor) if type(g) is Twice else g for g in given]
            return super().__torch_function__(function, kinds, given, named or {})

    made, x = block(**settings), random(2, 3, 4, 16)
    watch(made.norm2)
    with torch.no_grad():
        made.gamma1 *= 2
        wanted = made(x)
        made.gamma1 = Twice(made.gamma1.detach() / 2)
        torch.testing.assert_close(made(x).as_subclass(Tensor), wanted)


# Levels.


def level(depth: int, **settings: Any) -> nn.Module:
    """A level of several blocks in training, every parameter of which counts."""
    torch.manual_seed(0)
    model = InternImage(channels=16, depths=(depth, 1, 1, 1), drop_path_rate=0.4, **settings)
    model.levels[0].downsample = None
    return counting(model.levels[0])


def casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many formulas weights are cast at once; the list grows with each cast."""
    counts: list[int] = []

    def record(many: Any, dtype: torch.dtype) -> Any:
        counts.append(len(many))
        return join(many, dtype)

    join = projections.join
    monkeypatch.setattr(projections, "join", record)
    return counts


SETTINGS = [
    {},
    {"dw_kernel_size": 3, "output_bias": True, "mlp_fc2_bias": True},
    {"layer_scale": 0.5},
    {"post_norm": True, "layer_scale": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_of_a_levels_blocks_are_cast_together(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of a kind at once, unless somebody watches a block; with the same results."""
    made, x = level(5, **settings), random(2, 3, 4, 16).requires_grad_()
    counts, shared = casts(monkeypatch), set()
    rows = projections.Sums._rows

    def record(sums: projections.Sums, grad: Tensor) -> Tensor:
        shared.add(id(sums.ones))
        return rows(sums, grad)

    monkeypatch.setattr(projections.Sums, "_rows", record)
    found = gradients(made, x)
    assert counts == [4, 4, 1, 1]
    # The MLP's first product has a bias always, and offsets have.
    assert len(shared) == 4
    counts.clear()
    calls = watch(made.blocks[3])
    wanted = gradients(made, x)
    assert counts == [1] * 10
    assert calls == ["Block"]
    same(found, wanted)
    made.grad_checkpointing = True
    same(gradients(made, x), wanted)
    assert set(counts) == {1}
    counts.clear()
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(x), made(x))
    assert counts == [1] * 20  # of a block that is watched


@pytest.mark.parametrize("other", ["block", "layer", "class"])
def test_a_level_with_a_block_that_has_to_be_called(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = level(3), random(2, 3, 4, 16)

    class Block(type(made.blocks[0])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * super().forward(x)
            return y

    if other == "block":
        made.blocks[1] = nn.Tanh()
    elif other == "layer":
        made.blocks[1].mlp = nn.Tanh()
    else:
        made.blocks[1].__class__ = Block
    counts = casts(monkeypatch)
    torch.manual_seed(4)
    found = made(x)
    assert set(counts) == {1}
    torch.manual_seed(4)
    for block in made.blocks:
        x = block(x)
    torch.testing.assert_close(found, made.norm(x))


def test_a_level_of_frozen_and_different_blocks() -> None:
    """Only the gradients that are wanted, of parameters of several dtypes under autocast."""
    made, x = level(3).float(), torch.randn(2, 3, 4, 16, dtype=torch.bfloat16)
    made.blocks[1].requires_grad_(False)
    made.blocks[2].mlp.bfloat16()
    results = []
    for watched in (False, True):
        if watched:
            watch(made.blocks[0])
        torch.manual_seed(4)
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        y.float().square().sum().backward()
        results.append({"y": y, **{n: p.grad for n, p in made.named_parameters()}})
    for name, found in results[0].items():
        assert (found is None) is name.startswith("blocks.1."), name
        torch.testing.assert_close(found, results[1][name])


# 7 weights and biases of the one branch, 5 of the other, or 6 with every bias.
@pytest.mark.parametrize(
    ("settings", "count"), list(zip(SETTINGS, (7 + 5, 6, 7 + 5, 0), strict=True))
)
def test_a_compiled_level_stacks_what_it_computes_with(
    settings: dict[str, Any], count: int
) -> None:
    """The weights of a branch that a norm is multiplied into, four blocks at once. Without
    gradients, what is multiplied together is joined so."""
    made, x = level(6, **settings), random(2, 3, 4, 16).requires_grad_()
    stacks, joined = [], []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for target, found in ((torch.stack, stacks), (torch.cat, joined)):
            found.append([len(n.args[0]) for n in graph.graph.nodes if n.target is target])
        return graph.forward

    found = gradients(torch.compile(made, backend=record, fullgraph=True), x)
    with torch.no_grad():
        torch.compile(made, backend=record, fullgraph=True)(x)
    assert stacks == [[4] * count + [2] * count, []]
    assert joined[1] == ([] if "dw_kernel_size" in settings else [8, 8, 4, 4])
    watch(made.blocks[0])
    same({name.removeprefix("_orig_mod."): t for name, t in found.items()}, gradients(made, x))


# The MLP.


@pytest.mark.parametrize("bias", [True, False])
def test_the_mlp_is_its_submodules(bias: bool) -> None:
    """In its output and in every gradient, the second ones too; and it keeps one hidden map."""
    mlp = Mlp(3, 12, bias, {"dtype": torch.float64})
    x = torch.randn(5, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(mlp.named_parameters())}
    results, kept = [], []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel() == 10 * 12  # a hidden map
        return tensor

    for compute in (mlp, mlp.composed):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = compute(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for name, found, wanted in zip(["y", *leaves], *results, strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda m, n=name: f"{n}: {m}")
    assert kept == [1, 2]
    assert torch.autograd.gradgradcheck(mlp, (x,))


def test_submodules_of_the_mlp_can_be_watched_and_replaced() -> None:
    mlp, x, seen = Mlp(4, 8, False, {}), torch.randn(3, 4), []
    expected = mlp(x)
    mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    torch.testing.assert_close(mlp(x), expected)
    assert seen == ["fc1"]
    mlp.fc2 = nn.Sequential(mlp.fc2, nn.Tanh())
    torch.testing.assert_close(mlp(x), expected.tanh())


# Norms, and what is one kernel.

emulator = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}"
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[launches.Launches]:
    """What runs where the CUDA backend, on an emulated GPU, computes everything."""
    monkeypatch.setenv("DCNV4_BACKEND", "cuda")
    with emulated.emulated(), launches.recorded() as found:
        yield found


def norms(launched: launches.Launches) -> list[str]:
    """The directions of norms, in their order; they are forgotten."""
    names = [name for name in launched.names if name.startswith("layer_norm")]
    launched.variants.clear()
    return [name.removeprefix("layer_norm_") for name in names]


BOTH = ["forward"] * 2 + ["backward"] * 2


@emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"layer_scale": 0.5}, {"post_norm": True}, {"post_norm": True, "layer_scale": 2}],
)
def test_norms_of_a_block_are_the_cuda_backends(
    settings: dict[str, Any], dtype: torch.dtype, launched: launches.Launches
) -> None:
    """With every gradient in the parameter's own dtype, under autocast too."""
    made, x = block(0.4, **settings), random(2, 2, 3, 16).to(dtype).double().requires_grad_()
    exact = gradients(made, x)
    assert norms(launched) == []  # float64
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = gradients(made.float(), x)
    assert norms(launched) == BOTH
    for name, right in exact.items():
        assert found[name].dtype == (dtype if name in "xy" else torch.float32), name
        error = (found[name].double() - right).norm() / right.norm()
        assert error <= (1e-5 if dtype == torch.float32 else 0.1), f"{name}: {error:.1e}"


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    """A block and a map in half precision, of channels that the kernel of an MLP takes."""
    monkeypatch.setattr(choice, "_MLP_ROWS", dict.fromkeys(choice._MLP, 0))
    torch.manual_seed(0)
    made = counting(InternImage(channels=64, depths=(1, 1, 1, 1)).levels[0].blocks[0])
    return made.half().requires_grad_(False), torch.randn(2, 5, 7, 64).half()


@emulator
def test_an_mlp_that_nothing_is_to_be_known_of_is_one_kernel(
    wide: tuple[nn.Module, Tensor], launched: launches.Launches
) -> None:
    made, x = wide
    exact = made.double()(x.double())
    y = made.half()(x)
    assert launched.names[-1] == "mlp"
    assert norms(launched) == ["forward"]
    same({"y": y.double()}, {"y": exact}, rtol=4e-3, atol=4e-3 * float(exact.std()))
    rows = x.transpose(1, 2)  # not contiguous
    made(rows)
    assert "mlp" not in launched.names
    for name, value in (
        ("drop_path", timm.layers.DropPath(0.4)),
        ("gamma2", nn.Parameter(torch.ones(64).half(), requires_grad=False)),
        ("post_norm", True),
    ):
        launched.variants.clear()
        before = getattr(made, name)
        setattr(made, name, value)
        made(x)
        setattr(made, name, before)
        assert "mlp" not in launched.names, name
        made.eval()(x) if name == "drop_path" else made(x)
        assert launched.names.count("mlp") == 1, name
    launched.variants.clear()
    gradients(made.requires_grad_(), x.requires_grad_())
    assert "mlp" not in launched.names


def test_a_compiled_mlp_is_one_operator(
    wide: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kernel may take it, without gradients; what it does not take is computed."""
    (made, x), graphs = wide, []
    monkeypatch.undo()  # as above

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    for may, grad in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        with (
            mock.patch.object(mlp, "_may_be_fused", lambda *_, may=may: may),
            torch.set_grad_enabled(grad),
        ):
            found = torch.compile(made, backend=record, fullgraph=True)(x)
        same({"y": found}, {"y": made(x)}, rtol=4e-3, atol=4e-3 * float(found.std()))
    assert ["dcnv4.mlp_branch" in str(graph) for graph in graphs] == [False, True, False]
    parts = (*made.norm2[0].parameters(), *made.mlp.fc1.parameters(), made.mlp.fc2.weight, None)
    rows = x.view(-1, 64)
    torch.library.opcheck(torch.ops.dcnv4.mlp_branch, (rows, 1e-6, *parts))
    if emulated.why_not() is None:
        monkeypatch.setattr(choice, "_MLP_ROWS", dict.fromkeys(choice._MLP, 0))
        with emulated.emulated(), launches.launching("mlp"):
            y = torch.ops.dcnv4.mlp_branch(rows, 1e-6, *parts)
        exact = torch.ops.dcnv4.mlp_branch(rows, 1e-6, *parts)
        same({"y": y}, {"y": exact}, rtol=4e-3, atol=4e-3 * float(exact.std()))


@emulator
def test_derivatives_of_a_norms_gradients(launched: launches.Launches) -> None:
    """They are made of PyTorch's operations; where no more are wanted, of the kernel."""
    norm, x = LayerNorm(16), torch.randn(3, 16, requires_grad=True)
    leaves = [x, norm.weight, norm.bias]

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])]

    found = second(norm(x))
    assert norms(launched) == ["forward", "backward"]
    wanted = second(torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps))
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@emulator
def test_who_is_interested_in_a_norm_sees_pytorchs(launched: launches.Launches) -> None:
    norm, x = LayerNorm(16), torch.randn(3, 16)
    wanted = norm(x)
    assert norms(launched) == ["forward"]
    with torch.autograd.profiler.profile():  # sees what runs without it
        norm(x).sum().backward()
    assert norms(launched) == ["forward", "backward"]
    torch.testing.assert_close(torch.vmap(norm)(x), wanted)
    traced = torch.jit.trace(norm, x, check_trace=False)
    assert "layer_norm" in str(traced.inlined_graph)
    norm.double()
    torch.testing.assert_close(norm(x.double()), wanted.double())
    assert norms(launched) == []


@emulator
def test_a_norm_under_a_backend_that_cannot_compute_is_pytorchs(
    launched: launches.Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, x = LayerNorm(16), torch.randn(3, 16)
    for name in "reference", "triton":  # the latter needs a GPU, which layers will say
        monkeypatch.setenv("DCNV4_BACKEND", name)
        norm(x)
    assert norms(launched) == []
