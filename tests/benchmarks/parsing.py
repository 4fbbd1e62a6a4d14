"""The commands of benchmarks/, asked without `python -m benchmarks`."""

import argparse
from types import ModuleType


def parsed(command: ModuleType, *words: str) -> argparse.Namespace:
    """What `command.run` takes, from the words of a command line."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)
