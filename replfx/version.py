"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("replfx")
except PackageNotFoundError:  # run from a checkout that is not installed, as benchmarks/gpu.sh does
    __version__ = "not installed"
