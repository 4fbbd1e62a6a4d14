"""synthesize_once: the gradients of micro-batches one by one, with one synthesis for all of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import replfx
from replfx.live import syntheses_of
from tests.support.compare import Gradients, assert_same_gradients, loss_of, outputs
from tests.support.compiled import Compiled, small
from tests.support.models import tower
from tests.support.strategies import Case, cases


def accumulated(model: nn.Module, micro: Callable[[int], Tensor], count: int) -> Gradients:
    """What `count` losses leave in the gradients."""
    for index in range(count):
        micro(index).backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@settings(max_examples=10)
@given(case=cases(), count=st.integers(1, 3), again=st.booleans())
def test_gradients_are_those_of_a_synthesis_a_micro_batch(case: Case, count: int, again: bool) -> None:
    model = case.transformed()
    buffers = copy.deepcopy(dict(model.named_buffers()))

    def micro(index: int) -> Tensor:
        x, *rest = case.inputs()
        return loss_of(outputs(model, (x.detach() * (1 + index), *rest)))

    for _ in range(1 + again):
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])  # running statistics, as they were
        expected = accumulated(model, micro, count)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        with replfx.synthesize_once(model):
            for index in range(count):
                micro(index).backward()
        assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected)
        model.zero_grad()


def test_each_layer_synthesises_once() -> None:
    model, calls = small(), [0]
    for layer in syntheses_of(model).values():
        layer.fusion.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with replfx.synthesize_once(model):
        for _ in range(4):
            model(torch.randn(2, 4)).sum().backward()
        with torch.no_grad():
            model(torch.randn(2, 4))
    assert calls[0] == len(syntheses_of(model)) == 3
    model(torch.randn(2, 4))
    assert calls[0] == 6, "after it a forward synthesises again"


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_has_one_more_graph_and_no_synthesis_in_it() -> None:
    model, xs = small().double(), [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    expected = accumulated(model, lambda index: model(xs[index]).square().sum(), 3)
    compiled = Compiled(model, "aot_eager")
    counters.clear()
    for _ in range(3):
        model.zero_grad()
        with replfx.synthesize_once(compiled.compiled):
            for x in xs:
                compiled(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, sums in another order
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.batches == [[]]
    compiled(xs[0])
    assert compiled.batches == [[], [3, 3]]
    with replfx.synthesize_once(compiled.compiled):
        compiled(xs[0])
    assert compiled.calls == [10, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_micro_batches_run_again_with_the_same_weights(reentrant: bool) -> None:
    model = small().double()
    xs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = accumulated(model, lambda index: model(xs[index]).square().sum(), 2)
    with replfx.synthesize_once(model):
        for x in xs:
            y: Tensor = checkpoint(model, x, use_reentrant=reentrant)
            y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, sums in another order


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def write(model: nn.Module) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "fc1.weight" in name).mul_(2)


def nest(model: nn.Module) -> None:
    with replfx.synthesize_once(model):
        pass


@pytest.mark.parametrize(
    ("deed", "message"),
    [(step, "an optimizer steps within .*`blocks.1`"), (write, "weights changed that `blocks.1`"), (nest, "blocks.1")],
)
def test_what_would_spoil_the_gradients_is_refused(deed: Callable[[nn.Module], None], message: str) -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(replfx.FusionError, match=message), replfx.synthesize_once(model):
        deed(model)
    assert all(layer.shared is None for layer in syntheses_of(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if ".fusion." in name)
    if deed is step:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(model)  # and goes on


def test_another_models_optimizer_may_step() -> None:
    model, other = small(), small()
    with replfx.synthesize_once(model):
        step(other)
        model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_after_an_error_of_the_users_nothing_flows() -> None:
    model = small()

    def fails() -> None:
        with replfx.synthesize_once(model):
            model(torch.randn(2, 4)).sum().backward()
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(p.grad is None for name, p in model.named_parameters() if ".fusion." in name)
    assert all(layer.shared is None for layer in syntheses_of(model).values())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replfx.training.accumulation.is_distributed", lambda: True)
    with pytest.raises(replfx.FusionError, match="one process"), replfx.synthesize_once(small()):
        pass
    with replfx.synthesize_once(tower()):
        pass  # nothing to synthesise


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_it_synthesises_for_itself(copied: Callable[[Any], Any]) -> None:
    model = small()
    with replfx.synthesize_once(model):
        twin = copied(model)
    x = torch.randn(2, 4)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    step(twin)
    assert all(p.grad is not None for p in twin.parameters())


def test_frozen_weights_and_no_grad_around_it() -> None:
    model = small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.0" in name)
    with torch.no_grad(), replfx.synthesize_once(model), torch.enable_grad():
        model(torch.randn(2, 4)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
