"""The mixer operator: a replaced block without its MLP, what mixes its tokens computed with synthesised weights. Ours.

A transformer block is two residual branches: one that mixes tokens (attention, as a rule) and an MLP that sees each
token alone. Most of a block's FLOPs are the MLP's, and what replacing keeps of the accuracy is attention's
(docs/findings.md), so this one keeps the first and drops the second: y = x + attention(N(x); θ, own).
"""

import math
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.fusion.pairing import synthesizable
from replfx.modules.structure import set_submodule
from replfx.operators.base import BlockOperator, Match, Site, is_in, operators
from replfx.operators.folding import Fold, branch_silencers, silence
from replfx.operators.probe import Unmeasured, modules_around
from replfx.operators.residual import Branch, Residual, gives
from replfx.plain_data import read_dataclass
from replfx.tracing.info import info_of, name_of

__all__ = ["MixerOperator"]

_PRODUCTS = ("mul", "mul_", "imul")


@dataclass(frozen=True)
class Dropped:
    """An MLP that is left out, as `MixerOperator` takes it; `dropped` are the largest modules that are all in it."""

    dropped: tuple[str, ...]
    items: Mapping[str, list[bool]]
    spread: bool
    scales: tuple[str, ...]
    fold: Fold | str


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
        items: of those of them that give a tuple, which of its items are tensors; the others are None.
        spread: whether one zero will do in their place, which a sum spreads: not where it is written into.
        scales: its parameters that scale the MLP's branch.
        fold: how that MLP is made to give nothing when the block is unrolled, or why it cannot be.

    Example:
        >>> model = replfx.transform(timm.create_model("vit_small_patch16_224"), operator="mixer")
    """

    unrolls = False
    matches_by_structure = True

    def __init__(
        self,
        block: nn.Module,
        interface: Interface,
        *,
        keep: Sequence[str] = (),
        dropped: Sequence[str] = (),
        items: Mapping[str, Sequence[bool]] | None = None,
        spread: bool = True,
        scales: Sequence[str] = (),
        fold: Mapping[str, Any] | str = "its plan does not say how",
    ) -> None:
        names = {name for name, _ in block.named_modules()}
        if not dropped or not names.issuperset(dropped):
            raise FusionError(f"the mixer operator's options are malformed: dropped={list(dropped)!r}")
        self.dropped, self.scales = tuple(dropped), tuple(scales)
        self.items, self.spread = dict(items or {}), spread
        self.fold = fold if isinstance(fold, str) else read_dataclass(Fold, fold, "fold")
        super().__init__(block, interface, keep=keep)

    def wanted(self, block: nn.Module) -> list[str]:
        return _rest(block, self.dropped, self.scales)

    def prepare(self, block: nn.Module) -> None:
        for path in self.dropped:
            nothing = _in_place_of(block.get_submodule(path), _nothing(self.items.get(path), spread=self.spread))
            set_submodule(block, path, nothing.train(block.training))
        for name in self.scales:  # what scales nothing is not to be trained
            path, _, leaf = name.rpartition(".")
            scale = nn.Parameter(block.get_parameter(name).detach().clone(), requires_grad=False)
            block.get_submodule(path)._parameters[leaf] = scale

    @classmethod
    def match(cls, site: Site) -> Match:
        found = _mlp(site)
        if isinstance(found, str):
            return Match(reason=found)
        rest = _rest(site.block, found.dropped, found.scales)
        if not rest:
            return Match(reason="what is left without its MLP has no parameter to synthesise")
        kept = [name for name in site.without_counterpart() if name in rest]
        if len(kept) == len(rest):
            return Match(reason="neither neighbour has the like of any weight that is left without its MLP")
        options = asdict(found) | ({"keep": kept} if kept else {})
        few = {"items": found.items, "spread": not found.spread}  # a plan names only where there are such
        return Match({name: value for name, value in options.items() if few.get(name, True)})

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        if isinstance(self.fold, str):
            raise FusionError(f"the MLP that it lacks cannot be made to give nothing: {self.fold}")
        silence(block, self.fold)


def _rest(block: nn.Module, dropped: Sequence[str], scales: Sequence[str]) -> list[str]:
    """The matrices of a block that are left without some of its modules."""
    return [
        name for name in synthesizable(block) if name not in scales and not any(is_in(name, unit) for unit in dropped)
    ]


def _nothing(items: Sequence[bool] | None, *, spread: bool) -> fx.GraphModule:
    """A module without parameters that gives a zero of its first argument's dtype.

    A `torch.fx.GraphModule` needs no replfx to run, to pickle or to be copied.

    Args:
        items: gives a tuple of it and of None, where an item is no tensor.
        spread: it has that argument's dimensions alone, and a sum spreads it; else its shape.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    if spread:  # one example of one token and channel: drop-path and its like look at the dimensions of what they get
        shape = graph.call_function(operator.mul, ((1,), graph.call_method("dim", (x,))))
    else:
        shape = graph.call_method("size", (x,))
    zero = graph.call_method("new_zeros", (x, shape))
    graph.output(zero if items is None else tuple(zero if tensor else None for tensor in items))
    return fx.GraphModule(nn.Module(), graph, "Nothing")


def _in_place_of(left_out: nn.Module, nothing: fx.GraphModule) -> nn.Module:
    """What stands in the place of a module that is left out, with what others ask a normalisation of torch.nn for.

    `nn.TransformerEncoderLayer` compares the `eps` of its two before it hands all weights to one fused operator. One
    that equals no number keeps it from looking for weights that are not there.
    """
    if not type(left_out).__module__.startswith("torch.nn") or not hasattr(left_out, "eps"):
        return nothing
    asked: Any = nn.Sequential(nothing)  # a copy of a GraphModule has no more attributes than its graph reads
    asked.eps = math.nan
    return cast(nn.Module, asked)


