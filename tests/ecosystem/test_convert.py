"""`dcnv4.convert`: which convolutions it takes, what their successors keep, what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dcnv4
from dcnv4 import DCNv4Conv2d


class Block(nn.Module):
    """A dense 3x3, a depthwise 7x7 and a pointwise convolution."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(o)
        self.depthwise = nn.Conv2d(o, o, 7, padding=3, groups=o)
        self.pointwise = nn.Conv2d(o, o, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(self.norm(self.conv(x)).relu()))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(3, 16, 2), Block(16, 32, 2), Block(32, 64, 1))


ALL = [f"{stage}.{conv}" for stage in "012" for conv in ("conv", "depthwise")]
NO_STEM = ALL[1:]
# Weights are dropped in every call of these tests but those that look for what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:the weights of .* were dropped:UserWarning")


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, NO_STEM),
        ({"names": "2"}, ["2.conv", "2.depthwise"]),
        ({"names": ["0", "2.conv"]}, ["0.depthwise", "2.conv"]),
        ({"names": ["0.conv", "*"]}, ALL),
        ({"names": "*.conv"}, ALL[::2]),
        ({"names": "[12].conv"}, ["1.conv", "2.conv"]),
        ({"names": "*.depthwise"}, ["0.depthwise", "1.depthwise", "2.depthwise"]),
        ({"kind": "depthwise", "names": "1"}, ["1.depthwise"]),
        ({"kind": "dense"}, ["1.conv", "2.conv"]),
        ({"where": lambda name, conv: conv.stride == (1, 1)}, [*ALL[1::2][:2], *ALL[4:]]),
    ],
    ids=lambda argument: ",".join(argument),
)
def test_selection(selection: dict[str, Any], expected: list[str]) -> None:
    model = network()
    before = dict(model.named_modules())
    replaced = dcnv4.convert(model, **selection)
    assert list(replaced) == expected
    for name, module in model.named_modules():
        if name in replaced:
            assert module is replaced[name]
            assert type(module) is DCNv4Conv2d
        elif name in before and not name.startswith(tuple(f"{e}." for e in expected)):
            assert module is before[name]


def test_model_trains_after_it() -> None:
    model = network()
    x = torch.randn(2, 3, 32, 32)
    size = model(x).shape
    replaced = dcnv4.convert(model, ["1", "2"])
    y = model(x)
    assert y.shape == size
    y.square().mean().backward()
    for layer in replaced.values():
        assert layer.offset_mask.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1)},
        {"kernel_size": 3, "dilation": (2, 3), "padding": 4},
        {"kernel_size": 5, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("kernel_size", [None, 3])
def test_geometry_is_kept(arguments: dict[str, Any], kernel_size: int | None) -> None:
    if kernel_size == 3 and arguments["kernel_size"] == 2:
        kernel_size = 4  # odd kernels have other centres
        arguments = {**arguments, "padding": 2}
    model = nn.Sequential(nn.Conv2d(6, 8, **arguments))
    x = torch.randn(2, 6, 15, 16)
    size = model(x).shape
    layer = dcnv4.convert(model, kernel_size=kernel_size)["0"]
    assert model(x).shape == size
    if kernel_size is not None:
        assert layer.window.kernel_size == (kernel_size, kernel_size)
    assert layer.window.stride == torch.nn.modules.utils._pair(arguments.get("stride", 1))
    assert layer.window.dilation == torch.nn.modules.utils._pair(arguments.get("dilation", 1))


def test_new_kernel_looks_around_the_same_centres() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 7, 2, padding=6, dilation=2, groups=4))
    other = copy.deepcopy(model)
    x = torch.randn(1, 4, 20, 20)
    wide = dcnv4.convert(model)["0"].sampling_points(x)[0].mean(-2)
    narrow = dcnv4.convert(other, kernel_size=3, groups=1)["0"].sampling_points(x)[0].mean(-2)
    torch.testing.assert_close(wide, narrow)


