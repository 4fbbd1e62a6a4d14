"""Names that a reader of a plot understands, for those that commands and files use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["model", "setting", "subject", "variant"]

_MODELS = {
    "vit_s": "ViT-S/16",
    "vit_b": "ViT-B/16",
    "vit_l": "ViT-L/16",
    "resnet50": "ResNet-50",
    "resnet110": "ResNet-110",
    "resnet152": "ResNet-152",
    "convnext_t": "ConvNeXt-T",
    "gpt": "GPT, 12 blocks of width 384",
    "gpt2": "GPT, 12 blocks of width 768",
    "gpt_1024": "GPT, 1,024 blocks",
    "recorded_1024": "1,024 recorded blocks",
    "windows_1024": "1,024 windows of a Sequential",
    "regions_1024": "1,024 regions of a loop",
}
_TASKS = {
    "cifar10-resnet20": "A ResNet on CIFAR-10",
    "cifar10-resnet32": "A ResNet on CIFAR-10",
    "cifar10-resnet110": "A ResNet on CIFAR-10",
    "cifar10-vit": "A ViT on CIFAR-10",
    "cifar10-convnext": "A ConvNeXt on CIFAR-10",
    "fashion-mnist": "A ResNet on Fashion-MNIST",
    "wikitext2": "A GPT on WikiText-2's words",
    "wikitext2-bytes": "A GPT on WikiText-2's bytes",
    "bytes-narrow": "A narrow GPT on WikiText-2's bytes",
    "bytes-narrow-scaled": "A narrow GPT on WikiText-2's bytes, small initial weights",
    "python-bytes": "A narrow GPT on Python's sources",
    "python-bytes-scaled": "A narrow GPT on Python's sources, small initial weights",
    "svhn": "A ResNet on SVHN",
    "stl10": "A ResNet on STL-10",
    "imagenet": "ResNet-50 on ImageNet",
    "camvid-fcn": "An FCN on CamVid",
    "cityscapes": "An FCN on Cityscapes",
    "bccd-fcos": "FCOS on BCCD",
    "coco": "FCOS on COCO",
    "turns": "A ResNet on CIFAR-10, two blocks replaced",
}
_METHODS = {
    "full": "full depth",
    "removed": "blocks removed",
    "rule2024": "rule of 2024",
    "stochastic-depth": "stochastic depth",
    "layerdrop": "LayerDrop",
    "sharing": "weights tied",
    "checkpointing": "activation checkpointing",
    # of other commands
    "full compiled": "full depth, compiled",
    "eager full": "full depth, eager",
    "eager replfx": "replaced, eager",
    "Inductor full": "full depth, Inductor",
    "Inductor removed": "blocks removed, Inductor",
    "Inductor replfx": "replaced, Inductor",
    "backend replfx": "replaced, replfx's backend",
    "kernels replfx": "replaced, replfx's kernels",
}
_FUSIONS = ("scalar", "scalar_layer", "channel")


def _percent(share: str) -> str:
    return f"{100 * float(share):g} %"


def _percents(shares: str) -> str:
    return ", ".join(map(_percent, shares.split(",")))


def _ordinal(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")


_OPTIONS: dict[str, Callable[[str], str]] = {
    "unroll": lambda value: f"unrolled at {_percents(value)}",
    "at": lambda value: f"grown at {_percents(value)}",
    "share": lambda value: f"shared from {_percent(value)}",
    "unshare": lambda value: f"no more from {_percent(value)}",
    "late": lambda value: f"replaced at {_percent(value)}",
    "select": lambda value: value.replace(",", ", "),
    "every": lambda value: f"every {_ordinal(int(value))} block",
    "fraction": lambda value: f"{_percent(value)} of the blocks",
    "keep": lambda value: f"{value if value.isdecimal() else _percent(value)} of the blocks kept",
    "lr": lambda value: f"learning rate {float(value):g}",
    "length": lambda value: f"{_percent(value)} of the steps",
    "after": lambda value: f"rate × {float(value):g} once grown",
    "rewarm": lambda value: f"warmed up once more for {_percent(value)}",
    "moments": lambda value: f"moments {value}",
    "neighbour_gradient": lambda value: (
        "neighbours get no gradient" if float(value) == 0 else f"neighbours' gradient × {float(value):g}"
    ),
    # of a task's recipe
    "schedule": lambda value: f"{value} schedule",
    "steps": lambda value: f"{int(value):,} steps",
    "batch": lambda value: f"batch {value}",
    "learning_rate": lambda value: f"learning rate {float(value):g}",
}


def model(name: str) -> str:
    """A model that is measured.

    Example:
        >>> model("vit_s")
        'ViT-S/16'
    """
    return _MODELS.get(name, name)


def setting(config: Mapping[str, object]) -> str:
    """On what was measured, and which blocks were replaced.

    Example:
        >>> setting({"device": "cpu", "every": 2})
        'CPU, every 2nd block replaced'
    """
    return f"{str(config['device']).upper()}, every {_ordinal(int(str(config['every'])))} block replaced"


def subject(name: str) -> str:
    """A task at a budget, with what of its recipe was changed.

    Example:
        >>> subject("cifar10-resnet32/small,steps=6000")
        'A ResNet on CIFAR-10 (cifar10-resnet32, small budget, 6,000 steps)'
    """
    task, _, budget = name.partition("/")
    budget, *settings = budget.split(",")
    return f"{_TASKS.get(task, task)} ({', '.join([task, f'{budget} budget', *map(_option, settings)])})"


def variant(name: str) -> str:
    """How the blocks were replaced, as the command that measured it names it.

    Example:
        >>> variant("block+scalar:unroll=0.2")
        'block, unrolled at 20 %'
        >>> variant("same-time:as=light+channel")
        'full depth in the time of: light · channel'
        >>> variant("block materialized INT8")
        'block, materialized, INT8'
    """
    for method, option in (("same-time", "as"), ("full-time", "of")):
        other = name.removeprefix(f"{method}:{option}=")
        if other != name:
            return (
                f"full depth in the time of: {variant(other)}"
                if option == "as"
                else f"in full's time: {variant(other)}"
            )
    method, *options = name.split(":")
    return ", ".join([_method(method), *map(_option, options)])


def _method(name: str) -> str:
    if name in _METHODS:
        return _METHODS[name]
    operator, plus, fusion = name.partition("+")
    if plus:
        return operator if fusion == "scalar" else f"{operator} · {fusion}"
    operator, _, rest = name.partition(" ")
    fusion, _, once = rest.partition(", ")
    if fusion in _FUSIONS:
        return f"{operator} · {fusion}{', made once a step' if once else ''}"
    return ", ".join(name.split())


def _option(text: str) -> str:
    key, _, value = text.partition("=")
    return _OPTIONS[key](value) if key in _OPTIONS else f"{key} {value}"
