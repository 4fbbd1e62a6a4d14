"""What is compared: the bounds, replfx with each operator and fusion, and the peers. Each is named by a text.

    NAME[:OPTION=VALUE…]        removed     block+scalar:select=layer1.2,layer2.2     same-time:as=light+channel

NAME is one of `METHODS`, or OPERATOR+FUSION of replfx's registries. Every variant takes `lr=`, a learning rate of its
own, `length=`, a share of the recipe's steps, `after=`, what the rate is multiplied by once the model has grown, and
`rewarm=`, the share of the steps in which the rate rises from zero once more then, and `decay=`, what the
weight decay of fusion coefficients is multiplied by. `unroll=0.2,0.4` grows twice, each time by as many blocks, spread
over the depth; with `share=0.1` what is replaced is first replaced by `block` instead.
`sharing:every=2:unshare=0.2` gives blocks copies of what they shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import replfx
from benchmarks.accuracy.peers import checkpointing, dropping, sharing
from benchmarks.accuracy.prototypes import connect_trials, register_trial
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import skipped
from replfx import ReplfxError
from replfx.fusion.fusions import LinearFusion, along_first
from replfx.live import syntheses_of
from replfx.tracing import ExampleInputs

Options = Mapping[str, str]
Prepare = Callable[[nn.Module, ExampleInputs], nn.Module]
Grow = Callable[[nn.Module, Optimizer, ExampleInputs, int], nn.Module]


@dataclass(frozen=True)
class Variant:
    """How a model is changed before it is trained, and perhaps once more on the way.

    Attributes:
        name: the text that it was read from.
        prepare: (untouched model, example inputs) → the model to train.
        grow: (model, its optimizer, inputs of a training batch, how often it grows from here on) → the model to train
            on; the optimizer is changed in place.
        grows_at: shares of the steps after which it grows, in order.
        as_long_as: the variant whose total training time is to be filled; None takes the recipe's steps.
        made_as: the variant of which this is the model, where steps are as many as fill a time.
        learning_rate: instead of the recipe's.
        length: share of the recipe's steps that it is trained for, its schedule as a whole.
        after: what the learning rate is multiplied by from each growth on.
        rewarm: share of the steps after each growth in which the learning rate rises from zero to its schedule's.
        decay: what the weight decay of fusion coefficients is multiplied by.
    """

    name: str
    prepare: Prepare
    grow: Grow | None = None
    grows_at: tuple[float, ...] = ()
    as_long_as: str | None = None
    made_as: str = "full"
    learning_rate: float | None = None
    length: float = 1.0
    after: float = 1.0
    rewarm: float = 0.0
    decay: float = 1.0

    def share_of_full(self, step_over_full: float) -> float:
        """Its training time over full's with as many steps: it costs what full does once it has grown."""
        return self.length * (1 - (1 - step_over_full) * (fmean(self.grows_at) if self.grows_at else 1))

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """How it is trained, where the task's recipe is this one."""
        rate = recipe.learning_rate if self.learning_rate is None else self.learning_rate
        return replace(recipe, learning_rate=rate, steps=round(self.length * recipe.steps))


def variant_of(name: str) -> Variant:
    """Read a variant from its name.

    Raises:
        ReplfxError: there is no such method, or it has no such option.

    """
    method, *given = name.split(":")
    given, own = [o for o in given if not _is_common(o)], [o for o in given if _is_common(o)]
    if own:
        return _with_common(name, variant_of(":".join([method, *given])), own)
    if method in TIMED:
        return _timed(name, method, name.partition(f":{TIMED[method]}=")[2])
    options: dict[str, str] = {}
    for option in given:
        key, _, value = option.partition("=")
        options[key] = value
    make = METHODS.get(method, _replfx if "+" in method else None)
    if make is None:
        raise ReplfxError(f"no variant {method!r}; there are {', '.join([*METHODS, *TIMED])} and OPERATOR+FUSION")
    try:
        return make(name, options)
    except (TypeError, ValueError) as error:
        raise ReplfxError(f"variant {name!r}: {error}") from error


def _is_common(option: str) -> bool:
    return option.partition("=")[0] in COMMON


def _with_common(name: str, variant: Variant, options: list[str]) -> Variant:
    """A variant with what every variant may have of its own."""
    given = [option.partition("=") for option in options]
    try:
        own: dict[str, Any] = {COMMON[key]: float(value) for key, _, value in given}
        if own.keys() & {"after", "rewarm"} and variant.grow is None:
            raise ValueError("after= and rewarm= are for a model that grows")
        return replace(variant, name=name, **own)
    except ValueError as error:
        raise ReplfxError(f"variant {name!r}: {error}") from error