def test_dtype_device_mode_bias_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, bias=False)).double().eval()
    bias = model[0].bias.detach().clone()
    replaced = dcnv4.convert(model)
    for layer in replaced.values():
        assert not layer.training
        assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert torch.equal(replaced["0"].output_proj.bias, bias)
    assert replaced["1"].output_proj.bias is None
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, device="meta", dtype=torch.bfloat16))
    for init in ("average", "kernel"):
        (layer,) = dcnv4.convert(copy.deepcopy(mixed), init=init).values()
        assert layer.training
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.gpu
def test_device_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)).cuda().half()
    (layer,) = dcnv4.convert(model, init="kernel").values()
    assert all(p.is_cuda and p.dtype == torch.float16 for p in layer.parameters())


def test_options_reach_the_layers() -> None:
    (layer,) = dcnv4.convert(
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)),
        init="zero",
        groups=2,
        without_pointwise=True,
        dw_kernel_size=3,
        softmax=True,
        backend="reference",
    ).values()
    assert layer.window.groups == 2
    assert layer.window.softmax
    assert layer.value_proj is None
    assert layer.offset_mask_dw is not None
    assert (layer.offset_mask.bias == 0).all()
    assert layer.backend == "reference"


def test_a_shared_convolution_stays_shared() -> None:
    shared = nn.Conv2d(6, 6, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    replaced = dcnv4.convert(model)
    assert list(replaced) == ["0", "2"]
    assert model[0] is model[2]


KERNELS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": 2, "dilation": (2, 1)},
    {"kernel_size": 4, "padding": 1, "bias": False},
]


@pytest.mark.parametrize("arguments", KERNELS, ids=repr)
def test_kernel_starts_as_the_convolution(arguments: dict[str, Any]) -> None:
    """Up to the image's border and beyond, in value and gradient."""
    conv = nn.Conv2d(6, 6, groups=6, **arguments).double()
    model = nn.Sequential(copy.deepcopy(conv))
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    dcnv4.convert(model, init="kernel")
    torch.testing.assert_close(model(x), conv(x))
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (model, conv)]
    torch.testing.assert_close(*grads)


def test_kernel_without_pointwise() -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    model = nn.Sequential(conv)
    (layer,) = dcnv4.convert(model, init="kernel", without_pointwise=True).values()
    assert set(layer.state_dict()) == {"offset_mask.weight", "offset_mask.bias"}
    x = torch.randn(1, 6, 5, 6)
    torch.testing.assert_close(model(x), conv(x))


def test_average_starts_as_a_box_filter() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False))
    dcnv4.convert(model, without_pointwise=True)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(model(x), nn.functional.avg_pool2d(x, 3, 1))


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_subclasses_have_to_be_named() -> None:
    model = nn.Sequential(Doubled(6, 4, 3), nn.Conv2d(4, 4, 3))
    assert list(dcnv4.convert(copy.deepcopy(model))) == ["1"]
    assert list(dcnv4.convert(copy.deepcopy(model), types=Doubled)) == ["0"]
    assert list(dcnv4.convert(model, types=(Doubled, nn.Conv2d))) == ["0", "1"]


@pytest.mark.parametrize(
    "types", [nn.ConvTranspose2d, nn.Module, nn.Conv2d(1, 1, 1), "Conv2d", [3]]
)
def test_other_modules_are_no_convolutions(types: Any) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(
        TypeError, match=r"types must be torch\.nn\.Conv2d or subclasses of it; got"
    ):
        dcnv4.convert(model, types=types)
    assert type(model[0]) is nn.ConvTranspose2d


