"""INT8 of materialized models: size, outputs and accuracy beside the float model; and what transformed ones say.

torchao's weight-only and dynamic quantisation, and PT2E's static one for X86 (its numerics: what Inductor makes of it
is Inductor's). A transformed model is not to be quantised, and either says so or is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from tests.integrations.shipped import OPERATORS, scattered
from tests.support.digits import Digits, accuracy, cnn, train, vit
from tests.support.digits import digits as handwritten
from tests.support.models import GPT, ConvNet

pytest.importorskip("torchao")

from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.inference.subjects import weight_bytes

pytestmark = pytest.mark.integrations

CONFIGS: Mapping[str, Callable[[], Any]] = {
    "weight-only": Int8WeightOnlyConfig,
    "dynamic": Int8DynamicActivationInt8WeightConfig,
}
every_operator = pytest.mark.parametrize("operator", OPERATORS)
every_config = pytest.mark.parametrize("config", CONFIGS)

# Of the norm of the float outputs. A weight is rounded to one of 255 steps up to its row's largest, which is some
# three standard deviations: 0.7 % of its own size, like the activations where those are rounded too; two dozen such
# roundings, independent of each other, give some 4 %. A weight in the wrong place gives 100 %.
ERROR = 0.05


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def gpt(operator: str, fusion: str = "scalar") -> tuple[nn.Module, Tensor]:
    """A transformed GPT, wide enough for the linear layers to be nearly all of it, and a batch."""
    torch.manual_seed(0)
    model = replfx.transform(GPT(width=64, depth=5), operator=operator, fusion=fusion)
    return scattered(model).eval(), torch.randint(0, 31, (4, 12))


def linear_bytes(model: nn.Module) -> int:
    return sum(weight_bytes([module.weight]) for module in model.modules() if isinstance(module, nn.Linear))


# ---- torchao


@every_config
@pytest.mark.parametrize("fusion", ["scalar", "channel"])
@every_operator
@torch.no_grad()
def test_torchao_quantises_a_materialized_model(operator: str, fusion: str, config: str) -> None:
    model, x = gpt(operator, fusion)
    plain = replfx.materialize(model)
    before, expected = linear_bytes(plain), plain(x)
    quantize_(plain, CONFIGS[config]())
    assert before / 4 <= linear_bytes(plain) <= 1.2 * before / 4  # and a float scale for each row
    replaced = plain.get_submodule(replfx.report(model).replaced[0])
    made = [m for m in replaced.modules() if isinstance(m, nn.Linear)]
    assert made
    assert {type(m.weight).__name__ for m in made} == {"Int8Tensor"}  # what was synthesised is quantised as well
    assert 0 < relative_error(plain(x), expected) < ERROR
    assert torch.equal(model(x), expected)  # the transformed model shares nothing with it


@every_config
@torch.no_grad()
def test_a_quantised_neighbour_is_refused(config: str) -> None:
    model, x = gpt("light")
    quantize_(model, CONFIGS[config]())
    for use in (model, replfx.materialize, replfx.unroll):
        with pytest.raises(replfx.FusionError, match=r"is quantised \(Int8Tensor\).*replfx\.materialize"):
            use(x if use is model else model)


@every_config
@torch.no_grad()
def test_torchao_stops_at_a_replaced_block_and_what_it_leaves_is_refused(config: str) -> None:
    model, x = gpt("block")
    with pytest.raises(replfx.FusionError, match=r"is quantised \(Int8Tensor\).*replfx\.materialize"):
        quantize_(model, CONFIGS[config]())
    with pytest.raises(replfx.FusionError, match=r"is quantised \(Int8Tensor\).*replfx\.materialize"):
        model(x)


@every_operator
@torch.no_grad()
def test_what_no_fusion_layer_reads_may_be_quantised(operator: str) -> None:
    model, x = gpt(operator)
    expected = model(x)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path == "head")
    assert 0 < relative_error(model(x), expected) < ERROR


def test_quantised_models_are_not_transformed() -> None:
    model = GPT(width=64)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(replfx.NoChainError, match="Int8Tensor: quantised weights are not fused"):
        replfx.transform(model)


# ---- PT2E


def static_int8(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    """The model in static INT8, calibrated on the batches."""
    exported = torch.export.export(model, (batches[0],)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return convert_pt2e(prepared)


def used_tensors(model: fx.GraphModule) -> list[Tensor]:
    """What the graph reads: a converted model also holds the float weights that it no longer uses."""
    targets = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    found = [tensor for name, tensor in model.state_dict().items() if name in targets]
    assert len(found) == len([t for t in targets if isinstance(_at(model, t), Tensor)])
    return found


def _at(model: nn.Module, target: str) -> object:
    path, _, leaf = target.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


@pytest.mark.parametrize("name", ["gpt", "conv"])
@every_operator
def test_pt2e_quantises_a_materialized_model(operator: str, name: str) -> None:
    torch.manual_seed(0)
    if name == "gpt":
        model, x = gpt(operator)
    else:
        x = torch.rand(4, 3, 8, 8)
        model = scattered(replfx.transform(ConvNet(widths=(16, 32)), operator=operator)).eval()
    plain = replfx.materialize(model)
    made = static_int8(plain, [x])
    weights = sum(p.numel() for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in [m.weight])
    codes = [tensor for tensor in used_tensors(made) if tensor.dtype == torch.int8]
    assert sum(tensor.numel() for tensor in codes) == weights
    assert weight_bytes(used_tensors(made)) < 0.5 * weight_bytes(plain.state_dict().values())
    with torch.no_grad():
        assert 0 < relative_error(made(x), plain(x)) < ERROR


@every_operator
def test_pt2e_of_a_transformed_model_without_batch_norm_is_right(operator: str) -> None:
    model, x = gpt(operator)
    if operator == "block":  # torchao takes what makes a layer's weight for a part of the layer
        with pytest.raises(TypeError, match="tuple indices"):
            static_int8(model, [x])
        model = replfx.materialize(model)
    made = static_int8(model, [x])
    with torch.no_grad():
        assert 0 < relative_error(made(x), model(x)) < ERROR


@every_operator
def test_pt2e_folds_no_batch_norm_into_a_synthesised_weight(operator: str) -> None:
    """It stops, with an error of its own: our part ends where a model is exported."""
    model = scattered(replfx.transform(ConvNet(), operator=operator)).eval()
    with pytest.raises(ValueError, match="Expected get_attr node"):
        static_int8(model, [torch.rand(4, 3, 8, 8)])
    static_int8(replfx.materialize(model), [torch.rand(4, 3, 8, 8)])


class PreActivation(nn.Module):
    """A block whose first convolution has a batch normalisation after it, and whose light operator has none."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


