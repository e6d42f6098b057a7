"""Hugging Face models give the same outputs and gradients with their attention routed."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dcnv4.integrations.transformers as integration
from dcnv4 import FlashDeformAttn, backends, ops
from dcnv4.integrations.transformers import disable, enable

if find_spec("transformers") is None:
    pytest.skip("needs transformers; pip install transformers", allow_module_level=True)

import transformers

MAJOR = int(transformers.__version__.split(".")[0])

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
BERT = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
DETR = {
    "backbone_config": RESNET,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 6,
}
NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 8, 8],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
    "eval_size": None,
}
GROUNDING = {
    **DETR,
    "backbone_config": {**SWIN, "out_features": ["stage2", "stage3", "stage4"]},
    "text_config": BERT,
    "max_text_len": 8,
}

# The model class and its configuration, by model type.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "d_fine": ("DFineForObjectDetection", {**RT_DETR, "decoder_n_points": [3, 6, 3]}),
    "deformable_detr": ("DeformableDetrForObjectDetection", {**DETR, **NO_TIMM}),
    "deimv2": ("Deimv2ForObjectDetection", RT_DETR),
    "grounding_dino": ("GroundingDinoForObjectDetection", GROUNDING),
    "lw_detr": (
        "LwDetrForObjectDetection",
        {
            **DETR,
            "backbone_config": {
                "model_type": "lw_detr_vit",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_windows": 4,
                "image_size": 64,
                "pretrain_image_size": 64,
                "out_indices": [1, 2],
            },
            "projector_scale_factors": [1.0, 0.5],
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 2,
            "group_detr": 1,
        },
    ),
    "mask2former": (
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": SWIN,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 16,
            "num_queries": 5,
        },
    ),
    "mm_grounding_dino": ("MMGroundingDinoForObjectDetection", GROUNDING),
    "omdet_turbo": (
        "OmDetTurboForObjectDetection",
        {
            "backbone_config": {**SWIN, "out_features": ["stage2", "stage3", "stage4"]},
            **NO_TIMM,
            "apply_layernorm_after_vision_backbone": False,
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": 99,
                "hidden_size": 16,
                "projection_dim": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "image_size": 64,
            "num_queries": 6,
            "encoder_in_channels": [16, 32, 64],
            "vision_features_channels": [24, 24, 24],
            "encoder_hidden_dim": 24,
            "encoder_attention_heads": 2,
            "encoder_dim_feedforward": 16,
            "decoder_hidden_dim": 24,
            "decoder_num_heads": 2,
            "decoder_num_layers": 2,
            "decoder_dim_feedforward": 16,
            "text_projection_in_dim": 16,
            "text_projection_out_dim": 16,
            "task_encoder_hidden_dim": 16,
            "class_embed_dim": 16,
        },
    ),
    "oneformer": (
        "OneFormerForUniversalSegmentation",
        {
            "backbone_config": SWIN,
            "conv_dim": 32,
            "mask_dim": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 16,
            "num_queries": 5,
            "text_encoder_width": 16,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 99,
            "task_seq_len": 8,
        },
    ),
    "pp_doclayout_v2": ("PPDocLayoutV2Model", RT_DETR),
    "pp_doclayout_v3": (
        "PPDocLayoutV3ForObjectDetection",
        {
            **RT_DETR,
            "backbone_config": {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "x4_feat_dim": 8,
        },
    ),
    "pp_doclayout_v4": ("PPDocLayoutV4ForObjectDetection", RT_DETR),
    "rf_detr": (
        "RfDetrForObjectDetection",
        {
            **DETR,
            "backbone_config": {
                "model_type": "rf_detr_dinov2",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_windows": 2,
                "image_size": 56,
                "patch_size": 14,
                "out_features": ["stage1", "stage2"],
            },
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 2,
            "group_detr": 1,
        },
    ),
    "rt_detr": ("RTDetrForObjectDetection", RT_DETR),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", RT_DETR),
}
# One of each place where transformers keeps the sampling.
PLACES = ("deformable_detr", "d_fine", "mask2former", "rt_detr_v2")
SIZES = {"rf_detr": (56, 112)}
# Those whose layers compute what those of Deformable DETR do.
WHOLE = (
    *("deformable_detr", "grounding_dino", "lw_detr", "mask2former", "mm_grounding_dino"),
    *("omdet_turbo", "oneformer", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"),
    *("rf_detr", "rt_detr"),
)
FROM_OFFSETS, FROM_LOCATIONS = "ms_deform_attn_from_offsets", "ms_deform_attn"


def operator_of(kind: str) -> str:
    return FROM_OFFSETS if kind in WHOLE else FROM_LOCATIONS


def make(kind: str, **changes: Any) -> nn.Module:
    """A small model with random weights, in eval mode; its points lie off the pixel centres."""
    name, settings = MODELS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model: nn.Module = cls(cls.config_class(**copy.deepcopy(settings), **changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        elif "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter)
    return model


def inputs(kind: str) -> dict[str, Any]:
    """What the model is called with."""
    torch.manual_seed(1)
    arguments: dict[str, Any] = {"pixel_values": torch.randn(2, 3, *SIZES.get(kind, (96, 128)))}
    words = torch.randint(1, 99, (2, 8))
    if "grounding" in kind:
        arguments["input_ids"] = words
    elif kind == "omdet_turbo":
        arguments |= {
            "classes_input_ids": words,
            "classes_attention_mask": torch.ones_like(words),
            "tasks_input_ids": words,
            "tasks_attention_mask": torch.ones_like(words),
            "classes_structure": torch.tensor([1, 1]),
        }
    elif kind == "oneformer":
        arguments["task_inputs"] = torch.randn(2, 8)
    return arguments


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for n, a in arguments.items()
    }


def available(kind: str) -> None:
    if not hasattr(transformers, MODELS[kind][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {MODELS[kind][0]}")
    if kind in ("mask2former", "oneformer"):
        pytest.importorskip("scipy", reason="the loss of the model needs scipy; pip install scipy")


def float64(kind: str) -> None:
    if kind == "omdet_turbo" and MAJOR < 5:
        pytest.skip(f"transformers {transformers.__version__} runs no OmDet-Turbo in float64")


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output, the nested ones too."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "sampling_offsets")]


def attention_call(
    model: nn.Module, kind: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """The model's first attention layer, with what the model calls it with."""
    layer, seen = attention_layers(model)[0], []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**{n: a.to(dtype) if a.is_floating_point() else a for n, a in inputs(kind).items()})
    hook.remove()
    args, kwargs = seen[0]
    names = inspect.signature(layer.forward).parameters
    return layer, {**dict(zip(names, args, strict=False)), **kwargs}