@pytest.mark.parametrize("names", [None, 3, [3]])
def test_names_are_strings(names: Any) -> None:
    with pytest.raises(TypeError, match="names must be a string or a sequence of them; got"):
        dcnv4.convert(nn.Sequential(nn.Conv2d(6, 4, 3)), names)


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(6, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "arguments", "message"),
    [
        (nn.Conv2d(6, 4, 1), {}, "must select a convolution .* larger than 1 x 1; got none"),
        (nn.ReLU(), {"where": lambda *_: True}, "got none for names = .*, types = Conv2d and wher"),
        (nn.Conv2d(6, 4, 3), {"kind": "depthwise"}, "got none for names = .*, kind = 'depthwise'"),
        (nn.Conv2d(6, 4, 3), {"names": ["1", "layr*"]}, r"of the model: 0, 1; got layr\*"),
        (nn.Conv2d(6, 4, 3), {"names": "1.conv"}, "of the model: none so deep; got 1.conv"),
        (nn.Conv2d(6, 4, 3), {"names": "0"}, "larger than 1 x 1; got none for names = 0"),
        (nn.Conv2d(6, 4, 3), {"kind": "grouped"}, "kind must be one of any, depthwise, dense; got"),
        (nn.Conv2d(6, 4, 3), {"init": "random"}, "init must be 'average' or 'zero'; got 'random'"),
        (
            nn.Conv2d(6, 4, 3),
            {"init": "kernel"},
            "must meet depthwise convolutions .* got 1 = Conv",
        ),
        (
            nn.Conv2d(4, 4, 5, groups=4),
            {"init": "kernel", "kernel_size": 3},
            "kernel_size of 1 mus",
        ),
        (
            nn.Conv2d(4, 4, 5, padding=2, groups=4),
            {"init": "kernel", "kernel_size": 3},
            "must meet depthwise convolutions that keep their kernel_size",
        ),
        (
            nn.Conv2d(4, 4, 3, groups=4),
            {"init": "kernel", "softmax": True},
            "without softmax, .*; got 4, 4, .*softmax=True",
        ),
        (
            nn.Conv2d(4, 4, 3, groups=4),
            {"init": "kernel", "groups": 2},
            "must go with groups = 4 for .*; got 4, 4, .*groups=2",
        ),
        (
            nn.Conv2d(4, 4, 3, groups=4),
            {"init": "kernel", "without_pointwise": True},
            "must keep the bias of .*; got without_pointwise",
        ),
        (nn.Conv2d(6, 4, 2, padding="same"), {}, "same padding >= 0 on both sides; got 2, which n"),
        (
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
            {},
            "padding_mode of 1 .* 'reflect'",
        ),
        (nn.Conv2d(4, 6, 3), {"groups": 4}, "must divide the 6 channels; got 4"),
        (hooked(), {}, "1 must have no forward hooks"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_refusals_leave_the_model_alone(
    conv: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, (1, 1)), conv)
    if "got none" not in message and "kind must" not in message:
        # One that could be replaced comes first.
        model[0] = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        dcnv4.convert(model, **arguments)
    assert list(model.named_modules()) == before


def test_what_a_convolution_has_is_no_option() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    for option, given in {"padding": 1, "bias": False, "stride": 2, "out_channels": 4}.items():
        message = f"{option} must be left to each convolution, .* got {option} = {given}"
        with pytest.raises(TypeError, match=message):
            dcnv4.convert(model, **{option: given})
    assert type(model[0]) is nn.Conv2d


def test_names_of_a_large_model_are_not_all_listed() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(14)))
    with pytest.raises(ValueError, match=r"model: 0, 1, .*, 11 and 2 more; got layer9$"):
        dcnv4.convert(model, "layer9")


def test_a_stem_alone_has_to_be_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match="beside the first, which has to be named; got none"):
        dcnv4.convert(model)
    assert list(dcnv4.convert(model, "0")) == ["0"]


@pytest.mark.filterwarnings("default")
def test_it_says_what_it_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    kept = copy.deepcopy(model)
    with caplog.at_level("INFO", "dcnv4"), pytest.warns(UserWarning, match="dropped") as said:
        dcnv4.convert(model)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert str(said[0].message).startswith(
        "the weights of 1, 2 were dropped, and the model has to be trained; "
    )
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": Conv2d(8, 8, ")[0] for line in lines] == ["1", "2"]
    assert lines[0].endswith(f"is now {model[1].extra_repr()}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcnv4.convert(kept, kind="depthwise", init="kernel")
