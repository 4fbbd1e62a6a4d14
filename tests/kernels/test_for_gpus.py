"""What a GPU is not needed for: the kernels compile for one, and compilers know what they write to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from replfx.kernels import synthesize, synthesize_low_rank, synthesized_linear
from replfx.kernels.availability import INSTALLED
from tests.kernels.cases import only_plain

pytestmark = [only_plain, pytest.mark.skipif(not INSTALLED, reason="triton is not installed")]

# Compute capability 9.0; the backend is the one that comes with triton.
CAPABILITY = 90
ALL = {"to_p": True, "to_n": True, "to_a": True, "to_b": True}
LINEAR = {"tile_k": 32, "group": 8, "has_bias": True, "widen": False}


def kernels(pointer: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with constants as the launchers give them."""
    from replfx.kernels import matrix_kernels, synthesis_kernels

    double = {"double": pointer == "*fp64"}
    for width in (256,) if pointer == "*bf16" else (1, 64, 256):
        yield synthesis_kernels.synthesis_kernel, {"height": 2048 // width, "width": width, **double}
        yield synthesis_kernels.gradients_kernel, {"height": 1024 // width, "width": width, **double, **ALL}
    yield synthesis_kernels.totals_kernel, {"width": 1024, **double}
    yield matrix_kernels.low_rank_kernel, {"height": 16, "width": 128, **double}
    if pointer == "*fp32":
        for precision in ("ieee", "tf32"):
            yield matrix_kernels.linear_kernel, {"tile_m": 64, "tile_n": 64, "precision": precision, **LINEAR}
    elif pointer != "*fp64":
        yield matrix_kernels.linear_kernel, {"tile_m": 128, "tile_n": 128, "precision": "ieee", **LINEAR}


def kind_of(argument: str, pointer: str) -> str:
    name = argument.rstrip("0123456789")
    if name == "parts":
        return "*fp64" if pointer == "*fp64" else "*fp32"
    tensors = {"p", "n", "a", "b", "w", "g", "gp", "gn", "ga", "gb", "sum", "u", "v", "x", "y", "bias"}
    return pointer if name in tensors else "i32"


@pytest.mark.parametrize("pointer", ["*bf16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("*fp32", "*fp64"))])
def test_kernels_compile(pointer: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, constants in kernels(pointer):
        kinds = {name: "constexpr" if name in constants else kind_of(name, pointer) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
        # What a program keeps in shared memory fits the least of today's GPUs.
        assert made.metadata.shared <= 99 * 1024


class Driver:
    """Stands for a GPU's where PyTorch asks what a kernel would be compiled for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")


def test_compilers_know_what_kernels_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they copy every neighbour before a launch, and nothing fails."""
    import triton

    from replfx.kernels import synthesis_ops

    written: list[set[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend({name.rstrip("0123456789") for name in launch["tensors_to_clone"]} for launch in launches)
        return make_boxed_func(graph.forward)

    def work(x: Any, p: Any, n: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        made = synthesize([p] * 3, [n] * 3, [a] * 3, [b] * 3)
        grads = synthesis_ops.synthesize_backward([p], [p], [n], [a], [b])
        return (*made, synthesize_low_rank(p, n, a, b, u, v), synthesized_linear(x, p, n, a, b), *grads)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())  # `set_active` cannot be undone without a GPU
    with FakeTensorMode():
        shapes = ((7, 3), (5, 3), (5, 3), (5,), (1,), (5, 2), (3, 2))
        aot_function(work, note, note)(*(torch.randn(shape, device="cuda") for shape in shapes))
    assert sorted(map(sorted, written)) == [["ga", "gb", "gn", "gp"], ["sum"], ["w"], ["w"], ["y"]]