@torch.no_grad()
def test_pt2e_of_a_transformed_model_with_batch_norm_may_be_wrong_and_of_a_materialized_one_is_right() -> None:
    """torchao folds a batch norm into the neighbour's weight where that lies, and the light operator reads it there."""
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    torch.manual_seed(0)
    blocks = (PreActivation() for _ in range(5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks)
    model = scattered(replfx.transform(model, operator="light")).eval()
    for module in model.modules():
        if isinstance(module, PreActivation) and "bn2" in module._modules:  # it is kept
            module.bn2.weight.mul_(5)
    x, errors = torch.rand(4, 3, 8, 8), []
    for made in (model, replfx.materialize(model)):
        exported = torch.export.export(made, (x,)).module()
        _fuse_conv_bn_(exported)  # the first thing that prepare_pt2e does
        errors.append(relative_error(exported(x), model(x)))
    assert errors[1] < 1e-5 < 1e-2 < errors[0]  # once torchao leaves shared weights alone: say so in the documentation


# ---- accuracy, on real data


@pytest.fixture(scope="module")
def digits() -> Digits:
    pytest.importorskip("sklearn")
    return handwritten()


def trained(make: Callable[[], nn.Module], operator: str, data: Digits) -> nn.Module:
    """A model that was transformed, trained for seconds and materialized."""
    torch.manual_seed(0)
    model = replfx.transform(make(), data.train_images[:2], operator=operator)
    train(model, data, epochs=8, seed=0)
    return replfx.materialize(model.eval())


def static_accuracy(plain: nn.Module, data: Digits) -> float:
    """Of static INT8, calibrated on images that it was trained on."""
    batch = len(data.test_images)
    made = static_int8(plain, [data.train_images[:batch]])
    with torch.no_grad():
        return (made(data.test_images).argmax(1) == data.test_labels).double().mean().item()


@pytest.mark.parametrize(("make", "operator"), [(vit, "block"), (vit, "light"), (cnn, "light")])
def test_accuracy_survives(make: Callable[[], nn.Module], operator: str, digits: Digits) -> None:
    if make is vit:
        pytest.importorskip("timm")
    plain = trained(make, operator, digits)
    found = {"float": accuracy(plain, digits.test_images, digits.test_labels), "static": static_accuracy(plain, digits)}
    if make is vit:  # torchao's own take linear layers alone
        for name, config in CONFIGS.items():
            made = copy.deepcopy(plain)
            quantize_(made, config())
            found[name] = accuracy(made, digits.test_images, digits.test_labels)
    print({name: f"{100 * share:.1f} %" for name, share in found.items()})
    assert found["float"] > 0.9
    # Of 540 images: a handful near the border between two classes may change sides.
    assert all(abs(share - found["float"]) <= 0.015 for share in found.values()), found
