"""The coefficients of replaced blocks that are made anew for each graph, and that all graphs of a model share."""

import warnings
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from replfx.errors import CompileError

__all__ = ["Coefficients"]


class Coefficients:
    """Parameters by name (`blocks.1.replfx.fusion.previous`): of the first synthesis that each block was given."""

    def __init__(self) -> None:
        self._made: dict[str, nn.Parameter] = {}
        self._saved: dict[str, Tensor] | None = None  # loaded, and not asked for yet
        self._handed_out = False

    def hand_out(self) -> dict[str, nn.Parameter]:
        """All of them, to whom it may train them: what is made later is warned of."""
        self._handed_out = True
        return dict(self._made)

    def state_dict(self) -> dict[str, Tensor]:
        """Their values, and what was loaded for blocks that are not replaced yet."""
        return {**(self._saved or {}), **{name: parameter.detach() for name, parameter in self._made.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values, at once or when their parameters are made.

        Raises:
            CompileError: the state lacks a parameter, or has one of another shape.
        """
        for name, parameter in self._made.items():
            _value_for(name, parameter, state)
        with torch.no_grad():
            for name, parameter in self._made.items():
                parameter.copy_(state[name])
        # Copies: the state may be that of a backend that goes on training before these are asked for.
        self._saved = {name: value.detach().clone() for name, value in state.items() if name not in self._made}

    def share(self, path: str, layer: nn.Module, own: Set[int]) -> None:
        """Let the layer at `path` have the parameters that were made for it before, or keep its own for the next.

        Args:
            path: which block it replaces.
            layer: the replaced block.
            own: ids of parameters that are the model's.
        """
        for name, made in list(layer.named_parameters()):
            key = f"{path}.{name}"
            if id(made) in own:
                continue
            if key in self._made:
                known = self._made[key]
                if (known.dtype, known.device) != (made.dtype, made.device):  # the model has been moved
                    known.data = known.data.to(made)
                owner, _, leaf = name.rpartition(".")
                layer.get_submodule(owner)._parameters[leaf] = known
            else:
                self._adopt(key, made)

    def _adopt(self, key: str, made: nn.Parameter) -> None:
        if self._saved is not None:
            made.data.copy_(_value_for(key, made, self._saved))
            del self._saved[key]
        if self._handed_out:
            warnings.warn(f"`{key}` is new, and in no optimizer that was made before", stacklevel=2)
        self._made[key] = made


def _value_for(name: str, parameter: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    if name not in state:
        raise CompileError(f"the state_dict has no `{name}`: it was saved for other replaced blocks")
    value = state[name]
    if parameter.shape != value.shape:
        raise CompileError(
            f"`{name}` is {tuple(parameter.shape)} here and {tuple(value.shape)} in the state_dict: it was saved for "
            "another fusion"
        )
    return value
