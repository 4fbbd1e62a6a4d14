"""FSDP2 with parameters, gradients and optimizer state in the host's memory, and the computing on one GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.distributed.layouts import by_block
from tests.distributed.ranks import BATCH, whole_tensor
from tests.support.compare import EXACT
from tests.support.processes import on_ranks
from tests.support.strategies import case_of


def work(device: str, operator: str) -> None:
    """Three steps, beside those of the same model as one piece on the device."""
    case = case_of("transformer", operator, "channel", training=False, width=6, depth=5, seed=3)
    model = case.transformed()
    single = copy.deepcopy(model).to(device)
    sharded = by_block(model, offload_policy=CPUOffloadPolicy(pin_memory=device == "cuda"))
    nets = (single, sharded)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    for step in range(3):
        x = (case.inputs(BATCH)[0].detach() + step).to(device)
        losses = [net(x).square().mean() for net in nets]
        torch.testing.assert_close(losses[1], losses[0], rtol=EXACT, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, parameter in sharded.named_parameters():
        assert parameter.device.type == "cpu", name
        wanted = single.get_parameter(name).cpu()
        torch.testing.assert_close(whole_tensor(parameter).cpu(), wanted, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("operator", ["block", "light"])
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_offloaded_to_the_host(device: str, operator: str, tmp_path: Path) -> None:
    on_ranks(1, work, tmp_path, device, operator, backend="gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
