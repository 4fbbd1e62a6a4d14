"""A sample of the zoo: small models that between them take every way through capture and every kind of chain."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.zoo.check import REFUSED, REPLACED, check

REPLACED_MODELS = {
    # Residual, densely connected, branching, two-input and re-parametrised convolutional blocks; hybrids; transformers
    # of one stage and of several, with and without windows; models that only the recorder can take.
    "timm": (
        "test_resnet test_mambaout test_vit test_coatnet test_nfnet test_convnext test_byobnet resnest14d resnetv2_18 "
        "mobilenetv3_small_050 hgnetv2_b0 ese_vovnet19b_slim_dw pit_ti_224 gmlp_ti16_224 dla46x_c inception_next_atto "
        "poolformerv2_s12 nest_tiny"
    ),
    "torchvision": "alexnet squeezenet1_1 vgg11 googlenet resnet18 fcn_resnet50 fcos_resnet50_fpn",
    # Decoders, mixtures of experts, state spaces, encoders, encoder–decoders, vision, audio, two towers.
    "transformers": "gpt2 gemma olmoe mamba bamba modernbert deberta t5 whisper deit segformer wav2vec2 clip big_bird",
}
REFUSED_MODELS = {
    "timm:test_efficientnet": "no three like it in a row",
    "transformers:albert": "it is called 6 times in one forward pass",
}


def outcome_of(name: str):
    source = name.partition(":")[0]
    pytest.importorskip(source)
    models = importlib.import_module(f"benchmarks.zoo.{source}_models")
    return check(models.subject(name))


@pytest.mark.parametrize("name", [f"{s}:{model}" for s, models in REPLACED_MODELS.items() for model in models.split()])
def test_replaced(name: str) -> None:
    outcome = outcome_of(name)
    assert (outcome.status, outcome.stage, outcome.error) == (REPLACED, None, None)
    assert outcome.replaced > 0
    assert outcome.parameters_after < outcome.parameters_before


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_refused_with_the_reason(name: str) -> None:
    outcome = outcome_of(name)
    assert outcome.status == REFUSED
    assert any(REFUSED_MODELS[name] in reason for reason in outcome.reasons)
