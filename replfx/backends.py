"""The door to the backend for torch.compile, light enough for `import replfx`: Dynamo is not imported here.

The entry point is here too. Loading it must not import `replfx.compile`, which registers the name: Dynamo
registers it itself then, and refuses a second time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from replfx.errors import CompileError

if TYPE_CHECKING:
    from replfx.compile import Backend

__all__ = ["backend", "replfx_backend"]


def backend(
    *,
    max_bytes: int = 32 * 2**20,
    cache: bool = True,
    inner: str | Callable[..., Any] = "inductor",
    **unknown: object,
) -> "Backend":
    """A backend for `torch.compile` that knows fusion layers. A model without any goes to `inner` as it is.

    Args:
        max_bytes: syntheses of one shape run as one operation, as many as make this many bytes of weights, which
            live from the first one's use on; 0 leaves each where it is.
        cache: without gradients, keep the synthesised weights until the weights that they are made of change.
        inner: what compiles the rewritten graph: the name of a backend, or a callable that takes a GraphModule
            and a list of inputs.
        **unknown: anything else is refused.

    Returns:
        A callable; it takes Inductor's `mode=` and `options=` from `torch.compile`, and its own options there too.

    Raises:
        CompileError: an unknown option, or one of the wrong type. From `options=` it comes at the first call.

    Example:
        >>> model = torch.compile(replfx.transform(model), backend=replfx.backend(max_bytes=2**27))
        >>> model = torch.compile(replfx.transform(model), backend="replfx", options={"max_bytes": 2**27})
    """
    if unknown:
        raise CompileError(f"replfx.backend has no option {next(iter(unknown))!r}, but max_bytes, cache and inner")
    from replfx.compile import Backend

    return Backend(max_bytes=max_bytes, cache=cache, inner=inner)


def replfx_backend(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What the name "replfx" stands for in `torch.compile`: `backend()` with its defaults.

    Args, Raises:
        As `replfx.compile.Backend` has them.
    """
    return backend()(graph_module, inputs, mode=mode, options=options)
