"""The command line: `python -m replfx {inspect, demo}`."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import replfx
from replfx import demo
from replfx.errors import ReplfxError
from replfx.fusion.registry import AUTO
from replfx.tracing import ExampleInputs

__all__ = ["main"]

_SMALLEST_BATCH = 2  # BatchNorm in training mode refuses a batch of one


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 after a ReplfxError, 2 for a wrong call."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ReplfxError as error:
        print(f"replfx: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replfx", description="Train deep networks with fewer of their blocks.")
    parser.add_argument("--version", action="version", version=f"replfx {replfx.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    inspecting = commands.add_parser(
        "inspect",
        help="print a model's chains, what each block costs, what would be replaced and what that saves",
        description="Print a model's chains, what each block costs, what would be replaced and what that saves.",
    )
    _add_inspect_arguments(inspecting)
    inspecting.set_defaults(run=_inspect)
    showing = commands.add_parser(
        "demo",
        help="train two models whole, with fusion layers, and with the replaced blocks deleted",
        description="Train two models whole, with fusion layers, and with the replaced blocks deleted.",
    )
    demo.add_arguments(showing)
    showing.set_defaults(run=demo.run)
    return parser


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="timm:NAME, torchvision:NAME, or package.module:FACTORY (called without arguments)"
    )
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--every", type=int, metavar="K", help="replace blocks K, 2K, … of each chain (default: 2)")
    policy.add_argument("--fraction", type=float, metavar="F", help="replace this part of each chain")
    policy.add_argument("--select", action="append", metavar="GLOB", help="replace these blocks (may be repeated)")
    parser.add_argument(
        "--split-at", action="append", metavar="PATH", help="a pipeline stage begins with this module (may be repeated)"
    )
    parser.add_argument("--fusion", default=AUTO, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--operator", default=AUTO, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--input",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of the float input (default: the model's own, with batch 2); for a factory: none",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write it as 2,3,224,224") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a dimension under 1")
    return shape


def _inspect(args: argparse.Namespace) -> int:
    model, shape = _build(args.model)
    shape = args.input or shape
    inputs: ExampleInputs | None = None if shape is None else torch.rand(shape)
    report = replfx.inspect(
        model,
        inputs,
        every=args.every,
        fraction=args.fraction,
        select=args.select,
        split_at=args.split_at,
        fusion=args.fusion,
        operator=args.operator,
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(report)
    return 0


def _build(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model that a name on the command line means, with random weights, and its input shape if known."""
    source, colon, rest = name.partition(":")
    if not colon or not rest:
        raise ReplfxError(f"{name!r} names no model: write timm:NAME, torchvision:NAME or package.module:FACTORY")
    builders: dict[str, Callable[[str], tuple[nn.Module, tuple[int, ...] | None]]] = {
        "timm": _from_timm,
        "torchvision": _from_torchvision,
    }
    return builders[source](rest) if source in builders else _from_factory(source, rest)


def _from_timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    timm = _extra("timm")
    if not timm.is_model(name):
        raise ReplfxError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    return model, (_SMALLEST_BATCH, *size)


def _from_torchvision(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    models = _extra("torchvision.models")
    if name not in models.list_models():
        raise ReplfxError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    backbone = {"weights_backbone": None} if name in _with_backbone(models) else {}
    model: nn.Module = models.get_model(name, weights=None, **backbone)
    if name in models.list_models(models.detection):
        raise ReplfxError(
            f"{name} takes a list of images; call replfx.inspect(model, (images, targets)) from Python instead"
        )
    video = name in models.list_models(models.video)
    return model, (_SMALLEST_BATCH, 3, 16, 224, 224) if video else (_SMALLEST_BATCH, 3, _side(name), _side(name))


def _with_backbone(models: Any) -> set[str]:
    return {*models.list_models(models.detection), *models.list_models(models.segmentation)}


def _side(name: str) -> int:
    return 299 if name.startswith("inception") else 224


def _from_factory(module: str, name: str) -> tuple[nn.Module, None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ReplfxError(f"cannot import {module!r}: {error}") from error
    finally:
        sys.path.pop(0)
    factory = getattr(found, name, None)
    if not callable(factory):
        raise ReplfxError(f"{module!r} has no callable {name!r}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ReplfxError(f"{module}:{name} gave {type(model).__name__}, not a torch.nn.Module")
    return model, None


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReplfxError(f"this needs {module.partition('.')[0]}: pip install 'replfx[vision]'") from error


def _near(name: str, known: Sequence[str]) -> str:
    """A hint at a name that may have been meant."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return f"; near it: {', '.join(near)}" if near else ""
