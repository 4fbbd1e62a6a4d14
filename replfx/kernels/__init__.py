"""Triton kernels, one operation a file: kernels, launches, operators, gradients and the plain form together.

Importing this package imports triton where that is installed; `import replfx` does not import this package.
"""

from replfx.kernels.synthesis import synthesize

__all__ = ["synthesize"]
