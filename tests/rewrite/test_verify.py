"""Verify refuses an unsound model; a pass that fails names itself, and the model is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import replfx
from replfx import Fusion, Match, Operator, Site
from replfx.modules.copying import structural_copy
from replfx.passes import run_passes
from replfx.rewrite.build import build, install
from replfx.rewrite.verify import verify
from replfx.tracing import Inputs, costs_of, info_of
from tests.support.models import ConvNet, tower
from tests.support.snapshots import assert_unchanged, snapshot

X = torch.linspace(-1, 1, 8).view(2, 4)


class Bare(Operator):
    """Base of unsound operators; ignores the neighbours."""

    needs_neighbours = False

    @classmethod
    def match(cls, site: Site) -> Match:
        return Match()


class Narrower(Bare):
    """Gives half of the channels."""

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0][:, :4]


class Doubling(Bare):
    """Gives each sample twice."""

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.cat([args[0], args[0]])


class Cutting(Bare):
    """Lets no gradient through."""

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0].detach()


class Idle(Bare):
    """Owns a parameter that it does not use."""

    def __init__(self, block: nn.Module, interface: replfx.Interface) -> None:
        super().__init__(block, interface)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0]


class Infinite(Fusion):
    """Divides by nothing."""

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        return previous / 0.0


class WrongShape(Fusion):
    """Gives the transpose."""

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        return previous.T


UNSOUND = [
    (Narrower, r"the transformed model does not run, in `blocks\.2\b.*`: RuntimeError"),
    (Doubling, r"the output's shapes were \[\(2, 3\)\] and would become \[\(8, 3\)\]"),
    (Cutting, "`stem.*` would get no gradient any more|`blocks.0.*` would get no gradient any more"),
    (Idle, r"`blocks\.1\.replfx\.operator\.unused` would get no gradient"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("operator", "message"), UNSOUND, ids=[cls.__name__ for cls, _ in UNSOUND])
def test_unsound_operators(operator: type[Operator], message: str, inplace: bool) -> None:
    replfx.register_operator("unsound")(operator)
    model = tower(5)
    before = snapshot(model)
    with pytest.raises(replfx.VerifyError, match=message):
        replfx.transform(model, X, operator="unsound", inplace=inplace)
    assert_unchanged(model, before)


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize(("fusion", "message"), [(Infinite, r"`blocks\.1`.*not finite"), (WrongShape, ".")])
def test_unsound_fusions(fusion: type[Fusion], message: str, inputs: Tensor | None) -> None:
    if inputs is None and fusion is WrongShape:
        pytest.skip("shapes are not checked without inputs")
    replfx.register_fusion("unsound")(fusion)
    model = tower(5)
    before = snapshot(model)
    with pytest.raises(replfx.VerifyError, match=message):
        replfx.transform(model, inputs, fusion="unsound", inplace=True)
    assert_unchanged(model, before)


def test_hooks_and_modes_are_put_back() -> None:
    replfx.register_operator("unsound")(Narrower)
    model = tower(5).eval()
    model.blocks[1].train()
    model.blocks[1].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(replfx.VerifyError):
        replfx.transform(model, X, operator="unsound", inplace=True)
    assert_unchanged(model, before)


def test_a_sound_model_passes_and_is_not_run() -> None:
    model = ConvNet(4)
    x = torch.randn(2, 3, 8, 8)
    seen, plan, original = info_of(replfx.capture(model, x)), replfx.plan(model, x), structural_copy(model)
    install(model, build(model, plan))
    before = snapshot(model)
    verified = verify(model, original, Inputs.of(x, model), seen, plan)
    assert (verified.notes, verified.costs) == ((), costs_of(model, Inputs.of(x, model)))
    assert_unchanged(model, before)


def test_parameters_that_had_no_gradient_before_are_not_held_against_it() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.spare = tower(5), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x)

    assert replfx.report(replfx.transform(Unused(), X)).replaced == ["tower.blocks.1", "tower.blocks.3"]


class Failing(PassBase):
    """Raises what it is given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise self.error


class Idling(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


def test_a_failing_pass_names_itself_and_what_ran_before() -> None:
    with pytest.raises(replfx.PlanError) as caught:
        run_passes(replfx.capture(tower(5)), [Idling(), Failing(replfx.PlanError("no"))])
    (note,) = caught.value.__notes__
    assert "'Failing'" in note
    assert "['Idling']" in note


def test_a_bug_in_a_pass_is_not_dressed_up() -> None:
    with pytest.raises(Exception, match="Failing") as caught:
        run_passes(replfx.capture(tower(5)), [Failing(KeyError("x"))])
    assert not isinstance(caught.value, replfx.ReplfxError)
