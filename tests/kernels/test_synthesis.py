"""`synthesize` and its gradients are those of NumPy, in plain PyTorch and (from test_interpreter.py) in the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from replfx.kernels import synthesis, synthesize
from replfx.kernels.synthesis import INSTALLED, Rows, synthesize_backward, synthesize_operator
from tests.kernels import reference
from tests.kernels.cases import DEVICES, Case, One, cases, in_triton, only_interpreted, only_plain, random


def run(
    case: Case, device: str, call: Callable[..., list[Tensor]] = synthesize
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Inputs with their gradients, and θ."""
    inputs = case.tensors(device)
    made = call(*inputs) if case.ones else []
    wanted = [(w, g) for w, g, one in zip(made, case.grads(device), case.ones, strict=True) if one.used]
    wanted = [(w, g) for w, g in wanted if w.requires_grad]
    if wanted:
        torch.autograd.backward(*zip(*wanted, strict=True))
    return inputs, made


def check(case: Case, device: str, call: Callable[..., list[Tensor]] = synthesize) -> None:
    """Values and gradients, or that there is none."""
    inputs, made = run(case, device, call)
    for k, (one, theta, grad) in enumerate(zip(case.ones, made, case.grads(device), strict=True)):
        four = [tensors[k] for tensors in inputs]
        reference.assert_close(theta, reference.synthesis(*four), f"θ[{k}]")
        expected = reference.gradients(grad, *four)
        for name, tensor, need, pair in zip("pnab", four, one.needs, expected, strict=True):
            if not need or not one.used:
                assert tensor.grad is None, f"{name}[{k}]"
                continue
            assert tensor.grad is not None, f"{name}[{k}]"
            terms = one.shape and torch.Size(one.shape).numel() // max(tensor.numel(), 1)
            reference.assert_close(
                tensor.grad, pair, f"gradient of {name}[{k}]", terms=1 if name in "pn" else terms or 1
            )


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_values_and_gradients(device: str, case: Case) -> None:
    check(case, device)


@only_plain
@given(case=cases())
def test_the_operator_without_kernels(case: Case) -> None:
    check(case, "cpu", synthesize_operator)


def alike(shape: tuple[int, ...], count: int, *, channel: bool, dtype: torch.dtype = torch.float32) -> Case:
    one = One(shape, (channel, channel), ("contiguous",) * 3, (True,) * 4, True)
    return Case((one,) * count, dtype, 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channel", [True, False])
def test_any_number_of_tiles(device: str, channel: bool) -> None:
    """Nine syntheses of one width, each of another number of tiles, and each a lot longer than the one before."""
    layouts, needs = ("contiguous",) * 3, (True,) * 4
    sizes = [(9 * k, 70) if channel else (2, 550 * k * k) for k in range(1, 10)]
    check(Case(tuple(One(size, (channel,) * 2, layouts, needs, True) for size in sizes), torch.float32, 3), device)


@pytest.mark.parametrize("device", DEVICES)
def test_many_partial_sums(device: str) -> None:
    ones, a = torch.ones(1025, 1024, device=device), torch.ones(1, device=device)
    *_, (grad_a,), (grad_b,) = synthesize_backward([ones], [ones], [2 * ones], [a], [a], [12])
    assert (grad_a.item(), grad_b.item()) == (ones.numel(), 2 * ones.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(device: str, channel: bool, dtype: torch.dtype) -> None:
    ones = torch.ones(1, 4096, dtype=dtype, device=device)
    a = torch.ones(1, dtype=dtype, device=device, requires_grad=True)
    thetas = [ones, ones.view(-1)] if channel else [ones.view(64, 64), ones.view(-1)]
    made = synthesize(thetas, thetas, [a, a], [a.detach(), a.detach()])
    torch.autograd.backward(made, [torch.ones_like(theta) for theta in thetas])
    assert a.grad.item() == 8192  # a sum in bfloat16 stays at 256, one in float16 at 2048


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_every_time(device: str) -> None:
    runs = [run(alike((37, 60), 9, channel=channel), device) for _ in range(2) for channel in (True, False)]
    for one, other in zip(runs[:2], runs[2:], strict=True):
        for tensors, again in zip(one[0], other[0], strict=True):
            for tensor, twin in zip(tensors, again, strict=True):
                assert torch.equal(tensor.grad, twin.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_one_tensor_everywhere(device: str) -> None:
    """A block that is both neighbours, and coefficients shared by two syntheses: gradients add up."""
    theta, a = (random((6,), torch.float64, device, seed).requires_grad_() for seed in (1, 2))
    first, second = synthesize([theta, theta], [theta, theta], [a, a], [a, a])
    (first.sum() + 2 * second.sum()).backward()
    torch.testing.assert_close(theta.grad, 6 * a.detach())
    torch.testing.assert_close(a.grad, 6 * theta.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_gradients(device: str) -> None:
    inputs = alike((5, 3), 2, channel=True).tensors(device)
    sum(theta.sum() for theta in synthesize(*inputs)).backward()
    for a, p in zip(inputs[2], inputs[0], strict=True):
        torch.testing.assert_close(a.grad, p.detach().sum(1))


@pytest.mark.parametrize("device", DEVICES)
def test_runs_the_operator_where_triton_runs(device: str) -> None:
    (theta,) = synthesize(*alike((2, 3), 1, channel=True).tensors(device))
    assert ("replfx_synthesize" in theta.grad_fn.name()) == in_triton(device)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device: str) -> None:
    inputs = alike((2, 1, 2), 1, channel=True, dtype=torch.float64).tensors(device)
    scalar = alike((3,), 1, channel=False, dtype=torch.float64).tensors(device)
    flat = [tensor for both in zip(inputs, scalar, strict=True) for tensors in both for tensor in tensors]

    def call(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(synthesize(*([flat[2 * k], flat[2 * k + 1]] for k in range(4))))

    assert torch.autograd.gradcheck(call, flat)
    if not in_triton(device):
        assert torch.autograd.gradgradcheck(call, flat)


# ---- how it is launched


class Recorder:
    """Stands before a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@only_interpreted
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("channel", [True, False])
def test_one_launch_a_synthesis(monkeypatch: pytest.MonkeyPatch, count: int, channel: bool) -> None:
    names = ("synthesis_kernel", "gradients_kernel")
    recorders = [Recorder(getattr(synthesis, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(synthesis, name, recorder)
    run(alike((5, 30), count, channel=channel), "cpu")
    assert [len(recorder.grids) for recorder in recorders] == [count, count]


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_neighbours_are_read_in_place() -> None:
    shapes = [(4, 3, 3, 3), (6, 5), (7,), (4, 6, 1, 1)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p, n = ([torch.randn(shape) for shape in shapes] for _ in range(2))
        for tensors in (p, n):
            tensors[:] = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
        p[1], n[1] = p[1][1:4], n[1][2:5]  # rows of a matrix
        coefficients = [torch.ones(theta.shape[0]) for theta in p]
        rows = [Rows.of(*each) for each in zip(p, n, coefficients, coefficients, strict=True)]
        assert _places([each.previous for each in rows]) == _places(p)
        assert _places([each.next for each in rows]) == _places(n)


@only_plain
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_second_derivatives_are_refused_by_the_operator() -> None:
    w, a = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    (theta,) = synthesize_operator([w], [w], [a], [a])
    (grad,) = torch.autograd.grad(theta.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
