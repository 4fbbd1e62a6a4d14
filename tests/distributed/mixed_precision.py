"""What each process of test_mixed_precision.py does, and the same arithmetic on one process, written out."""

import copy
import json
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

import replfx
from replfx.fusion import FusionLayer
from tests.distributed.data_parallel import join, whole_tensor
from tests.distributed.models import BLOCKS, WIDTH, Model
from tests.strategies import randomize

BATCH, STEPS = 4, 5
LOW = torch.bfloat16

# Of the largest entry: both sides round to bfloat16 at the same places, and differ in the order of a few float32 sums
# (2^-24 each). Where one rounds to bfloat16 (2^-9) and the other does not, the difference is thousands of times that.
TOLERANCE = 2e-5


def _by_block(model: nn.Module, keep: bool) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=LOW, reduce_dtype=torch.float32)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(model, mp_policy=policy)
    return model


# Kind of block, operator, and whether blocks stay whole after their forward pass: the neighbour before then is read
# in bfloat16, as FSDP holds it.
CASES: dict[str, tuple[str, str, bool]] = {
    f"{block}-{operator}{'-kept' * keep}": (block, operator, keep)
    for block in ("transformer", "cnn")
    for operator in ("block", "light")
    for keep in (False, True)
}


def work(rank: int, world: int, port: int, folder: str) -> None:
    """Run every case; write what went wrong as JSON."""
    join(rank, world, port)
    found: dict[str, str | None] = {}
    for name, (block, operator, keep) in CASES.items():
        try:
            _check(block, operator, keep)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _check(block: str, operator: str, keep: bool) -> None:
    torch.manual_seed(3)
    model = replfx.transform(Model(BLOCKS[block]), _batch(block, 0), every=2, operator=operator, fusion="scalar")
    randomize(model, 5)
    single = copy.deepcopy(model)
    sharded = _by_block(model, keep)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (sharded, single)]
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        parts = _batch(block, step).chunk(world)
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(sharded(parts[rank])).backward()
        for part in parts:
            (_loss(_emulated(single, part, keep)) / world).backward()
        for layer in single.blocks if not keep else ():  # type: ignore[union-attr]
            if isinstance(layer, FusionLayer) and layer.fusion is not None:
                for coefficient in layer.fusion.parameters():
                    assert coefficient.grad is not None
                    coefficient.grad = coefficient.grad.to(LOW).float()
        for name, parameter in sharded.named_parameters():
            mine, theirs = whole_tensor(parameter.grad), single.get_parameter(name).grad
            assert mine is not None
            assert theirs is not None
            assert mine.dtype == torch.float32
            error, scale = (mine - theirs).abs().max().item(), theirs.abs().max().item()
            assert error <= TOLERANCE * scale, f"gradient {step} of {name}: off by {error:.2e} at {scale:.2e}"
        for optimizer in optimizers:
            optimizer.step()


def _batch(block: str, step: int) -> Tensor:
    shape = (BATCH, 6, WIDTH) if block == "transformer" else (BATCH, WIDTH, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def _loss(y: Tensor) -> Tensor:
    return y.float().square().mean()


def _coefficients(parameter: Tensor, keep: bool) -> Tensor:
    """Rounded to bfloat16, and so is their gradient.

    That is of each process's own where weights are gathered before they are fused; on shards it is of the average.
    """
    low = parameter.to(LOW).float()
    return low if keep else parameter + (low - parameter).detach()


def _emulated(model: nn.Module, x: Tensor, keep: bool) -> Tensor:
    """Each block in bfloat16; a replaced one with weights that are synthesised in float32."""
    blocks = list(model.blocks)  # type: ignore[union-attr]
    lows = [{name: p.to(LOW) for name, p in block.named_parameters()} for block in blocks]
    for position, (block, low) in enumerate(zip(blocks, lows, strict=True)):
        x = x.to(LOW)
        if not isinstance(block, FusionLayer):
            x = functional_call(block, low, (x,))
            continue
        of_operator = {n.removeprefix("operator."): p for n, p in low.items() if n.startswith("operator.")}
        after = dict(blocks[position + 1].named_parameters())
        before = lows[position - 1] if keep else dict(blocks[position - 1].named_parameters())
        assert block.fusion is not None
        a, b = (_coefficients(block.fusion.get_parameter(name), keep) for name in ("previous", "next"))
        theta = {
            name: (a[i] * before[name].float() + b[i] * after[name]).to(LOW)
            for i, name in enumerate(block.operator.sources)
        }
        x = functional_call(block.operator, of_operator, (theta, (x,), {}))
    return x