def _timed(name: str, method: str, other: str) -> Variant:
    """Full for as long as the other takes, or the other for as long as full takes."""
    if not other:
        raise ReplfxError(f"variant {name!r}: say which other, as in {method}:{TIMED[method]}=removed")
    found = variant_of(other)
    if found.as_long_as is not None:
        raise ReplfxError(f"variant {name!r}: {other} fills a time itself")
    if ":late=" in other:
        raise ReplfxError(f"variant {name!r}: what {other} costs after its change is not measured beforehand")
    if method == "same-time":
        return Variant(name, lambda model, example: model, as_long_as=other)
    return replace(found, name=name, as_long_as="full", made_as=other)


def policy_of(options: Options) -> dict[str, Any]:
    """The options of `replfx.transform` that say which blocks are replaced."""
    policy: dict[str, Any] = {}
    for key, value in options.items():
        if key == "select":
            policy[key] = value.split(",")
        elif key == "every":
            policy[key] = int(value)
        elif key == "fraction":
            policy[key] = float(value)
        elif key == "keep":
            policy[key] = int(value) if value.isdecimal() else float(value)
        else:
            raise ValueError(f"there is no option {key}; there are select, every, fraction, keep")
    return policy


def chosen_blocks(model: nn.Module, example: ExampleInputs, options: Options) -> list[str]:
    """Paths of the blocks that replfx would replace, which the bounds and the peers act on too."""
    return [r.path for r in replfx.plan(model, example, **policy_of(options)).replacements]


def chosen_with_like(model: nn.Module, example: ExampleInputs, options: Options) -> list[tuple[str, str]]:
    """The same, each with the path of the neighbour whose parameters have its shapes, the one before if both have.

    Raises:
        ValueError: neither neighbour has them.

    """
    found = []
    for r in replfx.plan(model, example, **policy_of(options)).replacements:
        wanted = sharing.shapes(model.get_submodule(r.path))
        like = [p for p in (r.previous, r.next) if p and sharing.shapes(model.get_submodule(p)) == wanted]
        if not like:
            raise ValueError(f"{r.path} has no neighbour with parameters of its shapes")
        found.append((r.path, like[0]))
    return found


def all_blocks(model: nn.Module, example: ExampleInputs) -> list[str]:
    """Paths of all blocks of all chains."""
    return [path for chain in replfx.inspect(model, example).chains for path in chain]


# ---- the methods


def _no_options(options: Options) -> None:
    if options:
        raise ValueError(f"it has no options, so not {', '.join(options)}")


def _full(name: str, options: Options) -> Variant:
    """Full depth all along; `at=0.2` marks where `after=` and `rewarm=` count from, as a control for what grows."""
    rest = dict(options)
    at = rest.pop("at", None)
    _no_options(rest)
    made = Variant(name, lambda model, example: model)
    return made if at is None else replace(made, grow=lambda model, *_: model, grows_at=(float(at),))


def _removed(name: str, options: Options) -> Variant:
    policy_of(options)
    return Variant(name, lambda model, example: removed(model, chosen_blocks(model, example, options)))


def removed(model: nn.Module, paths: list[str]) -> nn.Module:
    """Delete blocks; of one that changes its activation's shape the shortcut stays."""
    for path in paths:
        model.set_submodule(path, skipped(model.get_submodule(path)))
    return model


def _replfx(name: str, options: Options) -> Variant:
    operator, _, fusion = name.partition(":")[0].partition("+")
    register_trial(operator)
    register_trial(fusion)
    rest = dict(options)
    gradient = float(rest.pop("neighbour_gradient", 1.0))
    made_by = {"name": fusion, "initial": float(rest.pop("initial"))} if "initial" in rest else fusion
    unrolled, late, shared = (rest.pop(key, None) for key in ("unroll", "late", "share"))
    start: Any = rest.pop("start", "outputs")
    moments = rest.pop("moments", "carried")
    policy = policy_of(rest)

    def prepare(model: nn.Module, example: ExampleInputs, operator: str = operator) -> nn.Module:
        return connect_trials(
            replfx.transform(
                model, example, operator=operator, fusion=made_by, neighbour_gradient=gradient, inplace=True, **policy
            )
        )

    def replaced(
        model: nn.Module, optimizer: Optimizer, example: ExampleInputs, times: int, operator: str = operator
    ) -> nn.Module:
        made = prepare(model, example, operator)
        _follow(optimizer, made)
        return made

    if unrolled is not None and late is not None:
        raise ValueError("unroll= and late= are two schedules: give one")
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments}: there are {', '.join(MOMENTS)}")
    if late is not None:
        return Variant(name, lambda model, example: model, grow=replaced, grows_at=(float(late),))
    if unrolled is None:
        return Variant(name, prepare)
    unroll_at = tuple(float(share) for share in unrolled.split(","))
    share_at = () if shared is None else (float(shared),)

    def grow(model: nn.Module, optimizer: Optimizer, example: ExampleInputs, times: int) -> nn.Module:
        if times > len(unroll_at):
            return replaced(replfx.unroll(model, start="copies"), optimizer, example, times, operator="block")
        return _unrolled(model, optimizer, example, times, start=start, moments=moments)

    return Variant(name, prepare, grow=grow, grows_at=(*share_at, *unroll_at))


