"""calibrate: watch the original model on batches, and fit the replaced blocks of its transformed twin."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from replfx.calibration.fits import Fit, fit_for
from replfx.errors import CalibrationError
from replfx.live import synthesis_of
from replfx.modules.paths import block_at, is_region
from replfx.modules.tree import tensors_in, with_tensors
from replfx.rewrite.state import placed_blocks

__all__ = ["calibrate"]

_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], object]
"""Copies of a block's arguments, and of what it gave for them: a block may write into its input."""


def calibrate(model: nn.Module, original: nn.Module, loader: Iterable[object], *, progress: bool = True) -> None:
    """Start the replaced blocks of a transformed model where they best imitate the blocks that they were.

    `original` runs over the loader once, in evaluation mode and without gradients; the coefficients of each replaced
    block (and the light operator's gain and bias) are then set by least squares in float64 (`replfx.calibration.fits`
    has the formulas, which are ours). Memory is bounded by what one batch takes. On the first batch each layer is held
    against its start, and goes back to it if that imitates the block better.

    Args:
        model: what `replfx.transform` made of `original`; changed in place.
        original: the untransformed model, with its pretrained weights; stays as it is.
        loader: gives batches: a tensor, a dict of keyword inputs, or a sequence whose first item is the input, as data
            loaders give (images, labels). They are moved to the model's device.
        progress: show a progress bar.

    Raises:
        CalibrationError: the loader gives no batch, or something that the model does not take; activations that are
            not finite; a plan whose blocks are no modules; a model that was not made of `original`. The model is left
            as it was.

    Example:
        >>> model = replfx.transform(pretrained, images, operator="light")
        >>> replfx.calibrate(model, pretrained, loader)
    """
    root, placed = placed_blocks(model)
    pairs = {path: (at.synthesis, _block(original, path)) for path, at in placed.items()}
    fits = {path: fit for path, (layer, block) in pairs.items() if (fit := fit_for(layer, block)) is not None}
    first: dict[str, _Call] = {}
    replaced = {path: block_at(root, path) for path in placed}
    with _evaluating(original), _evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for path, (_, block) in pairs.items():
            for handle in _watch(path, block, fits.get(path), first):
                hooks.enter_context(handle)
        _run(original, loader, progress)
    with torch.no_grad():
        for path, fit in fits.items():
            if path in first:
                _fit_or_keep(fit, first[path], replaced[path])


def _block(original: nn.Module, path: str) -> nn.Module:
    if is_region(path):
        raise CalibrationError(f"`{path}` is no module but a piece of the graph, which cannot be watched")
    try:
        block = block_at(original, path)
    except AttributeError:
        block = None
    if block is None or synthesis_of(block) is not None:
        raise CalibrationError(f"the original model has no block `{path}`: give the untransformed model")
    return block


def _watch(path: str, block: nn.Module, fit: Fit | None, first: dict[str, _Call]) -> list[RemovableHandle]:
    """Show a block's calls to its fit, and keep the first."""
    given: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(with_tensors((args, kwargs), Tensor.clone))

    def after(_: nn.Module, __: object, output: object) -> None:
        if not all(bool(t.isfinite().all()) for t in tensors_in(output) if t.is_floating_point()):
            raise CalibrationError(
                f"what `{path}` gives for a batch of the loader is not finite; leave such batches out"
            )
        args, kwargs = given.pop()
        if fit is not None:
            fit.see(args, kwargs, output)
        if path not in first:
            first[path] = args, kwargs, with_tensors(output, Tensor.clone)

    within = fit.watch() if fit is not None else []
    return [
        *within,
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]


def _run(model: nn.Module, loader: Iterable[object], progress: bool) -> None:
    from rich.progress import Progress

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("calibrating", total=length_hint(loader) or None)
        for count, batch in enumerate(loader, 1):
            args, kwargs = _call_of(batch, device)
            try:
                model(*args, **kwargs)
            except CalibrationError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"{type(model).__name__} does not take batch {count} of the loader ({type(error).__name__}: "
                    f"{error}); give a tensor, a dict of keyword inputs, or a sequence whose first item is the input"
                ) from error
            bar.advance(task)
    if count == 0:
        raise CalibrationError("the loader gave no batch; an iterator that was used before is empty")


def _call_of(batch: object, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    batch = with_tensors(batch, lambda tensor: tensor.to(device))
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def _fit_or_keep(fit: Fit, seen: _Call, block: nn.Module) -> None:
    """Fit what a replaced block synthesises with, unless it imitated the block better before."""
    start = {name: value.clone() for name, value in fit.layer.state_dict().items()}
    before = _error(fit, seen, block)
    fit.finish()
    if not _error(fit, seen, block) < before:
        fit.layer.load_state_dict(start)


def _error(fit: Fit, seen: _Call, block: nn.Module) -> float:
    """Squared distance of its activation from the block's, in evaluation mode."""
    main_of = fit.layer.operator.interface.main_of
    args, kwargs = with_tensors(seen[:2], Tensor.clone)
    with _evaluating(block):
        given = main_of(block(*args, **kwargs))
    return float((given.double() - main_of(seen[2]).double()).square().sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
