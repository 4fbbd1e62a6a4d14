"""Example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from replfx.dtensors import is_dtensor
from replfx.errors import CaptureError
from replfx.modules.tree import leaf_copy, tensors_in, with_tensors
from replfx.torch_internals import what_was_compiled

__all__ = ["ExampleInputs", "Inputs", "calls_of", "check_has_weights", "check_is_whole"]

ExampleInputs: TypeAlias = Tensor | tuple[object, ...] | Mapping[str, object]


@dataclass(frozen=True)
class Inputs:
    """Example inputs as a call has them: `model(*args, **kwargs)`."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    @classmethod
    def of(cls, example: ExampleInputs | None, model: nn.Module) -> "Inputs | None":
        """Read what a user gave as `example_inputs`, and check that it lies where the model does.

        Raises:
            CaptureError: of another type than the three; on another device than the model.
        """
        if example is None:
            return None
        if isinstance(example, Tensor):
            inputs = cls((example,), {})
        elif isinstance(example, Mapping):
            inputs = cls((), dict(example))
        elif isinstance(example, tuple):
            inputs = cls(example, {})
        else:
            raise CaptureError(
                f"example_inputs is of type {type(example).__name__}; give a tensor, a tuple of positional inputs, "
                "or a dict of keyword inputs (a model that takes one list: `(the_list,)`)"
            )
        inputs._check_devices(model)
        return inputs

    def tensors(self) -> list[Tensor]:
        """All tensors in the inputs, however deep."""
        return tensors_in((self.args, self.kwargs))

    def map(self, replace: Callable[[Tensor], Tensor]) -> "Inputs":
        """A copy, containers and all, with `replace` of every tensor."""
        return Inputs(*with_tensors((self.args, self.kwargs), replace))

    def _check_devices(self, model: nn.Module) -> None:
        homes = {t.device for t in (*model.parameters(), *model.buffers())}
        for tensor in self.tensors():
            # A zero-dimensional CPU tensor mixes with any device, as in PyTorch itself.
            if homes and tensor.device not in homes and not (tensor.device.type == "cpu" and tensor.dim() == 0):
                raise CaptureError(
                    f"example_inputs has a tensor on {tensor.device}, the model is on "
                    f"{', '.join(sorted(map(str, homes)))}; move one of them with .to(device)"
                )


def check_has_weights(model: nn.Module) -> None:
    """Refuse what is no model, and a model whose weights do not exist yet."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, tensor in model.named_parameters():
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"the model's parameter `{name}` is lazy and not initialised yet; run the model once on a batch first"
            )
        if tensor.device.type == "meta":
            raise CaptureError(
                f"the model's parameter `{name}` is on the meta device, so it has no weights; "
                "give it real ones first (model.to_empty(device=...), then load or initialise them)"
            )


def check_is_whole(model: nn.Module) -> None:
    """Refuse what `check_has_weights` refuses, and a model that has been compiled, or sharded over processes."""
    check_has_weights(model)
    if (inner := what_was_compiled(model)) is not None:
        raise CaptureError(
            f"the model is compiled already: transform the {type(inner).__name__} in it, and compile what "
            "comes of that: torch.compile(replfx.transform(model, ...))"
        )
    for name, tensor in model.named_parameters():
        if is_dtensor(tensor):
            raise CaptureError(
                f"the model's parameter `{name}` is a DTensor, a part of which is here: transform the model first, and "
                "call fully_shard, replfx.parallelize_module or distribute_module after it"
            )


def calls_of(model: nn.Module, inputs: Inputs, blocks: Mapping[str, nn.Module]) -> dict[str, Inputs]:
    """What each of these parts of `model` is called with, the first time that it is, in one forward pass.

    A block that is not called is not in the result.
    """
    calls: dict[str, Inputs] = {}
    handles = []
    for path, block in blocks.items():

        def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], path: str = path) -> None:
            if path not in calls:
                calls[path] = Inputs(args, kwargs).map(leaf_copy)

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls
