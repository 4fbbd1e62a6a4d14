"""What other tools do with the same model: does what they make of it run?

Each is asked in training mode first and then in evaluation mode, and works if it works in one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo.check import first_line
from benchmarks.zoo.subject import Inputs, Variant, built, called, differentiable, fed


def symbolic_trace(model: nn.Module, inputs: Inputs) -> None:
    """torch.fx: the traced graph runs on the inputs."""
    called(torch.fx.symbolic_trace(model), inputs)


def feature_extractor(model: nn.Module, inputs: Inputs) -> None:
    """torchvision: an extractor of the last node's output runs on the inputs."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    last = {"train_return_nodes": train[-1:], "eval_return_nodes": evaluation[-1:]}
    called(create_feature_extractor(model, **last, suppress_diff_warning=True), inputs)


def export(model: nn.Module, inputs: Inputs) -> None:
    """torch.export, not strict: the exported module runs on the inputs."""
    args: tuple[object, ...] = (inputs,) if isinstance(inputs, Tensor) else ()
    if isinstance(inputs, tuple):
        args = inputs
    kwargs = inputs if isinstance(inputs, dict) else {}
    exported = torch.export.export(model, args, kwargs, strict=False)
    called(exported.module(), inputs)


def torch_pruning(model: nn.Module, inputs: Inputs) -> None:
    """Torch-Pruning: its dependency graph has a group to prune for one convolution or linear layer at least."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(
        model, inputs, forward_fn=called, output_transform=differentiable, verbose=False
    )
    for group in graph.get_all_groups():
        if len(group) > 0:
            return
    raise ValueError("it found no group of layers to prune")


PEERS: dict[str, Callable[[nn.Module, Inputs], None]] = {
    "torch.fx": symbolic_trace,
    "torchvision extractor": feature_extractor,
    "torch.export": export,
    "Torch-Pruning": torch_pruning,
}


class Trial:
    """Lets one peer after the other try a model, which is built anew only where a peer may have left traces in it."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.model: nn.Module | None = None

    def __call__(self, peer: str) -> dict[str, object]:
        """Whether a peer works, in which mode, and its error in training mode if it does not."""
        errors = []
        for training in (True, False):
            model = built(self.variant) if self.model is None else self.model
            self.model = None
            try:
                PEERS[peer](model.train(training), fed(self.variant))
            except Exception as error:
                errors.append(first_line(error))
            else:
                self.model = model
                return {"works": True, "training": training}
        return {"works": False, "error": errors[0]}
