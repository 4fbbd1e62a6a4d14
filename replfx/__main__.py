"""`python -m replfx`."""

import sys

from replfx.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