def _unrolled(
    model: nn.Module, optimizer: Optimizer, example: ExampleInputs, times: int, *, start: Any, moments: str
) -> nn.Module:
    """Unroll the blocks that are due, where this many growths are left: as `replfx.Schedule` does with several."""
    plan = replfx.plan_of(model)
    assert plan is not None
    known = set(model.parameters())
    due = [r.path for r in plan.replacements][::times]
    mixed = mixed_moments(model, optimizer, due) if moments == "mixed" else {}
    model = replfx.unroll(model, optimizer, example, blocks=due, start=start)
    for parameter in set(model.parameters()) - known if moments == "none" else ():
        optimizer.state.pop(parameter, None)
    for name, (first, second) in mixed.items():
        optimizer.state[model.get_parameter(name)].update(exp_avg=first, exp_avg_sq=second)
    return model


def mixed_moments(model: nn.Module, optimizer: Optimizer, blocks: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Adam's moments for what is synthesised, by its names: a·m + b·m' and a²·v + b²·v' of the neighbours' moments.

    As θ itself is mixed, and as the variance of a sum of independent gradients would be.
    """
    found, syntheses = {}, syntheses_of(model)
    for path in blocks:
        synthesis = syntheses[path]
        assert isinstance(synthesis.fusion, LinearFusion)
        a, b = (synthesis.fusion.parts(v.detach()) for v in (synthesis.fusion.previous, synthesis.fusion.next))
        for name in a:
            one, other = (optimizer.state[side[name]] for side in synthesis.counterparts())
            x, y = (along_first(part[name], one["exp_avg"]) for part in (a, b))
            first = x * one["exp_avg"] + y * other["exp_avg"]
            found[f"{path}.{name}"] = first, x**2 * one["exp_avg_sq"] + y**2 * other["exp_avg_sq"]
    return found


def _follow(optimizer: Optimizer, model: nn.Module) -> None:
    """Let the optimizer hold the model's parameters as they are now: forget what is gone, and take what is new."""
    there = dict.fromkeys(p for p in model.parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        for gone in [p for p in group["params"] if p not in there]:
            optimizer.state.pop(gone, None)
        group["params"] = [p for p in group["params"] if p in there]
    known = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.param_groups[0]["params"] += [p for p in there if p not in known]


def _rule2024(name: str, options: Options) -> Variant:
    """The 2024 rule as published: two scalars a layer, one of every four layers (arXiv 2410.01239)."""
    return replace(_replfx("block+scalar_layer", {"every": "4", **options}), name=name)


def _stochastic_depth(name: str, options: Options) -> Variant:
    last = dropping.survival(options, default=0.5)
    return Variant(name, lambda model, example: dropping.stochastic_depth(model, all_blocks(model, example), last))


def _layerdrop(name: str, options: Options) -> Variant:
    kept = dropping.survival(options, default=0.8)
    return Variant(name, lambda model, example: dropping.layerdrop(model, all_blocks(model, example), kept))


def _sharing(name: str, options: Options) -> Variant:
    if not options:
        return Variant(name, lambda model, example: sharing.share_all(model, all_blocks(model, example)))
    rest = dict(options)
    unshare = rest.pop("unshare", None)
    policy_of(rest)
    made = Variant(
        name, lambda model, example: sharing.share_with_neighbours(model, chosen_with_like(model, example, rest))
    )
    if unshare is None:
        return made
    return replace(
        made, grow=lambda model, optimizer, *_: sharing.unshare(model, optimizer), grows_at=(float(unshare),)
    )


def _stacking(name: str, options: Options) -> Variant:
    """Progressive stacking (Gong et al., ICML 2019), which is what replfx does with blocks that were left out."""
    rest = dict(options)
    grown = {"unroll": rest.pop("at", "0.5"), "start": "copies"}
    policy_of(rest)
    return replace(_replfx("identity+scalar", {**rest, **grown}), name=name)


def _checkpointing(name: str, options: Options) -> Variant:
    _no_options(options)
    return Variant(name, lambda model, example: checkpointing.checkpointed(model, all_blocks(model, example)))


COMMON = {"lr": "learning_rate", "length": "length", "after": "after", "rewarm": "rewarm", "decay": "decay"}
"""Options of every variant, and the fields that they set."""

MOMENTS = ("carried", "mixed", "none")
"""What Adam's moments of new parameters start as: as `replfx.unroll` makes them, `mixed_moments`, or nothing."""

TIMED = {"same-time": "as", "full-time": "of"}
"""Methods whose number of steps follows from measured costs, and the option that names the other variant."""

METHODS: dict[str, Callable[[str, Options], Variant]] = {
    "full": _full,
    "removed": _removed,
    "rule2024": _rule2024,
    "stochastic-depth": _stochastic_depth,
    "layerdrop": _layerdrop,
    "sharing": _sharing,
    "stacking": _stacking,
    "checkpointing": _checkpointing,
}
