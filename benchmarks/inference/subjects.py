"""The ways in which a model is run after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import replfx
from benchmarks.models import Subject
from replfx import ReplfxError
from replfx.measure import unique_storage_bytes


@dataclass(frozen=True)
class Way:
    """How a model is replaced, and what is done to it before it runs.

    Attributes:
        name: of the row.
        operator: of the replaced blocks; None leaves the model whole, "identity" deletes them.
        materialized: fusion layers are turned into plain modules.
        compiled: by Inductor.
        int8: the weights of linear layers are INT8 (torchao's weight-only quantisation).
    """

    name: str
    operator: str | None = None
    materialized: bool = False
    compiled: bool = False
    int8: bool = False


FULL = Way("full")
BOUNDS = (FULL, Way("full compiled", compiled=True), Way("removed", "identity", materialized=True))


def ways_of(operators: Sequence[str]) -> list[Way]:
    """The bounds, and each operator in each of its forms."""
    ways = list(BOUNDS)
    for operator in operators:
        ways += [
            Way(f"{operator} transformed", operator),
            Way(f"{operator} materialized", operator, materialized=True),
            Way(f"{operator} materialized compiled", operator, materialized=True, compiled=True),
            Way(f"{operator} materialized INT8", operator, materialized=True, int8=True),
        ]
    return ways


@dataclass(frozen=True)
class Runnable:
    """A model to run.

    Attributes:
        call: runs it on a batch.
        weight_bytes: of its parameters and buffers.
    """

    call: Callable[[Tensor], object]
    weight_bytes: int


def runnable(
    subject: Subject, way: Way, device: torch.device, *, every: int = 2, dtype: torch.dtype = torch.float32
) -> Runnable:
    """A model from seed 0 in evaluation mode, made ready one way; nothing is compiled before its first call.

    Raises:
        ReplfxError: the model's blocks do not have the operator, or there is nothing to quantise with.

    """
    torch.manual_seed(0)
    model = subject.build(device.type).eval().to(device)
    if way.operator is not None:
        example = subject.batch(device.type, 2)[0].to(device)
        model = replfx.transform(model, example, every=every, operator=way.operator)
    if way.materialized:
        model = replfx.materialize(model)
    model.to(dtype)
    if way.int8:
        to_int8(model)
    count = weight_bytes([*model.parameters(), *model.buffers()])
    return Runnable(torch.compile(model, fullgraph=True, dynamic=False) if way.compiled else model, count)


def to_int8(model: nn.Module) -> None:
    """Quantise the weights of linear layers in place, one scale a row.

    Raises:
        ReplfxError: torchao is not installed.

    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ReplfxError("torchao is not installed (pip install torchao)") from error
    # Inductor's settings are those of all ways, which are compiled beside this one.
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind the tensors, each storage once; of a quantised one those of its codes and scales."""
    return unique_storage_bytes(part for tensor in tensors for part in _parts(tensor))


def _parts(tensor: Tensor) -> list[Tensor]:
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol of tensors that stand for others
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    return [part for name in names for part in _parts(getattr(tensor, name))]
