"""Weights from elsewhere: DCNv3 against plain PyTorch, and what `checkpoints.load` takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv4 import DCNv4, FlashDeformAttn
from dcnv4.checkpoints import DCNv3, load

STATE = {
    "dw_conv.0.weight": (16, 1, 3, 3),
    "dw_conv.0.bias": (16,),
    "offset.weight": (36, 16),
    "offset.bias": (36,),
    "mask.weight": (18, 16),
    "mask.bias": (18,),
    "input_proj.weight": (16, 16),
    "input_proj.bias": (16,),
    "output_proj.weight": (16, 16),
    "output_proj.bias": (16,),
}
LN = {"dw_conv.1.1.weight": (16,), "dw_conv.1.1.bias": (16,)}
BN = {
    "dw_conv.1.0.weight": (16,),
    "dw_conv.1.0.bias": (16,),
    "dw_conv.1.0.running_mean": (16,),
    "dw_conv.1.0.running_var": (16,),
    "dw_conv.1.0.num_batches_tracked": (),
}
CENTER = {
    "center_feature_scale_proj_weight": (2, 16),
    "center_feature_scale_proj_bias": (2,),
}


@pytest.mark.parametrize(
    ("settings", "more"),
    [({}, LN), ({"norm_layer": "BN"}, BN), ({"center_feature_scale": True}, {**LN, **CENTER})],
    ids=["LN", "BN", "centre"],
)
def test_parameters_have_internimages_names(settings: dict[str, Any], more: Any) -> None:
    layer = DCNv3(16, group=2, **settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {**STATE, **more}


def plain_dcnv3(state: dict[str, Tensor], x: Tensor, settings: dict[str, Any]) -> Tensor:
    """InternImage's DCNv3 in evaluation on x [B, H, W, C], written with grid_sample."""
    batch, height, width, channels = x.shape
    groups, scale = settings["group"], settings.get("offset_scale", 1.0)
    kernel, dilation = settings.get("kernel_size", 3), settings.get("dilation", 1)
    pad, removed = settings.get("pad", 1), settings.get("remove_center", False)
    value = x @ state["input_proj.weight"].T + state["input_proj.bias"]

    depthwise = state["dw_conv.0.weight"]
    features = F.conv2d(
        x.permute(0, 3, 1, 2),
        depthwise,
        state["dw_conv.0.bias"],
        padding=depthwise.shape[-1] // 2,
        groups=channels,
    )
    if settings.get("norm_layer", "LN") == "LN":
        weight, bias = state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"]
        features = F.layer_norm(features.permute(0, 2, 3, 1), [channels], weight, bias, 1e-6)
    else:
        mean, var, weight, bias = (
            state[f"dw_conv.1.0.{name}"]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        features = F.batch_norm(features, mean, var, weight, bias).permute(0, 2, 3, 1)
    act = {"GELU": F.gelu, "ReLU": F.relu, "SiLU": F.silu}[settings.get("act_layer", "GELU")]
    features = act(features)

    offset = features @ state["offset.weight"].T + state["offset.bias"]
    mask = features @ state["mask.weight"].T + state["mask.bias"]
    offset = offset.view(batch, height, width, groups, -1, 2)
    mask = mask.view(batch, height, width, groups, -1).softmax(-1)

    # The image with its padding, as a map of its own: zeros beyond.
    padded = F.pad(value, (0, 0, pad, pad, pad, pad)).permute(0, 3, 1, 2)
    reach = dilation * (kernel - 1) // 2
    cells = [
        (column * dilation - reach, row * dilation - reach)
        for column in range(kernel)
        for row in range(kernel)
    ]
    if removed:
        cells.remove((0, 0))
    size = torch.tensor(padded.shape[:1:-1])
    output = torch.zeros_like(value)
    depth = channels // groups
    for g in range(groups):
        for k, cell in enumerate(cells):
            ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centers = torch.stack((xs, ys), -1) + reach
            at = centers + scale * (torch.tensor(cell) + offset[:, :, :, g, k])
            grid = (2 * at + 1) / size - 1
            part = slice(g * depth, (g + 1) * depth)
            sampled = F.grid_sample(padded[:, part], grid, align_corners=False)
            output[..., part] += mask[:, :, :, g, k, None] * sampled.permute(0, 2, 3, 1)

    if settings.get("center_feature_scale"):
        weight = state["center_feature_scale_proj_weight"]
        s = torch.sigmoid(features @ weight.T + state["center_feature_scale_proj_bias"])
        s = s.repeat_interleave(depth, -1)
        output = output * (1 - s) + value * s
    return output @ state["output_proj.weight"].T + state["output_proj.bias"]


def random_state(layer: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor = 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor = tensor.exp() if name.endswith("running_var") else tensor
        state[name] = tensor
    return state


SETTINGS = {
    "plain": {"group": 2},
    "InternImage-H": {
        "group": 4,
        "dw_kernel_size": 5,
        "center_feature_scale": True,
        "offset_scale": 1.5,
    },
    "BN, SiLU, 5x5, no centre": {
        "group": 2,
        "kernel_size": 5,
        "pad": 2,
        "act_layer": "SiLU",
        "norm_layer": "BN",
        "remove_center": True,
    },
    "ReLU, dilated, scaled": {
        "group": 1,
        "dilation": 2,
        "pad": 2,
        "act_layer": "ReLU",
        "offset_scale": 0.5,
    },
}


@pytest.mark.parametrize("case", SETTINGS)
def test_dcnv3_against_plain_pytorch(case: str) -> None:
    """With large random offsets, beyond the image and its padding, and every gradient."""
    settings = SETTINGS[case]
    layer = DCNv3(8, **settings).double().eval()
    state = random_state(layer)
    load(layer, state)
    x = torch.randn(2, 7, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in state.items()
        if name in dict(layer.named_parameters())
    }
    expected = plain_dcnv3(state, x, settings)
    torch.testing.assert_close(layer(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    layer(x).square().sum().backward()
    for name, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(layer.get_parameter(name).grad, grad, msg=name)
    positions, weights = layer.sampling_points(x)
    points = layer.window.points()
    assert positions.shape == (2, 7, 6, settings["group"], points, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_dcnv3_strides() -> None:
    """Points are predicted at the windows' centres, as in `DCNv4`."""
    layer = DCNv3(8, stride=2, group=2, center_feature_scale=True)
    assert layer(torch.randn(1, 7, 6, 8)).shape == (1, *layer.output_shape((7, 6)), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act_layer": "Tanh"}, "act_layer must be one of GELU, ReLU, SiLU; got 'Tanh'"),
        ({"norm_layer": "GN"}, "norm_layer must be 'LN' or 'BN'; got 'GN'"),
        ({"group": 3}, "must divide the 16 channels; got 3"),
    ],
)
def test_dcnv3_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCNv3(16, **arguments)


def test_dcnv3_refuses_other_layouts() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, C = 16\]; got \[2, 16, 7, 6\]"):
        DCNv3(16)(torch.ones(2, 16, 7, 6))
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\]; got \[2, 42, 16\]"):
        DCNv3(16)(torch.ones(2, 42, 16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dcn = DCNv4(16, group=2, kernel_size=5, pad=2)
        self.attn = FlashDeformAttn(16, 2, 2, 2)


@pytest.mark.parametrize("wrapped", ["bare", "model", "state_dict", "module", "DDP", "both"])
def test_load_finds_the_weights(wrapped: str) -> None:
    trained = {name: torch.randn_like(tensor) for name, tensor in Block().state_dict().items()}
    parallel = {f"module.{name}": tensor for name, tensor in trained.items()}
    checkpoint: Any = {
        "bare": trained,
        "DDP": parallel,
        "both": {"model": parallel, "optimizer": {}, "epoch": 3},
    }.get(wrapped, {wrapped: trained, "epoch": 3})
    keys = list(checkpoint)
    model = Block()
    load(model, checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert list(checkpoint) == keys


@pytest.mark.parametrize("rows", [150, 152, 160])
def test_load_fits_the_rows_that_nothing_reads(rows: int) -> None:
    """3·G·K = 150 of them are read; this layer has 152."""
    model = Block()
    trained = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    trained["dcn.offset_mask.weight"] = torch.randn(rows, 16)
    trained["dcn.offset_mask.bias"] = torch.randn(rows)
    load(model, trained)
    for key in ("weight", "bias"):
        got = model.get_parameter(f"dcn.offset_mask.{key}")
        assert len(got) == 152
        assert torch.equal(got[:150], trained[f"dcn.offset_mask.{key}"][:150])


@pytest.mark.parametrize("rows", [144, 168])
def test_load_refuses_the_rows_of_another_window(rows: int) -> None:
    model = Block()
    trained = dict(model.state_dict())
    trained["dcn.offset_mask.weight"] = torch.randn(rows, 16)
    with pytest.raises(RuntimeError, match=rf"dcn\.offset_mask\.weight.*{rows}"):
        load(model, trained)


def test_load_refuses_a_larger_kernel_and_more_groups() -> None:
    for settings in ({"kernel_size": 5, "pad": 2}, {"group": 2}):
        with pytest.raises(RuntimeError, match=r"size mismatch for offset_mask\.weight"):
            load(DCNv4(16, group=1), DCNv4(16, **{"group": 1, **settings}).state_dict())


def test_load_is_strict() -> None:
    trained = dict(Block().state_dict())
    del trained["attn.value_proj.bias"]
    with pytest.raises(RuntimeError, match=r"attn\.value_proj\.bias"):
        load(Block(), trained)


class Classifier(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, classes)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Classifier()
        self.head = nn.Linear(16, 7)


def filled(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}


def holds(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def put(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_load_reads_files(tmp_path: Path) -> None:
    trained = filled(Classifier())
    torch.save({"model": trained, "epoch": 3}, tmp_path / "trained.pth")
    for path in (tmp_path / "trained.pth", str(tmp_path / "trained.pth")):
        model = Classifier()
        assert load(model, path) == ([], [], [], "model")
        assert holds(model, trained)
    with pytest.raises(FileNotFoundError):
        load(Classifier(), tmp_path / "missing.pth")


def test_load_reads_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    trained, model = filled(Classifier()), Classifier()
    safetensors.save_file(trained, tmp_path / "trained.safetensors")
    assert load(model, tmp_path / "trained.safetensors").source == ""
    assert holds(model, trained)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"read by safetensors \(pip install safetensors\); got"):
        load(model, tmp_path / "trained.safetensors")


class Settings:
    """What a training script may have put beside the weights."""


def test_load_runs_no_code_unless_it_is_told_to(tmp_path: Path) -> None:
    trained, model = filled(Classifier()), Classifier()
    path = tmp_path / "trained.pth"
    torch.save({"model": trained, "config": Settings()}, path)
    # PyTorch 2.0 does not say what it refuses.
    refused = "UnpicklingError" if torch.__version__.startswith("2.0.") else "Settings"
    with pytest.raises(
        ValueError, match=rf"got .*trained\.pth with \S*{refused}.*weights_only=False"
    ):
        load(model, path)
    load(model, path, weights_only=False)
    assert holds(model, trained)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint must be a file of tensors.*got .*trained"):
        load(model, path)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_load_prefers_averaged_weights(key: str) -> None:
    trained, averaged = filled(Classifier()), filled(Classifier(), 1)
    model = Classifier()
    checkpoint = {"model": trained, "state_dict": trained, key: put("module.", averaged)}
    assert load(model, checkpoint).source == key
    assert holds(model, averaged)
    assert load(model, checkpoint, ema=False).source == "state_dict"
    assert holds(model, trained)
    assert load(model, {**checkpoint, key: None}).source == "state_dict"
    assert load(model, {"model": {"module": trained}}).source == "model.module"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.module."]
)
def test_load_sees_through_wrappers(prefix: str) -> None:
    """Of the checkpoint's names, of the model's, and of both."""
    trained, model = filled(Classifier()), Classifier()
    load(model, put(prefix, trained))
    assert holds(model, trained)
    wrapped: nn.Module = Classifier()
    for name in reversed(prefix.split(".")[:-1]):
        wrapped, inner = nn.Module(), wrapped
        wrapped.add_module(name, inner)
    for state in (trained, put(prefix, trained), put("module.", trained)):
        for parameter in wrapped.parameters():
            nn.init.zeros_(parameter)
        load(wrapped, state)
        assert holds(wrapped, put(prefix, trained))


def test_load_sees_through_a_compiled_part() -> None:
    trained, model = filled(Classifier()), Classifier()
    load(
        model, {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in trained.items()}
    )
    assert holds(model, trained)
    compiled = Classifier()
    try:
        compiled.blocks[0] = torch.compile(compiled.blocks[0])  # type: ignore[assignment]
    except RuntimeError as error:
        pytest.skip(f"torch.compile: {error}")  # PyTorch 2.0 with Python 3.11
    load(compiled, trained)
    assert torch.equal(
        compiled.blocks[1].dcn.value_proj.weight, trained["blocks.1.dcn.value_proj.weight"]
    )
    assert torch.equal(
        compiled.blocks[0].dcn.value_proj.weight, trained["blocks.0.dcn.value_proj.weight"]
    )


def test_load_a_detector_into_its_backbone_and_back() -> None:
    """Both have a head: neither is taken for the other's."""
    trained, backbone = filled(Detector()), Classifier()
    report = load(backbone, trained, strict=False)
    assert report == ([], ["head.weight", "head.bias"], [], "")
    assert all(torch.equal(t, trained[f"backbone.{n}"]) for n, t in backbone.state_dict().items())
    with pytest.raises(
        RuntimeError, match=r"got missing: none; unexpected: head.weight, head.bias"
    ):
        load(backbone, trained)

    detector = Detector()
    before = detector.head.weight.clone()
    report = load(detector, {"model": filled(Classifier())}, strict=False)
    assert report == (["head.weight", "head.bias"], [], [], "model")
    assert holds(detector.backbone, filled(Classifier()))
    assert torch.equal(detector.head.weight, before)


def test_load_leaves_a_classifier_of_another_size_out_by_name() -> None:
    trained, model = filled(Classifier(5)), Classifier(3)
    before = model.head.weight.clone()
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for head\.weight.*skip=\.\.\."):
        load(model, trained)
    assert load(model, trained, skip="head") == ([], [], ["head.bias", "head.weight"], "")
    assert load(Classifier(3), put("module.", trained), skip=["hea*"]).skipped_keys
    assert torch.equal(model.head.weight, before)
    assert torch.equal(
        model.blocks[1].attn.value_proj.bias, trained["blocks.1.attn.value_proj.bias"]
    )
    assert load(Classifier(3), trained, strict=False).skipped_keys == ["head.bias", "head.weight"]
    del trained["head.bias"]
    assert load(model, trained, skip="head.*").skipped_keys == ["head.bias", "head.weight"]
    with pytest.raises(ValueError, match=r"skip must name tensors .* got fc"):
        load(model, trained, skip=["head", "fc"])


def test_load_without_strict_reports() -> None:
    trained = filled(Classifier())
    trained["neck"] = trained.pop("head.bias")
    model = Classifier()
    bias = model.head.bias.clone()
    assert load(model, trained, strict=False) == (["head.bias"], ["neck"], [], "")
    assert torch.equal(model.head.bias, bias)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, {}), TypeError, r"model must be a torch\.nn\.Module; got int"),
        ((Block(), 3), TypeError, "checkpoint must be a path, or the mapping .* got int"),
        ((Block(), Block()), TypeError, "checkpoint must be a path, .* got Block"),
        (
            (Block(), {"net": {}, "epoch": 3}),
            ValueError,
            "must hold tensors by name.* got net, epoch",
        ),
    ],
)
def test_load_names_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(*arguments)


@pytest.mark.parametrize("skip", [None, 3, [3]])
def test_load_skips_what_has_a_name(skip: Any) -> None:
    with pytest.raises(TypeError, match="skip must be a string or a sequence of them; got"):
        load(Block(), {}, skip=skip)


def test_load_refuses_dcnv3_weights_in_a_dcnv4() -> None:
    trained = {f"dcn.{name}": tensor for name, tensor in DCNv3(16).state_dict().items()}
    with pytest.raises(ValueError, match=r"dcn must be a dcnv4\.checkpoints\.DCNv3 .* got a DCNv4"):
        load(Block(), trained)
