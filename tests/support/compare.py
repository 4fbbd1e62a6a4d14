"""How models are run and compared: outputs, losses, gradients, references, optimizers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import replfx
from tests.reference import reference_forward
from tests.reference.heterogeneous import renamed
from tests.support.strategies import Case

# Of the largest entry of what is compared. Both sides do the same few thousand float64 operations in another
# order; at a rounding of 1.1e-16 each, through at most six blocks whose normalisations divide by standard
# deviations down to sqrt(eps) = 3e-3, that is under 1e-10. A wrong formula is off by 1e-3 and more.
EXACT = 1e-10

Gradients = dict[str, Tensor | None]
Outcome = tuple[list[Tensor], Gradients]


def outputs(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    result = call(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


def loss_of(results: list[Tensor]) -> Tensor:
    """Weighs every element by a number of its own, so that no gradient cancels."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return torch.stack([(r * w).sum() for r, w in zip(results, weights, strict=True)]).sum()


def run(model: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Any] | None = None) -> Outcome:
    """Outputs, and the gradient of every parameter and of the input; `call` runs the model, if it is not called."""
    model.zero_grad()
    inputs[0].grad = None
    results = outputs(model if call is None else call, inputs)
    loss_of(results).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [r.detach() for r in results], {**gradients, "input": inputs[0].grad}


def assert_close(one: Tensor, other: Tensor, what: str, tolerance: float = EXACT) -> None:
    assert one.shape == other.shape, what
    scale = max(other.abs().max().item(), 1e-3) if other.numel() else 1.0
    error = (one - other).abs().max().item() if other.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: off by {error:.2e} at a scale of {scale:.2e}"


def assert_same_gradients(found: Gradients, wanted: Gradients, tolerance: float = EXACT) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close(found[name], gradient, f"gradient of {name}", tolerance)


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    """Outputs and gradients; and every gradient is there and finite."""
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert torch.equal(gradient, other[1][name]), name


def assert_as_near(found: Tensor, rounded: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """`found` is as near to the truth as `rounded`, the same computation in low precision by other means.

    Two orders of the same operations round independently: their errors differ by a small factor. 4, and a floor of
    two units in the last place for where `rounded` happens to be exact.
    """
    error, allowed = ((t.detach().double() - exact).norm().item() for t in (found, rounded))
    assert error <= 4 * allowed + 2 * torch.finfo(dtype).eps * exact.norm().item(), what


def replaced_by(model: nn.Module) -> list[int]:
    return [int(path.split(".")[1]) for path in replfx.report(model).replaced]


def reference_name(name: str) -> str:
    """The reference's name of a tensor in the state_dict of a transformed model."""
    block, mark, added = name.partition("replfx.")
    return block + renamed(added) if mark else name


def reference_run(
    case: Case, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Gradients, dict[str, Tensor]]:
    """Outputs, gradients (by the library's names) and running statistics of the reference, with the same weights."""
    dtype = dtype or case.dtype
    tensors = {}
    for name, tensor in model.state_dict().items():
        own = tensor.detach().clone()
        own = own.to(dtype) if own.is_floating_point() else own
        tensors[reference_name(name)] = own
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        tensors[reference_name(name)].requires_grad_()
    x = inputs[0].detach().clone().to(dtype).requires_grad_()
    result = reference_forward(
        case.family,
        case.options,
        case.depth,
        replaced_by(model),
        tensors,
        (x, *inputs[1:]),
        fusion=case.policy.fusion,
        operator=case.policy.operator,
        neighbour_gradient=case.policy.neighbour_gradient,
        training=case.training,
    )
    results = list(result) if isinstance(result, tuple) else [result]
    loss_of(results).backward()
    gradients = {name: tensors[reference_name(name)].grad for name in names}
    buffers = {name: tensors[reference_name(name)] for name, _ in model.named_buffers()}
    return [r.detach() for r in results], {**gradients, "input": x.grad}, buffers


def of_replfx(model: nn.Module) -> Iterator[str]:
    """Whatever of replfx is left in a model."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("replfx"):
            yield f"module {path}"
        for name, value in vars(module).items():
            if name.startswith("_replfx"):
                yield f"{path}.{name}"
            if "hooks" in name and isinstance(value, dict) and value:
                yield f"{path}.{name}"


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "lr": 1e-3}, {"params": vectors, "lr": 2e-3}]
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(outputs(model, inputs)).backward()
        optimizer.step()


def assert_same_run(model: nn.Module, twin: nn.Module, call: Callable[..., Any], case: Case) -> None:
    """Outputs and all gradients of a model, and of a copy of it that `call` runs."""
    results, gradients = run(model, case.inputs())
    again, gradients_again = run(twin, case.inputs(), call)
    for one, two in zip(again, results, strict=True):
        assert_close(one, two, "output")
    assert_same_gradients(gradients_again, gradients)