# ---- finding the MLP


def _mixing(branch: Branch) -> str:
    """What to say of a branch of which a change of one token is seen to reach others."""
    root = branch.end.graph.owning_module
    if root is not None and "values of tensors" in info_of(root).frozen:
        return (
            f"whether its branch at `{branch.end.name}` mixes tokens cannot be told, for the model's code asks for "
            "values of tensors, and its graph goes on as these were"
        )
    return f"its branch at `{branch.end.name}` mixes tokens"


def _mlp(site: Site) -> Dropped | str:
    """The branch of a block that sees each token alone, or why there is none to leave out."""
    residual = Residual.of(site)
    if isinstance(residual, str):
        return residual
    if len(residual.branches) < 2:
        return "it has one branch alone, and nothing is left without that"
    reasons = []
    for branch in residual.branches:
        if not branch.entries:
            continue
        try:
            dropped = _mixing(branch) if branch.mixes_tokens else _dropped(branch)
        except Unmeasured as error:
            return str(error)
        if not isinstance(dropped, str):
            return dropped
        reasons.append(dropped)
    return "none of its branches is an MLP that can be left out: " + "; ".join(reasons)


def _exclusive(branch: Branch) -> list[fx.Node]:
    """The nodes that lead to the branch's end and to nothing else, in the order of the graph."""
    site, found, writes = branch.residual.site, {branch.end}, {node for node in branch.nodes if not node.users}
    for node in reversed(site.nodes):
        leads = all(user in found for user in node.users) and (node.users or node in writes)
        if node not in branch.residual.main and leads:
            found.add(node)
    return [node for node in site.nodes if node in found]


def _dropped(branch: Branch) -> Dropped | str:
    """How a branch is left out: which modules are to give nothing, and whether nothing comes out then."""
    residual, nodes = branch.residual, _exclusive(branch)
    site = residual.site
    calls = _calls(site)
    units = _units(site, nodes, calls)
    scales: list[str] = []
    for node in nodes:
        if node.op == "get_attr" and not _is_in_one(site, node, units):
            if not all(name_of(user) in _PRODUCTS for user in node.users):
                return f"its parameter `{site.inside(node)}` is read between the modules of its MLP"
            scales.append(site.inside(node))
    spread = next((way for way in (True, False) if _silent(branch, nodes, units, spread=way)), None)
    if spread is None:
        return f"its MLP is not made of modules alone: `{branch.end.name}` would not be zero without them"
    silenced = branch_silencers(branch)
    fold = Fold(silenced) if silenced else "whichever of its layers start at zero, it gives something"
    items = {unit: n for unit in units if (n := calls.get(unit)) is not None}
    return Dropped(units, items, spread, tuple(dict.fromkeys(scales)), fold)


def _is_in_one(site: Site, node: fx.Node, units: Sequence[str]) -> bool:
    return any(is_in(path, unit) for unit in units for path in modules_around(site, node)[-1:])


def _silent(branch: Branch, nodes: Sequence[fx.Node], units: Sequence[str], *, spread: bool) -> bool:
    """Whether the branch gives nothing where its modules give a zero: one that a sum spreads, or one as large as x.

    What only leads to them is not run: it may ask for a shape that such a zero has not.
    """
    residual = branch.residual
    inside = {node for node in nodes if node.all_input_nodes and _is_in_one(residual.site, node, units)}
    values = branch.gives(watch=inside)
    zeros = {
        node: value.new_zeros([1] * value.dim() if spread else value.shape)
        for node in inside
        if isinstance(value := values[node], Tensor) and (node is branch.end or not inside.issuperset(node.users))
    }
    start = {residual.site.input: residual.probe.x, **zeros}
    if not spread and any(zero.shape != residual.probe.x.shape for zero in zeros.values()):
        return False
    rest = [node for node in residual.site.nodes if node not in inside]
    nothing = torch.tensor(False)

    def is_left_out() -> Tensor:
        seen = residual.probe.replay(rest, start, [branch.end, residual.site.output])
        other = seen[residual.site.output].shape != residual.probe.x.shape  # and it must run: a sum may be in place
        return torch.tensor(bool(seen[branch.end].any()) or other)

    return gives(is_left_out, nothing)


def _calls(site: Site) -> dict[str, list[bool] | None]:
    """What the modules inside of the block give that are called once: None is a tensor, a list a tuple's items."""
    root = site.nodes[0].graph.owning_module
    calls = [call for call in info_of(root).calls if site.holds(call.path)] if root is not None else []
    count = Counter(call.path for call in calls)
    found: dict[str, list[bool] | None] = {}
    for call in calls:
        output = call.output
        if count[call.path] > 1 or not site.name(call.path):
            continue
        if isinstance(output, fx.Node):
            found[site.name(call.path)] = None
        elif isinstance(output, tuple | list) and all(item is None or isinstance(item, fx.Node) for item in output):
            found[site.name(call.path)] = [item is not None for item in output]
    return found


def _units(site: Site, nodes: Sequence[fx.Node], calls: Collection[str]) -> tuple[str, ...]:
    """The largest of the modules called within these nodes alone, by their names in the block."""
    inside = set(nodes)
    nodes = [node for node in nodes if node.all_input_nodes]  # no parameters, and no flags that capturing put in
    elsewhere = {path for node in site.nodes if node not in inside for path in modules_around(site, node)}
    found: list[str] = []
    for node in nodes:
        whole = [path for path in modules_around(site, node) if path not in elsewhere and path in calls]
        if whole and not any(is_in(whole[0], unit) for unit in found):
            found.append(whole[0])
    return tuple(found)
