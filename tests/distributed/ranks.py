"""What each process of test_data_parallel.py does: one group of processes goes through all cases."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import replfx
from replfx.live import syntheses_of
from tests.distributed.layouts import MODES, MORE_MODES, Mode
from tests.reference import Stack
from tests.support.compare import Gradients, assert_close
from tests.support.processes import tried
from tests.support.regions import Regions
from tests.support.stacks import Drawn
from tests.support.strategies import Case

BATCH = 8  # one example each for four processes that take a step in two parts
STEPS = 3  # the last two with what the first left in the optimizer and in FSDP's groups


@dataclass(frozen=True)
class Job:
    """A model to be, the modes to train it in, the optimizer, and the step before which the model is unrolled."""

    name: str
    case: Case | Drawn | Regions
    modes: tuple[str, ...]
    optimizer: str = "sgd"
    unrolled: int | None = None

    @property
    def names(self) -> list[str]:
        """One for each mode."""
        return [f"{self.name}-{mode}" for mode in self.modes]


def work(jobs: list[Job]) -> dict[str, str | None]:
    """Run every case in its modes; what went wrong in each."""
    found: dict[str, str | None] = {}
    for job in jobs:
        model = job.case.transformed()
        single = copy.deepcopy(model)
        history = list(_train(single, single, job, slice(None), Mode(lambda model: model)))
        for mode, name in zip(job.modes, job.names, strict=True):
            found[name] = tried(_check, copy.deepcopy(model), single, history, {**MODES, **MORE_MODES}[mode], job)
    return found


def _check(model: Stack, single: Stack, history: list[Gradients], mode: Mode, job: Job) -> None:
    """Training on each process's part of the batch, against one process with the whole batch."""
    wrapped, size = mode.wrap(model), BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    for step, gradients in enumerate(_train(wrapped, model, job, mine, mode)):
        assert gradients.keys() == history[step].keys()
        for name, gradient in gradients.items():
            _compare(gradient, history[step][name], f"gradient {step} of {name}")
    assert step == STEPS - 1
    for name, parameter in _named_parameters(model).items():
        _compare(whole_tensor(parameter), single.get_parameter(name), f"parameter {name}")
    assert _names(model) == _names(single)
    layers = {
        path.replace("_checkpoint_wrapped_module", "").replace("..", ".").strip("."): layer
        for path, layer in syntheses_of(model).items()
    }
    assert layers.keys() == syntheses_of(single).keys()
    for path, layer in layers.items():  # also from outside of a forward pass, where all is sharded
        one, other = layer.synthesized(), syntheses_of(single)[path].synthesized()
        for name, tensor in other.items():
            _compare(whole_tensor(one[name]), tensor, f"synthesised {name}")


def _names(model: nn.Module) -> list[str]:
    return [name.replace("_checkpoint_wrapped_module.", "") for name in model.state_dict()]


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names without what PyTorch's checkpointing puts between."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}


def _train(wrapped: nn.Module, model: Stack, job: Job, part: slice, mode: Mode) -> Iterator[Gradients]:
    """Steps on a part of each batch; the gradients of each."""
    if job.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        # AdamW divides by the size of a gradient: one that is zero but for rounding stays small beside this ε.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    for step in range(STEPS):
        if step == job.unrolled:
            torch.manual_seed(0)  # a block that was left out starts at random in part
            replfx.unroll(wrapped, optimizer)
        x, *extra = job.case.inputs(BATCH)
        x = x.detach() + step
        optimizer.zero_grad()
        if mode.evaluated:
            with torch.no_grad():
                wrapped(x[part], *extra)
        if mode.accumulate is None:
            _loss(wrapped(x[part], *extra), part).backward()
        else:
            middle = (part.start + part.stop) // 2
            for half in (slice(part.start, middle), slice(middle, part.stop)):
                with mode.accumulate(wrapped, half.stop == part.stop):
                    (_loss(wrapped(x[half], *extra), half) / 2).backward()
        yield {name: whole_tensor(p.grad) for name, p in _named_parameters(model).items()}
        optimizer.step()


def _loss(result: Tensor | tuple[Tensor, Tensor], part: slice) -> Tensor:
    """A mean over the batch, so that the mean over the processes is that over all."""
    if isinstance(result, tuple):
        return _loss(result[0], part) + result[1]
    weight = torch.randn(BATCH, *result.shape[1:], generator=torch.Generator().manual_seed(7), dtype=result.dtype)
    return (result * weight[part]).sum() / len(result)


def whole_tensor(tensor: Tensor | None) -> Tensor | None:
    """A DTensor gathered; else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(one: Tensor | None, other: Tensor | None, what: str) -> None:
    """The processes sum the same float64 numbers in another order.

    A gradient that is not averaged, or averaged twice, is off by a factor of the processes.
    """
    assert (one is None) == (other is None), f"{what}: {one is None} here, {other is None} in one process"
    if one is not None:
        assert_close(one, other, what)
