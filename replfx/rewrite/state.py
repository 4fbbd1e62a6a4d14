"""What a transformed model remembers: its plan and report, and a guard on the state_dicts it is given."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from replfx.errors import FusionError, PlanError, StateDictError
from replfx.live import SUBMODULE, Synthesis, syntheses_of, synthesis_of
from replfx.live.check_stage import check_stage, refuse_split_points
from replfx.modules.paths import head_of
from replfx.modules.structure import trainable_parameters
from replfx.modules.tree import inner_path
from replfx.plans import Plan
from replfx.reports.report import Report, without
from replfx.rewrite.saving import keep_plan_on_saving, stop_keeping_plan

__all__ = [
    "Placement",
    "Transformed",
    "forget",
    "load_state_dict",
    "mark",
    "marked",
    "placed_blocks",
    "plan_of",
    "plans_in",
    "state_of",
]

_ATTRIBUTE = "_replfx"


@dataclass
class Transformed:
    """Kept on a transformed model: it is copied and pickled with the model."""

    plan: Plan
    report: Report
    syntheses: dict[str, Synthesis]
    guard: RemovableHandle
    first: RemovableHandle
    follow: Callable[[Sequence[str]], None] | None = None  # unrolls the blocks that a state_dict has at full depth
    seen: dict[str, int] = field(default_factory=dict)  # ids of the model that was seen whole, and of what is in places

    def __getstate__(self) -> dict[str, object]:
        """All but `follow`, which is of one model and its optimizer, and not of a copy."""
        return {**vars(self), "follow": None}


@dataclass(frozen=True)
class Placement:
    """A replaced block in its model."""

    block: nn.Module  # the block; of several modules the first, of a region of the graph what is called in its place
    synthesis: Synthesis  # what computes its weights


def placed_blocks(model: nn.Module) -> tuple[nn.Module, dict[str, Placement]]:
    """The model that was transformed, and its replaced blocks by the paths that they have in its plan.

    They may have been wrapped since (checkpoint wrappers, `torch.compile`, DDP), and so may the model.

    Raises:
        PlanError: the model is not transformed.
        FusionError: a replaced block is not there any more.
    """
    root = marked(model)
    found = {s: module for module in root.modules() if (s := synthesis_of(module)) is not None}
    placed = {}
    for path, synthesis in state_of(root).syntheses.items():
        if synthesis not in found:
            raise FusionError(f"the replaced block `{path}` is not in the model any more: something took its place")
        placed[path] = Placement(found[synthesis], synthesis)
    return root, placed


def marked(model: nn.Module) -> nn.Module:
    """The transformed model in `model`: itself, or what it wraps.

    Raises:
        PlanError: there is none, or several.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(_memory(module).get(_ATTRIBUTE), Transformed)]
    if model in found:
        return model
    if len(found) == 1:
        return found[0]
    kind = type(model).__name__
    if found:
        raise PlanError(f"{len(found)} parts of this {kind} are transformed models; name one of them")
    raise PlanError(f"this {kind} is not a transformed model; call replfx.transform first")


def mark(model: nn.Module, plan: Plan, report: Report) -> None:
    """Let a model that was just transformed remember how."""
    syntheses = syntheses_of(model)
    _memory(model)[_ATTRIBUTE] = Transformed(
        plan,
        report,
        {r.path: syntheses[head_of(model, r.path)] for r in plan.replacements},
        guard=model.register_load_state_dict_pre_hook(_guard),
        first=model.register_forward_pre_hook(_check_whole),
    )
    keep_plan_on_saving(model)


def forget(model: nn.Module, paths: Collection[str]) -> bool:
    """Let a model forget some of its replaced blocks. If it has no others, it forgets all, and this gives False."""
    state = state_of(model)
    left = tuple(r for r in state.plan.replacements if r.path not in paths)
    if not left:
        _unmark(model)
        return False
    state.plan = Plan(state.plan.model, left)
    state.report = without(state.report, paths, trainable_parameters(model))
    state.syntheses = {path: synthesis for path, synthesis in state.syntheses.items() if path not in paths}
    state.seen = {}
    return True


def _unmark(model: nn.Module) -> None:
    # By its number: the handle of a copy still speaks of the model that it was copied from.
    model._load_state_dict_pre_hooks.pop(state_of(model).guard.id, None)
    model._forward_pre_hooks.pop(state_of(model).first.id, None)
    del _memory(model)[_ATTRIBUTE]
    stop_keeping_plan(model)