def copied_by_pickle(module: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(module))
    return twin


def copied_by_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin


def run(model: nn.Module, arguments: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What every attention layer and then the model return, and all gradients by name."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        for layer in attention_layers(model)
    ]
    outputs += list(tensors(model(**arguments)))
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for output in outputs:
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=generator)
            total = total + (weights * output.nan_to_num(0, 0, 0)).sum()
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], grads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operations as small as these take several times as long where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Call(NamedTuple):
    operator: str
    backend: str


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Grows by one with every call of an operator of attention."""
    seen: list[Call] = []

    def count(operator: ops.Operator) -> None:
        run = operator.forward

        def counted(backend: str, *call: Any) -> Tensor:
            seen.append(Call(operator.name, backend))
            return run(backend, *call)

        monkeypatch.setattr(operator, "forward", counted)

    count(ops.MS_DEFORM_ATTN)
    count(ops.MS_DEFORM_ATTN_FROM_OFFSETS)
    return seen


def check_close(result: Tensor, expected: Tensor, scale: float, name: str) -> None:
    assert result.shape == expected.shape, name
    finite = expected.isfinite()
    torch.testing.assert_close(result[~finite], expected[~finite], equal_nan=True)
    error = (result - expected)[finite].abs().amax() if finite.any() else torch.zeros(())
    assert float(error) <= 1e-9 * scale, f"{name}: {float(error)} beside {scale}"


def check_same(
    found: tuple[list[Tensor], dict[str, Tensor]], expected: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    """Outputs and gradients of `run` in float64."""
    assert len(found[0]) == len(expected[0])
    for i, (output, wanted) in enumerate(zip(*(f[0] for f in (found, expected)), strict=True)):
        check_close(output, wanted, float(wanted[wanted.isfinite()].abs().amax()), f"output {i}")
    assert found[1].keys() == expected[1].keys()
    # A key's bias has no effect on a softmax: its gradient is the rounding of its neighbours'.
    scales: dict[str, float] = {}
    for name, grad in expected[1].items():
        group = name.rsplit(".", 2)[0]
        scales[group] = max(scales.get(group, 0.0), float(grad.abs().max()))
    for name, grad in expected[1].items():
        check_close(found[1][name], grad, scales[name.rsplit(".", 2)[0]], name)
        assert float(grad.abs().max()) > 0 or "sampling_offsets" not in name, name


@pytest.mark.parametrize("kind", MODELS)
def test_same_outputs_and_gradients(kind: str, calls: list[Call]) -> None:
    available(kind)
    float64(kind)
    arguments = doubled(inputs(kind))
    expected = run(make(kind).double(), arguments)
    assert not calls
    model = make(kind).double()
    assert enable(model) is model
    calls.clear()
    found = run(model, arguments)
    layers = attention_layers(model)
    assert [call.operator for call in calls] == [operator_of(kind) for _ in layers]
    assert layers
    check_same(found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_disable_restores(kind: str, calls: list[Call]) -> None:
    available(kind)
    model, arguments = make(kind), inputs(kind)
    classes = [type(m) for m in model.modules()]
    contents = [dict(vars(m)) for m in attention_layers(model)]
    state = list(model.state_dict())
    assert enable(enable(model)) is model
    assert list(model.state_dict()) == state
    assert disable(model) is model
    calls.clear()
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in attention_layers(model)] == contents
    with torch.no_grad():
        model(**arguments)
    assert not calls
    disable(model)


def layer_call(layer: nn.Module, coordinates: int) -> dict[str, Any]:
    """What an attention layer of 32 channels is called with, in float64; points are boxes where
    `coordinates` is 4."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    width = layer.value_proj.in_features
    shapes = [(6, 8), (3, 4), (2, 2), (1, 3)][: layer.n_levels]
    length = sum(height * width for height, width in shapes)
    arguments = {
        "hidden_states": numbers(2, 7, width),
        "attention_mask": numbers(2, length) > -0.5,
        "encoder_hidden_states": numbers(2, length, width),
        "position_embeddings": numbers(2, 7, width),
        "reference_points": numbers(2, 7, len(shapes), coordinates),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }
    taken = inspect.signature(type(layer).forward).parameters
    return {name: argument for name, argument in arguments.items() if name in taken}


