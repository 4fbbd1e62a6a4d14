"""The second rung: what a run records computes the same, whatever Python did on the way.

test_toys.py goes through more that Python can do, with gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx.tracing import info_of
from tests.support.models import Mlp, Row
from tests.support.snapshots import assert_unchanged, snapshot


class Recorded(Row):
    """Base: three blocks, and something that stops symbolic tracing."""

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(3)))
        self.stem = nn.Linear(4, 8)

    def run(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x))


class BySize(Recorded):
    """Control flow on a shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        return y.relu() if y.shape[0] % 2 == 0 else -y


class ByValue(Recorded):
    """Control flow on a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        return y * 2 if y.sum().item() > -1e9 else y


TABLE, SCALE = torch.arange(16.0).view(2, 8), torch.tensor(2.0)


class WithConstants(Recorded):
    """One constant is asked for its value alone, another is written to and put back."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x).round()  # so that what is added can be taken away again
        if y.sum().item() < -1e9:
            return y
        moved = TABLE.add_(y.detach()).clone()
        TABLE.sub_(y.detach())
        return moved + SCALE.item() * y


class Listed(Recorded):
    """Lists and dicts go in and come out."""

    def forward(self, items: list[Tensor], options: dict[str, Any]) -> dict[str, Any]:
        outs = [self.run(item) for item in items[:1]]
        return {"outs": outs, "scaled": outs[0] * options["scale"], "bias": items[1] + options["shift"]}


X = torch.linspace(-1, 1, 8).view(2, 4)
SAMPLES: list[tuple[nn.Module, Any]] = [
    (BySize(), X),
    (ByValue(), X),
    (WithConstants(), X),
    (Listed(), ([X, X + 1], {"scale": torch.tensor([2.0]), "shift": 3})),
]


def flat(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(("model", "inputs"), SAMPLES, ids=lambda v: type(v).__name__)
def test_the_recording_computes_the_same_and_leaves_the_model_alone(model: nn.Module, inputs: Any) -> None:
    fired: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: fired.append(1))
    before = snapshot(model)
    graph = replfx.capture(model, inputs)
    assert_unchanged(model, before)
    assert fired == []
    assert info_of(graph).tracer == "recorded"
    graph.graph.lint()
    expected = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    for one, other in zip(flat(expected), flat(graph(*flat(inputs))), strict=True):
        assert torch.equal(one, other)
    assert fired == [1]


def test_what_is_only_asked_for_its_value_is_not_in_the_graph() -> None:
    graph = replfx.capture(WithConstants(), X).graph
    constants = [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith("_tensor_constant")]
    assert len(constants) == 1
    assert all(node.users for node in constants)


def test_structure_of_outputs_is_kept() -> None:
    model, inputs = SAMPLES[-1]
    graph = replfx.capture(model, inputs)
    output = graph(*flat(inputs))
    assert set(output) == {"outs", "scaled", "bias"}
    assert isinstance(output["outs"], list)


def test_the_chain_is_found_whatever_stopped_symbolic_tracing() -> None:
    for model, inputs in SAMPLES:
        assert replfx.inspect(model, inputs).chains == [["blocks.0", "blocks.1", "blocks.2"]], type(model).__name__


def test_inputs_through_args_and_kwargs() -> None:
    class KeywordOnly(Recorded):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.run(kwargs["x"]) * kwargs["scale"]

    inputs = {"x": X, "scale": torch.tensor([2.0])}
    model = KeywordOnly()
    graph = replfx.capture(model, inputs)
    assert torch.equal(graph(*flat(inputs)), model(**inputs))


def test_dropout_and_batch_norm_follow_the_mode_where_they_are_modules() -> None:
    class Noisy(BySize):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def run(self, x: Tensor) -> Tensor:
            return self.drop(self.norm(super().run(x)))

    model = Noisy()
    before = snapshot(model)
    graph = replfx.capture(model, X)
    assert_unchanged(model, before)
    for mode in (False, True, False):
        model.train(mode)
        graph.train(mode)
        torch.manual_seed(0)
        expected = model(X)
        torch.manual_seed(0)
        assert torch.equal(graph(X), expected)


def test_a_real_run_leaves_random_state_and_statistics_alone() -> None:
    class NoisyByValue(ByValue):
        def run(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.norm(super().run(x)), 0.5, self.training)

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

    model = NoisyByValue()
    before = snapshot(model)
    replfx.capture(model, X)
    assert_unchanged(model, before)


def test_a_model_without_submodules_is_not_called_as_a_whole() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            assert type(x) is not fx.Proxy  # the first rung ends here
            return (x @ self.weight).relu()

    graph_module = replfx.capture(Bare(), torch.ones(2, 3))
    assert [node.op for node in graph_module.graph.nodes].count("call_module") == 0
    assert torch.equal(graph_module(torch.ones(2, 3)), torch.ones(2, 3))
