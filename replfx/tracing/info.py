"""What a capture knows besides its graph: every module call, and what each node costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import fx, nn

from replfx.modules.tree import parts_of
from replfx.tracing.chance import Draws

__all__ = [
    "FLAG",
    "CaptureInfo",
    "Cost",
    "Frozen",
    "Look",
    "ModuleCall",
    "OfClass",
    "Place",
    "info_of",
    "is_flag",
    "name_of",
    "nodes_in",
]

FLAG = "training_flag"
"""The name of the submodules that a graph calls to know whether the model is in training mode."""

Place: TypeAlias = tuple[object, ...]


@dataclass
class ModuleCall:
    """One call of one module during the capture.

    Attributes:
        path: the module's path in the model.
        args, kwargs, output: as the call had them, with a `torch.fx.Node` for every tensor.
        start, stop: the nodes recorded during the call are `CaptureInfo.nodes[start:stop]`.
        held: what objects, lists and dicts among its arguments held before, as a cache does: by its place, which
            begins with the argument's position or name, the node.
        filled: what they hold after it that they did not hold before.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    stop: int = -1
    output: object = None
    held: dict[Place, fx.Node] = field(default_factory=dict)
    filled: dict[Place, fx.Node] = field(default_factory=dict)

    def fill(self, held: Mapping[Place, fx.Node]) -> None:
        """Note what its arguments hold after it."""
        self.filled = {place: node for place, node in held.items() if self.held.get(place) is not node}


Frozen: TypeAlias = Literal["random numbers", "values of tensors"]


@dataclass(frozen=True)
class Look:
    """How a model is looked at.

    Attributes:
        draws: to which end chance is steered.
        training: whether in training mode, which is the model's own but where chance skips blocks in training alone.
    """

    draws: Draws
    training: bool


@dataclass
class CaptureInfo:
    """What a capture knows besides its graph, kept at `graph_module.meta["replfx"]`.

    Attributes:
        tracer: what made the graph: symbolic tracing, the recorder, or Dynamo.
        root: the model's structure, sharing its parameters and buffers; what the graph's targets refer to.
        nodes: all nodes in the order in which they were recorded.
        calls: all module calls in the order in which they ended: a block's parts come before the block.
        notes: what a reader of the graph should know, such as a branch taken on `training`.
        measured: the nodes carry shapes and costs (example inputs were given).
        outputs: shapes of the tensors in the model's output; None if unmeasured.
        look: how the model was looked at; None for Dynamo's graph.
        frozen: what the model's Python code asked for as it ran, so that the graph goes on as it was answered.
    """

    tracer: Literal["symbolic", "recorded", "dynamo"]
    root: nn.Module
    nodes: list[fx.Node]
    calls: list[ModuleCall]
    notes: list[str] = field(default_factory=list)
    measured: bool = False
    outputs: list[tuple[int, ...]] | None = None
    look: Look | None = None
    frozen: set[Frozen] = field(default_factory=set)

    def without_graph(self) -> "CaptureInfo":
        """The info without nodes, root and calls, which say nothing once the graph is gone or was copied."""
        return replace(self, root=nn.Module(), nodes=[], calls=[], notes=list(self.notes), frozen=set(self.frozen))

    def __getstate__(self) -> dict[str, object]:  # for copies and for pickle
        return vars(self.without_graph())


@dataclass(frozen=True)
class Cost:
    """What a node of a captured graph costs, kept at `node.meta["replfx"]`.

    Attributes:
        path: path of the innermost module that the node was recorded in.
        parameters: number of parameters that the node reads directly.
        flops: floating-point operations of the forward pass (a multiply-add is two), None if unmeasured.
        saved_bytes: bytes of storage that autograd keeps for backward because of this node and of none
            before it, parameters and buffers not counted; None if unmeasured.
    """

    path: str
    parameters: int
    flops: int | None = None
    saved_bytes: int | None = None


def info_of(graph_module: fx.GraphModule) -> CaptureInfo:
    """The `CaptureInfo` of a graph that `replfx.capture` made."""
    info = graph_module.meta.get("replfx")
    if not isinstance(info, CaptureInfo):
        raise TypeError("this GraphModule was not made by replfx.capture")
    return info


class OfClass(dict[str, Any]):
    """What an instance of a dataclass holds, by attribute, with nodes in the place of tensors.

    Attributes:
        kind: the dataclass.
    """

    def __init__(self, kind: type, attributes: Mapping[str, Any]) -> None:
        super().__init__(attributes)
        self.kind = kind

    @classmethod
    def of(cls, value: object, convert: Callable[[Any], Any]) -> "OfClass | None":
        """Read an object, each of whose attributes is converted; None if it is of no dataclass."""
        if isinstance(value, type | dict) or not is_dataclass(value):
            return None
        return cls(type(value), {str(name): convert(part) for name, part in parts_of(value)})


def is_flag(node: fx.Node) -> bool:
    """Whether it says if a module is in training mode."""
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == FLAG


def name_of(node: fx.Node) -> str:
    """What a node calls or reads: the name of a function, or the target."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def nodes_in(tree: object) -> list[fx.Node]:
    """All nodes in nested tuples, lists, dicts and slices, left to right."""
    if isinstance(tree, fx.Node):
        return [tree]
    parts = parts_of(tree) if isinstance(tree, tuple | list | dict | slice) else ()
    return [node for _, part in parts for node in nodes_in(part)]
