"""The command line: `python -m replfx {inspect, plan, demo}`."""

import argparse
import json
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import replfx
from replfx import demo, interrupted
from replfx.demo import positive
from replfx.errors import ReplfxError
from replfx.fusion.registry import AUTO
from replfx.show import named_models
from replfx.show.named_models import Named, UsersError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 after an error of replfx or in the user's factory; 2 for a wrong call; 130 after Ctrl-C.
    """
    interrupted.raise_from_here_on()
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args))
    except ReplfxError as error:
        print(f"replfx: {error}", file=sys.stderr)
        return 1
    except UsersError as error:
        print(f"replfx: {args.model} raised:\n{_users_frames(error.__cause__)}", file=sys.stderr, end="")
        return 1
    except KeyboardInterrupt:
        print(interrupted.MESSAGE, file=sys.stderr)
        return interrupted.EXIT_STATUS


def _users_frames(error: BaseException | None) -> str:
    """A traceback of the user's files alone: neither replfx's nor those of Python and of installed packages."""
    assert error is not None
    written = traceback.TracebackException.from_exception(error)
    ours = Path(replfx.__file__).parent
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    # A user's folder may lie within Python's, as a virtual environment's does in a project; so by the frame's file.
    kept = [
        frame
        for frame in written.stack
        if not frame.filename.startswith("<")
        and not any(Path(frame.filename).is_relative_to(p) for p in (ours, *installed))
    ]
    written.stack = traceback.StackSummary.from_list(kept)
    return "".join(written.format(chain=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replfx", description="Train deep networks with fewer of their blocks.")
    parser.add_argument("--version", action="version", version=f"replfx {replfx.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    inspecting = commands.add_parser(
        "inspect",
        help="print a model's chains, what each block costs, what would be replaced and what that saves",
        description="Print a model's chains, what each block costs, what would be replaced and what that saves.",
        epilog="Examples: replfx inspect torchvision:resnet50 --draw resnet50.svg; "
        "replfx inspect transformers:gpt2 --config n_layer=6 --compare; "
        "replfx inspect models:build --input 2,64 --tokens 1000 --json",
    )
    _add_inspect_arguments(inspecting)
    inspecting.set_defaults(run=_inspect)
    planning = commands.add_parser(
        "plan",
        help="choose operator and blocks for a budget of memory, time or parameters, and say what to expect",
        description="Choose operator and blocks for a budget, from costs that are measured here; say what to expect.",
        epilog="Examples: replfx plan timm:vit_small_patch16_224 --input 16,3,224,224 --budget time=0.75; "
        "replfx plan transformers:gpt2 --budget memory=2GiB --budget parameters=0.8 --save plan.json",
    )
    _add_plan_arguments(planning)
    planning.set_defaults(run=_plan)
    showing = commands.add_parser(
        "demo",
        help="train a small language model whole, and in the ways that replfx offers",
        description="Train a small language model for about the same time at full depth, with every second block left "
        "out until 0.6 of the steps, left out to the end, and made from its neighbours.",
    )
    demo.add_arguments(showing)
    showing.set_defaults(run=demo.run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help=f"{named_models.FORMS}; all have random weights. NAME of transformers is a configuration's type (gpt2) "
        "or a model class; FACTORY is called without arguments",
    )
    parser.add_argument(
        "--split-at", action="append", metavar="PATH", help="a pipeline stage begins with this module (may be repeated)"
    )
    parser.add_argument("--fusion", default=AUTO, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of a transformers configuration, such as num_hidden_layers=4 (may be repeated)",
    )
    parser.add_argument(
        "--input",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of the input (default: the model's own, with batch 2); for a factory: none",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="the input of --input is integers below N, such as a vocabulary's size, rather than floats",
    )


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "--budget",
        action="append",
        required=True,
        type=_limit,
        metavar="NAME=LIMIT",
        help="memory=12GiB (peak of a training step, AdamW's state included) or its share of the full model's, "
        "time=0.75 (of the full model's step), parameters=0.6 (may be repeated: all have to be met)",
    )
    parser.add_argument("--operator", default=AUTO, metavar="NAME", help="default: %(default)s, which tries all")
    parser.add_argument("--save", metavar="FILE.json", help="write the plan, for replfx.Plan.from_json")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--every", type=int, metavar="K", help="replace blocks K, 2K, … of each chain (default: 2)")
    policy.add_argument("--fraction", type=float, metavar="F", help="replace this part of each chain")
    policy.add_argument("--keep", type=_number, metavar="N", help="keep this number or share of a chain's blocks")
    policy.add_argument("--select", action="append", metavar="GLOB", help="replace these blocks (may be repeated)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--operator", default=AUTO, metavar="NAME", help="default: %(default)s")
    one.add_argument(
        "--compare",
        action="store_true",
        help="instead of the blocks, all operators that fit: parameters, FLOPs, saved bytes, time of a training step",
    )
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="timed steps of --compare (default: %(default)s)"
    )
    parser.add_argument(
        "--all", action="store_true", help="a row for every block, rather than one for all equal blocks"
    )
    parser.add_argument("--draw", metavar="FILE.svg", help="draw the chains into this file too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _number(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write it as 2,3,224,224") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a dimension under 1")
    return shape


def _limit(text: str) -> tuple[str, object]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; write it as memory=12GiB or time=0.75")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _plan(args: argparse.Namespace) -> int:
    named = named_models.build(args.model, args.config)
    made = replfx.transform(
        named.model,
        named_models.inputs_of(named, args.input, args.tokens),
        budget=dict(args.budget),
        operator=args.operator,
        fusion=args.fusion,
        split_at=args.split_at,
    )
    if args.save is not None:
        try:
            Path(args.save).write_text(replfx.plan_of(made).to_json())
        except OSError as error:
            raise ReplfxError(f"the plan cannot be written: {error}") from error
    found = replfx.report(made)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    named = named_models.build(args.model, args.config)
    return _compare(args, named) if args.compare else _report(args, named)


def _report(args: argparse.Namespace, named: Named) -> int:
    inputs = named_models.inputs_of(named, args.input, args.tokens)
    found = replfx.inspect(named.model, inputs, operator=args.operator, **_policy(args))
    if args.draw is not None:
        try:
            replfx.draw(found, args.draw)
        except OSError as error:
            raise ReplfxError(f"the drawing cannot be written: {error}") from error
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        from replfx.reports.text import ReportText

        Console().print(ReportText(found, every_block=args.all))
    return 0


def _policy(args: argparse.Namespace) -> dict[str, Any]:
    """Which blocks are replaced, and how their weights are made, as keywords."""
    return {name: getattr(args, name) for name in ("every", "fraction", "keep", "select", "split_at", "fusion")}


def _compare(args: argparse.Namespace, named: Named) -> int:
    from rich.console import Console

    from replfx.show.comparing import compare

    if args.draw is not None or args.all:
        raise ReplfxError("--compare shows operators rather than blocks: leave --draw and --all out")
    inputs = named_models.inputs_of(named, args.input, args.tokens)
    if inputs is None:
        raise ReplfxError("--compare times training steps, and this model does not say what it takes: give --input")
    with Console(stderr=True).status("measuring"):
        comparison = compare(named.model, inputs, repeats=args.repeats, **_policy(args))
    if args.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        Console().print(comparison)
    return 0
