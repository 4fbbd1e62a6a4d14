"""Modules of torch.nn that hold others: their layers are blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.blocks import by_hand
from tests.support.models import Row

WIDTH, MASK = 16, nn.Transformer.generate_square_subsequent_mask(6)
PADDING = torch.arange(6).expand(2, 6) > torch.tensor([[3], [5]])
X = torch.linspace(-1, 1, 2 * 6 * WIDTH).view(2, 6, WIDTH)
MEMORY = X[:, :4].flip(-1)


def layer(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> Any:
    return kind(WIDTH, 2, 32, **{"batch_first": True, "dropout": 0.0, **options})


def encoder(nested: bool = True, norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    last = nn.LayerNorm(WIDTH) if norm else None
    return nn.TransformerEncoder(layer(**options), 5, norm=last, enable_nested_tensor=nested)


def decoder(**options: Any) -> nn.TransformerDecoder:
    return nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, **options), 5)


class Inside(nn.Module):
    """A composite module as a part of a model."""

    def __init__(self, inner: nn.Module, **given: Any) -> None:
        super().__init__()
        self.embed, self.inner, self.given = nn.Linear(WIDTH, WIDTH), inner, given
        for parameter in inner.parameters():  # layers of a transformer begin as copies of one
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.inner(self.embed(x), *others, **self.given)


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "encoder": (Inside(encoder()), (X,)),
    "encoder, tokens first": (Inside(encoder(batch_first=False)), (X,)),
    "encoder, norm": (Inside(encoder(norm=True)), (X,)),
    "encoder, norm first": (Inside(encoder(nested=False, norm_first=True)), (X,)),
    "encoder, mask": (Inside(encoder(nested=False), mask=MASK, is_causal=True), (X,)),
    "encoder, padding": (Inside(encoder(nested=False), src_key_padding_mask=PADDING), (X,)),
    "encoder, nested": (Inside(encoder(), src_key_padding_mask=PADDING), (X,)),
    "decoder": (Inside(decoder()), (X, MEMORY)),
    "decoder, mask": (Inside(decoder(norm_first=True), tgt_mask=MASK), (X, MEMORY)),
    "transformer": (Inside(nn.Transformer(WIDTH, 2, 5, 5, 32, 0.0, batch_first=True)), (X, MEMORY)),
}


# nn.Transformer is an encoder and a decoder, which have cases of their own: one mode is enough for it.
@pytest.mark.parametrize(
    ("name", "training"), [(name, mode) for name in CASES for mode in (True, False) if mode or name != "transformer"]
)
def test_layers_are_blocks_and_compute_what_they_should(name: str, training: bool) -> None:
    model, inputs = CASES[name]
    model = copy.deepcopy(model).train(training)
    made = replfx.transform(model, inputs)
    assert replfx.report(made).replaced == replfx.inspect(model, inputs).replaced
    paths = [path for path, module in model.named_modules() if "Layer" in type(module).__name__[-6:]]
    blocks = [path for path in paths if path.endswith((".layers.1", ".layers.3"))]
    assert replfx.report(made).replaced == blocks
    wanted = by_hand(model, made)
    for mode in (True, False):
        torch.testing.assert_close(made.train(mode)(*inputs), wanted.train(mode)(*inputs))
    with torch.no_grad():  # here the fast path of layers that are kept may be taken
        torch.testing.assert_close(made(*inputs), wanted(*inputs))


@pytest.mark.parametrize("model", [encoder(), decoder()], ids=["encoder", "decoder"])
def test_as_the_model_itself(model: nn.Module) -> None:
    inputs = (X, MEMORY) if isinstance(model, nn.TransformerDecoder) else (X,)
    assert replfx.report(replfx.transform(model, inputs)).replaced == ["layers.1", "layers.3"]


def test_frozen_in_evaluation_the_ordinary_path_is_captured() -> None:
    graph = replfx.capture(Inside(encoder(norm_first=True)).eval().requires_grad_(False), X)
    assert any(node.target == "inner.layers.0.linear1" for node in graph.graph.nodes)


def test_the_inside_is_seen_by_light_operators() -> None:
    model = Inside(encoder(nested=False, norm_first=True))
    assert replfx.inspect(model, X, operator="light").replaced == ["inner.layers.1", "inner.layers.3"]


@pytest.mark.parametrize("training", [True, False])
def test_layers_in_a_loop_need_no_example_inputs(training: bool) -> None:
    model = Row(*(layer() for _ in range(5)))
    assert replfx.inspect(model.train(training)).replaced == ["blocks.1", "blocks.3"]


def test_without_example_inputs_the_reason_says_that_they_would_help() -> None:
    report = replfx.inspect(Inside(encoder()))
    assert report.replaced == []
    assert report.refused["inner.layers.1"] == (
        "it is a part of `inner`, and without example_inputs TransformerEncoder cannot be looked into"
    )


def test_beside_other_blocks_it_hides_none_of_them() -> None:
    stem = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(5)))
    report = replfx.inspect(nn.Sequential(stem, encoder()))
    assert report.replaced == ["0.1", "0.3"]
