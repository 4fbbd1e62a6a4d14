"""How a replaced block is fitted to the block that it was. All formulas are ours."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from replfx.calibration.grams import Gram, solve
from replfx.calibration.sides import Sides
from replfx.live import Synthesis
from replfx.operators.base import BlockOperator
from replfx.operators.light import LightOperator
from replfx.torch_internals import BatchNorm, convolve

__all__ = ["BlockFit", "Fit", "LightFit", "fit_for"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Fit:
    """Watches the replaced block at work, and then sets what the synthesis has of its own.

    Args:
        layer: the synthesis of the replaced block.
        block: the block that it replaces, in the original model.
        sides: what the layer synthesises from.
    """

    def __init__(self, layer: Synthesis, block: nn.Module, sides: Sides) -> None:
        self.layer, self.block, self.sides = layer, block, sides

    def watch(self) -> list[RemovableHandle]:
        """Begin to collect what runs within the block; the hooks to be removed at the end."""
        return []

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Collect what the block was given, as it was, and what it gave."""

    def finish(self) -> None:
        """Set the parameters."""
        raise NotImplementedError


def fit_for(layer: Synthesis, block: nn.Module) -> Fit | None:
    """The way to fit a layer; None if there is none for its operator or its fusion."""
    sides = Sides.of(layer)
    if sides is None:
        return None
    if isinstance(layer.operator, BlockOperator):
        return BlockFit(layer, block, sides)
    return LightFit(layer, block, sides) if isinstance(layer.operator, LightOperator) else None