def layer_results(layer: nn.Module, call: dict[str, Any]) -> dict[str, Tensor]:
    """Both outputs, and all gradients by name, those of the inputs too."""
    leaves = {n: a for n, a in call.items() if isinstance(a, Tensor) and a.requires_grad}
    leaves |= dict(layer.named_parameters())
    output, weights = layer(**call)
    total = torch.zeros(())
    for tensor in (output, weights):
        factors = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64).view_as(tensor)
        total = total + (factors * tensor).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"output": output, "weights": weights, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_layers(kind: str, calls: list[Call]) -> None:
    available(kind)
    own = attention_layers(make(kind))[0].double()
    routed = enable(copy.deepcopy(own))
    for coordinates in (2, 4):
        call = layer_call(own, coordinates)
        expected = layer_results(own, call)
        calls.clear()
        found = layer_results(routed, call)
        assert [call.operator for call in calls] == [FROM_OFFSETS]
        assert len(expected) == 2 + 4 + 8
        for name, tensor in expected.items():
            check_close(found[name], tensor, float(tensor.abs().max()), f"{name}, {coordinates}")


@pytest.mark.parametrize("kind", ["deformable_detr", "grounding_dino", "omdet_turbo"])
def test_attention_weights(kind: str, calls: list[Call]) -> None:
    """Models read them of a hook, of a layer that was told, of a layer that was not."""
    available(kind)
    float64(kind)
    own, arguments = make(kind).double(), doubled(inputs(kind))
    routed = enable(copy.deepcopy(own))
    layer, call = attention_call(own, kind, torch.float64)
    calls.clear()
    with torch.no_grad():
        weights = layer(**call)[1]
        outputs = [list(tensors(m(**arguments, output_attentions=True))) for m in (routed, own)]
    assert {call.operator for call in calls} == {FROM_OFFSETS}
    assert weights.shape in [output.shape for output in outputs[1]]
    torch.testing.assert_close(*outputs, equal_nan=True)


