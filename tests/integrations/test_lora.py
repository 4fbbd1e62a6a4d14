"""LoRA on the kept blocks of a transformed model.

A fusion layer goes on reading what a kept block's weight was before it was adapted: adapters stand beside the weights.
So a replaced block computes the same before and after, and LoRA on a transformed model is LoRA on the materialized
one. A merge changes the weights themselves: materialize first.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.live import Synthesis
from tests.integrations.shipped import transformed_tower
from tests.support.models import tower

pytestmark = pytest.mark.integrations

POINTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
OPERATORS = pytest.mark.parametrize("operator", ["block", "light"])
KEPT = r".*blocks\.[024]\.fc\d"


def adapted(model: nn.Module, **options: Any) -> Any:
    """With adapters that do something from the start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    options = {"target_modules": KEPT, "r": 2, "lora_alpha": 4, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**options))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    model(POINTS).pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@OPERATORS
def test_adapters_stand_beside_the_weights_that_fusion_layers_read(operator: str) -> None:
    model = transformed_tower(operator)
    by_hand, before = replfx.materialize(model), copy.deepcopy(model)
    lora = adapted(model)
    with torch.no_grad():
        for index in (0, 2, 4):
            for name in ("fc1", "fc2"):
                layer = model.blocks[index].get_submodule(name)
                pair = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
                by_hand.get_parameter(f"blocks.{index}.{name}.weight").add_(2.0 * pair[0] @ pair[1])  # alpha/r
    torch.testing.assert_close(lora(POINTS), by_hand(POINTS))
    assert not torch.allclose(lora(POINTS), before(POINTS))
    with lora.disable_adapter():
        torch.testing.assert_close(lora(POINTS), before(POINTS))


@OPERATORS
def test_it_is_lora_on_the_materialized_model(operator: str) -> None:
    model = transformed_tower(operator)
    plain, lora = adapted(replfx.materialize(model)), adapted(model)
    expected = gradients(plain)
    found = gradients(lora)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def train(lora: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(replfx.parameter_groups(lora), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        lora(POINTS).pow(2).sum().backward()
        optimizer.step()
    return optimizer


def test_coefficients_are_trained_if_they_are_asked_for(tmp_path: Path) -> None:
    from peft import PeftModel

    model = transformed_tower()
    plan, base = replfx.plan(tower(5)), copy.deepcopy(model.state_dict())
    lora = adapted(model, modules_to_save=["fusion"])
    groups = {group["name"]: len(group["params"]) for group in replfx.parameter_groups(lora)}
    assert groups == {"decay": 12, "no_decay": 4}  # two adapters of two matrices a block, and the coefficients
    before = [layer.synthesized() for layer in layers_of(model)]
    train(lora)
    for layer, theta in zip(layers_of(model), before, strict=True):
        assert not torch.allclose(layer.synthesized()["fc1.weight"], theta["fc1.weight"])
    lora.save_pretrained(str(tmp_path))
    fresh = replfx.apply(tower(5), plan)
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(loaded(POINTS), lora(POINTS))


def layers_of(model: nn.Module) -> list[Synthesis]:
    return [module for module in model.modules() if isinstance(module, Synthesis)]


@OPERATORS
def test_training_goes_on_from_saved_adapters(operator: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = transformed_tower(operator)
    plan, base = replfx.plan(tower(5), operator=operator), copy.deepcopy(model.state_dict())
    lora = adapted(model)
    optimizer = train(lora)
    lora.save_pretrained(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())
    train(lora, optimizer=optimizer)
    fresh = replfx.apply(tower(5), plan)
    replfx.load_state_dict(fresh, base)
    resumed = PeftModel.from_pretrained(fresh, str(tmp_path), is_trainable=True)
    again = torch.optim.AdamW(replfx.parameter_groups(resumed), lr=0.01)
    again.load_state_dict(state)
    train(resumed, optimizer=again)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in lora.state_dict().items())


@OPERATORS
def test_a_merge_is_right_after_materialize(operator: str) -> None:
    lora = adapted(transformed_tower(operator))
    expected = lora(POINTS)
    careless = copy.deepcopy(lora).merge_and_unload()
    assert not torch.allclose(careless(POINTS), expected)  # its fusion layers read the merged weights
    lora.base_model.model = replfx.materialize(lora.base_model.model)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(POINTS), expected)
    assert not layers_of(merged)


@pytest.mark.parametrize("targets", ["all-linear", ["fc1", "fc2"]])
def test_a_replaced_block_takes_adapters_of_its_own(targets: str | list[str]) -> None:
    lora = adapted(transformed_tower(), target_modules=targets)
    lora(POINTS).square().sum().backward()
    trained = {name for name, p in lora.named_parameters() if p.requires_grad and p.grad is not None}
    assert {name.split(".lora_")[0] for name in trained} >= {
        f"base_model.model.blocks.1.{layer}" for layer in ("fc1", "fc2")
    }
    adapted(transformed_tower("light"), target_modules=["fc1", "fc2"])  # has none of the block's layers


@pytest.mark.usefixtures("fresh_dynamo")
@OPERATORS
def test_it_is_compiled_and_exported(operator: str) -> None:
    lora = adapted(transformed_tower(operator))
    compiled = torch.compile(copy.deepcopy(lora), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(POINTS), lora(POINTS))
    program = torch.export.export(lora.base_model.model, (POINTS,))
    torch.testing.assert_close(program.module()(POINTS), lora(POINTS))
