"""The rungs agree: whichever can take a model, the chains, the costs and the plan are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from torch import fx, nn

from replfx.chains.find import find_chains
from replfx.modules.copying import structural_copy
from replfx.tracing import Held, Traces, info_of
from replfx.tracing.capturing import record_on_fakes, record_on_values, symbolic_on_fakes
from replfx.tracing.inputs import Inputs
from tests.support.strategies import Case, cases


def capture_by(rung: str, model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    if rung == "symbolic":
        return symbolic_on_fakes(model, inputs)
    held = Held(model, None)
    if rung == "values":
        return record_on_values(model, inputs, held)
    with Traces(model) as traces:
        return record_on_fakes(model, inputs, traces, held)


def findings(model: nn.Module, inputs: Inputs, rung: str) -> tuple[Any, ...]:
    graph = capture_by(rung, structural_copy(model), inputs)
    found = find_chains(graph)
    costs = [node.meta["replfx"] for node in graph.graph.nodes if "replfx" in node.meta]
    info = info_of(graph)
    inner: dict[str, list[int]] = {}
    for call in info.calls:
        nodes = [n.meta["replfx"] for n in info.nodes[call.start : call.stop] if "replfx" in n.meta]
        inner.setdefault(call.path, []).append(sum(cost.saved_bytes for cost in nodes))
    return (
        [
            [(block.path, block.shape_change, block.site.shape, block.obstacle) for block in chain.blocks]
            for chain in found.chains
        ],
        sorted(found.refused),
        sum(cost.flops for cost in costs),
        sum(cost.saved_bytes for cost in costs),
        {path: saved for path, saved in inner.items() if any(path in chain.paths for chain in found.chains)},
    )


@settings(max_examples=10)
@given(cases())
def test_the_rungs_agree_on_drawn_stacks(case: Case) -> None:
    model = case.model()
    inputs = Inputs.of(case.inputs(), model)
    first = findings(model, inputs, "symbolic")
    assert first[0] or first[2]
    assert findings(model, inputs, "fakes") == first
    assert findings(model, inputs, "values") == first


TV = torchvision.models
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: TV.resnet18(), 64),
    "densenet": (lambda: TV.DenseNet(8, (3, 3), 8), 32),
    "mobilenet_v3": (lambda: TV.mobilenet_v3_small(), 64),
    "vit": (lambda: TV.VisionTransformer(32, 8, 4, 2, 16, 32), 32),
    "regnet": (lambda: TV.regnet_y_400mf(), 32),
    "timm-vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24), 32),
    "timm-mixer": (lambda: timm.create_model("mixer_s32_224", img_size=64), 64),
    "timm-convnext": (lambda: timm.create_model("convnext_atto", drop_path_rate=0.1), 32),
    "timm-poolformer": (lambda: timm.create_model("poolformer_s12"), 32),
    "timm-ghostnet": (lambda: timm.create_model("ghostnet_050"), 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rungs_agree_on_models(name: str) -> None:
    torch.manual_seed(0)
    build, size = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    inputs = Inputs.of(torch.randn(2, 3, size, size), model)
    try:
        first = findings(model, inputs, "symbolic")
    except Exception as error:  # the rung is for models whose Python code lets it
        pytest.skip(f"cannot be traced symbolically: {type(error).__name__}")
    assert findings(model, inputs, "fakes") == first
