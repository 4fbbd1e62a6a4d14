"""The operators keep PyTorch's rules, compilers see into them, and triton is needed for none of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from replfx.kernels import synthesize
from tests.kernels.cases import DEVICES, only_plain


def leaf(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).requires_grad_()


def arguments(device: str) -> dict[str, list[tuple[Any, ...]]]:
    def make(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [leaf(*shape, device=device) for shape in shapes]

    p, n = (make((5, 3), (7,), (4, 2, 3, 3), (2, 0)) for _ in range(2))
    p[2] = p[2].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    a, b = make((5,), (1,), (1,), (1,)), make((1,), (1,), (4,), (2,))
    four = [[tensor.detach() for tensor in tensors] for tensors in (p, n, a, b)]
    return {"synthesize": [(p, n, a, b)], "synthesize_backward": [(four[0], *four), (four[0], *four, [3, 12, 0, 15])]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(arguments("cpu")))
def test_opcheck(name: str, device: str) -> None:
    for args in arguments(device)[name]:
        opcheck(getattr(torch.ops.replfx, name).default, args)


# ---- compiled


class Model(nn.Module):
    """Two syntheses, in a list and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        (theta,) = synthesize([self.before], [self.after], [self.a], [self.b])
        other, *_ = synthesize([self.after, theta], [theta, self.after], [self.b, self.a], [self.a, self.b])
        return x @ theta @ other


def gradients(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), parameters))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(device: str, backend: str) -> None:
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a compiler")
    torch.manual_seed(0)
    model = Model().to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 6, device=device)
    wanted = gradients(model, list(model.parameters()), x)
    # Two orders of the same float32 operations, on values of some hundreds.
    torch.testing.assert_close(gradients(compiled, list(model.parameters()), x), wanted, rtol=1e-4, atol=1e-3)


@only_plain
def test_exported() -> None:
    model = Model()
    x = torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert "replfx" not in program.graph_module.code


# ---- triton, or none


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@only_plain
def test_works_without_triton() -> None:
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch, replfx.kernels as k\n"
        "w, a = torch.ones(2, 2, requires_grad=True), torch.full((2,), 0.5)\n"
        "assert torch.equal(k.synthesize([w], [w], [a], [a])[0], w)\n"
        "(theta,) = torch.ops.replfx.synthesize([w], [w], [a], [a])\n"
        "theta.sum().backward()\n"
        "assert torch.equal(w.grad, torch.ones(2, 2))\n"
    )