def _check_whole(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Runs before a forward pass, and checks a model once; a copy, and what has changed its blocks, again."""
    if torch.compiler.is_dynamo_compiling():
        return
    state = state_of(model)
    if torch.compiler.is_exporting():
        refuse_split_points(model)
    places = {place for synthesis in state.syntheses.values() for place in synthesis.places}
    found = {place: id(module) for place in places if (module := _module_at(model, place)) is not None}
    found[""] = id(model)
    if not found.items() <= state.seen.items():
        check_stage(model)
        state.seen = found


def _module_at(model: nn.Module, place: str) -> nn.Module | None:
    """What is at a path; None if nothing is: a block that is no module, or a model that was wrapped inside."""
    found: nn.Module | None = model
    for name in place.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _memory(model: nn.Module) -> dict[str, Any]:
    """What of a model is copied and pickled with it: of a GraphModule its meta, else its attributes."""
    return model.meta if isinstance(model, fx.GraphModule) else model.__dict__


def state_of(model: nn.Module) -> Transformed:
    """What a transformed model remembers; raises as `marked` does."""
    state: Transformed = _memory(marked(model))[_ATTRIBUTE]
    return state


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was transformed, to keep beside its weights.

    Args:
        model: a transformed model, also after `fully_shard` or `parallelize_module`; of a wrapper (DDP, a compiled
            model) what it wraps.

    Raises:
        PlanError: the model is not transformed.

    Example:
        >>> model = replfx.transform(model, every=2)
        >>> torch.save({"plan": replfx.plan_of(model).to_json(), "model": model.state_dict()}, "checkpoint.pt")
    """
    return state_of(model).plan


def plans_in(model: nn.Module) -> list[Plan]:
    """The plans of the transformed models in a model: its own, also inside of a wrapper, or those of its parts."""
    states = (_memory(module).get(_ATTRIBUTE) for module in model.modules())
    return [state.plan for state in states if isinstance(state, Transformed)]


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state_dict that fits `model` exactly, or say what it belongs to and load nothing.

    `model.load_state_dict` of a transformed model refuses by itself what is of the untransformed one or of
    another plan. An untransformed model knows nothing of replfx, so there only this function can tell; and unlike
    PyTorch's it leaves the model as it was when keys or shapes do not fit.

    Args:
        model: transformed or not.
        state_dict: all parameters and persistent buffers of `model`, by name.

    Raises:
        StateDictError: it is of a transformed model and `model` is not, the other way round, of another plan,
            or of another model.

    Example:
        >>> model = replfx.apply(build_model(), Plan.from_json(text))
        >>> replfx.load_state_dict(model, torch.load("weights.pt"))
    """
    _guard(model, state_dict, "")
    own = model.state_dict()
    advice = "if one of the two is transformed, apply the same plan to the other first (replfx.apply)"
    for key in (*own, *state_dict):
        if key not in state_dict or key not in own:
            side = "the state_dict" if key not in state_dict else type(model).__name__
            raise StateDictError(f"{side} has no `{key}`: the state_dict is of another model; {advice}")
        given, wanted = getattr(state_dict[key], "shape", None), getattr(own[key], "shape", None)
        if given != wanted:
            raise StateDictError(f"`{key}` is {given} in the state_dict and {wanted} in the model; {advice}")
    model.load_state_dict(state_dict)


def _guard(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """Runs before any tensor is loaded, so that a wrong state_dict leaves the model as it was.

    PyTorch tells it nothing of `strict`. So a block that one of the two has replaced and the other not is refused, as
    its weights would be nobody's; of blocks that the model has not, a pipeline stage, PyTorch says what it always says.
    """
    syntheses = syntheses_of(module)
    full = _full_in(module, syntheses, state_dict, prefix)
    known = _memory(module).get(_ATTRIBUTE)
    if full and isinstance(known, Transformed) and known.follow is not None:
        known.follow([path for path in known.syntheses if head_of(module, path) in full])
        syntheses, full = syntheses_of(module), {}
    for path, gone in full.items():
        raise StateDictError(
            f"`{path}` is a replaced block, and the state_dict has its own `{gone}`: it is of the untransformed model, "
            "or of a time after replfx.unroll. Load it before replfx.transform, or into replfx.unroll(model); load the "
            "state of a replfx.Schedule before the model's"
        )
    foreign = [key for key in state_dict if f".{SUBMODULE}." in f".{key}"]
    if foreign and syntheses:
        expected = {prefix + key for key in module.state_dict()}
        foreign = [key for key in foreign if key not in expected]
    modules = dict(module.named_modules()) if foreign else {}
    foreign = [key for key in foreign if _lacks_weights(modules, state_dict, prefix, key)]
    if foreign and not syntheses:
        raise StateDictError(
            f"the state_dict has `{min(foreign)}`: it is of a transformed model, and this {type(module).__name__} is "
            "not transformed. Apply its plan first (replfx.apply), or save replfx.materialize(model).state_dict()"
        )
    if foreign:
        raise StateDictError(
            f"the state_dict has `{min(foreign)}`, this model has not: it was saved under another plan, or under other "
            "names. Save replfx.plan_of(model).to_json() beside the weights, and use replfx.apply"
        )


def _lacks_weights(modules: Mapping[str, nn.Module], state_dict: Mapping[str, Tensor], prefix: str, key: str) -> bool:
    """Whether there is the replaced block that a key is of, and the block has weights that the state has not."""
    path = f".{key.removeprefix(prefix)}".partition(f".{SUBMODULE}.")[0].removeprefix(".")
    block = modules.get(path)
    own = () if block is None else block.state_dict()
    return any(prefix + inner_path(path, name) not in state_dict for name in own)


def _full_in(
    module: nn.Module, syntheses: Mapping[str, Synthesis], state_dict: Mapping[str, Tensor], prefix: str
) -> dict[str, str]:
    """The replaced blocks that a state_dict has at full depth, each with a name of it that they have no more."""
    found = {}
    for path, synthesis in syntheses.items():
        inside = _gone(path, synthesis, module.get_submodule(path))
        gone = next((name for name in inside if prefix + name in state_dict), None)
        if gone is not None:
            found[path] = gone
    return found


def _gone(path: str, synthesis: Synthesis, block: nn.Module) -> Iterable[str]:
    """The names in the model of the parameters that a replaced block had and has not any more."""
    skeleton = synthesis.skeleton
    had = synthesis.operator.sources if skeleton is None else skeleton.parameters()
    has = {name for name, _ in block.named_parameters()}
    inside = (name for name in had if name not in has)
    if synthesis.names:  # it was no module
        return [synthesis.names[name] for name in inside if name in synthesis.names]
    return [inner_path(path, name) for name in inside]
