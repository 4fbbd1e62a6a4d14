"""What each process of test_tensor_parallel.py does: one group of processes goes through all cases."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.parallel import parallelize_module as torch_parallelize_module

import replfx
from tests.distributed.models import BLOCKS, WIDTH, stack
from tests.distributed.ranks import whole_tensor
from tests.support.compare import assert_close
from tests.support.processes import tried
from tests.support.strategies import randomize

BATCH, TOKENS = 4, 8
STEPS = 3  # the last two with what the first left in the optimizer and in FSDP's groups


def _everything_shared() -> dict[str, ParallelStyle]:
    """Heads and hidden units shared out; between blocks every process has the whole activation."""
    return {
        **{f"blocks.*.attn.{name}": ColwiseParallel() for name in "qkv"},
        "blocks.*.attn.o": RowwiseParallel(),
        "blocks.*.mlp.fc1": ColwiseParallel(),
        "blocks.*.mlp.fc2": RowwiseParallel(),
    }


def _matrices_shared() -> dict[str, ParallelStyle]:
    """Each matrix's product shared out, and put together again: what can be done with a fused projection."""
    return {
        "blocks.*.attn.qkv": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.attn.o": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.mlp.fc1": ColwiseParallel(),
        "blocks.*.mlp.fc2": RowwiseParallel(),
    }


def _sequence_shared() -> dict[str, ParallelStyle]:
    """Between blocks every process has a part of the tokens."""
    whole = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    return {
        "blocks.*.norm1": SequenceParallel(),
        "blocks.*.attn": PrepareModuleInput(**whole),
        **{f"blocks.*.attn.{name}": ColwiseParallel() for name in "qkv"},
        "blocks.*.attn.o": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.norm2": SequenceParallel(),
        "blocks.*.mlp": PrepareModuleInput(**whole),
        "blocks.*.mlp.fc1": ColwiseParallel(),
        "blocks.*.mlp.fc2": RowwiseParallel(output_layouts=Shard(1)),
    }


@dataclass(frozen=True)
class Case:
    block: str
    operator: str
    fusion: str
    neighbour_gradient: float

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        made = replfx.transform(
            stack(BLOCKS[self.block]).double(),
            self.inputs(0) if self.block == "fused" else None,  # it unpacks what it computes
            every=2,
            operator=self.operator,
            fusion=self.fusion,
            neighbour_gradient=self.neighbour_gradient,
        )
        randomize(made, 5)
        return made

    def inputs(self, step: int) -> Tensor:
        shape = (BATCH, TOKENS, WIDTH) if self.block != "cnn" else (BATCH, WIDTH, 6, 6)
        return torch.randn(shape, generator=torch.Generator().manual_seed(11 + step), dtype=torch.float64)


@dataclass(frozen=True)
class Wrapped:
    """A model as it runs here, and which part of a batch it is given: `take` of the whole, the loss times `scale`.

    `evaluated`: whether a forward pass without a backward comes before each step.
    """

    model: nn.Module
    take: Callable[[Tensor], Tensor]
    scale: float = 1.0
    evaluated: bool = False


def _tensor(model: nn.Module) -> Wrapped:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Wrapped(replfx.parallelize_module(model, mesh, _everything_shared()), lambda x: x)


def _matrices(model: nn.Module) -> Wrapped:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Wrapped(replfx.parallelize_module(model, mesh, _matrices_shared()), lambda x: x)


def _by_block(model: nn.Module) -> Wrapped:
    """As scripts do that go through the blocks of a model with one plan."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {path.removeprefix("blocks.*."): style for path, style in _everything_shared().items()}
    for block in model.blocks:
        replfx.parallelize_module(block, mesh, plan)
    return Wrapped(model, lambda x: x)


def _sequence(model: nn.Module) -> Wrapped:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    return Wrapped(replfx.parallelize_module(model, mesh, _sequence_shared()), lambda x: x.chunk(world, 1)[rank])


def _prepared(model: nn.Module) -> Wrapped:
    """Each process has a part of the tokens; the replaced blocks are handed all of them, and hand back a part."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    whole = PrepareModuleInputOutput(
        input_layouts=(Shard(1),),
        desired_input_layouts=(Replicate(),),
        use_local_input=True,
        output_layouts=(Replicate(),),
        desired_output_layouts=(Shard(1),),
    )
    kept = {path.replace("*", "[024]"): style for path, style in _sequence_shared().items()}
    replfx.parallelize_module(model, mesh, {"blocks.[13]": whole, **kept})
    return Wrapped(model, lambda x: x.chunk(world, 1)[rank])


