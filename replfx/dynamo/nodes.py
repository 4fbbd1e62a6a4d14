"""What the passes over Dynamo's graph ask of its nodes.

Dynamo's graph is one of torch functions and tensor methods; parameters are placeholders, `node.meta` holds a fake
tensor (`example_value`) and the modules that the node was traced in (`nn_module_stack`).
"""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from replfx.torch_internals import FakeTensor, memory_id
from replfx.torch_internals.dynamo import GET_DATA, source_of

__all__ = [
    "are_plain_and_unwritten",
    "epochs",
    "handed_out",
    "has_known_sizes",
    "is_plain",
    "is_pure",
    "is_untouched",
    "made_beside",
    "made_of_parameters",
    "path_in_model",
    "storages",
    "tensors_of",
    "value_of",
]

# Functions and methods that neither write nor draw random numbers: these may be moved, merged and cached. What
# syntheses and alignments are made of; anything else stays where it is.
_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.floordiv,
        operator.getitem,
        operator.matmul,
        operator.mod,
        operator.mul,
        operator.neg,
        operator.sub,
        operator.truediv,
        torch.arange,
        torch.cat,
        torch.eye,
        torch.flatten,
        torch.lerp,
        torch.matmul,
        torch.take_along_dim,
        F.pad,
    }
)
_METHODS = frozenset(
    {
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "mul",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    }
)


def value_of(node: fx.Node) -> Any:
    """The fake tensor that stands for what the node gives; None where Dynamo noted none."""
    return node.meta.get("example_value")


def made_beside(like: fx.Node, function: Any, *args: fx.Node | None) -> fx.Node:
    """A call of `function` before the node `like`, in the same module, with the value that it gives noted."""
    with like.graph.inserting_before(like):
        made = like.graph.call_function(function, args)
    made.meta = {**like.meta, "example_value": function(*(None if arg is None else value_of(arg) for arg in args))}
    return made


def tensors_of(node: fx.Node) -> Iterator[Tensor]:
    """All tensors that the node gives."""
    value = value_of(node)
    items = value if isinstance(value, tuple | list) else (value,)
    return (item for item in items if isinstance(item, Tensor))


def path_in_model(expression: str) -> str:
    """Where something is in the compiled model, from Dynamo's expression for it.

    Example:
        >>> path_in_model("L['self']._modules['blocks']._modules['0']._parameters['weight']")
        'blocks.0.weight'
        >>> path_in_model("L['self'].blocks.0")
        'blocks.0'
    """
    # A wrapped forward has the model in args[0], and what wraps one of torch's own modules calls it fn.
    root = re.match(r"L\['(?:self|args|fn)'\](?:\[0\])?|[LG](?=\[)", expression)
    inside = expression[root.end() :] if root else expression
    return ".".join(re.findall(r"\w+", re.sub(r"\._(modules|parameters|buffers)\b", "", inside)))


def _is_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter of the compiled model, or what `functional_call` put in the place of one."""
    value = value_of(node)
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and "._parameters[" in source_of(node))


def made_of_parameters(graph: fx.Graph, operation: Callable[..., Any] | None = None) -> dict[fx.Node, bool]:
    """The parameters and what the graph makes of them alone, in order.

    Syntheses are made of parameters alone, and no activation is. So they are known by what they are made of, and not by
    the modules in which they were traced.

    Args:
        graph: Dynamo's.
        operation: one that is as pure as the functions that we know: the batched synthesis.

    Returns:
        Whether each of these nodes computes, or reads what does; the others only look at parameters (views).
    """
    found, parameters = dict[fx.Node, bool](), set[int]()
    for node in graph.nodes:
        if node.op == "placeholder":
            if _is_parameter(node):
                found[node] = False
                parameters |= storages([node])
        elif (is_pure(node) or node.target is operation) and all(before in found for before in node.all_input_nodes):
            before = node.all_input_nodes
            computes = bool(before) and storages([node]).isdisjoint(parameters)
            found[node] = computes or any(found[each] for each in before)
    return found


def is_plain(value: object) -> bool:
    """Whether it is a dense tensor: not a DTensor or another tensor made of tensors."""
    if not isinstance(value, FakeTensor) or value.layout != torch.strided:
        return False
    return type(value) is FakeTensor or isinstance(value, nn.Parameter)


def are_plain_and_unwritten(nodes: Iterable[fx.Node]) -> bool:
    """Whether the nodes give plain tensors of one dtype and device that nothing writes into, of sizes that are known.

    Of several dtypes, as under autocast, each result is rounded, and another order of operations would show.
    """
    nodes = list(nodes)
    values = [value_of(node) for node in nodes]
    if not all(map(is_plain, values)) or not all(map(is_untouched, nodes)):
        return False
    return has_known_sizes(values) and len({(value.dtype, value.device) for value in values}) == 1


def has_known_sizes(values: Iterable[Tensor]) -> bool:
    """Whether no size is a symbol, whose value, such as the number of tokens, other calls may change."""
    return all(type(size) is int for value in values for size in value.shape)


def is_pure(node: fx.Node) -> bool:
    """Whether the node can be moved, merged with its like, and left out: one of few known functions."""
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS


def is_untouched(node: fx.Node) -> bool:
    """Whether nothing in the whole graph writes into what the node gives, or into a view of it.

    Dynamo ran every node on these fake tensors; views share the counter of writes, which starts at 0.
    """
    if any(tensor._version for tensor in tensors_of(node)):
        return False
    if node.graph not in _uncounted:
        _uncounted[node.graph] = _written_uncounted(node.graph)
    return _uncounted[node.graph].isdisjoint(storages([node]))


# Asked of each node, and none of the passes adds a write.
_uncounted: "WeakKeyDictionary[fx.Graph, set[int]]" = WeakKeyDictionary()


def _written_uncounted(graph: fx.Graph) -> set[int]:
    """The memory that is written into and whose counter does not say so, or the counter of another tensor does.

    What `.data` gives has a counter of its own; operations on lists and `p.data = …` (`set_`, or an operation of its
    own) count nothing.
    """
    found: set[int] = set()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.args:
            name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
            if name.endswith("_") and not name.endswith("__"):  # PyTorch's mark of what changes its first argument
                first = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                found |= storages([node, *(each for each in first if isinstance(each, fx.Node))])
            elif node.target is GET_DATA and any(tensor._version for tensor in tensors_of(node)):
                found |= storages([node])
    return found


def storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory that the nodes' tensors are in."""
    return {memory_id(tensor.untyped_storage()) for node in nodes for tensor in tensors_of(node)}


def handed_out(graph: fx.Graph) -> set[int]:
    """The memory that the graph gives to its caller, who may write into it."""
    return storages(graph.output_node().all_input_nodes)


def epochs(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the stretches of the graph between which nothing may be moved.

    A node that gives no value switches a mode (gradients, autocast) or does something that we do not know.
    """
    found, current = {}, 0
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module") and value_of(node) is None:
            current += 1
        found[node] = current
    return found
