"""What a model without modules computes once some of its layers are replaced, by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from tests.reference.alignment import align, split_gains
from tests.reference.blocks import ALL, Tensors
from tests.reference.heterogeneous import Spot, parts_of
from tests.reference.model import _fuse, _scaled
from tests.support.functional import Functional, Spec

__all__ = ["reference_run", "spots_of"]


def _untouched(spec: Spec) -> Functional:
    with torch.random.fork_rng():  # the random numbers that come next are dropout's
        return Functional(spec)


def spots_of(spec: Spec, *, measured: bool) -> list[Spot]:
    """The layers, in the order in which they run; without measured shapes nobody sees a change of them."""
    found = []
    for paths, before, after in zip(_untouched(spec).paths, spec.widths, spec.widths[1:], strict=False):
        first = next(iter(paths.values()))
        member = "replaced_" + first.replace(".", "_")
        found.append(Spot(f"@{first}", (member,), measured and before != after, False, (before, after)))
    return found


def reference_run(
    spec: Spec,
    replaced: Sequence[int],
    tensors: Tensors,
    inputs: tuple[Tensor, ...],
    *,
    fusion: str,
    neighbour_gradient: float,
    training: bool,
) -> Tensor:
    """The output of the model whose layers `replaced` are replaced.

    Args:
        spec: what the model is.
        replaced: positions of layers.
        tensors: the state of the transformed model, by its names.
        inputs: the model's.
        fusion, neighbour_gradient, training: as for `replfx.transform`.
    """
    plain, spots = _untouched(spec).to(inputs[0].dtype).train(training), spots_of(spec, measured=True)
    shapes = [{role: plain.get_parameter(path).shape for role, path in paths.items()} for paths in plain.paths]
    state = {name: t for name, t in tensors.items() if name in plain.state_dict()}
    for i in replaced:
        parts, roles = parts_of(tensors, spots[i]), list(plain.paths[i])
        targets = {role: tuple(shape) for role, shape in shapes[i].items() if len(shape) >= 2}
        aligned = []
        for j, name in ((i - 1, "gains_before"), (i + 1, "gains_after")):
            theirs = {role: _scaled(tensors[plain.paths[j][role]], neighbour_gradient) for role in targets}
            gains = split_gains(parts.get(name), {role: tuple(t.shape) for role, t in theirs.items()}, targets)
            aligned.append({role: align(t, gains[role], targets[role], "matrix") for role, t in theirs.items()})
        made = _fuse(parts["a"], parts["b"], *aligned, dict.fromkeys(targets, ALL), fusion, 1.0)
        own = {role: parts[f"own.p{n}"] for n, role in enumerate(roles) if role not in targets}
        state.update({plain.paths[i][role]: t for role, t in {**made, **own}.items()})
    return functional_call(plain, state, inputs, strict=True)