class BlockFit(Fit):
    """Each synthesised map by itself: a and b that minimise Σ |a·θ_prev h + b·θ_next h − θ h|² over its inputs h.

    θ is the replaced block's own weight. A weight of something else than a linear layer or a convolution (or of one
    that does not run as a module) is fitted as it is: the same with h running over unit vectors.
    """

    def watch(self) -> list[RemovableHandle]:
        self._grams = {name: Gram() for name in self.layer.operator.sources}
        handles = []
        for name in self._grams:
            path, _, leaf = name.rpartition(".")
            owner = self.block.get_submodule(path)
            if leaf == "weight" and isinstance(owner, nn.Linear | _Convolution):
                handles.append(owner.register_forward_pre_hook(partial(self._add, name)))
        return handles

    def _add(self, name: str, owner: nn.Module, args: tuple[Any, ...]) -> None:
        self._grams[name].add([_rows(_response(owner, weight, args[0]), owner) for weight in self._weights(name)])

    def _weights(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.sides.previous[name], self.sides.next[name], self.block.get_parameter(name)

    def finish(self) -> None:
        sums = {name: self._sums(name) for name in self._grams}
        if self.sides.common:
            common = solve(torch.stack([each.sum(0) for each in sums.values()]).sum(0))
            self.sides.assign(next(iter(sums)), common)
            return
        for name, each in sums.items():
            self.sides.assign(name, solve(each if self.sides.by_channel else each.sum(0)))

    def _sums(self, name: str) -> Tensor:
        gram = self._grams[name]
        if gram.sums is None:  # it never ran as a module
            gram.add([weight.detach().flatten(1).t() for weight in self._weights(name)])
        assert gram.sums is not None
        return gram.sums


def _response(owner: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """What the layer gives with another weight, and no bias."""
    if isinstance(owner, nn.Linear):
        return F.linear(inputs, weight)
    assert isinstance(owner, _Convolution)
    return convolve(owner, inputs, weight)


def _rows(values: Tensor, owner: nn.Module) -> Tensor:
    """(rows, channels): a convolution's channels come after the batch, if it has one."""
    if isinstance(owner, _Convolution):
        spatial = len(owner.kernel_size)
        return values.movedim(-spatial - 1, -1).flatten(0, -2)
    return values.flatten(0, -2)


class LightFit(Fit):
    """The light operator's last map, with its gain and bias, to the block's own residual branch r = y − x.

    Per output channel c, r_c ≈ g_c (a z_prev,c + b z_next,c) + t_c, where z are what the two sides of the map give
    (its first one, if it has two, is synthesised as it stands). With a and b of each channel's own that is one
    least-squares problem a channel; else a and b come first, for all channels together, and then g and t. Where
    the normalisation follows the map and is a BatchNorm, its statistics become those of the map's results. After
    another normalisation only g and t are fitted. Behind a ReLU only places that are not cut off are counted.
    """

    def __init__(self, layer: Synthesis, block: nn.Module, sides: Sides) -> None:
        super().__init__(layer, block, sides)
        operator = layer.operator
        assert isinstance(operator, LightOperator)
        self.operator, self.gram = operator, Gram()
        self.after = None if operator.recipe.norm_first else operator.norm
        self.name = operator.recipe.maps[-1]
        self.cut = _cuts(operator.activation)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = self.operator.interface.activation(args, kwargs)
        y = self.operator.interface.main_of(output)
        columns = [self._flat(column) for column in (*self._regressors(x), y - x)]
        weights = self._flat(y > 0) if self.cut else None
        self.gram.add([*columns[:-1], torch.ones_like(columns[0]), columns[-1]], weights)

    def _regressors(self, x: Tensor) -> list[Tensor]:
        theta = self.layer.synthesized()
        if self._is_fixed():
            return [self.operator.mapped(x, theta, normalised=True)]
        return [
            self.operator.mapped(x, {**theta, self.name: side[self.name]}, normalised=False)
            for side in (self.sides.previous, self.sides.next)
        ]

    def _is_fixed(self) -> bool:
        """Whether a and b stay: their effect goes through a normalisation that mixes channels."""
        return self.after is not None and not isinstance(self.after, BatchNorm)

    def _flat(self, values: Tensor) -> Tensor:
        return values.flatten(0, -2) if self.operator.linear else values.movedim(1, -1).flatten(0, -2)

    def finish(self) -> None:
        sums = self.gram.sums
        assert sums is not None
        if self._is_fixed():
            self._put_after(*solve(sums).unbind(-1))
            return
        if self.sides.by_channel:
            self.sides.assign(self.name, solve(sums)[:, :2])
        elif not (self.sides.common and len(self.operator.recipe.maps) > 1):  # else the first map would change too
            self.sides.assign(self.name, solve(_centred(sums).sum(0)))
        self._fit_gain(sums)

    def _fit_gain(self, sums: Tensor) -> None:
        """Of z = a z_prev + b z_next as it is now: slope and shift per channel."""
        rule = self.sides.rule
        a, b = (rule.parts(vector)[self.name].detach().double() for vector in (rule.previous, rule.next))
        # (z, 1, r) from (z_prev, z_next, 1, r)
        change = torch.zeros(len(sums), 3, 4, dtype=torch.float64, device=sums.device)
        change[:, 0, 0], change[:, 0, 1] = a, b
        change[:, 1, 2] = change[:, 2, 3] = 1
        reduced = change @ sums @ change.mT
        slope, shift = solve(reduced).unbind(-1)
        if self.after is None:
            _put(self.operator, slope, shift, "gain")
            return
        count = reduced[:, 1, 1].clamp_min(1)
        mean = reduced[:, 0, 1] / count
        variance = (reduced[:, 0, 0] / count - mean**2).clamp_min(0)
        norm = self.after
        assert isinstance(norm, BatchNorm)
        with torch.no_grad():
            if norm.running_mean is not None and norm.running_var is not None:
                bias = getattr(self.operator.map, "bias", None)  # which z has not
                norm.running_mean.copy_(mean if bias is None else mean + bias)
                norm.running_var.copy_(variance)
        _put(norm, slope * (variance + norm.eps).sqrt(), shift + slope * mean)

    def _put_after(self, slope: Tensor, shift: Tensor) -> None:
        """Of what the normalisation gives now."""
        norm = self.after
        assert norm is not None
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        _put(norm, slope if weight is None else slope * weight, shift if bias is None else slope * bias + shift)


def _put(holder: nn.Module, gain: Tensor, shift: Tensor, name: str = "weight") -> None:
    """Set what there is of a gain and a bias."""
    for leaf, value in ((name, gain), ("bias", shift)):
        parameter = getattr(holder, leaf, None)
        if isinstance(parameter, Tensor):
            with torch.no_grad():
                parameter.copy_(value)


def _centred(sums: Tensor) -> Tensor:
    """(channels, 3, 3) of (z_prev, z_next, r) less their means, from (z_prev, z_next, 1, r)."""
    keep = [0, 1, 3]
    means = sums[:, keep, 2:3]
    count = sums[:, 2:3, 2:3].clamp_min(1)
    return sums[:, keep][:, :, keep] - means @ means.mT / count


def _cuts(activation: Any) -> bool:
    """Whether it is a ReLU: what it lets through it leaves alone, and the rest is gone."""
    return activation is not None and torch.equal(activation(torch.tensor([-1.0, 0.5])), torch.tensor([0.0, 0.5]))
