"""Running passes in a row."""

from collections.abc import Sequence

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from replfx.errors import ReplfxError

__all__ = ["run_passes"]


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