def test_arguments_by_position_and_without_a_list(calls: list[Call]) -> None:
    own = attention_layers(make("deformable_detr"))[0].double()
    call = layer_call(own, 2)
    names = list(inspect.signature(own.forward).parameters)
    names = names[: max(names.index(name) for name in call) + 1]
    expected, routed = own(**call), enable(copy.deepcopy(own))
    calls.clear()
    torch.testing.assert_close(routed(*(call.get(name) for name in names)), expected)
    call.pop("spatial_shapes_list", None)
    torch.testing.assert_close(routed(**call), expected)
    assert [call.operator for call in calls] == [FROM_LOCATIONS, FROM_OFFSETS]


def test_hooks_of_submodules_run(calls: list[Call]) -> None:
    layer = attention_layers(make("deformable_detr"))[0].double()
    arguments = layer_call(layer, 2)
    expected = enable(layer)(**arguments)[0]
    for name, module in layer.named_children():
        calls.clear()
        seen: list[Tensor] = []
        with module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)):
            found = layer(**arguments)[0]
        assert len(seen) == 1, name
        torch.testing.assert_close(found, expected)
        [call] = calls
        # What hooks of the sampling see is locations.
        assert call.operator == (FROM_LOCATIONS if name == "attn" else FROM_OFFSETS)


def test_a_layer_of_another_formula_has_its_sampling_routed(calls: list[Call]) -> None:
    own = attention_layers(make("deformable_detr"))[0].double()
    if not hasattr(own, "attn"):
        pytest.skip(f"transformers {transformers.__version__} has no module that samples")
    arguments, kind = layer_call(own, 4), type(own)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(2 * hidden_states, *args, **kwargs)

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return self.scale * output, weights

    for kind in (Doubled, Scaled):
        own.__class__, own.scale = kind, nn.Parameter(torch.ones(()))
        routed = enable(copy.deepcopy(own))
        calls.clear()
        output, weights = routed(**arguments)
        assert [call.operator for call in calls] == [FROM_LOCATIONS]
        torch.testing.assert_close((output, weights), own(**arguments))


def test_pickles_of_version_0_1_load() -> None:
    """They say nothing of a layer around the sampling."""
    layer = attention_layers(make("deformable_detr"))[0]
    own = type(getattr(layer, "attn", layer))
    loaded = integration._unpickle(own, "reference")
    assert isinstance(loaded, own)
    assert type(loaded) is integration._routed_class(own, "reference", None)


