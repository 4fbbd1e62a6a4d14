"""Both rungs give one product: the same costs, the same chains, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import replfx
from replfx.tracing import info_of
from tests.support.models import GPT, ConvNet, Stop, tower
from tests.support.snapshots import assert_unchanged, snapshot


def ids() -> Tensor:
    return torch.randint(0, 31, (2, 12))


MODELS = [(tower, (2, 4)), (lambda: ConvNet(3), (2, 3, 8, 8)), (GPT, None)]


def flops(graph: fx.GraphModule) -> int:
    return sum(n.meta["replfx"].flops for n in graph.graph.nodes if "replfx" in n.meta)


def parameters(graph: fx.GraphModule) -> int:
    counted = {n.target: n.meta["replfx"].parameters for n in graph.graph.nodes if "replfx" in n.meta}
    return sum(counted.values())


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(("build", "shape"), MODELS, ids=["tower", "convnet", "gpt"])
def test_flops_and_parameters_are_the_models(build: type[nn.Module], shape: tuple[int, ...] | None, stop: bool) -> None:
    model = Stop(build()) if stop else build()
    x = ids() if shape is None else torch.randn(shape)
    graph = replfx.capture(model, x)
    assert info_of(graph).tracer == ("recorded" if stop else info_of(graph).tracer)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert flops(graph) == counter.get_total_flops() > 0
    assert parameters(graph) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("build", "shape"), MODELS, ids=["tower", "convnet", "gpt"])
def test_both_rungs_find_the_same(build: type[nn.Module], shape: tuple[int, ...] | None) -> None:
    model = build()
    x = ids() if shape is None else torch.randn(shape)
    plain, stopped = replfx.inspect(model, x), replfx.inspect(Stop(model), x)
    assert stopped.capture == "recorded"
    assert [[f"model.{path}" for path in chain] for chain in plain.chains] == stopped.chains
    assert [f"model.{path}" for path in plain.replaced] == stopped.replaced
    for one, other in zip(plain.blocks, stopped.blocks, strict=True):
        assert (one.flops, one.saved_bytes, one.parameters) == (other.flops, other.saved_bytes, other.parameters)
    assert plain.before == stopped.before
    assert plain.after == stopped.after


class Small(nn.Module):
    """linear, relu, linear: small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("stop", [False, True])
def test_costs_counted_by_hand(stop: bool) -> None:
    graph = replfx.capture(Stop(Small()) if stop else Small(), torch.randn(3, 4))
    costs = {
        str(n.target).split(".")[-1]: n.meta["replfx"] for n in graph.graph.nodes if n.op.startswith("call_module")
    }
    # one keeps its input x (3×4 floats); relu keeps its result (3×8), which is two's input too.
    assert (costs["one"].flops, costs["one"].saved_bytes, costs["one"].parameters) == (2 * 3 * 4 * 8, 48, 40)
    assert (costs["two"].flops, costs["two"].saved_bytes, costs["two"].parameters) == (2 * 3 * 8 * 2, 0, 18)
    total = sum(n.meta["replfx"].saved_bytes for n in graph.graph.nodes if "replfx" in n.meta)
    assert total == 48 + 96


def test_shapes_and_dtypes_are_noted() -> None:
    graph = replfx.capture(tower(3), torch.randn(5, 4))
    (stem,) = (n for n in graph.graph.nodes if n.target == "stem")
    assert stem.meta["shape"] == (5, 8)
    assert stem.meta["dtype"] is torch.float32
    assert stem.meta["replfx"].path in ("stem", "")


def test_without_inputs_nothing_is_measured() -> None:
    graph = replfx.capture(tower(3))
    assert not info_of(graph).measured
    assert all(n.meta["replfx"].flops is None for n in graph.graph.nodes)


def test_a_model_that_fails_is_left_as_it_was() -> None:
    class Broken(Stop):
        def forward(self, x: Tensor) -> Tensor:
            self.model(x)
            self.seen = True
            raise RuntimeError("out of cheese")

    model = Broken(ConvNet(3))
    x = torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    with pytest.raises(replfx.CaptureError, match=r"Broken does not run on the .*out of cheese"):
        replfx.capture(model, x)
    assert_unchanged(model, before)
    assert nn.Module.__call__.__name__ != "watched"


def test_the_class_is_put_back_and_attributes_are_not_leaked() -> None:
    class Counting(Stop):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.calls = 0
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            return super().forward(x)

    model, x = Counting(tower(3)), torch.randn(2, 4)
    before = snapshot(model)
    replfx.capture(model, x)
    assert_unchanged(model, before)
    assert (model.calls, model.seen) == (0, [])


def test_a_no_grad_caller_gets_the_same_costs() -> None:
    model, x = tower(3), torch.randn(2, 4)
    with torch.no_grad():
        inside = replfx.inspect(model, x)
    assert inside == replfx.inspect(model, x)
