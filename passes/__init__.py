"""The passes, one a file: each turns a graph into a graph. What they share is here, and how they run."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from replfx.errors import ReplfxError

__all__ = ["Rewrite", "run_passes"]

Candidate = TypeVar("Candidate")


class Rewrite(PassBase, Generic[Candidate]):
    """A pass that changes a graph in place, wherever it finds something that is worth it."""

    @abstractmethod
    def find(self, graph: fx.Graph) -> Iterable[Candidate]:
        """What may be rewritten with the same result; each is rewritten before the next is asked for."""

    def is_worth_it(self, candidate: Candidate) -> bool:
        """Whether the graph is better for it."""
        return True

    @abstractmethod
    def rewrite(self, graph: fx.Graph, candidate: Candidate) -> None:
        """Do it."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite all that is worth it."""
        changed = False
        for candidate in self.find(graph_module.graph):
            if self.is_worth_it(candidate):
                self.rewrite(graph_module.graph, candidate)
                changed = True
        if changed:
            graph_module.recompile()
        return PassResult(graph_module, changed)


def run_passes(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> PassResult:
    """Run `passes` on `graph_module` in order; the graph is linted before the first and after each.

    Raises:
        ReplfxError: what a pass raised, with a note that names the pass and those that ran before it.
    """
    graph_module.graph.lint()
    manager = PassManager(list(passes), run_checks_after_each_pass=True)
    manager.add_checks(_lint)
    try:
        return manager(graph_module)
    except Exception as error:  # PassManager wraps whatever a pass raises, and says which pass it was
        if isinstance(error.__cause__, ReplfxError):
            error.__cause__.add_note(str(error))
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _lint(module: nn.Module) -> None:
    assert isinstance(module, fx.GraphModule)
    module.graph.lint()
