"""The identity operator: the block is gone."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.operators.base import Match, Operator, Site, operators
from replfx.operators.folding import Fold, identity_fold, silence
from replfx.operators.plain import plain_module

__all__ = ["IdentityOperator"]


@operators.register("identity")
class IdentityOperator(Operator):
    """y = x: the block is gone. The bound that replacing can save, and depth pruning for who wants that.

    Args:
        block, interface: as for every operator.
        fold: how the full block is made to give on its input, or why it cannot be.
    """

    needs_neighbours = False
    matches_by_structure = True

    def __init__(
        self, block: nn.Module, interface: Interface, *, fold: Mapping[str, Any] | str = "its plan does not say how"
    ) -> None:
        super().__init__(block, interface)
        self.fold = fold if isinstance(fold, str) else Fold.read(fold)

    @classmethod
    def match(cls, site: Site) -> Match:
        if site.interface.computed():
            return Match(reason="it gives more than its activation, which only the block itself can compute")
        fold = identity_fold(site)
        return Match({"fold": fold if isinstance(fold, str) else asdict(fold)})

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.interface.result(args, kwargs, self.interface.activation(args, kwargs))

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        return plain_module(nn.Identity(), self.interface)

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        if isinstance(self.fold, str):
            raise FusionError(f"the block cannot be made to give on its input: {self.fold}")
        silence(block, self.fold)
