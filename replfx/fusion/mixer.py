"""The mixer operator: a replaced block without its MLP, what mixes its tokens computed with synthesised weights. Ours.

A transformer block is two residual branches: one that mixes tokens (attention, as a rule) and an MLP that sees each
token alone. Most of a block's FLOPs are the MLP's, and what replacing keeps of the accuracy is attention's
(docs/findings.md), so this one keeps the first and drops the second: y = x + attention(N(x); θ, own).
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.fusion.anatomy import is_norm, is_residual, name_of
from replfx.fusion.folding import Branch, Fold, branches, is_layout, is_product, is_scale, silence
from replfx.fusion.interface import Interface
from replfx.fusion.operators import BlockOperator, Match, Site, operators
from replfx.fusion.pairing import synthesizable
from replfx.structure import is_stand_in, set_submodule

__all__ = ["MixerOperator"]

# Functions that see each token alone, beside layout, products and what `_keeps_zero` finds: activations, dropout.
_TOKENWISE = ("add", "add_", "iadd", "addmm", "chunk", "getattr", "getitem", "linear", "size", "split", "to")

_TRIED = ((1, 1, 1), (2, 4, 6))


@dataclass(frozen=True)
class Dropped:
    """A branch that is left out.

    Attributes:
        units: the modules that it is made of, the largest that are all in it.
        scales: parameters of the block itself that scale it.
        last: the layer that has to begin at zero for it to give nothing; None if there is no such.
    """

    units: tuple[str, ...]
    scales: tuple[str, ...]
    last: str | None


@operators.register("mixer")
class MixerOperator(BlockOperator):
    """The block's own computation with synthesised parameters and without its MLP: x + attention(N(x); θ, own).

    For blocks with a branch that mixes tokens and one that does not: pre-norm transformer blocks with any attention
    and any MLP, gated ones too, MLP-Mixers, MetaFormers. Its LayerNorm, LayerScale and biases are its own. With it
    go the MLP's parameters, activations and FLOPs. Unrolled, the MLP begins as the mean of its neighbours', with a
    last layer of zero.

    Args:
        block, interface, keep: as for `BlockOperator`.
        dropped: paths in the block of the modules that make up its MLP, found by `match`.
        scales: its parameters that scale the MLP's branch.
        silenced: the layer that is zero at the start when the block is unrolled; None if there is no such.

    Example:
        >>> model = replfx.transform(timm.create_model("vit_small_patch16_224"), operator="mixer")
    """

    unrolls = False

    def __init__(
        self,
        block: nn.Module,
        interface: Interface,
        *,
        keep: Sequence[str] = (),
        dropped: Sequence[str] = (),
        scales: Sequence[str] = (),
        silenced: str | None = None,
    ) -> None:
        names = {name for name, _ in block.named_modules()}
        if not dropped or not names.issuperset(dropped):
            raise FusionError(f"the mixer operator's options are malformed: dropped={list(dropped)!r}")
        self.dropped, self.scales, self.silenced = tuple(dropped), tuple(scales), silenced
        super().__init__(block, interface, keep=keep)

    def wanted(self, block: nn.Module) -> list[str]:
        return _rest(block, self.dropped, self.scales)

    def prepare(self, block: nn.Module) -> None:
        for path in self.dropped:
            set_submodule(block, path, _nothing().train(block.training))
        for name in self.scales:  # what scales nothing is not to be trained
            path, _, leaf = name.rpartition(".")
            scale = nn.Parameter(block.get_parameter(name).detach().clone(), requires_grad=False)
            block.get_submodule(path)._parameters[leaf] = scale

    @classmethod
    def match(cls, site: Site) -> Match:
        found = _mlp(site)
        if isinstance(found, str):
            return Match(reason=found)
        rest = _rest(site.block, found.units, found.scales)
        if not rest:
            return Match(reason="what is left without its MLP has no parameter to synthesise")
        options = {"dropped": list(found.units), "scales": list(found.scales), "silenced": found.last}
        kept = [name for name in site.without_counterpart() if name in rest]
        if len(kept) == len(rest):
            return Match(reason="neither neighbour has the like of any weight that is left without its MLP")
        return Match({**options, "keep": kept} if kept else options)

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        if self.silenced is None:
            raise FusionError("nothing with a weight ends the MLP that it lacks")
        silence(block, Fold((self.silenced,)))


def _rest(block: nn.Module, dropped: Sequence[str], scales: Sequence[str]) -> list[str]:
    """The matrices of a block that are left without some of its modules."""
    return [
        name for name in synthesizable(block) if name not in scales and not any(_is_in(name, unit) for unit in dropped)
    ]


def _nothing() -> fx.GraphModule:
    """A module without parameters that gives a zero of its first argument's dtype and dimensions, which a sum spreads.

    A `torch.fx.GraphModule` needs no replfx to run, to pickle or to be copied.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    # One example of one token and channel: drop-path and its like look at the dimensions of what they get.
    ones = graph.call_function(operator.mul, ((1,), graph.call_method("dim", (x,))))
    graph.output(graph.call_method("new_zeros", (x, ones)))
    return fx.GraphModule(nn.Module(), graph, "Nothing")


