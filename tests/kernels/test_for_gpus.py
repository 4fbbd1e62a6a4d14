"""What a GPU is not needed for: the kernels compile for one, and compilers know what they write to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from replfx.kernels import synthesis, synthesize
from replfx.kernels.synthesis import INSTALLED
from tests.kernels.cases import only_plain

pytestmark = [only_plain, pytest.mark.skipif(not INSTALLED, reason="triton is not installed")]

# Compute capability 9.0; the backend is the one that comes with triton.
CAPABILITY = 90


def kernels(pointer: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with constants as the launchers give them."""
    double = {"double": pointer == "*fp64"}
    for width in (256,) if pointer == "*bf16" else (1, 64, 256):
        yield synthesis.synthesis_kernel, {"height": 2048 // width, "width": width, **double}
        yield synthesis.gradients_kernel, {"height": 1024 // width, "width": width, **double, "needs": 15}


def kind_of(argument: str, pointer: str) -> str:
    return pointer if argument in {"p", "n", "a", "b", "w", "g", "gp", "gn", "ga", "gb"} else "i32"


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

    written: list[set[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend(set(launch["tensors_to_clone"]) for launch in launches)
        return make_boxed_func(graph.forward)

    def work(p: Any, n: Any, a: Any, b: Any) -> Any:
        made = synthesize([p] * 3, [n] * 3, [a] * 3, [b] * 3)
        grads = synthesis.synthesize_backward([p], [p], [n], [a], [b])
        return (*made, *grads)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())  # `set_active` cannot be undone without a GPU
    with FakeTensorMode():
        shapes = ((5, 3), (5, 3), (5,), (1,))
        aot_function(work, note, note)(*(torch.randn(shape, device="cuda") for shape in shapes))
    assert sorted(map(sorted, written)) == [["ga", "gb", "gn", "gp"], ["w"], ["w"], ["w"]]
