"""What a transformed model remembers: its plan and report, and a guard on the state_dicts it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from replfx.blocks import head_of
from replfx.errors import PlanError, StateDictError
from replfx.fusion import FusionLayer
from replfx.fusion.layer import check_neighbours, fusion_layers
from replfx.plans import Plan
from replfx.reports import Report
from replfx.stages import refuse_split_points

__all__ = [
    "Transformed",
    "fusion_layers",
    "load_state_dict",
    "mark",
    "placed_layers",
    "plan_of",
    "plans_in",
    "state_of",
    "unmark",
]

_ATTRIBUTE = "_replfx"


@dataclass
class Transformed:
    """Kept on a transformed model: it is copied and pickled with the model."""

    plan: Plan
    report: Report
    guard: RemovableHandle
    first: RemovableHandle
    checked: int = 0  # the id of the model that was seen whole: a copy is another one


def placed_layers(model: nn.Module, plan: Plan) -> dict[str, FusionLayer]:
    """The fusion layers of a model by the paths of the blocks that they replaced.

    Those of `fusion_layers`, but for windows: there the layer stands in the place of the first member.
    """
    layers = fusion_layers(model)
    return {r.path: layers[head_of(model, r.path)] for r in plan.replacements}


def mark(model: nn.Module, plan: Plan, report: Report) -> None:
    """Let a model that was just transformed remember how."""
    hooks = (model.register_load_state_dict_pre_hook(_guard), model.register_forward_pre_hook(_check_whole))
    _memory(model)[_ATTRIBUTE] = Transformed(plan, report, *hooks)


def unmark(model: nn.Module) -> None:
    """Forget it again."""
    # By its number: the handle of a copy still speaks of the model that it was copied from.
    model._load_state_dict_pre_hooks.pop(state_of(model).guard.id, None)
    model._forward_pre_hooks.pop(state_of(model).first.id, None)
    del _memory(model)[_ATTRIBUTE]


def _check_whole(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Runs before a forward pass, and looks in the first one whether the neighbours of all fusion layers are there."""
    if torch.compiler.is_dynamo_compiling():
        return
    state = state_of(model)
    if torch.compiler.is_exporting():
        refuse_split_points(model)
    if state.checked != id(model):
        check_neighbours(model)
        state.checked = id(model)


def _memory(model: nn.Module) -> dict[str, Any]:
    """What of a model is copied and pickled with it: of a GraphModule its meta, else its attributes."""
    return model.meta if isinstance(model, fx.GraphModule) else model.__dict__


def state_of(model: nn.Module) -> Transformed:
    """What a transformed model remembers.

    Raises:
        PlanError: the model is not transformed.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    state = _memory(model).get(_ATTRIBUTE)
    if not isinstance(state, Transformed):
        raise PlanError(f"this {type(model).__name__} is not a transformed model; call replfx.transform first")
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
    """Runs before any tensor is loaded, so that a wrong state_dict leaves the model as it was."""
    expected = {prefix + key for key in module.state_dict()}
    for path, layer in fusion_layers(module).items():
        base = f"{prefix}{path}."
        given = {key for key in state_dict if key.startswith(base)}
        plain = any(_of_plain_block(key.removeprefix(base)) for key in given)
        if plain or any(prefix + home in state_dict for home in layer.names.values()):
            raise StateDictError(
                f"`{path}` is a fusion layer, and the state_dict has the weights of the block that it replaced: it is "
                "of the untransformed model. Load it before replfx.transform, or into replfx.unroll(model)"
            )
    foreign = sorted(k for k in state_dict if k not in expected and (".fusion." in k or ".operator." in k))
    if foreign and not fusion_layers(module):
        raise StateDictError(
            f"the state_dict has `{foreign[0]}`: it is of a transformed model, and this {type(module).__name__} is not "
            "transformed. Apply its plan first (replfx.apply), or save replfx.materialize(model).state_dict()"
        )
    if foreign:
        raise StateDictError(
            f"the state_dict has `{foreign[0]}`, this model has not: it was saved under another plan, or under other "
            "names, as transformers' save_pretrained does without save_original_format=False. Save "
            "replfx.report(model) or the plan's to_json() beside the weights, and use replfx.apply"
        )


def _of_plain_block(name: str) -> bool:
    return name.split(".")[0] not in ("operator", "fusion")
