"""The backend: our passes over Dynamo's graph, then a compiler for what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from torch import Tensor, fx

from replfx.compile.batched import SYNTHESIZE, kernel_operation
from replfx.compile.caching import Cached, with_cached
from replfx.compile.hoisting import hoist_syntheses
from replfx.dynamo.nodes import made_of_parameters, value_of
from replfx.errors import CompileError
from replfx.passes import run_passes
from replfx.passes.batch_synthesis import BatchSynthesis
from replfx.passes.fold_affines import FoldAffines
from replfx.passes.merge_syntheses import MergeSyntheses
from replfx.passes.reassociate_products import ReassociateProducts
from replfx.torch_internals.dynamo import (
    InductorWrapper,
    ShortenTraceback,
    TracingContext,
    copy_source,
    detect_fake_mode,
    lookup_backend,
    tracing,
    uses_cuda_graphs,
)

__all__ = ["Backend", "RefusedError"]

Compiler: TypeAlias = Callable[..., Any]


class RefusedError(CompileError, ShortenTraceback):
    """Dynamo hands this one on as it is, where it wraps others."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


@dataclass(frozen=True)
class Backend:
    """A backend for `torch.compile`; `replfx.backend` makes one, and has its options.

    Example:
        >>> model = torch.compile(replfx.transform(model), backend=Backend(cache=True), mode="max-autotune")
    """

    max_bytes: int = 32 * 2**20
    cache: bool = False
    kernels: bool = False
    inner: str | Compiler = "inductor"

    __name__ = "replfx"

    def __post_init__(self) -> None:
        if type(self.max_bytes) is not int or self.max_bytes < 0:
            raise RefusedError(f"max_bytes= is a number of bytes, 0 for no batching, not {self.max_bytes!r}")
        for name in ("cache", "kernels"):
            if type(value := getattr(self, name)) is not bool:
                raise RefusedError(f"{name}= is True or False, not {value!r}")
        if not isinstance(self.inner, str) and not callable(self.inner):
            raise RefusedError(f'inner= is the name of a backend, as "inductor", or a callable, not {self.inner!r}')

    def __call__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Tensor],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's.

        Args:
            graph_module: Dynamo's graph; it stays as it is, and what is rewritten is a copy.
            inputs: what it will be called with, or the like.
            mode: Inductor's, as it was given to `torch.compile`.
            options: the same; those with the names of `replfx.backend`'s arguments are ours, the rest is Inductor's.

        Raises:
            CompileError: an option that neither knows, or of the wrong type.
        """
        ours = {name: value for name, value in (options or {}).items() if name in _names()}
        self = replace(self, **ours)
        theirs = {name: value for name, value in (options or {}).items() if name not in ours}
        compiler = self._compiler(mode, theirs)
        if not any(made_of_parameters(graph_module.graph).values()):  # nothing is synthesised
            return _callable(compiler(graph_module, inputs))
        graph_module = _copy(graph_module)
        operation = self._rewrite(graph_module)
        # CUDA graphs would copy the kept values into their own memory at each call.
        kept = self.cache and not uses_cuda_graphs(compiler)
        hoisted = hoist_syntheses(graph_module, operation) if kept else None
        if hoisted is None:
            return _callable(compiler(graph_module, inputs))
        # Dynamo's fakes of the parameters, not the parameters: of these, symbolic sizes would be made without a source.
        given = [value_of(node) for node in hoisted.graph_module.graph.find_nodes(op="placeholder")]
        with tracing(TracingContext(detect_fake_mode(hoisted.examples))):  # its guards are none of Dynamo's graph's
            compute = _callable(compiler(hoisted.graph_module, given))
        main = _callable(compiler(graph_module, [*inputs, *hoisted.examples]))
        return with_cached(main, Cached(compute), hoisted.inputs)

    def _rewrite(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """Run the passes, in place; gives the operation of batched syntheses."""
        passes: list[Any] = [MergeSyntheses(), ReassociateProducts(), FoldAffines()]
        operation: Callable[..., Any] = kernel_operation() if self.kernels else SYNTHESIZE
        if self.max_bytes or self.kernels:
            passes.append(BatchSynthesis(operation, self.max_bytes, least=1 if self.kernels else 2))
        run_passes(graph_module, passes)
        return operation

    def _compiler(self, mode: str | None, options: dict[str, Any]) -> Compiler:
        if self.inner == "inductor":
            try:
                return InductorWrapper(mode, options, None)
            except RuntimeError as error:
                raise RefusedError(f"{error}; of replfx's own there are {', '.join(_names())}") from error
        if mode not in (None, "default") or options:
            given = next(iter(options), f"mode={mode!r}")
            raise RefusedError(f"unknown option {given}: mode and Inductor's options need inner='inductor'")
        return lookup_backend(self.inner)


def _names() -> list[str]:
    return [field.name for field in fields(Backend)]


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with all that Dynamo noted on the graph, for AOTAutograd reads it; Dynamo itself goes on with the first.

    It asks the first one's inputs for what it noted on them, so that they must not become more.
    """
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(graph_module.graph, known))
    for node, twin in known.items():
        copy_source(node, twin)
    made = fx.GraphModule(graph_module, graph, type(graph_module).__name__)
    for name, value in vars(graph_module).items():
        made.__dict__.setdefault(name, value)
    made.meta = dict(graph_module.meta)
    return made


def _callable(compiled: Any) -> Callable[..., Any]:
    """A backend may give a GraphModule: it is called by its forward."""
    return compiled.forward if isinstance(compiled, fx.GraphModule) else compiled
