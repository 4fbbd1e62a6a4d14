"""placeholder_modules: modules and their calls for a graph that has none any more, but says what ran in which.

That is Dynamo's graph. Its parameters are known by their paths in the model, and its nodes by the modules that they
were traced in: so a tree of modules that only hold these parameters, each of which passes for one of the class that
was there (`structure.pass_for`), and the calls as a capture has them. Candidates, links and pairing then need
not know the difference. What the nodes don't tell is missing: modules that gave no node, unused parameters; and
parameters stand in the order in which they are first read, and not in that of their registration.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from typing import Any

from torch import Tensor, fx, nn

from replfx.dynamo.nodes import path_in_model
from replfx.modules.structure import attribute_at, class_of, is_container, is_setting, pass_for
from replfx.tracing import ModuleCall

__all__ = ["modules_of", "stack_of"]

_MOST = 100_000  # numbered children; a larger number is a name

# The arguments of torch's convolutions after input, weight and bias.
_CONVOLUTION = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS = {f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)} | {f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)}


def modules_of(graph: fx.Graph, root: nn.Module) -> list[ModuleCall]:
    """Make `root`, which holds the parameters by their paths, a tree of placeholder modules; gives their calls.

    A call's `args` are the values from outside that it reads, in the order of their reading, without its own
    parameters and the buffers that nothing else reads; its output is what is read outside of it, a tuple if that is
    not one value. A call whose nodes don't lie side by side is left out.
    """
    spans = _Spans(list(graph.nodes), root)
    paths, kinds = dict[str, str](), dict[str, type[nn.Module]]()
    places: dict[tuple[str, str], list[int]] = defaultdict(list)  # where each call's nodes are among those that compute
    for position, node in enumerate(spans.computing):
        for key, path, kind in stack_of(node):
            path = paths.setdefault(key.partition("@")[0], path)  # a module with two names goes by the first
            kinds.setdefault(path, kind)
            places[path, key].append(position)
    for path, kind in list(kinds.items()):
        module = _at(root, path)
        if module is None:
            del kinds[path]
            continue
        pass_for(module, kind, _of_linear(module) if "in_features" in getattr(kind, "__constants__", ()) else None)
    paths = {key: path for key, path in paths.items() if path in kinds}
    for node in spans.computing:
        _note_settings(node, root, paths)
    _put_in_order(root, kinds.keys())
    side_by_side = {each: at for each, at in places.items() if at[-1] - at[0] == len(at) - 1}
    whole = [(path, at[0], at[-1] + 1) for (path, _), at in side_by_side.items() if path and path in kinds]
    return [spans.call(*each) for each in sorted(whole, key=lambda each: (each[2], -each[1], -each[0].count(".")))]


def stack_of(node: fx.Node) -> Iterator[tuple[str, str, type[nn.Module]]]:
    """The modules that the node ran in, the outermost first: a key of each call, the module's path and its class."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    for key, (name, kind) in stack.items():
        if isinstance(kind, type):
            yield key, path_in_model(name), kind


def _at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, made if there is none; None where a name of it, a key of some dict, is no module's."""
    at = root
    for name in path.split(".") if path else ():
        if name not in at._modules:
            if hasattr(at, name):
                return None
            at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    return at


# ---- what the graph tells of a module's settings


def _of_linear(module: nn.Module) -> dict[str, object] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else {"out_features": weight.shape[0], "in_features": weight.shape[-1]}


def _note_settings(node: fx.Node, root: nn.Module, paths: dict[str, str]) -> None:
    """Let the module that owns a convolution's kernel, or makes it from another, have the convolution's settings."""
    name = getattr(node.target, "__name__", "")
    if name not in _CONVOLUTIONS or node.op != "call_function":
        return
    values = dict(zip(("input", "weight", "bias", *_CONVOLUTIONS[name]), node.args, strict=False)) | node.kwargs
    weight = values["weight"]
    if not isinstance(weight, fx.Node) or not weight.meta.get("shape"):
        return
    owner = str(weight.target).rpartition(".")[0]
    if weight.op != "get_attr":  # standardised, or made otherwise
        owner = next((paths.get(key.partition("@")[0], "") for key, _, _ in reversed(list(stack_of(node)))), "")
    settings = {key: values[key] for key in _CONVOLUTIONS[name] if key in values and is_setting(values[key])}
    module = root.get_submodule(owner)
    shape = {"kernel_size": weight.meta["shape"][2:]}
    pass_for(module, class_of(module), {"groups": 1, **settings, **shape})


# ---- the order of children


def _put_in_order(root: nn.Module, called: Set[str]) -> None:
    """Let numbered children stand in their order, with an Identity for each that gave no node.

    A module that has numbered children and was never called is a list of modules.
    """
    for path, module in list(root.named_modules()):
        names = list(module._modules)
        if not names or not all(name.isdecimal() for name in names):
            continue
        if path not in called:
            pass_for(module, nn.ModuleList)
        numbered = {int(name): child for name, child in module._modules.items()}
        if max(numbered) >= _MOST or not is_container(module):
            continue
        module._modules.clear()
        for number in range(max(numbered) + 1):
            module.add_module(str(number), numbered.get(number) or _identity())


def _identity() -> nn.Module:
    made = nn.Module()
    pass_for(made, nn.Identity)
    return made


# ---- calls


class _Spans:
    """Gives what a stretch of a graph reads and gives."""

    def __init__(self, nodes: Sequence[fx.Node], root: nn.Module) -> None:
        self.index = {node: index for index, node in enumerate(nodes)}
        self.computing = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
        self._read = {node: attribute_at(root, str(node.target)) for node in nodes if node.op == "get_attr"}

    def call(self, path: str, start: int, stop: int) -> ModuleCall:
        """The call of the module at `path`, which ran the computing nodes `[start, stop)`."""
        nodes = self.computing[start:stop]
        first, end = self.index[nodes[0]], self.index[nodes[-1]] + 1
        outside = {argument: None for node in nodes for argument in node.all_input_nodes}
        args = tuple(node for node in outside if self._comes_in(node, path, first, end))
        given = tuple(node for node in nodes if any(self.index[user] >= end for user in node.users))
        return ModuleCall(path, args, {}, first, end, given[0] if len(given) == 1 else given)

    def _comes_in(self, node: fx.Node, path: str, first: int, end: int) -> bool:
        if node.op != "get_attr":
            return self.index[node] < first
        value = self._read[node]
        if isinstance(value, nn.Parameter):
            return not str(node.target).startswith(f"{path}.")
        if isinstance(value, Tensor):
            return any(not first <= self.index[user] < end for user in node.users)
        return False
