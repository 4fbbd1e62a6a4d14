"""Chance changes no plan, and the user's random states are as they were."""

# ruff: noqa: NPY002 - models draw from NumPy's older generator too

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.tracing import capturing
from replfx.tracing.chance import Draws, kept_random_states, steered
from tests.support.models import Layer, Products


class Skipping(nn.Module):
    """Skips blocks where `skips` says so."""

    def __init__(self, skips: Callable[[Any, int], bool]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(9))
        self.skips = skips
        self.own = random.Random(random.random())
        self.torchs = torch.Generator().manual_seed(random.randrange(10**6))
        self.numpys = np.random.default_rng(random.randrange(10**6))
        self.older = np.random.RandomState(random.randrange(10**6))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if not self.skips(self, index):
                x = block(x)
        return x


SKIPS: dict[str, Callable[[Any, int], bool]] = {
    "torch.rand below": lambda m, i: m.training and bool(torch.rand(1) < 0.3),
    "torch.rand above, in any mode": lambda m, i: bool(torch.rand([]) > 0.7),
    "one draw for all": lambda m, i: torch.rand(9)[i].item() < 0.3,
    "torch.bernoulli keeps": lambda m, i: m.training and not torch.bernoulli(torch.tensor(0.7)).item(),
    "torch.bernoulli skips": lambda m, i: torch.bernoulli(torch.tensor(0.3)).item() == 1,
    "torch.randint": lambda m, i: m.training and torch.randint(0, 4, (1,)).item() == 0,
    "uniform_": lambda m, i: m.training and torch.empty(9).uniform_()[i].item() < 0.3,
    "random.random": lambda m, i: random.random() < 0.3,
    "random.choice": lambda m, i: m.training and random.choice([True, False]),
    "random.randint low": lambda m, i: m.training and random.randint(0, 4) == 0,
    "random.randint high": lambda m, i: m.training and random.randint(0, 4) == 4,
    "numpy rand": lambda m, i: np.random.rand() < 0.3,
    "numpy uniform above": lambda m, i: np.random.uniform() > 0.7,
    "its own torch.Generator": lambda m, i: torch.rand(1, generator=m.torchs).item() < 0.3,
    "its own random.Random": lambda m, i: m.own.random() < 0.3,
    "its own numpy Generator": lambda m, i: m.numpys.random() < 0.3,
    "its own numpy RandomState": lambda m, i: m.older.rand() < 0.3,
    "one block by low draws, the next by high ones": lambda m, i: (
        m.training and (random.random() < 0.3 if i % 2 else random.random() > 0.7)
    ),
}


def states(model: Skipping | None = None) -> list[object]:
    found: list[object] = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
    if model is not None:
        found += [model.own.getstate(), model.torchs.get_state().tolist()]
        found += [str(model.numpys.bit_generator.state), str(model.older.get_state())]
    return found


@pytest.mark.parametrize("name", SKIPS)
def test_one_plan_whatever_was_drawn(name: str) -> None:
    for seed, use in enumerate((replfx.inspect, lambda model, x: replfx.report(replfx.transform(model, x)))):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        model, x = Skipping(SKIPS[name]), torch.randn(2, 8)
        before = states(model)
        assert use(model, x).replaced == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
        assert states(model) == before


def test_random_states_are_kept_after_a_refusal_too() -> None:
    class Failing(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no more")

    model = Failing(SKIPS["random.random"])
    before = states(model)
    for use in (replfx.transform, replfx.inspect, replfx.plan, replfx.capture):
        with pytest.raises(replfx.CaptureError, match="no more"):
            use(model, torch.zeros(2, 8))
        assert states(model) == before


def test_the_captured_model_follows_its_mode_although_it_was_looked_at_in_evaluation() -> None:
    class Dropping(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    # Half of the blocks would be skipped by high draws and the others by low ones: only evaluation has them all.
    model, x = Dropping(SKIPS["one block by low draws, the next by high ones"]), torch.randn(4, 8)
    graph = replfx.capture(model, x)
    assert sum(isinstance(call, nn.LayerNorm) for call in map(graph.get_submodule, _called(graph))) == 9
    assert graph.training
    assert (graph(x) == 0).any()
    assert not (graph.eval()(x) == 0).any()


def _called(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def test_what_no_draw_decides_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    original = capturing._look
    monkeypatch.setattr(capturing, "_look", lambda *args: looks.append(args[-1]) or original(*args))
    replfx.capture(Skipping(lambda m, i: i == 3), torch.zeros(2, 8))  # a block is unused, and nothing is drawn
    replfx.capture(Skipping(lambda m, i: random.random() < 0), torch.zeros(2, 8))  # drawn, and nothing left out
    assert len(looks) == 2


@pytest.mark.parametrize("draws", Draws)
def test_steered_draws_are_at_one_end_and_come_to_an_end(draws: Draws) -> None:
    with kept_random_states(nn.Module()), steered(draws, nn.Module()) as steering:
        assert not steering.has_drawn()
        seen = [random.random(), np.random.rand(), torch.rand(()).item(), random.uniform(0, 1)]
        assert all(value > 0.999 if draws is Draws.HIGH else value < 0.001 for value in seen)
        assert steering.has_drawn()
        # Rejection sampling would never end on the same number for ever.
        random.normalvariate(), random.gammavariate(0.5, 1), random.randint(0, 4)
        np.random.randn(), np.random.gamma(0.5), np.random.randint(0, 5), np.random.permutation(7)
        torch.randn(3), torch.poisson(torch.ones(3)), torch._standard_gamma(torch.ones(3)), torch.randperm(5)
        steering.restart()
        assert steering.has_drawn()
        again = [random.random(), np.random.rand(), torch.rand(()).item(), random.uniform(0, 1)]
        assert again == seen


def test_a_region_keeps_its_noise() -> None:
    class Noisy(Products):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(8)

    for inputs in (None, torch.zeros(2, 8)):
        made = replfx.transform(Noisy(width=8), inputs)
        torch.manual_seed(3)
        found = made(torch.zeros(2, 8))
        torch.manual_seed(3)
        assert torch.equal(found, torch.rand(8).expand(2, 8))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


def test_other_threads_go_on_while_a_model_is_captured() -> None:
    """What they run is no part of the graph, and what they capture waits its turn."""
    model, x = Skipping(lambda m, i: False), torch.randn(2, 8)
    other, stop, errors = Skipping(lambda m, i: False), threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                model(x)
                other(x)
                Doubled.apply(x)
                with torch.autocast("cpu", enabled=False):
                    other(x)
        except Exception as error:
            errors.append(error)

    nodes = len(replfx.capture(model, x).graph.nodes)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert [len(replfx.capture(model, x).graph.nodes) for _ in range(5)] == [nodes] * 5
    finally:
        stop.set()
        thread.join()
    assert not errors
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(replfx.inspect(model, x).replaced)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["blocks.1", "blocks.3", "blocks.5", "blocks.7"]] * 4
