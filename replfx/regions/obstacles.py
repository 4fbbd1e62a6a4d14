"""obstacles: what keeps a block from being replaced; all that look for blocks ask here.

A reason says something of "it", the block. None is no reason.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from replfx.fusion.pairing import LEAST_SHARE, first_unpaired, pair, share_paired
from replfx.modules.structure import is_wrapped
from replfx.regions.flat_graph import FlatGraph
from replfx.regions.region import Piece
from replfx.regions.tokens import is_stateless
from replfx.regions.writes import written_outside
from replfx.tracing import ModuleCall, is_flag, nodes_in

__all__ = ["called_again", "leaking", "too_unlike", "unfit_piece", "unfit_to_cut", "unfit_to_replace", "unfit_to_share"]


# ---- of modules


def called_again(count: int, what: str = "it") -> str | None:
    """That a module is called more than once."""
    return f"{what} is called {count} times in one forward pass" if count > 1 else None


def unfit_to_share(block: nn.Module) -> str | None:
    """Why the parameters of `block` cannot be read by a fusion."""
    for path, sub in block.named_modules():
        where = f"its submodule `{path}`" if path else "it"
        if isinstance(sub, torch.jit.ScriptModule):
            return f"{where} is scripted (TorchScript): its parameters cannot be swapped"
        if parametrize.is_parametrized(sub):
            return f"{where} is parametrised (torch.nn.utils.parametrize); remove_parametrizations first"
    return _not_numbers(block.named_parameters())


def _not_numbers(named: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, parameter in named:
        dtype, kind = parameter.dtype, None
        if is_wrapped(parameter):
            kind = f"of type {type(parameter.data).__name__}"
        elif not (dtype.is_floating_point or dtype.is_complex):
            kind = str(dtype)
        if kind is not None:
            return f"its parameter `{name}` is {kind}: quantised weights are not fused"
        if not _combines(dtype):
            return f"its parameter `{name}` is {dtype}, which PyTorch stores but does not add"
    return None


@cache
def _combines(dtype: torch.dtype) -> bool:
    """Whether there are linear combinations of such numbers; eight bits of floating point are for storage alone."""
    try:
        one = torch.ones(1, dtype=dtype)
        return bool((0.5 * one + 0.5 * one).isfinite().all())
    except (RuntimeError, NotImplementedError):
        return False


def unfit_to_replace(named: Mapping[str, Tensor], owners: Mapping[int, list[str]]) -> str | None:
    """Why a block must stay although a neighbour may read it.

    Args:
        named: the block's parameters by their names in the model, all names of a tied one.
        owners: for each parameter (by id) all the names that it has in the model.
    """
    if not any(p.requires_grad for p in named.values()):
        return "all its parameters are frozen: replacing it would save no training"
    for name, parameter in named.items():
        if shared := _shared(name, (other for other in owners[id(parameter)] if other not in named)):
            return shared
        one, *others = owners[id(parameter)]
        if others and parameter.dim() >= 2:
            return f"its `{one}` and `{others[0]}` are one parameter (tied): each would be made anew"
        if not parameter.requires_grad:
            return f"its parameter `{name}` is frozen and the others are not"
    return None


def _shared(name: str, others: Iterable[str]) -> str | None:
    other = next(iter(others), None)
    return None if other is None else f"its parameter `{name}` is shared with `{other}`"


def too_unlike(block: nn.Module, *neighbours: tuple[str, nn.Module]) -> str | None:
    """Why a block cannot be made from these neighbours, given with their paths."""
    pairs = {path: pair(block, neighbour) for path, neighbour in neighbours}
    if share_paired(block, *pairs.values()) >= LEAST_SHARE:
        return None
    path, neighbour = min(neighbours, key=lambda other: share_paired(block, pairs[other[0]]))
    return f"too little of it can be made from `{path}`: {first_unpaired(block, neighbour)}"


# ---- of nodes


def leaking(call: ModuleCall, nodes: Sequence[fx.Node]) -> str | None:
    """Why the nodes of a call are no region with its arguments as entry and its output as exit."""
    own = [node for node in nodes if node.op != "get_attr" and not is_flag(node)]
    arguments = {*nodes, *nodes_in((call.args, call.kwargs)), *call.held.values()}
    if hidden := _read_outside(own, {*nodes_in(call.output), *call.filled.values()}):
        return hidden
    for node in nodes:
        for outer in node.all_input_nodes:
            if outer not in arguments and outer.op != "get_attr" and not is_flag(outer):
                return f"it reads `{outer.name}`, which is not among its arguments"
    return None


def _read_outside(nodes: Sequence[fx.Node], outputs: Collection[fx.Node]) -> str | None:
    """That others than these nodes read one of them that is no output."""
    inside = set(nodes)
    hidden = (node for node in nodes if node not in outputs and not inside.issuperset(node.users))
    found = next(hidden, None)
    return None if found is None else f"an intermediate result of it (`{found.name}`) is used outside of it"


def unfit_to_cut(stream: FlatGraph, call: ModuleCall, nodes: Sequence[fx.Node], module: nn.Module) -> str | None:
    """Why the nodes of a call cannot be cut out of a graph without modules."""
    inside = set(nodes)
    read = [n for n in nodes_in(call.output) if any(u not in inside and u.op != "output" for u in n.users)]
    if len(read) > 1:
        return f"{len(read)} of its results are used outside of it, and not one"
    if any(node.op == "call_module" for node in nodes):
        return "it calls a module that Dynamo did not look into"
    start, stop = stream.position[nodes[0]], stream.position[nodes[-1]] + 1
    if changes := _changes_others(stream, start, stop, call.args):
        return changes
    for argument in call.args:
        if isinstance(stream.values.get(argument), nn.Parameter):
            return f"it reads the parameter `{argument.target}`, which is not its own"
    return _read_elsewhere(stream, start, stop, module.named_parameters())


def unfit_piece(stream: FlatGraph, piece: Piece) -> str | None:
    """Why a piece of a graph may be in no chain."""
    start, stop = piece.start, piece.stop
    return (
        _read_outside(stream.nodes[start:stop], (piece.output,))
        or _changes_others(stream, start, stop, (piece.input,))
        or _unfit_modules(stream, piece)
        or _unfit_parameters(stream, piece)
    )


def _changes_others(stream: FlatGraph, start: int, stop: int, mains: Sequence[fx.Node]) -> str | None:
    """That nodes change a value of others, whichever of `mains` is the main activation, which they may change."""
    changes = [written_outside(stream, start, stop, main) for main in mains]
    return f"it changes a value in place that is not its own (`{changes[0]}`)" if all(changes) else None


def _read_elsewhere(stream: FlatGraph, start: int, stop: int, named: Iterable[tuple[str, Tensor]]) -> str | None:
    name = next((name for name, tensor in named if not stream.reads_only_in(tensor, start, stop)), None)
    return None if name is None else f"its parameter `{name}` is read outside of it too"


def _unfit_modules(stream: FlatGraph, piece: Piece) -> str | None:
    for path in piece.modules.values():
        module = stream.root.get_submodule(path)
        if is_stateless(module):
            continue
        if again := called_again(stream.calls[id(module)], f"`{path}`"):
            return again
        if not all(stream.reads_only_in(buffer, piece.start, piece.stop) for buffer in module.buffers()):
            return f"a buffer of `{path}` is read outside of it"
        if reason := unfit_to_share(module):
            return f"`{path}` cannot be shared: {reason}"
    return None


def _unfit_parameters(stream: FlatGraph, piece: Piece) -> str | None:
    paths = list(piece.parameters.values())
    named = {path: stream.root.get_parameter(path) for path in paths}
    for path, parameter in named.items():
        twins = [name for name in stream.names[id(parameter)] if name != path]
        if shared := _shared(path, [*twins, *["a module that it calls"] * (paths.count(path) - 1)]):
            return shared
    if elsewhere := _read_elsewhere(stream, piece.start, piece.stop, named.items()):
        return elsewhere
    frozen = next((path for path, parameter in named.items() if not parameter.requires_grad), None)
    return _not_numbers(named.items()) if frozen is None else f"its parameter `{frozen}` is frozen"