def _sharded_tensor(model: nn.Module, **options: bool) -> Wrapped:
    """Tensor parallelism within pairs of processes, FSDP2 across them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    replfx.parallelize_module(model, mesh["tensor"], _everything_shared())
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"], **options)
    fully_shard(model, mesh=mesh["data"])
    rank, parts = mesh.get_local_rank("data"), mesh.size(0)
    return Wrapped(model, lambda x: x.chunk(parts)[rank], parts)


def _sharded_sequence(model: nn.Module) -> Wrapped:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    replfx.parallelize_module(model, mesh["tensor"], _sequence_shared())
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=False)
    fully_shard(model, mesh=mesh["data"])
    rank, parts, inner = mesh.get_local_rank("data"), mesh.size(0), mesh.get_local_rank("tensor")
    return Wrapped(model, lambda x: x.chunk(parts)[rank].chunk(2, 1)[inner], parts)


def _sharded_evaluated(model: nn.Module) -> Wrapped:
    """A forward pass without a backward comes before each step, and leaves all blocks whole for FSDP."""
    wrapped = _sharded_tensor(model, reshard_after_forward=False)
    return replace(wrapped, evaluated=True)


def _distributed(model: nn.Module) -> Wrapped:
    """All parameters are DTensors, and so is what the model is given: of a batch each process has a part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute_module(model, mesh, _matrices_by_rows)
    return Wrapped(model, lambda x: distribute_tensor(x, mesh, [Shard(0)]))


def _matrices_by_rows(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """All else is replicated by torch, which has no sharded kernels."""
    if isinstance(module, nn.Linear) and "weight" in module._parameters:  # none that is synthesised
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))


MODES: dict[str, Callable[[nn.Module], Wrapped]] = {
    "tensor": _tensor,
    "matrices": _matrices,
    "by_block": _by_block,
    "sequence": _sequence,
    "prepared": _prepared,
    "sharded_tensor": _sharded_tensor,
    "sharded_sequence": _sharded_sequence,
    "sharded_evaluated": _sharded_evaluated,
    "distributed": _distributed,
}


Jobs = list[tuple[str, Case, tuple[str, ...]]]


def work(jobs: Jobs) -> dict[str, str | None]:
    """Run every case in its modes; what went wrong in each."""
    found: dict[str, str | None] = {}
    for name, case, modes in jobs:
        single = case.model()
        history = list(_train(Wrapped(copy.deepcopy(single), lambda x: x), case))
        for mode in modes:
            found[f"{name}-{mode}"] = tried(_check, MODES[mode], single, case, history)
    return found


Snapshot = dict[str, Tensor]


def _check(
    wrap: Callable[[nn.Module], Wrapped], single: nn.Module, case: Case, history: list[tuple[Snapshot, Snapshot]]
) -> None:
    """A gradient that is summed where it should be averaged, or the other way round, is off by a factor."""
    for step, (gradients, parameters) in enumerate(_train(wrap(copy.deepcopy(single)), case)):
        for what, mine, expected in (
            ("gradient", gradients, history[step][0]),
            ("parameter", parameters, history[step][1]),
        ):
            assert mine.keys() == expected.keys()
            for name, tensor in mine.items():
                assert_close(tensor, expected[name], f"{what} {step} of {name}")


