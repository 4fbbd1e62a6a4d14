"""Gradient accumulation: the weights of replaced blocks are synthesised once for all micro-batches of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from replfx.dtensors import is_distributed
from replfx.errors import FusionError
from replfx.live import Synthesis, syntheses_of
from replfx.live.synthesis import SharedWeights

__all__ = ["synthesize_once"]


@contextmanager
def synthesize_once(model: nn.Module) -> Iterator[None]:
    """Within it each replaced block's weights are synthesised once, and differentiated once, at its end.

    For gradient accumulation: without it each micro-batch synthesises anew, forward and backward. Within it the
    micro-batches' gradients add up on the synthesised weights, and what they come to flows into coefficients and
    neighbours when it ends. By linearity these are the same gradients but for rounding; before the end the neighbours'
    are incomplete, and the coefficients have none. (Ours.)

    It takes as much memory as the replaced blocks' weights and their gradients, for as long as it lasts.

    Args:
        model: with replaced blocks, or compiled, or in another module; one without them is left alone.

    Raises:
        FusionError: it is within another of the same model; several processes train (`torch.distributed` is
            initialised: DDP and FSDP would not see the gradients that come at the end); an optimizer steps within it,
            or weights that were read are written to. After an error, also one of yours, nothing flows into
            coefficients and neighbours.

    Example:
        >>> for batches in loader:  # several micro-batches an optimizer step
        ...     with replfx.synthesize_once(model):
        ...         for images, labels in batches:
        ...             (criterion(model(images), labels) / len(batches)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    layers = syntheses_of(model)
    held = next((path for path, layer in layers.items() if layer.shared is not None), None)
    if held is not None:
        raise FusionError(f"`{held}` is within a synthesize_once already: use one for all micro-batches of a step")
    if layers and is_distributed():
        raise FusionError(
            "synthesize_once is for one process: torch.distributed is initialised, and what flows into the neighbours "
            "at its end would not be reduced over the processes; leave it out"
        )
    syntheses = [_Once.of(path, layer) for path, layer in layers.items()]
    watch = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _refuse_step(optimizer, syntheses))
    try:
        for synthesis in syntheses:
            synthesis.layer.shared = synthesis.shared
        yield
    finally:
        watch.remove()
        for synthesis in syntheses:
            synthesis.layer.shared = None
    _flow_on(syntheses)


@dataclass(frozen=True)
class _Once:
    """What one layer synthesised."""

    path: str  # where the layer is
    layer: Synthesis
    made: dict[str, Tensor]  # its weights, with the graph that they came by
    shared: SharedWeights  # the same memory, where gradients add up
    # The parameters that they were made of, and how often each had been written to.
    read: list[tuple[nn.Parameter, int]]

    @classmethod
    def of(cls, path: str, layer: Synthesis) -> "_Once":
        with torch.enable_grad():
            made = layer.synthesized()
        shared = SharedWeights(
            {name: theta.detach().requires_grad_(theta.requires_grad) for name, theta in made.items()}
        )
        return cls(path, layer, made, shared, [(p, p._version) for p in layer.read_parameters()])


def _refuse_step(optimizer: Optimizer, syntheses: list[_Once]) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for synthesis in syntheses:
        if not stepped.isdisjoint(id(parameter) for parameter, _ in synthesis.read):
            raise FusionError(
                f"an optimizer steps within synthesize_once: the gradients of what `{synthesis.path}` reads are not "
                "complete before its end; step after it"
            )


def _flow_on(syntheses: list[_Once]) -> None:
    """Let the gradients of all synthesised weights flow into what these were made of."""
    written = next((s.path for s in syntheses if any(p._version != version for p, version in s.read)), None)
    if written is not None:
        raise FusionError(
            f"within synthesize_once weights changed that `{written}` reads: the micro-batches after that ran with the "
            "old ones; change weights between steps"
        )
    pairs = [(made, synthesis.shared[name]) for synthesis in syntheses for name, made in synthesis.made.items()]
    used = [(made, theta.grad) for made, theta in pairs if theta.grad is not None]
    if used:
        torch.autograd.backward([made for made, _ in used], [gradient for _, gradient in used])
