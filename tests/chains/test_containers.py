"""Every way in which blocks are put together: it is transformed or refused with its reason, and nothing is silent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.modules.paths import is_region, members_of
from replfx.modules.tree import tensors_in
from tests.chains.containers import CONTAINERS, Container
from tests.support.compare import of_replfx
from tests.support.models import Row
from tests.support.slow import some_slow
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import randomize

WORKS = {name: case for name, case in CONTAINERS.items() if not case.refusal}
REFUSED = {name: case for name, case in CONTAINERS.items() if case.refusal}


def built(case: Container) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return case.build().double(), _double(case.inputs())


def _double(inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return tuple(_double(t) for t in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def outcome(model: nn.Module, inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients that there are, with the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(1)
    results = tensors_in(model(*(inputs if isinstance(inputs, tuple) else (inputs,))))
    torch.stack(
        [(r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results]
    ).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    return [r.detach() for r in results], gradients


@pytest.mark.parametrize("name", WORKS)
def test_it_is_transformed_and_stays_what_it_was(name: str) -> None:
    model, inputs = built(WORKS[name])
    before = snapshot(model)
    made = replfx.transform(model, inputs, operator="block")
    assert_unchanged(model, before)
    assert type(made) is type(model)
    assert replfx.report(made).replaced == list(WORKS[name].replaced)
    check_reasons(model, replfx.report(made))
    results, gradients = outcome(made, inputs)
    wanted, originally = outcome(model, inputs)
    assert [r.shape for r in results] == [r.shape for r in wanted]
    has = {parameter for parameter, _ in made.named_parameters()}
    assert {p for p in has if p in gradients} == {p for p in has if ".replfx." in p or p in originally}

    randomize(made, 2)
    twin = replfx.apply(fresh(WORKS[name]), replfx.Plan.from_json(replfx.plan_of(made).to_json()))
    twin.load_state_dict(made.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(outcome(twin, inputs)[0], outcome(made, inputs)[0], strict=True))
    plain = replfx.materialize(made)
    assert not list(of_replfx(plain))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outcome(plain, inputs)[0], outcome(made, inputs)[0], strict=True))


def fresh(case: Container) -> nn.Module:
    """A fresh one, with other weights."""
    torch.manual_seed(7)
    return case.build().double()


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str) -> None:
    model, inputs = built(REFUSED[name])
    before = snapshot(model)
    with pytest.raises(replfx.ReplfxError, match=REFUSED[name].refusal):
        replfx.transform(model, inputs)
    assert_unchanged(model, before)
    with pytest.raises(replfx.ReplfxError, match=REFUSED[name].refusal):
        replfx.transform(model, inputs, inplace=True)
    assert_unchanged(model, before)
    report = replfx.inspect(model, inputs, operator="block")
    assert report.replaced == []
    check_reasons(model, report)
    told = [f"`{path}`: {why}" for path, why in report.refused.items()]
    assert any(re.search(REFUSED[name].refusal, text) for text in (*told, *report.notes))


# ---- why not


def torchvision_model(name: str, size: int) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        torchvision = pytest.importorskip("torchvision")
        return torchvision.models.get_model(name, weights=None), torch.rand(2, 3, size, size)

    return build


INSPECTED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": torchvision_model("resnet18", 64),
    "vgg11_bn": torchvision_model("vgg11_bn", 32),
    "densenet121": torchvision_model("densenet121", 64),
    "swin_t": torchvision_model("swin_t", 64),
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small", 64),
}


def unexplained(model: nn.Module, report: replfx.Report) -> list[str]:
    """Modules with a weight matrix, of a class that has another instance, of which the report says nothing.

    It speaks of a module when it names it, one that it is in, or one that is in it.
    """
    named = {b.path for b in report.blocks if b.operator or b.kept} | set(report.refused)
    spoken = {member for path in named if not is_region(path) for member in members_of(model, path)}
    classes = Counter(type(module) for module in model.modules())
    silent = []
    for path, module in model.named_modules():
        own = type(module).__module__.startswith("torch.nn")  # a layer or a container
        if own or classes[type(module)] < 2 or all(p.dim() < 2 for p in module.parameters()):
            continue
        if not any(path == s or path.startswith(f"{s}.") or s.startswith(f"{path}.") for s in spoken):
            silent.append(path)
    return silent


@pytest.mark.parametrize("name", some_slow(INSPECTED, ("densenet121", "swin_t")))
def test_every_block_that_stays_has_a_reason(name: str) -> None:
    model, inputs = INSPECTED[name]()
    check_reasons(model, replfx.inspect(model, inputs, operator="block"))


def check_reasons(model: nn.Module, report: replfx.Report) -> None:
    assert all((block.operator is None) == bool(block.kept) for block in report.blocks)
    assert not unexplained(model, report)
    assert report.replaced or report.refused or report.notes
    for why in (*report.refused.values(), *(block.kept or "" for block in report.blocks)):
        assert "None" not in why
        if "not like" in why or "too little" in why:
            assert re.search(r"`[^`]+`: .+ ≠ .+", why), why  # what differs, and both values
    printed = "".join(str(report).split())  # lines are broken, within long names too
    for why in report.refused.values():
        assert "".join(why.split()) in printed


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.relu()


def conv(kernel: int, groups: int = 1) -> Block:
    return Block(nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups))


LIKE = "no three like it in a row: it is not like "


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (
            (conv(3), conv(1), conv(3)),
            "`blocks.1`: `layer.kernel_size`: (3, 3) ≠ (1, 1) (`layer.weight`: dense ≠ pointwise)",
        ),
        ((conv(3), conv(3, 4), conv(3)), "`blocks.1`: `layer.groups`: 1 ≠ 4 (`layer.weight`: dense ≠ depthwise)"),
        ((conv(3), Block(nn.Identity()), conv(3)), "only"),
        ((conv(3), Block(nn.ConvTranspose2d(4, 4, 1)), conv(3)), "`blocks.1`: `layer`: Conv2d ≠ ConvTranspose2d"),
        (
            (conv(3), Block(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))), conv(3)),
            "`blocks.1`: `layer.weight`: (4, 4, 3, 3) ≠ absent",
        ),
    ],
)
def test_what_keeps_two_blocks_apart_is_named(blocks: tuple[nn.Module, ...], reason: str) -> None:
    report = replfx.inspect(Row(*blocks), torch.randn(1, 4, 5, 5))
    few = "no three like it in a row, only `blocks.0` and `blocks.2`: a block is replaced between two others"
    assert report.refused["blocks.0"] == (few if reason == "only" else LIKE + reason)


def test_the_policy_says_what_it_leaves() -> None:
    model = Row(*(conv(3) for _ in range(9)))
    x = torch.randn(1, 4, 5, 5)
    for policy, wanted in (
        ({"every": 4}, "every=4 leaves it: it is number 6 in its stage"),
        ({"fraction": 0.2}, "fraction=0.2 leaves it"),
        ({"select": "blocks.5"}, "select does not name it"),
    ):
        report = replfx.inspect(model, x, **policy)
        assert wanted in [block.kept for block in report.blocks]
        assert f": {wanted}" in " ".join(str(report).split())
