"""verify: is the transformed model sound?"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils import _pytree as pytree

from replfx.errors import VerifyError
from replfx.state import fusion_layers
from replfx.tracing import Inputs, ghost_of, info_of

__all__ = ["Verify", "does_not_run"]


@dataclass(frozen=True, eq=False)
class Verify(PassBase):
    """Check a transformed model; changes nothing.

    Always: synthesised weights are finite. With inputs, under fake tensors, so at no compute: the output has
    the shapes that it had, and every trainable parameter gets a gradient that had one before.

    Attributes:
        model: the transformed model; None if it is the graph itself.
        original: the model before, or any twin of it in structure.
        inputs: example inputs, or None.
    """

    model: nn.Module | None
    original: nn.Module
    inputs: Inputs | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raise VerifyError if the model is not sound."""
        model = graph_module if self.model is None else self.model
        _check_synthesis(model)
        if self.inputs is not None:
            self._check_run(graph_module, model, self.inputs)
        return PassResult(graph_module, False)

    def _check_run(self, graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs) -> None:
        try:
            before, without = _dry_run(self.original, inputs)
        except Exception as error:  # the capture ran the model for real for the same reason
            info_of(graph_module).notes.append(f"shapes not verified: {type(error).__name__} under fake tensors")
            return
        try:
            after, still_without = _dry_run(model, inputs)
        except Exception as error:
            raise VerifyError(does_not_run(error)) from error
        if before != after:
            raise VerifyError(f"the output's shapes were {before} and would become {after}; please report this")
        lost = sorted(name for name in still_without - without if name in dict(model.named_parameters()))
        if lost:
            raise VerifyError(f"`{lost[0]}` would get no gradient any more ({len(lost)} parameters in all)")


def does_not_run(error: BaseException) -> str:
    """What to say of a transformed model that fails although the original ran."""
    return (
        f"the transformed model does not run: {type(error).__name__}: {error}. A fusion layer takes what its block "
        "took and has its attributes, but is not of its class: if the model asks isinstance(block, …), let it ask "
        "for an attribute"
    )


def _check_synthesis(model: nn.Module) -> None:
    with torch.no_grad():
        for path, layer in fusion_layers(model).items():
            for name, tensor in layer.synthesized().items():
                if not torch.isfinite(tensor).all():
                    raise VerifyError(f"`{path}`: the synthesised `{name}` is not finite; check the fusion's options")


def _dry_run(model: nn.Module, inputs: Inputs) -> tuple[list[tuple[int, ...]], set[str]]:
    """Output shapes, and the trainable parameters that get no gradient, of a run under fake tensors."""
    mode, ghost, fakes = ghost_of(model, inputs)
    with mode, torch.enable_grad():
        output = ghost(*fakes.args, **fakes.kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        losses = [leaf.sum() for leaf in leaves if leaf.requires_grad and leaf.dtype.is_floating_point]
        if losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
    without = {name for name, p in ghost.named_parameters() if p.requires_grad and p.grad is None}
    return [tuple(leaf.shape) for leaf in leaves], without
