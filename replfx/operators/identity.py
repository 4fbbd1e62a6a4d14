"""The identity operator: the block is gone."""

import operator
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.operators.base import Match, Operator, Site, operators
from replfx.operators.folding import Fold, identity_fold, silence
from replfx.operators.outer_sum import is_branch
from replfx.operators.plain import plain_module
from replfx.plain_data import read_dataclass

__all__ = ["IdentityOperator"]


@operators.register("identity")
class IdentityOperator(Operator):
    """y = x: the block is gone. The bound that replacing can save, and depth pruning for who wants that.

    A block that is a residual branch itself, added to its input by the code around it, gives zeros: y = 0·x, so that a
    normalisation before it has a gradient, as DistributedDataParallel wants.

    Args:
        block, interface: as for every operator.
        fold: how the full block is made to give the same, or why it cannot be.
        branch: whether it is such a branch.
    """

    needs_neighbours = False
    matches_by_structure = True

    def __init__(
        self,
        block: nn.Module,
        interface: Interface,
        *,
        fold: Mapping[str, Any] | str = "its plan does not say how",
        branch: bool = False,
    ) -> None:
        super().__init__(block, interface)
        self.branch = branch
        self.fold = fold if isinstance(fold, str) else read_dataclass(Fold, fold, "fold")

    @classmethod
    def match(cls, site: Site) -> Match:
        if site.interface.computed():
            return Match(reason="it gives more than its activation, which only the block itself can compute")
        branch = is_branch(site)
        fold = identity_fold(site, branch=branch)
        options: dict[str, object] = {"branch": True} if branch else {}
        return Match({"fold": fold if isinstance(fold, str) else asdict(fold), **options})

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.interface.activation(args, kwargs)
        return self.interface.result(args, kwargs, given * 0.0 if self.branch else given)

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        return plain_module(_zeros() if self.branch else nn.Identity(), self.interface)

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        if isinstance(self.fold, str):
            wanted = "nothing" if self.branch else "on its input"
            raise FusionError(f"the block cannot be made to give {wanted}: {self.fold}")
        silence(block, self.fold)


def _zeros() -> nn.Module:
    """A module of PyTorch's own that gives zeros like what it gets."""
    graph = fx.Graph()
    graph.output(graph.call_function(operator.mul, (graph.placeholder("x"), 0.0)))
    return fx.GraphModule({}, graph, "Zeros")
