"""`dcnv4.models`: what models compute, the weights they load, what timm and heads ask of them."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import timm
    from timm.models._manipulate import group_parameters
    from timm.optim import create_optimizer_v2

    from dcnv4.models import InternImage, parameter_groups
except (ImportError, RuntimeError) as error:  # the latter of torchvision beside another PyTorch
    pytest.skip(
        f"needs timm, and torchvision for torch {torch.__version__}: {error}",
        allow_module_level=True,
    )

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_names.json").read_text())
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

SMALL = {"channels": 16, "depths": (1, 2, 1, 1), "num_classes": 5}
# A small model with each of the published settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "T": ("flash_internimage_t", {}),
    "T of detectors": ("flash_internimage_t", {"layer_scale": 1.0}),
    "B": ("flash_internimage_b", {}),
    "L": ("flash_internimage_l", {}),
    "InternImage-L": ("internimage_l", {}),
}


def small(kind: str = "T", **settings: Any) -> InternImage:
    name, own = KINDS[kind]
    return timm.create_model(name, **{**SMALL, **own, **settings})


def randomise(model: nn.Module) -> None:
    """Numbers with which every parameter and every statistic counts."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_var", "gamma1", "gamma2")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3 if tensor.dim() == 1 else tensor[0].numel() ** -0.5)


# What the papers say, in plain PyTorch, from the names of the weights.


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def conv(p: dict[str, Tensor], name: str, x: Tensor, **settings: Any) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), p[f"{name}.weight"], p.get(f"{name}.bias"), **settings)
    return y.permute(0, 2, 3, 1)


