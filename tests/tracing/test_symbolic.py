"""The first rung: symbolic graphs compute what the model does, and go on following its training mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.tracing import info_of
from tests.support.models import GPT, ConvNet, tower
from tests.support.snapshots import assert_unchanged, snapshot


class FunctionalDropout(nn.Module):
    """Passes its own `training` to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


class DropPath(nn.Module):
    """Branches on `training` in Python; has no parts."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1).bernoulli_(0.5) / 0.5


class Droppy(nn.Module):
    """Every way in which common code follows the training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FunctionalDropout()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.path(self.norm(x))
        return self.drop(x)


class Masked(nn.Module):
    """An optional argument that Python code branches on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.linear(x)
        if mask is not None:
            y = y * mask
        return y


def seeded(module: nn.Module, *args: Tensor) -> Tensor:
    torch.manual_seed(3)
    return module(*args)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("model", "shape"),
    [(tower(3), (2, 4)), (ConvNet(2), (2, 3, 8, 8)), (Droppy(), (6, 8))],
    ids=["tower", "convnet", "droppy"],
)
def test_the_graph_computes_the_same_in_both_modes(model: nn.Module, shape: tuple[int, ...], measured: bool) -> None:
    x = torch.randn(shape)
    graph = replfx.capture(model, x if measured else None)
    assert info_of(graph).tracer == "symbolic"
    graph.graph.lint()
    for mode in (True, False, True):
        model.train(mode)
        graph.train(mode)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        expected = seeded(model, x)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])  # the graph shares them
        assert torch.equal(seeded(graph, x), expected)


def test_drops_follow_train_and_eval() -> None:
    model = Droppy().eval()
    graph = replfx.capture(model)
    x = torch.randn(6, 8)
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    before = model.norm.num_batches_tracked.item()
    graph(x)
    assert model.norm.num_batches_tracked.item() == before + 1
    graph.eval()
    graph(x)
    assert model.norm.num_batches_tracked.item() == before + 1


def test_parameters_and_buffers_are_shared() -> None:
    model = ConvNet(2)
    graph = replfx.capture(model)
    shared = {id(t) for t in (*graph.parameters(), *graph.buffers())}
    assert {id(t) for t in (*model.parameters(), *model.buffers())} <= shared
    x = torch.randn(2, 3, 8, 8)
    model.eval(), graph.eval()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(graph(x), model(x))


def test_an_optional_argument_keeps_its_default() -> None:
    model = Masked()
    x, mask = torch.randn(2, 4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    for inputs in (None, x, {"x": x}):
        graph = replfx.capture(model, inputs)
        assert [n.target for n in graph.graph.nodes if n.op == "placeholder"] == ["x"]
        assert torch.equal(graph(x), model(x))
    for inputs in ((x, mask), {"x": x, "mask": mask}):
        graph = replfx.capture(model, inputs)
        assert [n.target for n in graph.graph.nodes if n.op == "placeholder"] == ["x", "mask"]
        assert torch.equal(graph(x, mask), model(x, mask))
        assert not torch.equal(graph(x, mask), model(x))


def test_it_is_free_of_the_batch_size() -> None:
    model = ConvNet(2).eval()
    graph = replfx.capture(model, torch.randn(2, 3, 8, 8)).eval()
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(graph(x), model(x))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model, x = Tied(), torch.randn(2, 4)
    for inputs in (None, x):
        graph = replfx.capture(model, inputs)
        assert torch.equal(graph(x), model(x))
        assert sum(p.numel() for p in graph.parameters()) == 16 + 4 + 4
        assert graph.get_parameter("two.weight") is model.one.weight


def test_every_module_call_is_known() -> None:
    graph = replfx.capture(tower(2))
    paths = [call.path for call in info_of(graph).calls]
    assert paths.index("blocks.0.fc1") < paths.index("blocks.0") < paths.index("blocks.1") < paths.index("blocks")
    for call in info_of(graph).calls:
        for node in info_of(graph).nodes[call.start : call.stop]:
            inner = [path for path, _ in node.meta["nn_module_stack"].values()]
            assert call.path in inner or str(node.target) == call.path


def test_the_model_is_left_as_it_was() -> None:
    model = Droppy()
    fired: list[str] = []
    model.norm.register_forward_hook(lambda *_: fired.append("hook"))
    model.first.register_forward_pre_hook(lambda *_: fired.append("pre"))
    x = torch.randn(6, 8)
    before = snapshot(model)
    for inputs in (None, x):
        replfx.capture(model, inputs)
        assert_unchanged(model, before)
    assert fired == []


def test_a_transformer_that_reads_shapes_needs_no_inputs() -> None:
    model, ids = GPT(), torch.randint(0, 31, (2, 12))
    graph = replfx.capture(model)
    assert torch.equal(graph(ids), model(ids))
    assert torch.equal(graph(ids[:1, :5]), model(ids[:1, :5]))