# ---- finding the MLP


def _mlp(site: Site) -> Dropped | str:
    """The branch of a block that sees each token alone, or why there is none to leave out."""
    if is_stand_in(site.block):
        return "its layers are functions in Dynamo's graph, and the mixer operator takes over modules"
    if not is_residual(site):
        return "it is not residual: its output is not a sum with its own input as a term"
    found = branches(site)
    if len(found) < 2:
        return "it has one branch alone, and nothing is left without that"
    reasons = []
    for branch in found:
        nodes = _exclusive(site, branch)
        stranger = next((node for node in nodes if not _is_tokenwise(site, node)), None)
        if stranger is not None:
            reasons.append(f"`{_label(stranger)}` of its branch at `{branch.end.name}` may mix tokens")
            continue
        dropped = _dropped(site, branch, nodes)
        if not isinstance(dropped, str):
            return dropped
        reasons.append(dropped)
    return "none of its branches is an MLP: " + "; ".join(reasons)


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else name_of(node)


def _exclusive(site: Site, branch: Branch) -> list[fx.Node]:
    """The nodes that lead to the branch's end and to nothing else, in the order of the graph."""
    found = {branch.end}
    for node in reversed(site.nodes):
        if node not in branch.main and node.users and all(user in found for user in node.users):
            found.add(node)
    return [node for node in site.nodes if node in found]


def _is_tokenwise(site: Site, node: fx.Node) -> bool:
    if not node.all_input_nodes:  # a parameter, or a flag that capturing put in
        return True
    if node.op != "call_module":
        return is_layout(node) or is_product(node) or _keeps_zero(site, node) or name_of(node) in _TOKENWISE
    module = site.block.get_submodule(site.inside(node))
    if isinstance(module, nn.Linear) or next(module.parameters(), None) is None or is_scale(module):
        return True
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return set(module.kernel_size) == {1} and set(module.stride) == {1}
    return is_norm(module, len(next(module.parameters())))


def _keeps_zero(site: Site, node: fx.Node) -> bool:
    """Whether it is a function of one tensor that makes zero of zero, tried on two shapes: activations, dropout."""
    if name_of(node) == "dropout":  # it may have a second input, which tells whether it is trained
        return True
    if node.op == "get_attr" or len(node.all_input_nodes) != 1:
        return False
    try:
        with torch.no_grad():
            made = [_applied(site, node, torch.zeros(shape)) for shape in _TRIED]
    except Exception:  # it is not of the kind asked for
        return False
    return all(
        isinstance(m, Tensor) and m.shape == shape and not m.any() for m, shape in zip(made, _TRIED, strict=True)
    )


def _applied(site: Site, node: fx.Node, z: Tensor) -> Any:
    args = [z if isinstance(argument, fx.Node) else argument for argument in node.args]
    kwargs = {key: z if isinstance(value, fx.Node) else value for key, value in node.kwargs.items()}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return copy.deepcopy(site.block.get_submodule(site.inside(node))).train()(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _dropped(site: Site, branch: Branch, nodes: Sequence[fx.Node]) -> Dropped | str:
    """How the nodes of a branch are left out: which modules are to give nothing, and whether nothing comes out then."""
    units = _units(site, nodes)
    zero: set[fx.Node] = set()
    scales: list[str] = []
    for node in nodes:
        if any(_is_in(path, unit) for unit in units for path in _owners(site, node)[-1:]):
            zero.add(node)
        elif node.op == "get_attr":
            if not all(is_product(user) for user in node.users):
                return f"its parameter `{site.inside(node)}` is read between the modules of its MLP"
            scales.append(site.inside(node))
        elif any(term in zero for term in node.all_input_nodes) and (is_product(node) or _keeps_zero(site, node)):
            zero.add(node)
    if branch.end not in zero:
        return f"its MLP is not made of modules alone: `{branch.end.name}` would not be zero without them"
    return Dropped(units, tuple(dict.fromkeys(scales)), branch.last_layer())


def _units(site: Site, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The largest modules that are called within these nodes alone, by their names in the block."""
    inside = set(nodes)
    nodes = [node for node in nodes if node.all_input_nodes]  # no parameters, and no flags that capturing put in
    elsewhere = {path for node in site.nodes if node not in inside for path in _owners(site, node)}
    found: list[str] = []
    for node in nodes:
        whole = [path for path in _owners(site, node) if path not in elsewhere]
        if whole and not any(_is_in(whole[0], unit) for unit in found):
            found.append(whole[0])
    return tuple(found)


def _owners(site: Site, node: fx.Node) -> list[str]:
    """The modules inside of the block that were running when a node was recorded, the outermost first."""
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack.append(str(node.target))
    within = [site.name(path) for path in stack if site.holds(path)]
    return [name for name in dict.fromkeys(within) if name]


def _is_in(path: str, unit: str) -> bool:
    return path == unit or path.startswith(f"{unit}.")
