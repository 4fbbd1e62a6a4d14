"""The door to the backend for torch.compile, light enough for `import replfx`: Dynamo is not imported here.

The entry point is here too. Loading it must not import `replfx.compile`, which registers the name: Dynamo
registers it itself then, and refuses a second time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx

from replfx.chains.policy import ChoiceLike, Options, policy_of
from replfx.errors import CompileError

if TYPE_CHECKING:
    from replfx.compile import Backend, ReplacingBackend

__all__ = ["backend", "replfx_backend"]


def backend(
    *,
    every: int | None = None,
    fraction: float | None = None,
    keep: int | float | None = None,
    select: str | Sequence[str] | None = None,
    fusion: ChoiceLike | None = None,
    operator: ChoiceLike | None = None,
    neighbour_gradient: float | None = None,
    max_bytes: int = 32 * 2**20,
    cache: bool = False,
    kernels: bool = False,
    inner: str | Callable[..., Any] = "inductor",
    **unknown: object,
) -> "Backend | ReplacingBackend":
    """A backend for `torch.compile` that knows syntheses, and that can replace blocks itself.

    Without any of the first seven options it compiles a transformed model, and hands a model that synthesises nothing
    to `inner` as it is. If one of them is given it replaces blocks of a plain model, in the graph that Dynamo captures.

    Args:
        every: replace every k-th block, as in `replfx.transform`.
        fraction: replace this part of each chain instead.
        keep: replace all blocks of each chain but this number or share instead.
        select: replace the blocks of these names instead ("blocks.1").
        fusion: how weights are made from the neighbours'.
        operator: what runs with them.
        neighbour_gradient: factor on the gradient into the neighbours.
        max_bytes: syntheses of one shape run as one operation, as many as make this many bytes of weights, which
            live from the first one's use on; 0 leaves each where it is.
        cache: without gradients, keep the synthesised weights until the weights that they are made of change. Not
            the default, as PyTorch does not count writes through `p.data`: after these call `replfx.compile.forget`.
        kernels: on a GPU with triton, syntheses run as `replfx.kernels.synthesize`, whose backward reads each gradient
            once for neighbours and coefficients; elsewhere as plain operations. Not the default, as no GPU has said
            yet where they beat what Inductor makes of `max_bytes`.
        inner: what compiles the rewritten graph: the name of a backend, or a callable that takes a GraphModule
            and a list of inputs.
        **unknown: anything else is refused.

    Returns:
        A callable; it takes Inductor's `mode=` and `options=` from `torch.compile`, and its own last four there too.
        One that replaces has the coefficients: `parameters()`, `state_dict()`, and the `plan`.

    Raises:
        CompileError: an unknown option, or one of the wrong type. From `options=` it comes at the first call.
        PlanError, FusionError: as `replfx.transform` raises them for its options.

    Example:
        >>> transformed = replfx.transform(model)
        >>> compiled = torch.compile(transformed, backend=replfx.backend(max_bytes=2**27))
        >>> compiled = torch.compile(transformed, backend="replfx", options={"max_bytes": 2**27})

        A plain model; the first call makes the coefficients:

        >>> backend = replfx.backend(every=2)
        >>> compiled = torch.compile(model, backend=backend)
        >>> loss = compiled(images).mean()
        >>> optimizer = torch.optim.AdamW([*model.parameters(), *backend.parameters()])
    """
    if unknown:
        known = (
            "every, fraction, keep, select, fusion, operator, neighbour_gradient, max_bytes, cache, kernels and inner"
        )
        raise CompileError(f"replfx.backend has no option {next(iter(unknown))!r}, but {known}")
    from replfx.compile import Backend, ReplacingBackend

    plain = Backend(max_bytes=max_bytes, cache=cache, kernels=kernels, inner=inner)
    given = {
        "every": every,
        "fraction": fraction,
        "keep": keep,
        "select": select,
        "fusion": fusion,
        "operator": operator,
        "neighbour_gradient": neighbour_gradient,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    return ReplacingBackend(policy_of(**cast(Options, asked)), plain) if asked else plain


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
