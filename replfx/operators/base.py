"""Operators: what runs with the synthesised parameters, in the place of a replaced block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.fusion.pairing import pair, synthesizable
from replfx.fusion.registry import Registry

__all__ = [
    "BlockOperator",
    "Match",
    "Operator",
    "Site",
    "Source",
    "is_in",
    "operators",
    "register_operator",
]

operators: Registry["Operator"] = Registry("operator")
register_operator = operators.register


@dataclass(frozen=True)
class Source:
    """Which parameter of a neighbour a synthesised parameter is fused from.

    Attributes:
        path: the parameter's name inside the block.
        rows: the part of the first dimension that is taken, as (start, stop); None takes all.
    """

    path: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Site:
    """A block that may be replaced, with what is known of it when a plan is made.

    Attributes:
        path: where the block is in the model.
        block: the module.
        interface: how it is called.
        shape: shape of its main activation; None if no example inputs were given.
        nodes: the nodes of its region in the captured graph.
        input, output: the nodes of its main activation, before and after.
        others: those of further activations that it changes, as the two streams of a joint attention.
        names: for the modules of the model that make up the block, the names that they have in `block`; that of
            the block itself is empty.
        previous, next: the blocks that its parameters would be fused from; None at the ends of a chain.
    """

    path: str
    block: nn.Module
    interface: Interface
    shape: tuple[int, ...] | None
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    output: fx.Node
    names: Mapping[str, str]
    previous: nn.Module | None = None
    next: nn.Module | None = None
    others: tuple[tuple[fx.Node, fx.Node], ...] = ()

    def inside(self, node: fx.Node) -> str:
        """The name in `block` of the module that a node of it calls."""
        return self.name(str(node.target))

    def name(self, target: str) -> str:
        """The name in `block` of what is at a path in the model; a path outside of the block stays."""
        for path, name in self.names.items():
            if is_in(target, path):
                return f"{name}.{target[len(path) + 1 :]}".strip(".")
        return self._shared.get(target, target)

    def holds(self, target: str) -> bool:
        """Whether a path in the model is in the block."""
        return any(is_in(target, path) for path in self.names) or target in self._shared

    @cached_property
    def _shared(self) -> dict[str, str]:
        """Modules that the block has, but the model elsewhere first (one activation for all): their names in both."""
        root, own = self.input.graph.owning_module, {module: name for name, module in self.block.named_modules()}
        called = {str(node.target) for node in self.nodes if node.op == "call_module"}
        elsewhere = [target for target in called if not any(is_in(target, path) for path in self.names)]
        known = dict(root.named_modules(remove_duplicate=False)) if root is not None and elsewhere else {}
        return {target: own[module] for target in elsewhere if (module := known.get(target)) in own}

    def without_counterpart(self) -> list[str]:
        """Parameters of two dimensions and up that neither neighbour has the like of."""
        if self.previous is None or self.next is None:
            return []
        found = {**pair(self.block, self.previous), **pair(self.block, self.next)}
        return [name for name in synthesizable(self.block) if name not in found]


def is_in(path: str, module: str) -> bool:
    """Whether a path is that of a module, or of something inside of it."""
    return path == module or path.startswith(f"{module}.")


@dataclass(frozen=True)
class Match:
    """Whether an operator fits a site: truthy with the options to build it, or falsy with the reason."""

    options: Mapping[str, object] = field(default_factory=dict)
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


class Operator(nn.Module):
    """Base of all operators.

    An operator with `keeps_block` leaves the block as it is, save for its matrices, which are synthesised when they are
    read. In the place of any other, `forward` runs, and the block's own modules are freed.

    Args:
        block: the block to replace; an operator copies what it keeps of it, and never changes it.
        interface: how the block is called.

    A subclass takes what its `match` found as further keyword arguments, plain JSON values.

    Attributes:
        sources: which parameters are synthesised, by the names that `forward` gets them under.
        needs_neighbours: whether a replaced block needs a kept block on each side.
        matches_by_structure: `match` reads no weight's value, so that what it finds holds for all equal blocks. False
            for a subclass that has a `match` of its own, unless it says otherwise.
        keeps_block: whether the block runs its own computation.
        unrolls: whether the block, with weights of its own, is the full block.
    """

    needs_neighbours: ClassVar[bool] = True
    matches_by_structure: ClassVar[bool] = False
    keeps_block: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False
    sources: dict[str, Source]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "match" in cls.__dict__ and "matches_by_structure" not in cls.__dict__:
            cls.matches_by_structure = False

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.interface = interface
        self.sources = {}

    @classmethod
    def match(cls, site: Site) -> Match:
        """Whether this operator can stand for the block at `site`."""
        raise NotImplementedError

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would have given for `args` and `kwargs`, with `theta` synthesised."""
        raise NotImplementedError

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        """A module without replfx that computes the same with `theta` as its own weights."""
        raise NotImplementedError

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        """Let `block`, a full block like the one of which this operator took the place, compute what it computes.

        For operators of which `unrolls` is false: those of which it is true have the block themselves.

        Args:
            theta: the synthesised weights.
            block: has weights like its neighbours'; it is changed in place.
            inputs: a batch of its main activation, if there is one at hand.

        Raises:
            FusionError: it cannot.
        """
        raise FusionError(f"{type(self).__name__} cannot go back into a full block; call replfx.materialize instead")


@operators.register("block")
class BlockOperator(Operator):
    """The block's own computation with synthesised parameters: f(x; θ, own).

    θ are the parameters of two dimensions and up; norms, biases, other vectors and running statistics stay
    the block's own (the 2024 rule, arXiv 2410.01239, for a whole block). Saves parameters, gradients and
    optimizer state, and next to no time. Fits any block.

    Args:
        block, interface: as for every operator.
        keep: parameters of two dimensions and up that stay the block's own too, because neither neighbour
            has their like (the shortcut convolution of a block that changes the shape).

    Attributes:
        dropped: paths in the block of modules that it is without, and that give nothing.
    """

    keeps_block = True
    unrolls = True
    dropped: tuple[str, ...] = ()

    def __init__(self, block: nn.Module, interface: Interface, *, keep: Sequence[str] = ()) -> None:
        super().__init__(block, interface)
        wanted = self.wanted(block)
        if unknown := set(keep) - set(wanted):
            raise ValueError(f"keep names {sorted(unknown)[0]!r}, which the block has not")
        self.sources = {name: Source(name) for name in wanted if name not in keep}

    def wanted(self, block: nn.Module) -> list[str]:
        """The parameters of the block that are synthesised unless they are kept."""
        return list(synthesizable(block))

    def prepare(self, block: nn.Module) -> None:
        """Take out of the block itself what it is without."""

    @classmethod
    def match(cls, site: Site) -> Match:
        if not synthesizable(site.block):
            return Match(reason="it has no parameter of two dimensions or more to synthesise")
        kept = site.without_counterpart()
        return Match({"keep": kept}) if kept else Match()