def _train(wrapped: Wrapped, case: Case) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Gradients and parameters of each step."""
    optimizer = torch.optim.AdamW(wrapped.model.parameters(), lr=1e-2, eps=1e-3, foreach=False)
    for step in range(STEPS):
        x = case.inputs(step)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        optimizer.zero_grad()
        if wrapped.evaluated:
            with torch.no_grad():
                wrapped.model(wrapped.take(x))
        loss = (wrapped.model(wrapped.take(x)) * wrapped.take(weight)).sum() * wrapped.scale
        loss.backward()
        gradients = {name: whole_tensor(p.grad) for name, p in wrapped.model.named_parameters() if p.grad is not None}
        optimizer.step()
        yield gradients, {name: whole_tensor(p).detach().clone() for name, p in wrapped.model.named_parameters()}


def refusals() -> str | None:
    """What `parallelize_module`, and what comes after it, refuses; what went wrong."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return tried(_refusals, mesh) or tried(_ways_out, mesh)


def _refusals(mesh: DeviceMesh) -> None:
    case = Case("transformer", "block", "scalar", 1.0)
    model, styles = case.model(), _everything_shared()
    kinds = [type(p) for p in model.parameters()]
    for plan, at, message in (
        ({**styles, "blocks.*.mlp.fc3": ColwiseParallel()}, mesh, "`blocks.*.mlp.fc3` names no module of Row"),
        ({"blocks.1.mlp.fc3": ColwiseParallel()}, mesh, "`blocks.1.mlp.fc3` names no module of Row"),
        (styles, init_device_mesh("cpu", (1, mesh.size())), "device_mesh has 2 dimensions"),
    ):
        with pytest.raises(replfx.FusionError, match=re.escape(message)):
            replfx.parallelize_module(model, at, plan)
        assert [type(p) for p in model.parameters()] == kinds
    with pytest.raises(replfx.FusionError, match=r"does not fit in `blocks\.1`: ColwiseParallel"):
        replfx.parallelize_module(case.model(), mesh, {"blocks.1.norm1": ColwiseParallel()})
    light = Case("transformer", "light", "scalar", 1.0).model()
    with pytest.raises(replfx.FusionError, match="names no module"):
        replfx.parallelize_module(light, mesh, {"blocks.1.mlp.fc3": ColwiseParallel()})

    for plan in (styles, _sequence_shared()):
        with pytest.raises((replfx.FusionError, RuntimeError), match=r"call replfx\.parallelize_module|leaf tensors"):
            torch_parallelize_module(case.model(), mesh, plan)(case.inputs(0))
    with pytest.raises(replfx.CaptureError, match="is a DTensor"):
        replfx.transform(torch_parallelize_module(stack(BLOCKS["transformer"]).double(), mesh, styles), every=2)

    replfx.parallelize_module(model, mesh, styles)
    with pytest.raises(replfx.FusionError, match=r"`blocks\.1` has been parallelised before"):
        replfx.parallelize_module(model, mesh, styles)


def _ways_out(mesh: DeviceMesh) -> None:
    """Copies, state_dicts and plain models of what is parallel give what the model gives on one process."""
    for operator in ("block", "mixer", "light"):
        case = Case("transformer", operator, "channel", 1.0)
        single, x = case.model(), case.inputs(1)
        model = replfx.parallelize_module(copy.deepcopy(single), mesh, _everything_shared())
        assert list(model.state_dict()) == list(single.state_dict())
        expected = single(x)
        for other in (copy.deepcopy(model), replfx.materialize(model)):
            torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)  # float64, sums in another order
        if operator == "block":
            torch.testing.assert_close(replfx.unroll(copy.deepcopy(model))(x), expected, rtol=1e-12, atol=1e-12)
        else:
            with pytest.raises(replfx.FusionError, match=r"`blocks\.1` cannot be unrolled: it is tensor parallel"):
                replfx.unroll(copy.deepcopy(model))
    shared = replfx.parallelize_module(copy.deepcopy(single), mesh, _sequence_shared())
    with pytest.raises(replfx.FusionError, match=r"`blocks\.1` cannot be made plain: its processes share the sequence"):
        replfx.materialize(shared)
