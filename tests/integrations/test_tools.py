"""A transformed model under the tools of a training script, each against the same model by hand or without the tool."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import replfx
from tests.integrations.shipped import transformed_tower
from tests.support.strategies import randomize

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 2])
POINTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
OPERATORS = pytest.mark.parametrize("operator", ["block", "light"])


def vit(drop_path: float = 0.0) -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=5, num_heads=2, drop_path_rate=drop_path
    )
    randomize(model, 4)
    return model


def transformed_vit(operator: str = "block", drop_path: float = 0.0) -> nn.Module:
    model = replfx.transform(vit(drop_path), operator=operator)
    randomize(model, 5)
    return model


def gradients(model: nn.Module, call: Callable[..., Tensor], inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of a call, and what they give every parameter of a model."""
    model.zero_grad()
    out = call(inputs)
    F.cross_entropy(out, LABELS[torch.arange(len(inputs)) % len(LABELS)]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return out.detach(), found


def assert_equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


def forwards_of(layer: nn.Module) -> list[int]:
    """Counts how often a layer runs: with checkpoints, again in the backward pass, which need not see it end."""
    runs: list[int] = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


# ---- checkpoints


@OPERATORS
@pytest.mark.parametrize("when", ["before", "after"])
def test_timms_checkpoints_change_no_gradient(operator: str, when: str) -> None:
    without = transformed_vit(operator)
    if when == "before":
        original = vit()
        original.set_grad_checkpointing()
        model = replfx.transform(original, operator=operator)
        model.load_state_dict(without.state_dict())
    else:
        model = copy.deepcopy(without)
        model.set_grad_checkpointing()
    runs = forwards_of(model.get_submodule(replfx.report(model).replaced[0]))
    assert_equal(gradients(model, model, IMAGES), gradients(without, without, IMAGES))
    assert len(runs) == 2


@OPERATORS
def test_reentrantly_checkpointed_blocks_have_the_same_gradients(operator: str) -> None:
    """The other kind of checkpoint is in tests/properties/test_runs.py."""
    model = transformed_tower(operator)
    expected = gradients(model, model, POINTS)
    runs = forwards_of(model.blocks[1])

    def call(x: Tensor) -> Tensor:
        x = model.stem(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return model.head(x)

    assert_equal(gradients(model, call, POINTS), expected)
    assert len(runs) == 2


# ---- drop-path


def test_a_replaced_block_drops_paths_at_its_own_rate() -> None:
    """With a seed, as timm's block does that has the synthesised weights: `materialize` is left out of it."""
    model = transformed_vit(drop_path=0.5).train()
    by_hand, plan = vit(drop_path=0.5).train(), replfx.report(model)
    assert plan.replaced == ["blocks.1", "blocks.3"]
    weights = model.state_dict()
    for path in plan.replaced:
        synthesized = model.get_submodule(path).synthesized()
        weights.update({f"{path}.{name}": t.detach() for name, t in synthesized.items()})
    names = by_hand.state_dict().keys()
    by_hand.load_state_dict({name: t for name, t in weights.items() if name in names})
    results = []
    for each in (model, by_hand):
        torch.manual_seed(7)
        results.append(each(IMAGES))
    torch.testing.assert_close(*results)
    torch.manual_seed(8)
    assert not torch.allclose(model(IMAGES), results[0])  # so that paths were dropped at all
    model.eval()
    assert not torch.allclose(model(IMAGES), results[0])


# ---- averages of weights


def trained(model: nn.Module, average: Callable[[nn.Module], object], steps: int = 3) -> list[dict[str, Tensor]]:
    """Train some steps; gives the weights after each."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(POINTS), torch.arange(6) % 3).backward()
        optimizer.step()
        average(model)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen


def assert_is_that_model(averaged: nn.Module, weights: dict[str, Tensor], operator: str) -> None:
    """All its weights, the coefficients too, and what a fresh model computes with them."""
    found = dict(averaged.named_parameters())
    assert found.keys() == weights.keys()
    assert any("fusion." in name for name in found)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, msg=name)
    fresh = transformed_tower(operator, seed=99)
    fresh.load_state_dict(weights)
    torch.testing.assert_close(averaged(POINTS), fresh(POINTS))


@OPERATORS
def test_averaged_model(operator: str) -> None:
    model = transformed_tower(operator)
    average = AveragedModel(model)
    seen = trained(model, average.update_parameters)
    means = {name: torch.stack([weights[name] for weights in seen]).mean(0) for name in seen[0]}
    assert not torch.allclose(means["blocks.1.replfx.fusion.next"], seen[-1]["blocks.1.replfx.fusion.next"])
    assert_is_that_model(average.module, means, operator)
    assert not torch.allclose(average(POINTS), model(POINTS))  # its fusion layers read its own blocks


def test_averaged_model_with_a_decay() -> None:
    model = transformed_tower()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    first, *rest = trained(model, average.update_parameters)
    assert_is_that_model(average.module, decayed(first, rest), "block")


@OPERATORS
def test_timms_average(operator: str) -> None:
    model = transformed_tower(operator)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = ModelEmaV3(model, decay=0.75)
    seen = trained(model, average.update)
    assert_is_that_model(average.module, decayed(start, seen), operator)
    assert not torch.allclose(average.module(POINTS), model(POINTS))


def decayed(start: dict[str, Tensor], seen: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    for weights in seen:
        start = {name: 0.75 * value + 0.25 * weights[name] for name, value in start.items()}
    return start


# ---- scaled and clipped gradients


@OPERATORS
def test_grad_scaler_trains_as_without_it(operator: str) -> None:
    """The scale is a power of two, so that it takes nothing from float32's precision."""
    results = []
    for scaled in (True, False):
        model = transformed_tower(operator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(POINTS), torch.arange(6) % 3)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    start = transformed_tower(operator).get_parameter("blocks.1.replfx.fusion.next")
    assert not torch.equal(results[0]["blocks.1.replfx.fusion.next"], start)


def test_grad_scaler_passes_over_a_coefficients_gradient_that_is_not_finite() -> None:
    model = transformed_tower()
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model.get_parameter("blocks.1.replfx.fusion.next").register_hook(lambda gradient: gradient * torch.inf)
    scaler.scale(model(POINTS).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@OPERATORS
def test_clip_grad_norm(operator: str) -> None:
    model = transformed_tower(operator)
    _, found = gradients(model, model, POINTS)
    by_hand = sum(float(gradient.double().pow(2).sum()) for gradient in found.values()) ** 0.5
    before = {name: gradient.clone() for name, gradient in found.items()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), by_hand / 4)
    assert norm.item() == pytest.approx(by_hand, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] / 4, msg=name)


# ---- weights as arguments


@OPERATORS
def test_an_ensemble_under_vmap_is_a_loop(operator: str) -> None:
    models = [transformed_tower(operator, seed) for seed in (10, 11, 12)]
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")  # has no weights of its own to fall back on

    def call(weights: dict[str, Tensor], state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (weights, state), (x,))

    outputs = vmap(call, (0, 0, None))(stacked, buffers, POINTS)
    torch.testing.assert_close(outputs, torch.stack([model(POINTS) for model in models]))

    def loss(weights: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(call(weights, state, POINTS), torch.arange(6) % 3)

    found = vmap(torch.func.grad(loss))({name: p.detach() for name, p in stacked.items()}, buffers)
    for index, model in enumerate(models):
        F.cross_entropy(model(POINTS), torch.arange(6) % 3).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, msg=name)


def test_gradients_of_each_sample_under_vmap() -> None:
    model = transformed_tower()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],)).pow(2).sum()

    found = vmap(torch.func.grad(loss), (None, 0))(weights, POINTS)
    for index, point in enumerate(POINTS):
        model.zero_grad()
        model(point[None]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, msg=name)


# ---- compiled and exported with a tool at work


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_with_timms_checkpoints() -> None:
    without = transformed_vit()
    model = copy.deepcopy(without)
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = gradients(model, compiled, IMAGES), gradients(without, without, IMAGES)
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("average", [AveragedModel, ModelEmaV3])
def test_an_average_is_compiled_and_exported(average: Callable[[nn.Module], nn.Module]) -> None:
    model = transformed_tower()
    averaged = average(model)
    randomize(model, 20)  # so that reading the wrong blocks would show
    expected = averaged(POINTS)
    torch.testing.assert_close(torch.compile(averaged, fullgraph=True, backend="aot_eager")(POINTS), expected)
    program = torch.export.export(averaged.module, (POINTS,))
    torch.testing.assert_close(program.module()(POINTS), expected)


def test_an_ensemble_is_exported() -> None:
    models = [transformed_tower(seed=seed).requires_grad_(False) for seed in (10, 11)]
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    class Ensemble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return vmap(lambda weights: functional_call(base, (weights, buffers), (x,)))(stacked)

    program = torch.export.export(Ensemble(), (POINTS,))
    torch.testing.assert_close(program.module()(POINTS), torch.stack([model(POINTS) for model in models]))
