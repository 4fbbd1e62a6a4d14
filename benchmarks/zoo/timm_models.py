"""The smallest model and one of middle size of each of timm's families, drawn from its registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.zoo.subject import Subject, Variant

SOURCE = "timm"


def names(store: Path, on_count: Callable[[int, int], object] = lambda done, total: None) -> list[str]:
    """Names of the subjects; parameters are counted once and remembered in a file."""
    counts = _counts(store, on_count)
    families = [
        sorted(timm.list_models(module=family), key=lambda model: (counts[model], model))
        for family in timm.list_modules()
    ]
    smallest, middle = [models[0] for models in families], [models[len(models) // 2] for models in families]
    return [f"{SOURCE}:{model}" for model in dict.fromkeys((*smallest, *middle))]


def subject(name: str) -> Subject:
    """A model by its name, which need not be one of `names`."""
    model = name.partition(":")[2]
    return Subject(name, _families()[model], _variants(model))


@cache
def _families() -> dict[str, str]:
    """Model → the module of timm that it is from."""
    return {model: family for family in timm.list_modules() for model in timm.list_models(module=family)}


def _variants(model: str) -> tuple[Variant, ...]:
    """Smaller images first: a fixed size is asked for when the model is built, any other is just given."""
    config = timm.get_pretrained_cfg(model, allow_unregistered=False)
    if config is None:
        raise LookupError(f"timm has no configuration for {model}")
    channels, usual, _ = config.input_size
    sizes = dict.fromkeys((112, 128, usual // 2) if config.fixed_input_size else (96, 112, 128))  # patches of 14 and 16
    smaller = [
        _variant(model, channels, size, {"img_size": size} if config.fixed_input_size else {})
        for size in sizes
        if size < usual
    ]
    return (*smaller, _variant(model, channels, usual, {}))


def _variant(model: str, channels: int, size: int, options: dict[str, Any]) -> Variant:
    return Variant(f"{size} px", partial(_build, model, options), partial(_images, channels, size))


def _build(model: str, options: dict[str, Any]) -> nn.Module:
    result: nn.Module = timm.create_model(model, pretrained=False, **options)
    return result


def _images(channels: int, size: int) -> Tensor:
    return torch.randn(2, channels, size, size)


def _counts(store: Path, on_count: Callable[[int, int], object]) -> dict[str, int]:
    """Parameters of every model of the registry, counted without memory for them."""
    stored = json.loads(store.read_text()) if store.exists() else {}
    counts: dict[str, int] = stored.get("parameters", {}) if stored.get("timm") == timm.__version__ else {}
    missing = [model for model in timm.list_models() if model not in counts]
    try:
        for done, model in enumerate(missing):
            on_count(done, len(missing))
            with torch.device("meta"), _Undrawn():
                counts[model] = sum(p.numel() for p in timm.create_model(model, pretrained=False).parameters())
    finally:  # it takes minutes: what was counted when someone lost patience need not be counted again
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps({"timm": timm.__version__, "parameters": counts}, indent=1) + "\n")
    return counts


class _Undrawn(TorchFunctionMode):
    """Skips the arithmetic of initial weights, which even on the meta device is more than half of the time."""

    skipped = frozenset(("normal_", "uniform_", "erfinv_", "mul_", "add_", "sub_", "div_", "clamp_", "fill_", "zero_"))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and getattr(func, "__name__", "") in self.skipped:
            return args[0]
        return func(*args, **(kwargs or {}))
