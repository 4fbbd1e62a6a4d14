"""Pipeline stages: what a replaced block reads has to be in the stage in which it runs."""

from torch import nn

from replfx.errors import FusionError
from replfx.live import Synthesis, syntheses_of
from replfx.torch_internals.distributed import split_points

__all__ = ["check_stage", "refuse_split_points"]


def check_stage(stage: nn.Module) -> None:
    """Make sure that each replaced block of a part of a model has its neighbours in that part.

    A replaced block reads the weights of the kept blocks beside it, and keeps them alive though the model is cut apart.
    If they are in another pipeline stage, it would go on reading a copy that no optimizer trains. A plan made with
    `split_at=` keeps them together. replfx checks a transformed model from which blocks were taken away in its first
    forward pass, and one that `torch.distributed.pipelining.pipeline` parts when it is exported. Call this for a stage
    that you put together yourself.

    Args:
        stage: what one rank runs: a copy of the model without the other ranks' blocks, `nn.Sequential(*blocks[4:])`.

    Raises:
        FusionError: a replaced block whose neighbour is not in the stage, by their names.

    Example:
        >>> model = replfx.transform(model, split_at=["blocks.6"])
        >>> stage = nn.Sequential(*model.blocks[:6]) if rank == 0 else nn.Sequential(*model.blocks[6:])
        >>> replfx.check_stage(stage)
    """
    if not isinstance(stage, nn.Module):
        raise FusionError(f"a stage is a torch.nn.Module, not {type(stage).__name__}")
    # Parameters too: a batch norm that was converted is another module with the parameters of the one before.
    present = {id(part) for part in (*stage.modules(), *stage.parameters())}
    for path, synthesis in syntheses_of(stage).items():
        for reading in synthesis.readings():
            owner = reading.owner()
            if id(owner) not in present and id(reading.tensor()) not in present:
                place = _place(synthesis, owner) or reading.leaf
                raise FusionError(
                    synthesis.neighbour_missing(path, place, "that is not in the model or stage that runs")
                )


def _place(synthesis: Synthesis, owner: nn.Module) -> str | None:
    sides = zip(synthesis.places, synthesis.neighbours, strict=False)
    return next((place for place, side in sides if owner in side.modules()), None)


def refuse_split_points(model: nn.Module) -> None:
    """Refuse what `torch.distributed.pipelining.pipeline` would part.

    It gives each stage that reads a weight a copy of its own, and these are trained apart. Where it is to split it has
    marked the modules; the order of registration stands for the order in which they run.

    Raises:
        FusionError: a marked module lies between a replaced block and its neighbour.
    """
    marks = split_points(model)
    if not marks:
        return
    modules = dict(model.named_modules())
    order = {path: number for number, path in enumerate(modules)}
    for path, layer in syntheses_of(model).items():
        for place, side in zip(layer.places, layer.neighbours, strict=False):
            inner = {id(part) for part in side.modules()}
            within = [name for name, module in modules.items() if id(module) in inner]
            if not within:
                continue
            one, other = sorted([(path, path), (within[0], within[-1])], key=lambda span: order[span[0]])
            for marked, begins in marks.items():
                after_one = order[marked] > order[one[0]] or (not begins and order[marked] >= order[one[0]])
                before_other = order[marked] < order[other[0]] or (begins and order[marked] <= order[other[0]])
                if after_one and before_other:
                    raise FusionError(layer.neighbour_missing(path, place, f"pipeline() would split at `{marked}`"))
