"""Replaced blocks: put into a model, and taken out of it again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.live.classes import SUBMODULE, computed_by, links_of, make_computed, make_plain
from replfx.live.graphs import make_graph_computed, make_graph_plain
from replfx.live.synthesis import Synthesis
from replfx.modules.tree import REGISTRIES, attributes_of, inner_path, tensors_in
from replfx.torch_internals import FLAT_WEIGHTS

__all__ = ["Snapshot", "make_block_plain", "owners_of", "replace_block", "strip_block"]


@dataclass(frozen=True)
class _Slot:
    """Where a block reads a parameter."""

    owner: nn.Module  # the module that has it
    leaf: str  # its name there
    name: str  # its first name in the block


def _slots_of(block: nn.Module, names: Mapping[str, object]) -> list[_Slot]:
    """All places in `block` of these parameters of its; a tied one has several."""
    known = {id(block.get_parameter(name)): name for name in names}
    return [
        _Slot(owner, leaf, known[id(parameter)])
        for owner in block.modules()
        for leaf, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in known
    ]


def replace_block(block: nn.Module, synthesis: Synthesis, holder: nn.Module | None = None) -> None:
    """Let a block run with synthesised weights, in place.

    Args:
        block: its matrices become computed attributes.
        synthesis: becomes the submodule `replfx` of the block.
        holder: gets it instead, where the block is no module of the model.

    Raises:
        FusionError: something in the block cannot do with computed weights; the block may be changed in part.
    """
    holder = holder or block
    if SUBMODULE in holder._modules or hasattr(holder, SUBMODULE):
        raise FusionError(f"it has an attribute `{SUBMODULE}` already, where replacing puts its coefficients")
    operator = synthesis.operator
    slots = _slots_of(block, operator.sources)
    _refuse_second_lists(block, slots)
    synthesis.marks = {slot.name: dict(vars(slot.owner._parameters[slot.leaf])) for slot in slots}
    of_graph = _read_by_graph(block, operator.sources)
    leaves: dict[nn.Module, dict[str, str]] = {}
    for slot in slots:
        if slot.name not in of_graph:
            leaves.setdefault(slot.owner, {})[slot.leaf] = slot.name
    if not isinstance(holder, fx.GraphModule):
        leaves.setdefault(holder, {})
    for owner, names in leaves.items():
        role = ("block" if holder is block else "member") if owner is holder else None
        make_computed(owner, synthesis, names, role)
    holder._modules[SUBMODULE] = synthesis
    if isinstance(block, fx.GraphModule):
        make_graph_computed(block, of_graph)


def strip_block(block: nn.Module, synthesis: Synthesis) -> None:
    """Let the operator of a synthesis run in a block's place, and free what the block had."""
    for registry in (block._modules, block._parameters, block._buffers):
        registry.clear()
    block._modules[SUBMODULE] = synthesis
    make_computed(block, synthesis, {}, "operator")


def make_block_plain(holder: nn.Module, synthesis: Synthesis, model: nn.Module, theta: Mapping[str, Tensor]) -> None:
    """Give a replaced block the weights `theta` as its own, and take away what replacing added; in place."""
    values = {name: nn.Parameter(tensor) for name, tensor in theta.items()}
    for name, value in values.items():
        vars(value).update(synthesis.marks.get(name, {}))
    for owner in list(owners_of(model, synthesis)):
        make_plain(owner, {leaf: values[name] for leaf, name in links_of(owner).items()})
    del holder._modules[SUBMODULE]
    if isinstance(holder, fx.GraphModule):
        make_graph_plain(holder, values)
    else:
        make_plain(holder, {})


def owners_of(model: nn.Module, synthesis: Synthesis) -> Iterator[nn.Module]:
    """The modules of which a synthesis computes parameters."""
    return (module for module in model.modules() if computed_by(module) is synthesis)


def _read_by_graph(block: nn.Module, names: Collection[str]) -> set[str]:
    """Which of these parameters a block that is a graph reads itself; a FusionError if a graph inside of it does."""
    found: set[str] = set()
    for path, module in block.named_modules():
        if isinstance(module, fx.GraphModule):
            read = (str(node.target) for node in module.graph.nodes if node.op == "get_attr")
            mine = {inner_path(path, name) for name in read}.intersection(names)
            if path and mine:
                raise FusionError(
                    f"its `{path}` is a torch.fx.GraphModule that reads `{min(mine)}` itself: trace the whole block"
                )
            found |= mine
    return found


def _refuse_second_lists(block: nn.Module, slots: list[_Slot]) -> None:
    """Refuse a block with an attribute that holds a parameter too: it would go on with that."""
    wanted = {id(slot.owner._parameters[slot.leaf]): slot.name for slot in slots}
    for path, module in block.named_modules():
        for attribute, value in attributes_of(module):
            if isinstance(module, nn.RNNBase) and attribute in FLAT_WEIGHTS:
                continue
            held = next((wanted[id(tensor)] for tensor in tensors_in(value) if id(tensor) in wanted), None)
            if held is not None:
                raise FusionError(
                    f"its attribute `{f'{path}.{attribute}'.strip('.')}` holds the parameter `{held}` too, beside the "
                    "module that owns it, and would go on with that: let it look the parameter up when it is needed"
                )


class Snapshot:
    """What modules are now, to make them so again."""

    def __init__(self, *modules: nn.Module) -> None:
        inside = dict.fromkeys(inner for module in dict.fromkeys(modules) for inner in module.modules())
        self._kept: list[Callable[[], None]] = [_keeper(module) for module in inside]

    def restore(self) -> None:
        """Make all modules what they were."""
        for keep in self._kept:
            keep()


def _keeper(module: nn.Module) -> Callable[[], None]:
    kind, attributes = type(module), dict(vars(module))
    registries = {name: dict(attributes[name]) for name in REGISTRIES}
    graph = None
    if isinstance(module, fx.GraphModule):
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))

    def restore() -> None:
        if module.__class__ is not kind:
            module.__class__ = kind
        vars(module).clear()
        vars(module).update(attributes)
        for name, content in registries.items():
            registry = attributes[name]
            registry.clear()
            registry.update(content)
        if graph is not None:
            setattr(module, "graph", graph)  # noqa: B010 (a property, of which the type checker knows nothing)

    return restore
