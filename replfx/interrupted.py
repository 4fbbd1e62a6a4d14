"""Ctrl-C while the command line imports torch and others, which takes seconds: it ends in one line, as later.

The package imports this first of all: Python imports the package before `replfx/__main__.py`, which could not catch it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

__all__ = ["EXIT_STATUS", "MESSAGE", "ending_at_once", "raise_from_here_on"]

MESSAGE = "replfx: stopped by Ctrl-C"
EXIT_STATUS = 130
"""What shells give for a command that Ctrl-C ended."""


def raise_from_here_on() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, as it does in Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While others' packages are imported, end the command at Ctrl-C: some of them catch every exception."""
    _end_if_command()
    try:
        yield
    finally:
        raise_from_here_on()


def _end_if_command() -> None:
    """Does nothing in a program that imports replfx, nor where Ctrl-C does something else already."""
    mine = _IS_COMMAND and threading.current_thread() is threading.main_thread()
    if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _runs_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # while `python -m` looks for the module
        at = sys.orig_argv.index("-m") if "-m" in sys.orig_argv else -2
        return sys.orig_argv[at + 1 : at + 2] == ["replfx"]
    return Path(sys.argv[0] if sys.argv else "").stem == "replfx"  # the script that pip installs


def _end(number: int, frame: FrameType | None) -> None:
    print(MESSAGE, file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)


_IS_COMMAND = _runs_command()
_end_if_command()
