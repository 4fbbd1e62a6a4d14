"""A sample of the zoo: small models that between them take every way through capture and every kind of chain."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import replfx
from benchmarks.zoo.check import REFUSED, REPLACED, check
from benchmarks.zoo.subject import Inputs, Subject, built, called, fed, tensors_of
from tests.support.slow import some_slow

REPLACED_MODELS = {
    # Residual, densely connected, branching, two-input and re-parametrised convolutional blocks; hybrids; transformers
    # of one stage and of several, with and without windows; models that only the recorder can take.
    "timm": (
        "test_resnet test_mambaout test_vit test_coatnet test_nfnet test_convnext test_byobnet resnest14d resnetv2_18 "
        "mobilenetv3_small_050 hgnetv2_b0 ese_vovnet19b_slim_dw pit_ti_224 gmlp_ti16_224 dla46x_c inception_next_atto "
        "poolformerv2_s12 nest_tiny"
    ),
    "torchvision": "alexnet squeezenet1_1 googlenet resnet18 fcn_resnet50 fcos_resnet50_fpn",
    # Decoders, mixtures of experts, state spaces, encoders, encoder–decoders, vision, audio, two towers.
    "transformers": "gpt2 gemma olmoe mamba bamba modernbert deberta t5 whisper deit segformer wav2vec2 clip big_bird",
}
REFUSED_MODELS = {
    "timm:test_efficientnet": "no three like it in a row",
    "transformers:albert": "it is called 6 times in one forward pass",
}


# Where Dynamo's graph has other chains: the first block of T5 gives the position bias too, and is no piece of a graph.
OTHER_BLOCKS = ("transformers:t5",)

# Where Dynamo's nodes have lost the modules that they ran in (Mamba's scan), blocks are found by structure alone.
BY_STRUCTURE = ("transformers:mamba",)

SAMPLE = [f"{source}:{model}" for source, models in REPLACED_MODELS.items() for model in models.split()]


def subject(name: str) -> Subject:
    source = name.partition(":")[0]
    pytest.importorskip(source)
    models = importlib.import_module(f"benchmarks.zoo.{source}_models")
    return models.subject(name)


QUICK = ("timm:test_resnet", "timm:test_vit", "timm:test_convnext", "torchvision:resnet18", "transformers:gpt2")


@pytest.mark.parametrize("name", some_slow(SAMPLE, set(SAMPLE) - set(QUICK)))
def test_replaced(name: str) -> None:
    outcome = check(subject(name))
    assert (outcome.status, outcome.stage, outcome.error) == (REPLACED, None, None)
    assert outcome.replaced > 0
    assert outcome.parameters_after < outcome.parameters_before


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_refused_with_the_reason(name: str) -> None:
    outcome = check(subject(name))
    assert outcome.status == REFUSED
    assert any(REFUSED_MODELS[name] in reason for reason in outcome.reasons)


def compiled(model: torch.nn.Module, inputs: Inputs, backend: str | Callable[..., object]) -> list[torch.Tensor]:
    """What the model gives, compiled in one graph."""
    torch.compiler.reset()
    return list(tensors_of(called(torch.compile(model, backend=backend, fullgraph=True), inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_no_graph_break_where_there_was_none(name: str) -> None:
    """And the backend that replaces in Dynamo's graph makes what `transform` makes, bit for bit in eager mode."""
    variant = subject(name).variants[-1]
    model, inputs = built(variant), fed(variant)
    for config in (vars(module).get("config") for module in model.modules()):
        if hasattr(config, "use_cache"):
            config.use_cache = False  # in Dynamo's graph a layer that fills a cache is no piece between two others
    try:
        compiled(copy.deepcopy(model), inputs, "eager")
    except TorchDynamoException as error:
        pytest.skip(f"Dynamo breaks the graph of the untouched model: {str(error).splitlines()[0]}")
    transformed = replfx.transform(model, inputs)
    expected = list(tensors_of(called(transformed, inputs)))
    for one, other in zip(compiled(copy.deepcopy(transformed), inputs, "eager"), expected, strict=True):
        torch.testing.assert_close(one, other)
    backend = replfx.backend(every=2, inner="eager")
    found = compiled(copy.deepcopy(model), inputs, backend)
    paths = [replacement.path[1:] for replacement in backend.plan.replacements]
    if name in BY_STRUCTURE:
        assert paths
        assert not set(paths) & set(replfx.report(transformed).replaced)
        return
    if name not in OTHER_BLOCKS:
        assert paths == list(replfx.report(transformed).replaced)
    reference = replfx.transform(model, inputs, select=paths)
    for one, other in zip(found, tensors_of(called(reference, inputs)), strict=True):
        assert torch.equal(one, other)
