"""What the kernels take; everything else is refused before a kernel reads memory that is not there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from replfx.errors import FusionError

__all__ = ["check_linear", "check_low_rank", "check_syntheses"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_syntheses(
    previous: Sequence[Tensor],
    next: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
) -> None:
    """Refuse what is no list of syntheses.

    Raises:
        FusionError: the lists differ in length, tensors in dtype or device, neighbours in shape, or coefficients are
            neither one nor one a channel.
    """
    lists = {"previous": previous, "next": next, "a": a, "b": b} | ({} if grads is None else {"grads": grads})
    lengths = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(lengths.values())) > 1:
        raise FusionError(f"every synthesis needs one tensor of each list, and the lists have {lengths}")
    _check_alike({f"{name}[{k}]": tensor for name, tensors in lists.items() for k, tensor in enumerate(tensors)})
    for k, theta in enumerate(previous):
        _check_shape(f"next[{k}]", next[k], f"previous[{k}]", theta)
        if grads is not None:
            _check_shape(f"grads[{k}]", grads[k], f"previous[{k}]", theta)
        _check_coefficients(f"a[{k}]", a[k], theta)
        _check_coefficients(f"b[{k}]", b[k], theta)


def check_low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> None:
    """Refuse what `synthesize_low_rank` does not take.

    Raises:
        FusionError: as `check_syntheses`, or U and V are not (out, r) and (in, r).
    """
    check_syntheses([previous], [next], [a], [b])
    _check_alike({"previous": previous, "u": u, "v": v})
    if previous.dim() < 2 or u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[1]:
        raise FusionError(
            f"a low-rank term needs U (out, r), V (in, r) and neighbours (out, in, …), "
            f"not {_of(u)}, {_of(v)} and {_of(previous)}"
        )
    if u.shape[0] != previous.shape[0] or v.shape[0] != previous.shape[1:].numel():
        raise FusionError(
            f"U·Vᵀ would be ({u.shape[0]}, {v.shape[0]}) and the neighbours are {_of(previous)}: give U one row an "
            f"output channel and V one row for each of the {previous.shape[1:].numel()} elements of a channel"
        )


def check_linear(x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Refuse what `synthesized_linear` does not take.

    Raises:
        FusionError: as `check_syntheses`, or x, weights and bias do not fit together.
    """
    check_syntheses([previous], [next], [a], [b])
    _check_alike({"previous": previous, "x": x} | ({} if bias is None else {"bias": bias}))
    if previous.dim() != 2 or x.dim() < 1 or x.shape[-1] != previous.shape[1]:
        raise FusionError(f"x (…, in) goes through weights (out, in), and they are {_of(x)} and {_of(previous)}")
    if bias is not None and bias.shape != previous.shape[:1]:
        raise FusionError(f"the bias is {_of(bias)}; weights {_of(previous)} need one of ({previous.shape[0]},)")


def _of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_alike(named: dict[str, Tensor]) -> None:
    """One floating dtype, one device."""
    if not named:
        return
    name, like = next(iter(named.items()))
    if like.dtype not in _DTYPES:
        raise FusionError(f"{name} is {like.dtype}; the kernels take {', '.join(map(str, _DTYPES))}: cast it first")
    for other, tensor in named.items():
        if tensor.dtype != like.dtype:
            raise FusionError(f"{name} is {like.dtype} and {other} {tensor.dtype}: cast all to one dtype first")
        if tensor.device != like.device:
            raise FusionError(
                f"{name} is on {like.device} and {other} on {tensor.device}: move all to one device first"
            )


def _check_shape(name: str, tensor: Tensor, other: str, theta: Tensor) -> None:
    if tensor.shape != theta.shape:
        raise FusionError(f"{name} is {_of(tensor)} and {other} {_of(theta)}: align them to one shape first")


def _check_coefficients(name: str, coefficients: Tensor, theta: Tensor) -> None:
    if coefficients.dim() <= 1 and (
        coefficients.numel() == 1 or (theta.dim() > 0 and coefficients.shape == theta.shape[:1])
    ):
        return
    channels = f" or {theta.shape[0]} (one an output channel)" if theta.dim() else ""
    raise FusionError(f"{name} is {_of(coefficients)}; for a weight {_of(theta)} it needs 1 element{channels}")