def sampled(value: Tensor, offset_mask: Tensor, scale: float, softmax: bool) -> Tensor:
    """Nine points a group of 16 channels, columns outermost."""
    _, height, width, channels = value.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    groups = []
    for g in range(channels // 16):
        image = value[..., 16 * g : 16 * g + 16].permute(0, 3, 1, 2)
        own = offset_mask[..., 27 * g : 27 * g + 27]
        weights = own[..., 18:].softmax(-1) if softmax else own[..., 18:]
        total: Any = 0
        for k in range(9):
            x = columns + scale * (k // 3 - 1 + own[..., 2 * k])
            y = rows + scale * (k % 3 - 1 + own[..., 2 * k + 1])
            grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
            point = F.grid_sample(image, grid, align_corners=False)
            total = total + weights[..., k, None] * point.permute(0, 2, 3, 1)
        groups.append(total)
    return torch.cat(groups, -1)


def deformed(p: dict[str, Tensor], name: str, x: Tensor, scale: float) -> Tensor:
    if f"{name}.offset_mask.weight" in p:
        y = x
        if f"{name}.offset_mask_dw.weight" in p:
            y = conv(p, f"{name}.offset_mask_dw", x, padding=1, groups=x.shape[-1])
        offset_mask = linear(p, f"{name}.offset_mask", y)
        y = sampled(linear(p, f"{name}.value_proj", x), offset_mask, scale, False)
    else:
        y = conv(p, f"{name}.dw_conv.0", x, padding=1, groups=x.shape[-1])
        y = F.gelu(norm(p, f"{name}.dw_conv.1.1", y))
        parts = [linear(p, f"{name}.{part}", y) for part in ("offset", "mask")]
        parts = [part.unflatten(-1, (x.shape[-1] // 16, -1)) for part in parts]
        offset_mask = torch.cat(parts, -1).flatten(-2)
        y = sampled(linear(p, f"{name}.input_proj", x), offset_mask, scale, True)
    return linear(p, f"{name}.output_proj", y)


def expected(
    p: dict[str, Tensor], images: Tensor, scale: float, post_norm: bool
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the maps [B, C, H, W] of the levels, of a model that is not in training."""

    def block(name: str, x: Tensor) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return linear(p, f"{name}.mlp.fc2", F.gelu(linear(p, f"{name}.mlp.fc1", x)))

        for i, layer in (1, lambda x: deformed(p, f"{name}.dcn", x, scale)), (2, mlp):
            before = x if post_norm else norm(p, f"{name}.norm{i}.0", x)
            y = layer(before)
            y = norm(p, f"{name}.norm{i}.0", y) if post_norm else y
            x = x + p.get(f"{name}.gamma{i}", torch.ones(())) * y
        return x

    x = images.permute(0, 2, 3, 1)
    x = F.gelu(norm(p, "patch_embed.norm1.1", conv(p, "patch_embed.conv1", x, stride=2, padding=1)))
    x = norm(p, "patch_embed.norm2.1", conv(p, "patch_embed.conv2", x, stride=2, padding=1))
    maps = []
    for i, depth in enumerate(SMALL["depths"]):
        for j in range(depth):
            x = block(f"levels.{i}.blocks.{j}", x)
        x = x if post_norm else norm(p, f"levels.{i}.norm.0", x)
        maps.append(x.permute(0, 3, 1, 2))
        if i < 3:
            x = conv(p, f"levels.{i}.downsample.conv", x, stride=2, padding=1)
            x = norm(p, f"levels.{i}.downsample.norm.1", x)
    x = conv(p, "conv_head.0", x)
    statistics = (p[f"conv_head.1.0.running_{s}"] for s in ("mean", "var"))
    weight, bias = (p[f"conv_head.1.0.{s}"] for s in ("weight", "bias"))
    x = F.gelu(F.batch_norm(x.permute(0, 3, 1, 2), *statistics, weight, bias))
    return linear(p, "head", x.mean((2, 3))), maps


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_papers_say(kind: str) -> None:
    """Logits, maps and every gradient, in float64, of images whose sides no stride divides."""
    model = small(kind).double().eval()
    randomise(model)
    images = torch.randn(2, 3, 37, 50, dtype=torch.float64, requires_grad=True)
    state = {**model.state_dict(), **dict(model.named_parameters())}
    scale = {"B": 0.5, "L": 2.0, "InternImage-L": 2.0}.get(kind, 1.0)
    logits, maps = expected(state, images, scale, post_norm=not kind.startswith("T"))
    torch.testing.assert_close(model(images), logits)
    found = model.forward_intermediates(images)[1]
    assert [tuple(m.shape[2:]) for m in found] == [(10, 13), (5, 7), (3, 4), (2, 2)]
    torch.testing.assert_close(found, maps)
    leaves = {"images": images, **dict(model.named_parameters())}
    grad = torch.randn_like(logits)
    pairs = [torch.autograd.grad(y, list(leaves.values()), grad) for y in (model(images), logits)]
    for name, ours, theirs in zip(leaves, *pairs, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
        unread = name.endswith(("offset_mask.weight", "offset_mask.bias"))
        assert unread or bool((theirs != 0).any()), name


# Weights.


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_the_published_ones(name: str) -> None:
    depths, listed = PUBLISHED[name]["depths"], PUBLISHED[name]["shapes"]
    published = {
        key.replace("*", str(block)): shape
        for key, shape in listed.items()
        for block in range(depths[int(key.split(".")[1])] if "*" in key else 1)
    }
    model = timm.create_model(name, device="meta")
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == published
    millions = {"t": 29.82, "s": 50.07, "b": 97.45, "l": 223.30}[name[-1]]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_tags() -> None:
    tags = timm.list_pretrained("*internimage*")
    assert {f"flash_internimage_{tag}" for tag in ("t.in1k", "s.in1k", "b.in1k")} <= set(tags)
    for tag in tags:
        config = timm.models.get_pretrained_cfg(tag)
        assert config.url.startswith("https://huggingface.co/OpenGVLab/")
        size, classes = (384, 21841) if tag.endswith("in22k") else (224, 1000)
        size = 384 if "in22k" in tag else size
        assert (config.input_size, config.num_classes) == ((3, size, size), classes)
    default = timm.models.get_pretrained_cfg("flash_internimage_l")
    assert default.tag == "in22k_ft_in1k"


@pytest.fixture
def served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], dict[str, str]]]:
    """Puts a checkpoint where timm finds it by an address, and returns what says so."""
    folder, files = tmp_path / "served", iter(range(100))
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serve(checkpoint: Any) -> dict[str, str]:
            file = f"{next(files)}.pth"
            torch.save(checkpoint, folder / file)
            return {"url": f"http://127.0.0.1:{server.server_port}/{file}"}

        yield serve
        server.shutdown()
        thread.join()


def trained(kind: str = "T", **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = small(kind, **settings)
    randomise(model)
    return model.state_dict()


def same(found: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def test_published_files_load_by_their_address(served: Any) -> None:
    state = trained()
    other = {name: tensor + 1 for name, tensor in state.items()}
    for checkpoint in (
        state,
        {"model": state},
        {"model": other, "model_ema": state, "max_accuracy": 83.6},
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    ):
        overlay = {**served(checkpoint), "num_classes": 5}
        model = small(pretrained=True, pretrained_cfg_overlay=overlay)
        assert same(model.state_dict(), state)


def test_a_new_classifier_and_other_channels(served: Any) -> None:
    state = trained()
    overlay = {**served({"model": state}), "num_classes": 5}
    model = small(
        pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, drop_rate=0.1
    )
    found = model.state_dict()
    assert found["head.weight"].shape == (7, state["head.weight"].shape[1])
    first = "patch_embed.conv1.weight"
    torch.testing.assert_close(found[first], state[first].sum(1, keepdim=True))
    kept = [name for name in state if not name.startswith(("head.", first))]
    assert all(torch.equal(found[name], state[name]) for name in kept)


def test_backbones_of_detectors_and_segmenters_load(served: Any) -> None:
    state = trained("T of detectors")
    backbone = {
        f"backbone.{name}": tensor
        for name, tensor in state.items()
        if not name.startswith(("head", "conv_head"))
    }
    published = {
        "meta": {"epoch": 12},
        "state_dict": {**backbone, "neck.fpn_convs.0.conv.weight": torch.zeros(2, 2, 3, 3)},
    }
    overlay = served(published)
    load = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
    found = small("T of detectors", **load).state_dict()
    assert same(found, {f"model.{n[9:]}": tensor for n, tensor in backbone.items()})
    # Every scale of the file would be left out.
    with pytest.raises(ValueError, match=r"layer_scale=1.0.*got levels.0.blocks.0.gamma1, "):
        small("T", **load)


def test_a_file_loads_strictly_without_the_filter(tmp_path: Path) -> None:
    file = tmp_path / "flash_intern_image_t_1k_224.pth"
    torch.save({"model": trained()}, file)
    assert same(small(checkpoint_path=str(file)).state_dict(), trained())
    overlay = {"file": str(file), "num_classes": 5}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model.state_dict(), trained())


def test_without_a_network_it_says_what_to_do(served: Any, tmp_path: Path) -> None:
    gone = served(None)["url"] + ".gone"
    missing = str(tmp_path / "missing.pth")
    for overlay, place in ({"url": gone}, gone), ({"file": missing}, missing):
        with pytest.raises(RuntimeError) as caught:
            small(pretrained=True, pretrained_cfg_overlay=overlay)
        message = str(caught.value)
        assert f"weights of flash_internimage_t must be readable at {place} (a file" in message
        assert "pretrained_cfg_overlay={'file': ...}" in message
        assert "\n" not in message


# A backbone.


@pytest.mark.parametrize("kind", ["T", "B", "InternImage-L"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (-1,), 2])
def test_features(kind: str, indices: Any) -> None:
    model = small(kind).eval()
    randomise(model)
    backbone = small(kind, features_only=True, out_indices=indices)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    images = torch.randn(1, 3, 63, 45)
    every = model.forward_intermediates(images)[1]
    chosen = list(range(4))[-indices:] if isinstance(indices, int) else [i % 4 for i in indices]
    found = backbone(images)
    torch.testing.assert_close(found, [every[i] for i in chosen])
    assert backbone.feature_info.channels() == [16 << i for i in chosen]
    assert backbone.feature_info.reduction() == [4 << i for i in chosen]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in found)
    # DistributedDataParallel waits for the gradient of every parameter.
    sum(m.sum() for m in found).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_intermediates() -> None:
    model, images = small().eval(), torch.randn(1, 3, 64, 32)
    randomise(model)
    last, maps = model.forward_intermediates(images)
    assert last is maps[-1]
    torch.testing.assert_close(last, model.forward_features(images))
    rows = model.forward_intermediates(images, 1, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(rows[0].permute(0, 3, 1, 2), last)
    early, _ = model.forward_intermediates(images, [1], stop_early=True)
    torch.testing.assert_close(early, maps[1])
    final, some = model.forward_intermediates(images, [1])
    torch.testing.assert_close([final, *some], [last, maps[1]])
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC; got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(
        ValueError, match=r"x must be images \[B, in_chans, H, W\]; got \[3, 64, 64\]"
    ):
        model(torch.zeros(3, 64, 64))


# Training.


def test_checkpointing_changes_no_gradient() -> None:
    model, images = small("B"), torch.randn(2, 3, 32, 32)
    randomise(model)
    grads = []
    calls: list[int] = []
    model.levels[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(calls) == 3
    torch.testing.assert_close(*grads)


def original_rate(name: str, depths: tuple[int, ...], decay: float) -> float:
    """Of the original's recipe: a power for each block, counted from the last."""
    parts = name.split(".")
    order = [(level, block) for level, depth in enumerate(depths) for block in range(depth)]
    if parts[0] == "patch_embed":
        place = (0, 0)
    elif parts[0] != "levels":
        return 1.0
    elif parts[2] == "blocks":
        place = (int(parts[1]), int(parts[3]))
    elif int(parts[1]) == len(depths) - 1:
        return 1.0
    else:
        place = (int(parts[1]) + 1, 0)
    return decay ** (len(order) - 1 - order.index(place))


@pytest.mark.parametrize("kind", ["T", "L", "InternImage-L"])
def test_rates_and_decay_are_the_originals(kind: str) -> None:
    model = small(kind)
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.8, deformable_scale=0.25)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = original_rate(name, SMALL["depths"], 0.8)
        if ".dcn.offset" in name:
            rate *= 0.25
        assert found[id(parameter)] == (
            pytest.approx(rate),
            0.0 if parameter.dim() == 1 else 0.1,
        ), name
    whole = parameter_groups(model, deformable_scale=0.5)
    scales = {id(p): g["lr_scale"] for g in whole for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == (0.5 if ".dcn.offset" in name else 1.0)


def test_coarse_groups() -> None:
    model = small()
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert [sorted({name.split(".")[1] for name in groups[i]}) for i in range(1, 5)] == [
        [str(i)] for i in range(4)
    ]
    assert all(name.startswith("patch_embed") for name in groups[0])


def test_it_trains_with_timms_optimizer() -> None:
    model = small("B", drop_path_rate=0.2, drop_rate=0.1).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3, param_group_fn=parameter_groups)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_new_classifier() -> None:
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(images), pooled)
    model.half().reset_classifier(9)
    assert model.get_classifier().weight.dtype == torch.float16
    assert model.float()(images).shape == (2, 9)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, model.head_hidden_size, 1, 1)


def test_stochastic_depth_grows_to_its_rate() -> None:
    model = small(drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for level in model.levels for b in level.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_fresh_model_begins_as_the_original() -> None:
    model = timm.create_model("flash_internimage_s", depths=(1, 1, 1, 1))
    for name, parameter in model.named_parameters():
        if ".dcn.offset_mask." in name:
            assert not parameter.any(), name
        elif name.endswith(("mlp.fc1.weight", "head.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("value_proj.weight"):  # Glorot's
            assert parameter.std().item() == pytest.approx(len(parameter) ** -0.5, rel=0.05), name
        elif name.endswith(("gamma1", "gamma2")):
            assert (parameter == 1e-5).all(), name


# Precision.


@pytest.mark.skipif(VERSION < (2, 1), reason="autocast of a CPU needs torch >= 2.1")
@pytest.mark.parametrize("kind", ["T", "B"])
def test_maps_have_autocasts_dtype_and_statistics_are_exact(kind: str) -> None:
    model, images = small(kind).eval(), torch.randn(2, 3, 64, 64)
    randomise(model)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if type(module).__name__ in ("Block", "LayerNorm"):
            module.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert len(seen) > 15
    assert set(seen) == {torch.bfloat16}
    exact = model(images)
    assert ((found.float() - exact).norm() / exact.norm()).item() < 0.05

    norm = model.patch_embed.norm2[0]
    x = (100 + torch.randn(4, 16)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    weight, bias = norm.weight.double(), norm.bias.double()
    error = found.double() - F.layer_norm(x.double(), (16,), weight, bias, 1e-6)
    assert error.abs().max().item() < 0.05


# Graphs.

compiles = pytest.mark.skipif(VERSION < (2, 4), reason="whole graphs need torch >= 2.4")


@compiles
@pytest.mark.parametrize(("kind", "amp"), [("T", False), ("B", True)])
def test_one_graph_serves_every_batch_and_size(kind: str, amp: bool) -> None:
    """As exact as the model that is not compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = small(kind, depths=(1, 1))
    randomise(model)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(
        copy.deepcopy(model), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for i, shape in enumerate([(2, 3, 48, 40), (3, 3, 40, 48), (5, 3, 37, 43)]):
        images = torch.randn(shape).double()
        results = []
        for each in (model, compiled, exact):
            each.zero_grad()
            parameters = list(each.parameters())
            with (
                torch._dynamo.config.patch(error_on_recompile=i > 0),
                torch.autocast("cpu", torch.bfloat16, enabled=amp and each is not exact),
            ):
                logits = each(images.to(parameters[0].dtype))
            logits.to(parameters[0].dtype).square().mean().backward()
            results.append([each.double() for each in (logits, *(p.grad for p in parameters))])
        for plain, found, right in zip(*results, strict=True):
            rounding = torch.finfo(torch.bfloat16 if amp else torch.float32).eps * right.norm()
            # The batch norm takes the last level's biases out: their gradients are rounding alone.
            error, allowed = (found - right).norm(), 2 * (plain - right).norm()
            assert error <= allowed + 8 * rounding + (1e-4 if amp else 1e-6)


@compiles
def test_a_checkpointed_model_and_a_backbone_are_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    for model in small(), small(features_only=True):
        inner = getattr(model, "model", model)
        inner.set_grad_checkpointing()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        expected = model.eval()(images)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)


# Under other people's heads.


class Pyramid(nn.Module):
    """The maps of a model, of one width, as torchvision's detectors take them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = small(features_only=True, layer_scale=1.0, **settings)
        self.out_channels = 32
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = {str(i): each for i, each in enumerate(self.body(images))}
        found: dict[str, Tensor] = self.fpn(maps)
        return found


def loss_falls(model: nn.Module, loss_of: Callable[[], Tensor], steps: int = 4) -> None:
    """And every parameter gets a finite gradient, of some number that is not zero in the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    losses = []
    for _ in range(steps):
        torch.manual_seed(1)  # what detectors sample
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_mask_rcnn_trains() -> None:
    import torchvision

    if not torchvision.extension._has_ops():
        pytest.skip(f"needs torchvision's operators for torch {torch.__version__}")
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4)
    model = MaskRCNN(
        Pyramid(),
        3,
        min_size=64,
        max_size=80,
        rpn_anchor_generator=anchors,
        box_detections_per_img=4,
    )
    images = [torch.rand(3, 96, 120), torch.rand(3, 101, 96)]
    targets = []
    for image in images:
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 20:70, 30:80] = 1
        box = torch.tensor([[30.0, 20.0, 80.0, 70.0]])
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    loss_falls(model, lambda: sum(model(images, targets).values(), torch.zeros(())))
    for image, found in zip(images, model.eval()(images), strict=True):
        assert found["masks"].shape[2:] == image.shape[1:]


def test_a_segmenter_trains() -> None:
    from torchvision.models.segmentation.fcn import FCNHead

    torch.manual_seed(0)
    backbone, head = Pyramid(), FCNHead(32, 4)
    model = nn.ModuleList([backbone, head])
    images, labels = torch.randn(2, 3, 75, 90), torch.randint(4, (2, 75, 90))

    def loss() -> Tensor:
        maps = backbone(images).values()
        total = sum(F.interpolate(each, (19, 23)) for each in maps)
        scores = F.interpolate(head(total), (75, 90), mode="bilinear")
        return F.cross_entropy(scores, labels)

    loss_falls(model, loss)