def test_enabling_draws_no_random_numbers_and_compiles_nothing(calls: list[Call]) -> None:
    model = make("deformable_detr")
    state = torch.get_rng_state()
    enable(model)
    assert {call.backend for call in calls} == {"reference"}
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_every_family_is_tested() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for path in folder.rglob("modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "sampling_locations" in text and "grid_sample" in text:
            found.add(path.parent.name)
    assert "deformable_detr" in found
    assert found - {"deta"} <= MODELS.keys()


@pytest.mark.parametrize("kind", PLACES)
def test_other_models_stay_as_they_are(kind: str, calls: list[Call]) -> None:
    available(kind)
    model, other = make(kind), make(kind)
    enable(model)
    calls.clear()
    with torch.no_grad():
        other(**inputs(kind))
    assert not calls


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_save])
def test_copies_stay_enabled(
    kind: str, copied: Callable[[nn.Module], nn.Module], calls: list[Call]
) -> None:
    available(kind)
    layer, arguments = attention_call(enable(make(kind), backend="reference"), kind)
    calls.clear()
    twin = copied(layer)
    assert type(twin).__name__ == type(layer).__name__
    assert repr(twin) == repr(layer)
    expected, found = layer(**arguments)[0], twin(**arguments)[0]
    assert calls == [Call(operator_of(kind), "reference")] * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    calls.clear()
    disable(twin)(**arguments)
    assert not calls
    layer(**arguments)
    assert calls


@pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason=f"needs torch >= 2.1; got {torch.__version__}"
)
@pytest.mark.parametrize("kind", PLACES)
def test_compile(kind: str) -> None:
    available(kind)
    layer, arguments = attention_call(enable(make(kind)), kind)
    operators: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        operators.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def compiled(layer: nn.Module) -> Tensor:
        torch._dynamo.reset()
        # Older layers branch on the sum of a tensor of shapes.
        found: Tensor = torch.compile(layer, backend=keep, fullgraph=MAJOR >= 5)(**arguments)[0]
        return found

    try:
        found = compiled(layer)
    except torch._dynamo.exc.InternalTorchDynamoError:
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError):
            compiled(attention_call(make(kind), kind)[0])
        pytest.skip(f"torch {torch.__version__} does not compile transformers' own layer")
    assert operators.count(getattr(torch.ops.dcnv4, operator_of(kind)).default) == 1
    assert not any("grid_sample" in str(operator) for operator in operators)
    torch.testing.assert_close(found, layer(**arguments)[0])
    torch._dynamo.reset()


