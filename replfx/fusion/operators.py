"""Operators: what runs with the synthesised parameters, in the place of a replaced block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.fusion.pairing import pair, synthesizable
from replfx.fusion.registry import Registry
from replfx.structure import drop_hooks, structural_copy

__all__ = [
    "BlockOperator",
    "Match",
    "Operator",
    "Site",
    "Source",
    "operators",
    "register_operator",
    "run_with",
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

    def inside(self, node: fx.Node) -> str:
        """The name in `block` of the module that a node of it calls."""
        return self.name(str(node.target))

    def name(self, target: str) -> str:
        """The name in `block` of what is at a path in the model; a path outside of the block stays."""
        for path, name in self.names.items():
            if target == path or target.startswith(f"{path}."):
                return f"{name}.{target[len(path) + 1 :]}".strip(".")
        return target

    def holds(self, target: str) -> bool:
        """Whether a path in the model is in the block."""
        return any(target == path or target.startswith(f"{path}.") for path in self.names)

    def without_counterpart(self) -> list[str]:
        """Parameters of two dimensions and up that neither neighbour has the like of."""
        if self.previous is None or self.next is None:
            return []
        found = {**pair(self.block, self.previous), **pair(self.block, self.next)}
        return [name for name in synthesizable(self.block) if name not in found]


@dataclass(frozen=True)
class Match:
    """Whether an operator fits a site: truthy with the options to build it, or falsy with the reason."""

    options: Mapping[str, object] = field(default_factory=dict)
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


class Operator(nn.Module):
    """Base of all operators.

    Args:
        block: the block to replace; an operator copies what it keeps of it, and never changes it.
        interface: how the block is called.
        **options: what `match` found, plain JSON values.

    Attributes:
        sources: which parameters are synthesised, by the names that `forward` gets them under.
        needs_neighbours: whether a replaced block needs a kept block on each side.
        unrolls: whether `plain` gives the replaced block itself, at full depth.
    """

    needs_neighbours: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False
    sources: dict[str, Source]

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.interface = interface
        self.sources = {}

    def vacant(self) -> dict[str, tuple[nn.Module, str]]:
        """The block's parameters that are None but while it runs: by name, the module that lacks them and where."""
        return {}

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
        """Let `block`, the full block of which this operator took the place, compute what the operator computes.

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
            has their like (the shortcut convolution of a block that changes the shape), or because the model reads
            them itself.

    Attributes:
        dropped: paths in the block of modules that it is without, and that give nothing.
    """

    unrolls = True
    dropped: tuple[str, ...] = ()

    def __init__(self, block: nn.Module, interface: Interface, *, keep: Sequence[str] = ()) -> None:
        super().__init__(block, interface)
        if unknown := set(keep) - set(synthesizable(block)):
            raise ValueError(f"keep names {sorted(unknown)[0]!r}, which the block has not")
        self.block = structural_copy(block, hooks=True)
        drop_hooks(self.block)  # those on the block itself are the fusion layer's now
        self.sources = {name: Source(name) for name in synthesizable(block) if name not in keep}
        for name in self.sources:
            self._own(name, None)
        self._recurrent = [name for name, module in self.block.named_modules() if isinstance(module, nn.RNNBase)]
        self._forget_weights()

    def vacant(self) -> dict[str, tuple[nn.Module, str]]:
        return {name: self._slot(name) for name in self.sources}

    def _slot(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.block.get_submodule(path), leaf

    def _own(self, name: str, value: nn.Parameter | None) -> None:
        owner, leaf = self._slot(name)
        owner.__dict__.pop(leaf, None)  # where torch.fx puts the None when it copies a GraphModule
        owner._parameters[leaf] = value

    @classmethod
    def match(cls, site: Site) -> Match:
        if not synthesizable(site.block):
            return Match(reason="it has no parameter of two dimensions or more to synthesise")
        kept = site.without_counterpart()
        return Match({"keep": kept}) if kept else Match()

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._recurrent:
            return run_with(theta, self.block, args, kwargs)
        self._forget_weights()  # a copy has references of its own
        try:
            return run_with(theta, self.block, args, kwargs)
        finally:
            self._forget_weights()  # what was synthesised is not to outlive the call

    def _forget_weights(self) -> None:
        """Recurrent layers keep a second list of their weights, for the kernels that they call."""
        for layer in map(self.block.get_submodule, self._recurrent):
            assert isinstance(layer, nn.RNNBase)
            layer._flat_weights = [None] * len(layer._flat_weights)
            layer.__dict__["_flat_weight_refs"] = [_gone] * len(layer._flat_weights)  # so that it looks for them anew

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        for name, value in theta.items():
            self._own(name, nn.Parameter(value))
        for layer in map(self.block.get_submodule, self._recurrent):
            layer._init_flat_weights()  # type: ignore[operator]
        if isinstance(self.block, fx.GraphModule):  # a region: as a GraphModule of torch's own class
            return fx.GraphModule(self.block, self.block.graph, "Region").train(self.block.training)
        return self.block


def run_with(theta: dict[str, Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `module` gives with `theta` as its parameters of those names.

    Raises:
        FusionError: `torch.jit.trace` is looking on; it finds no weights but those that modules own.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise FusionError(
            f"torch.jit.trace cannot follow a fusion layer's {type(module).__name__} with synthesised weights: "
            "trace replfx.materialize(model)"
        )
    return torch.func.functional_call(module, theta, args, kwargs, tie_weights=False)


def _gone() -> None:
    """A reference to a weight that is no more, as a dead `weakref.ref` gives it."""
