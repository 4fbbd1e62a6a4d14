"""FSDP2's MixedPrecisionPolicy: weights of fusion layers come from the float32 shards, gradients are summed in float32.

The reference is one process that does the same by hand: float32 parameters, each process's part of the batch in
bfloat16 on its own, with weights synthesised in float32 and then rounded; the mean over the parts in float32.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from replfx.live import Synthesis, syntheses_of
from tests.distributed.layouts import by_block
from tests.distributed.ranks import BATCH, STEPS, whole_tensor
from tests.reference import Stack
from tests.support.processes import assert_all_well, on_ranks, tried
from tests.support.strategies import FUSIONS, Case, case_of, fits

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes

LOW = torch.bfloat16

# Forward passes round alike, so that gradients differ by the order of float32 sums alone, of some hundred terms.
FLOAT32 = 1e-5
# FSDP hands a layer its own coefficients in bfloat16, and so takes their gradient in it; and without a reduce_dtype
# it sums all but ours in it: half a unit in the last of 8 places each for rounding and for summing.
ROUNDED = 2.0**-7
# Where a neighbour is whole, what there is of it is rounded before weights are made, and its gradient is summed as it
# is: some ten roundings more on the way. One process's share left out would be off by half.
COARSE = 2.0**-4


def _whole(model: Stack, **options: Any) -> None:
    fully_shard(model, **options)


def _some(model: Stack, **options: Any) -> None:
    by_block(model, every=4, **options)


def _kept(model: Stack, **options: Any) -> None:
    by_block(model, reshard_after_forward=False, **options)


SHARDED: dict[str, Callable[..., object]] = {"by_block": by_block}
PARTLY_WHOLE: dict[str, Callable[..., object]] = {"whole": _whole, "some_blocks": _some, "kept": _kept}


def _cases() -> dict[str, Case]:
    found = {}
    for family in ("transformer", "convnext"):
        for operator in ("block", "light"):
            for fusion in FUSIONS if operator == "block" else ("scalar_layer",):
                facts = {"width": 6, "depth": 5, "dtype": torch.float32, "seed": 13}
                case = case_of(family, operator, fusion, training=False, **facts)
                if fits(family, case.options, operator):
                    found[f"{family}-{operator}-{fusion}"] = case
    return found


CASES = _cases()


def work(names: tuple[str, ...]) -> dict[str, str | None]:
    """These cases in all layouts and policies; what went wrong in each."""
    found: dict[str, str | None] = {}
    for name in names:
        case = CASES[name]
        for layout, wrap in {**SHARDED, **PARTLY_WHOLE}.items():
            for reduced in (torch.float32, None):
                found[f"{name}-{layout}-{reduced}"] = tried(_check, case, wrap, reduced, layout in SHARDED)
    return found


def _check(case: Case, wrap: Callable[..., object], reduced: torch.dtype | None, exact: bool) -> None:
    model = case.transformed()
    single = copy.deepcopy(model)
    wrap(model, mp_policy=MixedPrecisionPolicy(param_dtype=LOW, reduce_dtype=reduced))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    size, rank = BATCH // dist.get_world_size(), dist.get_rank()
    neighbours_of_shards = exact and reduced is not None
    for step in range(STEPS):
        with torch.no_grad():  # each step from the same numbers: a coefficient may round to either side of a tie
            for name, parameter in model.named_parameters():
                single.get_parameter(name).copy_(whole_tensor(parameter))
        x = (case.inputs(BATCH)[0].detach() + step).split(size)
        optimizer.zero_grad()
        result = model(x[rank])
        assert result.dtype == LOW
        result.float().square().mean().backward()
        wanted, sizes = _by_hand(single, x)
        largest = max(size for name, size in sizes.items() if ".fusion." in name)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            tight = neighbours_of_shards and ".fusion." not in name and ".operator." not in name
            own = whole_tensor(parameter.grad)
            error, scale = (own - wanted[name]).abs().max().item(), sizes[name]
            if not exact and ".fusion." in name:  # sums in which much cancels
                scale = largest
            limit = FLOAT32 if tight else ROUNDED if exact else COARSE
            assert error <= limit * scale, f"{step}, {name}: off by {error:.2e} at a scale of {scale:.2e}"
        optimizer.step()


def _by_hand(single: Stack, parts: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The mean over the parts of the gradients of each, and the largest entry before: what is rounded."""
    total: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for x in parts:
        single.zero_grad()
        layers = syntheses_of(single)
        made = {path: _rounded(layer) for path, layer in layers.items()}
        for path, layer in layers.items():
            layer._synthesize = lambda *_, made=made[path], **__: made
        low = {name: p.to(LOW) for name, p in single.named_parameters()}
        torch.func.functional_call(single, low, (x.to(LOW),)).float().square().mean().backward()
        for layer in layers.values():
            del layer._synthesize
        for name, parameter in single.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad / len(parts)
            sizes[name] = max(sizes.get(name, 0.0), parameter.grad.abs().max().item())
    return total, sizes


def _rounded(layer: Synthesis) -> dict[str, Tensor]:
    """A layer's weights from float32 neighbours and rounded coefficients, rounded."""
    sides = [
        {name: getattr(r.owner(), r.leaf)[slice(*(r.rows or (None,)))] for name, r in side.items()}
        for side in layer._readings
    ]
    coefficients = {name: p.to(LOW).float() for name, p in layer.fusion.named_parameters()}
    made = torch.func.functional_call(layer.fusion, coefficients, tuple(sides))
    return {name: theta.to(LOW) for name, theta in made.items()}


def check(folder: Path, names: tuple[str, ...]) -> None:
    assert_all_well(on_ranks(2, work, folder, names))


@pytest.mark.slow
def test_mixed_precision_on_two_processes(tmp_path: Path) -> None:
    check(tmp_path, ("transformer-block-channel",))


@pytest.mark.slow
def test_mixed_precision_in_everything(tmp_path: Path) -> None:
    check(tmp_path, tuple(CASES))
