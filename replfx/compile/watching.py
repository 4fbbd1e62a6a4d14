"""Watches over replaced blocks: no call of the compiled model may run one eagerly, with its own untrained weights.

Dynamo runs Python as it is where it may not or cannot compile: past its limit of recompilations, outside of its
graph, after an error that was suppressed. Then the replaced blocks' own modules run, and notice it here.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any
from weakref import ref

import torch
from torch import nn

from replfx.dynamo.nodes import path_in_model
from replfx.errors import CompileError
from replfx.torch_internals.dynamo import (
    InstructionTranslator,
    RunningContext,
    compiled_count,
    config,
    eval_frame,
    stance,
)

__all__ = ["CompiledCalls", "Watch", "module_named", "root_named"]


class CompiledCalls:
    """Knows the calls of what one backend compiles from all others, by their frames on the stack."""

    def __init__(self) -> None:
        self._backends: list[object] = []  # as Dynamo has the backend: with the mode and the options

    def note(self) -> bool:
        """Remember the call that is being compiled; gives whether it has to be one graph (`fullgraph=True`)."""
        for context, _ in _contexts():
            known = eval_frame.innermost_backend(context.callback)
            if known not in self._backends:
                self._backends.append(known)
            return bool(context.fullgraph)
        return False  # called by hand: there is nothing that could run eagerly

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def running(self) -> list[CodeType] | None:
        """What runs within such a call at the moment, the innermost first; None outside of them."""
        for context, inside in _contexts():
            if eval_frame.innermost_backend(context.callback) in self._backends:
                return inside
        return None


class Watch:
    """A forward pre-hook on a module of a replaced block: in a call of the compiled model it must not run eagerly.

    The model called by itself runs as it is. A copy of the module has no watch, and a pickled one needs no replfx.

    Args:
        path: the replaced block's.
        calls: those of the backend that replaced it.
    """

    def __init__(self, path: str, calls: CompiledCalls) -> None:
        self._path, self._calls = path, ref(calls)

    def __call__(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        calls = self._calls()
        inside = None if calls is None else calls.running()
        if inside is not None:
            raise CompileError(
                f"`{self._path}` is replaced, but here Dynamo runs it as it is, with its own weights, which are not "
                f"trained: {_reason(inside)}. Say which sizes vary (dynamic=True, torch._dynamo.mark_dynamic), raise "
                "the limit, compile with fullgraph=True to see what stops Dynamo, or use replfx.transform, which "
                "replaces blocks in eager mode too"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ({}, "get")  # as a hook, `{}.get(module, args)` lets the arguments be as they are


# Traced along with the block it is nothing. Compiled for itself, between eager frames, it would be nothing there too.
eval_frame.skip_code(Watch.__call__.__code__)


def _contexts() -> Iterator[tuple[Any, list[CodeType]]]:
    """What `torch.compile` made and runs at the moment, the innermost first, and the code that runs inside of it."""
    frame, inside = sys._getframe(1), list[CodeType]()
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__:
            context = frame.f_locals.get("self")
            if isinstance(context, RunningContext) and callable(context.callback):
                yield context, list(inside)
        inside.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]


def _reason(inside: Sequence[CodeType]) -> str:
    """Why Dynamo has not compiled what runs."""
    limit = min(config.recompile_limit, config.accumulated_recompile_limit)
    for code in inside:
        count = compiled_count(code)
        if count >= limit:
            return (
                f"it has compiled {code.co_qualname} {count} times, which is its limit "
                "(torch._dynamo.config.recompile_limit)"
            )
    if (asked := stance()) != "default":
        return f"torch.compiler.set_stance({asked!r}) asks for it"
    if config.suppress_errors:
        return "an error was suppressed (torch._dynamo.config.suppress_errors)"
    return (
        "it is outside of Dynamo's graph (a graph break or torch.compiler.disable; TORCH_LOGS=graph_breaks says where)"
    )


# ---- the modules of the model that is being compiled

_STEP = re.compile(r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]")


def module_named(expression: str, path: str) -> nn.Module | None:
    """The module at `path` on the way to a parameter, by Dynamo's expression for that; None if there is none."""
    return next((module for before, module in _on_the_way(expression) if path_in_model(before) == path), None)


def root_named(expression: str) -> nn.Module | None:
    """The outermost module on the way to a parameter, by Dynamo's expression for that."""
    return next((module for _, module in _on_the_way(expression)), None)


def _on_the_way(expression: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules that Dynamo's expression passes, in the call that it compiles at the moment."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # nothing is being compiled
        return
    at: Any = {"L": output.local_scope, "G": output.global_scope}.get(expression[:1])
    for step in _STEP.finditer(expression):
        name, key, index = step.groups()
        try:
            at = getattr(at, name) if name else at[key] if index is None else at[int(index)]
        except (AttributeError, LookupError, TypeError):
            return
        if isinstance(at, nn.Module):
            yield expression[: step.end()], at
