"""Blocks that put something into an object that they are given: caches of keys and values, and other ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx import Plan
from replfx.chains.find import find_chains

OPERATORS = ("block", "mixer", "light", "identity")
X = torch.linspace(-1, 1, 2 * 6 * 8).view(2, 6, 8)


class Layer:
    """The keys and values of one block."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None


class Cache:
    """A cache as transformers' are: it has a layer for each block, and counts the tokens of any that is asked."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= index:
            self.layers.append(Layer())
        layer = self.layers[index]
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys], -2)
        layer.values = values if layer.values is None else torch.cat([layer.values, values], -2)
        return layer.keys, layer.values

    def get_seq_length(self, index: int = 0) -> int:
        if index >= len(self.layers) or self.layers[index].keys is None:
            return 0
        return self.layers[index].keys.shape[-2]


class Attention(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), Attention(index), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        x = x + self.attn(self.norm1(x), cache=cache)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Takes its positions from the length of its cache, as that of `asked` has it."""

    def __init__(self, asked: int = 0) -> None:
        super().__init__()
        self.asked = asked
        self.positions = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(index) for index in range(5))

    def forward(self, x: Tensor, cache: Any = None, use_cache: bool = True) -> tuple[Tensor, Any]:
        cache = Cache() if cache is None and use_cache else cache
        past = 0 if cache is None else cache.get_seq_length(self.asked)
        x = x + self.positions(torch.arange(past, past + x.shape[1]))
        for block in self.blocks:
            x = block(x, cache=cache)
        return x, cache


def decoder(asked: int = 0) -> Decoder:
    torch.manual_seed(0)
    return Decoder(asked).eval()


def replaced(model: nn.Module, inputs: Any, **options: Any) -> list[str]:
    return replfx.report(replfx.transform(model, inputs, **options)).replaced


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_blocks_are_replaced_with_a_cache(operator: str) -> None:
    with_cache = replaced(decoder(), X, operator=operator)
    assert with_cache == replaced(decoder(), {"x": X, "use_cache": False}, operator=operator)
    assert with_cache == ["blocks.1", "blocks.3"]


@pytest.mark.parametrize("asked", [0, 1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_step_by_step_gives_what_the_whole_gives(operator: str, asked: int) -> None:
    """Also where the model asks the layer of a replaced block for its length."""
    made = replfx.transform(decoder(asked), X, operator=operator)
    again = replfx.apply(decoder(asked), Plan.from_json(replfx.plan_of(made).to_json()))
    for model in (made, replfx.materialize(made), again):
        whole, _ = model(X, use_cache=False)
        first, cache = model(X[:, :4])
        second, cache = model(X[:, 4:5], cache)
        third, cache = model(X[:, 5:], cache)
        torch.testing.assert_close(torch.cat([first, second, third], 1), whole)
        assert [cache.get_seq_length(index) for index in range(5)] == [6] * 5


def test_what_is_filled_is_known_by_its_place() -> None:
    (chain,) = find_chains(replfx.capture(decoder(), X)).chains
    for index, block in enumerate(chain.blocks):
        (filled,) = block.site.interface.fills
        assert (filled.slot, filled.at, filled.layer) == ("cache", (), index)
        assert filled.keys == filled.values == (2, 4)
        assert not block.site.interface.effects


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_the_backend_replaces_what_transform_replaces() -> None:
    """In Dynamo's graph keys and values are results of a block beside its activation, for the caller alone."""
    backend = replfx.backend(every=2, inner="eager")
    compiled = torch.compile(decoder(), backend=backend)
    first, cache = compiled(X[:, :4])
    made = replfx.transform(decoder(), X, every=2)
    for number, (name, value) in enumerate(backend.state_dict().items()):
        value += torch.linspace(-0.3, 0.3, value.numel()) + 0.1 * number
        made.state_dict()[name].copy_(value)
    first, cache = compiled(X[:, :4])
    second, cache = compiled(X[:, 4:5], cache)
    third, cache = compiled(X[:, 5:], cache)
    assert [r.path for r in backend.plan.replacements] == ["@blocks.1", "@blocks.3"]
    torch.testing.assert_close(torch.cat([first, second, third], 1), made(X)[0])
    assert [cache.get_seq_length(index) for index in range(5)] == [6] * 5


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_backend_says_who_keeps_a_cache_without_the_block() -> None:
    backend = replfx.backend(every=2, inner="eager", operator="identity")
    torch.compile(decoder(), backend=backend)(X)
    assert backend.plan.replacements == ()
    assert "use replfx.transform, which leaves the filling" in backend.notes[0]


class Notes(nn.Module):
    """A block that notes what it has seen in a container of any kind."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(8, 8)

    def forward(self, x: Tensor, notes: Any) -> Tensor:
        y: Tensor = self.linear(x)
        if isinstance(notes, dict):
            notes[f"seen {self.index}"] = y
        else:
            (notes if isinstance(notes, list) else notes.seen).append(y)
        return x + y.relu()


class Book:
    """No cache, as far as anybody knows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Noting(nn.Module):
    def __init__(self, container: Any, *, reads: bool = False) -> None:
        super().__init__()
        self.container, self.reads = container, reads
        self.blocks = nn.ModuleList(Notes(index) for index in range(5))

    def forward(self, x: Tensor) -> Any:
        notes = self.container()
        for block in self.blocks:
            x = block(x, notes)
        return x + notes[0] if self.reads else (x, notes)


@pytest.mark.parametrize("container", [dict, list, Book])
def test_other_containers_are_filled_by_the_block_alone(container: type) -> None:
    x = X[:, 0]
    assert replaced(Noting(container), x) == ["blocks.1", "blocks.3"]
    with pytest.raises(replfx.NoChainError, match="gives more than its activation, which only the block itself"):
        replfx.transform(Noting(container), x, operator="identity")


def test_what_the_model_reads_from_a_container_has_to_be_there() -> None:
    x = X[:, 0]
    assert replaced(Noting(list, reads=True), x) == ["blocks.1", "blocks.3"]
    assert replfx.inspect(Noting(list, reads=True), x, operator="identity").replaced == []


class Sharing(Decoder):
    """Its last block attends to the keys and values of the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[4].attn = Borrowing(4)


class Borrowing(Attention):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        k, v = cache.layers[1].keys, cache.layers[1].values
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def test_a_cache_that_another_block_reads() -> None:
    assert replaced(Sharing(), X) == ["blocks.1", "blocks.3"]
    report = replfx.inspect(Sharing(), X, operator="identity")
    assert "gives more than its activation" in report.refused["blocks.1"]
    assert "blocks.1" not in report.replaced


@pytest.mark.parametrize(
    "fills",
    [
        [{"slot": "cache.0", "at": [], "layer": 0, "keys": [1, 1], "values": [1, 1]}],
        [{"slot": "cache", "at": ["__class__"], "layer": 0, "keys": [1, 1], "values": [1, 1]}],
        [{"slot": "cache", "at": [], "layer": -1, "keys": [1, 1], "values": [1, 1]}],
        [{"slot": "cache", "at": [], "layer": 0, "keys": [1], "values": [1, 1]}],
        [{"slot": "cache", "at": [], "layer": 0, "keys": [1, True], "values": [1, 1]}],
        [{"slot": "cache"}],
        ["cache"],
        "cache",
    ],
)
def test_a_malformed_plan_is_refused(fills: Any) -> None:
    import json

    data = json.loads(replfx.plan(decoder(), X).to_json())
    data["replacements"][0]["interface"]["fills"] = fills
    with pytest.raises(replfx.PlanError):
        Plan.from_json(json.dumps(data))
