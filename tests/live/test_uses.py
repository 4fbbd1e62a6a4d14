"""What people do with a transformed model: checkpointing, pruning, wrapping, tracing, going back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import replfx
from tests.support.blocks import chain, gradients, inputs
from tests.support.models import Mlp, Tower, tower

X = torch.linspace(-1, 1, 8).view(2, 4)


# ---- checkpointing


class Inside(Mlp):
    """Checkpoints its own layers while it is trained, if it is told to."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return super().forward(x)
        h: Tensor = checkpoint(self.fc1, self.norm(x), use_reentrant=self.reentrant)
        return x + checkpoint(lambda h: self.fc2(self.act(h)), h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_inside_of_a_block(reentrant: bool, when: str) -> None:
    torch.manual_seed(0)
    model = Tower(*(Inside() for _ in range(5)))
    wanted = gradients(replfx.transform(model, X), X)
    if when == "before":
        for block in model.blocks:
            block.reentrant = reentrant
    made = replfx.transform(model, X)
    for block in made.get_submodule("blocks").children():
        block.reentrant = reentrant
    found = gradients(made, X)
    assert len(found) == len(list(made.parameters()))
    torch.testing.assert_close(found, wanted)


def test_what_is_checkpointed_in_part_and_read_elsewhere_saves_as_much_in_both_passes() -> None:
    """`torch.utils.checkpoint` counts what is saved, and a weight is synthesised at other times when it recomputes."""
    model = chain("checkpointed")
    made, x = replfx.transform(model, inputs()), inputs()
    found = gradients(made, x)
    plain = chain("mlp")
    assert len(found) == len(list(made.parameters()))
    assert len(list(plain.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
@pytest.mark.parametrize("operator", ["block", "light", "identity"])
@pytest.mark.parametrize("way", [replfx.materialize, replfx.unroll])
def test_blocks_that_were_wrapped_since(
    wrap: Callable[[nn.Module], nn.Module], operator: str, way: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    made = replfx.transform(tower(5), operator=operator).eval()
    wanted = made(X)
    blocks = made.get_submodule("blocks")
    for index in range(5):
        blocks[index] = wrap(blocks[index])
    ended = way(made)
    wrapped = ended.get_submodule("blocks.1")
    assert type(wrapped) is type(blocks.get_submodule("1"))
    for index in range(5):  # what was wrapped for compiling is run as it is
        inner = ended.get_submodule("blocks")[index]
        ended.get_submodule("blocks")[index] = getattr(inner, "_orig_mod", inner)
    torch.testing.assert_close(ended.eval()(X), wanted)
    assert not any(".replfx." in name for name, _ in ended.named_parameters())


def test_the_model_may_be_wrapped_too() -> None:
    class Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    holder = Holder(replfx.transform(tower(5)))
    assert replfx.report(holder).replaced == ["blocks.1", "blocks.3"]
    torch.testing.assert_close(replfx.materialize(holder)(X), holder(X))
    wanted = holder(X)
    assert replfx.unroll(holder) is holder
    torch.testing.assert_close(holder(X), wanted)
    with pytest.raises(replfx.PlanError, match="2 parts of this ModuleList are transformed"):
        replfx.report(nn.ModuleList([replfx.transform(tower(5)) for _ in range(2)]))


# ---- neighbours whose weights are made, or swapped


@pytest.mark.parametrize("kind", ["prune", "weight_norm", "spectral_norm"])
def test_weights_that_a_hook_makes_are_read_as_they_stand(kind: str) -> None:
    torch.manual_seed(0)
    made = replfx.transform(tower(5))
    for index in (0, 2, 4):
        layer = made.get_submodule(f"blocks.{index}.fc1")
        if kind == "prune":
            prune.l1_unstructured(layer, "weight", 0.5)
        elif kind == "weight_norm":
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(layer)
        else:
            nn.utils.spectral_norm(layer).eval()
    made.eval()(X)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith(("_orig", "_g")):
                p.mul_(3)
    assert torch.equal(made(X), made(X))
    made(X)
    before = (made.get_submodule("blocks.0.fc1").weight + made.get_submodule("blocks.2.fc1").weight) / 2
    torch.testing.assert_close(made.get_submodule("blocks.1.fc1").weight, before)
    for _ in range(2):
        made(X).sum().backward()


def test_weights_that_nobody_knows_are_refused() -> None:
    made = replfx.transform(tower(5))
    layer: Any = made.get_submodule("blocks.0.fc1")
    weight = layer.weight
    del layer.weight
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", weight * 2))
    layer.weight = weight.detach()
    with pytest.raises(replfx.FusionError, match="is no parameter but a tensor that something else makes"):
        made(X)


def test_layers_that_are_swapped_for_others_are_read_as_they_stand() -> None:
    made = replfx.transform(tower(5))
    made.get_submodule("blocks.0").fc1 = nn.Linear(8, 16)
    between = (made.get_submodule("blocks.0.fc1").weight + made.get_submodule("blocks.2.fc1").weight) / 2
    torch.testing.assert_close(made.get_submodule("blocks.1.fc1").weight, between)
    made(X)
    made.get_submodule("blocks.0").fc1 = nn.Identity()
    with pytest.raises(replfx.FusionError, match=r"call replfx\.materialize before a model is rebuilt"):
        _ = made.get_submodule("blocks.1.fc1").weight


def test_a_neighbour_that_is_swapped_as_a_whole_is_noticed() -> None:
    made = replfx.transform(tower(5))
    made(X)
    made.get_submodule("blocks")[0] = Mlp()
    with pytest.raises(replfx.FusionError, match=r"`blocks\.1`.*`blocks\.0`"):
        made(X)


# ---- tracing


def test_torch_jit_trace_follows() -> None:
    made = replfx.transform(tower(5)).eval()
    with pytest.warns(FutureWarning):
        traced = torch.jit.trace(made, X)
    torch.testing.assert_close(traced(X), made(X))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "blocks.0" in name or "replfx" in name:
                p.mul_(1.5)
    torch.testing.assert_close(traced(X), made(X))  # it shares the parameters, the neighbours' too


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_dynamo_and_export_follow() -> None:
    names, x = ("owner", "listed", "named", "children", "attention"), inputs()
    model = nn.Sequential(*(chain(name, 3) for name in names))
    made = replfx.transform(model, x, select=[f"{i}.1" for i in range(len(names))])
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    found, wanted = gradients(compiled, x), gradients(made, x)
    torch.testing.assert_close(list(found.values()), list(wanted.values()))
    for strict in (True, False):
        exported = torch.export.export(made, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), made(x))


def test_functional_call() -> None:
    made = replfx.transform(tower(5))
    parameters = {name: p * 1.01 for name, p in made.named_parameters()}
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(parameters[name])
    torch.testing.assert_close(torch.func.functional_call(made, parameters, (X,)), twin(X))


# ---- state_dicts


def test_modules_called_fusion_or_operator_are_no_false_alarm() -> None:
    class Multimodal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion, self.operator, self.tower = nn.Linear(3, 3), nn.Linear(3, 3), tower(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.operator(self.fusion(self.tower(x)))

    made = replfx.transform(Multimodal(), X)
    state = made.state_dict()
    made.load_state_dict({**state, "other.fusion.weight": torch.ones(1)}, strict=False)
    replfx.load_state_dict(Multimodal(), Multimodal().state_dict())
    with pytest.raises(replfx.StateDictError, match="it is of a transformed model"):
        replfx.load_state_dict(Multimodal(), state)