def test_compile_whole_model() -> None:
    model, arguments = enable(make("deformable_detr")), inputs("deformable_detr")
    with torch.no_grad():
        expected = model(**arguments).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(**arguments).logits
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize("kind", PLACES)
def test_trace(kind: str) -> None:
    """Of a whole model, as fvcore and TensorBoard trace it: level sizes are traced scalars."""
    available(kind)
    arguments = inputs(kind)

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = enable(make(kind))

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors(dict(self.model(pixel_values=pixels))))

    model = Outputs()
    traced = torch.jit.trace(model, arguments["pixel_values"], strict=False, check_trace=False)
    assert f"dcnv4::{operator_of(kind)}" in {node.kind() for node in traced.inlined_graph.nodes()}
    found, expected = (m(arguments["pixel_values"]) for m in (traced, model))
    torch.testing.assert_close(found, expected, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", PLACES)
def test_bfloat16_is_as_exact_as_before(kind: str) -> None:
    """The attention of a bfloat16 model, against the same layer in float64."""
    available(kind)
    layer, arguments = attention_call(make(kind).bfloat16(), kind, torch.bfloat16)
    own = layer(**arguments)[0]
    routed = enable(copy.deepcopy(layer))(**arguments)[0]
    assert routed.dtype == own.dtype == torch.bfloat16
    exact = layer.double()(**doubled(arguments))[0]
    error, budget = ((result.double() - exact).abs().mean() for result in (routed, own))
    assert float(error) <= 1.1 * float(budget)
    assert float(budget) < 0.05 * float(exact.abs().mean())


@torch.no_grad()
def test_autocast(calls: list[Call]) -> None:
    layer, arguments = attention_call(make("deformable_detr"), "deformable_detr")
    routed = enable(copy.deepcopy(layer))
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        own, output = layer(**arguments)[0], routed(**arguments)[0]
    assert output.dtype == torch.bfloat16
    assert [call.operator for call in calls] == [FROM_OFFSETS]
    exact = layer.double()(**doubled(arguments))[0]
    error, budget = ((result.double() - exact).abs().mean() for result in (output, own))
    assert float(error) <= 1.1 * float(budget)


def test_the_backend_is_passed_and_changed(calls: list[Call]) -> None:
    model = enable(make("deformable_detr"))
    for backend in ("reference", None, "auto"):
        enable(model, backend=backend)
        calls.clear()
        with torch.no_grad():
            model(**inputs("deformable_detr"))
        cpu = torch.device("cpu")
        chosen = backends.choose("ms_deform_attn", cpu, torch.float32, False, backend)
        assert set(calls) == {Call(FROM_OFFSETS, chosen)}


def test_refusals(calls: list[Call]) -> None:
    resnet = transformers.AutoModel.from_config(transformers.ResNetConfig(**RESNET))
    with pytest.raises(ValueError, match=r"must have deformable attention.*ResNetModel, which has"):
        enable(resnet)
    assert disable(resnet) is resnet
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        enable("model")  # type: ignore[type-var]
    model = make("deformable_detr")
    with pytest.raises(ValueError, match="backend must be one of"):
        enable(model, backend="fast")
    layer = attention_layers(model)[0]
    attention = getattr(layer, "attn", layer)
    attention.forward = attention.forward
    with pytest.warns(UserWarning, match=r"not routed: \S+self_attn\S* has a forward of its own"):
        enable(model)
    calls.clear()
    with torch.no_grad():
        model(**inputs("deformable_detr"))
    assert len(calls) == len(attention_layers(model)) - 1


@pytest.mark.parametrize("kind", ["d_fine", "deimv2", "rt_detr_v2"])
def test_discrete_sampling(kind: str, calls: list[Call]) -> None:
    """The nearest pixel of a level, on maps that are not square."""
    available(kind)
    model, arguments = make(kind, decoder_method="discrete").double(), inputs(kind)
    arguments = {n: a.double() if a.is_floating_point() else a for n, a in arguments.items()}
    with torch.no_grad():
        expected = model(**arguments)
        assert not calls
        found = enable(model)(**arguments)
    assert calls
    for got, right in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(got, right)


def test_a_layer_of_another_library_is_left_alone() -> None:
    class MultiScaleDeformableAttention(nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return query

    with pytest.raises(ValueError, match="which has none"):
        enable(MultiScaleDeformableAttention())


@pytest.mark.parametrize("coordinates", [2, 4])
def test_flash_deform_attn_loads_the_weights(coordinates: int) -> None:
    theirs = attention_layers(make("deformable_detr"))[0].double()
    layer = FlashDeformAttn(32, theirs.n_levels, theirs.n_heads, theirs.n_points).double()
    assert layer.load_state_dict(theirs.state_dict(), strict=True)
    shapes = [(6, 8), (3, 4), (2, 2), (1, 1)]
    value = torch.randn(2, sum(h * w for h, w in shapes), 32).double()
    query = torch.randn(2, 7, 32).double()
    points = torch.rand(2, 7, len(shapes), coordinates).double()
    padding = torch.rand(value.shape[:2]) < 0.3
    tensor = torch.tensor(shapes)
    arguments = {"spatial_shapes": tensor, "reference_points": points}
    if "spatial_shapes_list" in inspect.signature(theirs.forward).parameters:
        arguments["spatial_shapes_list"] = shapes
    for mask in (None, padding):
        expected = theirs(
            query,
            attention_mask=None if mask is None else ~mask,
            encoder_hidden_states=value,
            **arguments,
        )[0]
        found = layer(query, points, value, tensor, None, mask)
        torch.testing.assert_close(found, expected)
