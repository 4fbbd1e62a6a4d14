"""A flat graph: its nodes in order, without the reading of attributes, with what is asked of them often."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from functools import cached_property
from itertools import accumulate

from torch import Tensor, fx, nn

from replfx.modules.structure import attribute_at
from replfx.regions.region import root_of
from replfx.regions.tokens import Tokens
from replfx.torch_internals import SET_GRAD_ENABLED
from replfx.tracing import nodes_in

__all__ = ["FlatGraph"]


class FlatGraph:
    """The nodes that compute, in order; positions are indices into `nodes`.

    `get_attr` nodes are left out: where they stand says when a tensor was first read, not what is computed.

    Attributes:
        root: what the graph's targets refer to.
        nodes: all nodes but the `get_attr` ones.
        order: every node's place in the graph, `get_attr` nodes too.
        position: every node's index in `nodes`.
        arguments: the nodes that each node reads, in order and as often as it names them.
        last: for each node the last position that reads it, its own if none does.
        values: what each `get_attr` node reads.
        readers: for each tensor of the root, by id, the first and the last position that reads it.
        names: for each parameter, by id, all its names in the root.
        calls: how often each module is called, by id.
        has_parameters: whether each node reads a parameter.
        matrices: how many parameters of two dimensions and more were read before each position.
        grad_off: for each position, whether gradients are switched off before it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        everything: list[fx.Node] = list(graph_module.graph.nodes)
        self.root = root_of(graph_module)
        self.order = {node: index for index, node in enumerate(everything)}
        self.nodes = [node for node in everything if node.op != "get_attr"]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.values = {n: attribute_at(self.root, str(n.target)) for n in everything if n.op == "get_attr"}
        self.last = [max((self.position[user] for user in n.users), default=i) for i, n in enumerate(self.nodes)]
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)
        self.readers: dict[int, tuple[int, int]] = {}
        self.calls: Counter[int] = Counter()
        self._note_readers()
        parameters = [self._parameters(node) for node in self.nodes]
        self.has_parameters = [bool(read) for read in parameters]
        self.matrices = [0, *accumulate(sum(p.dim() >= 2 for p in read) for read in parameters)]
        self.arguments = [nodes_in((node.args, node.kwargs)) for node in self.nodes]
        self.grad_off = list(self._grad_off())

    @cached_property
    def tokens(self) -> list[Hashable]:
        """What each node does; only where structure is asked for."""
        return list(map(Tokens(self.root, self.values).of, self.nodes))

    def reads_only_in(self, tensor: Tensor, start: int, stop: int) -> bool:
        """Whether all that reads a tensor of the root lies in `[start, stop)`."""
        first, last = self.readers.get(id(tensor), (start, start))  # nothing may read it
        return start <= first and last < stop

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target))

    def _note_readers(self) -> None:
        for node, value in self.values.items():
            if isinstance(value, Tensor) and node.users:
                positions = [self.position[user] for user in node.users]
                self._note(value, min(positions), max(positions))
        for position, node in enumerate(self.nodes):
            if node.op == "call_module":
                module = self.module(node)
                self.calls[id(module)] += 1
                for tensor in (*module.parameters(), *module.buffers()):
                    self._note(tensor, position, position)

    def _note(self, tensor: Tensor, first: int, last: int) -> None:
        before = self.readers.get(id(tensor), (first, last))
        self.readers[id(tensor)] = min(before[0], first), max(before[1], last)

    def _parameters(self, node: fx.Node) -> list[nn.Parameter]:
        if node.op == "call_module":
            return list(self.module(node).parameters())
        read = [self.values[argument] for argument in node.all_input_nodes if argument.op == "get_attr"]
        return [value for value in read if isinstance(value, nn.Parameter)]

    def _grad_off(self) -> Iterator[bool]:
        """The recorder writes what `torch.no_grad()` does as two calls, and nothing may begin between them."""
        off = False
        yield off
        for node in self.nodes:
            if node.target is SET_GRAD_ENABLED:
                off = not (node.args[0] if node.args else True)
            yield off
