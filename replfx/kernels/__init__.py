"""Fusion kernels: the synthesis of weights in Triton, with plain PyTorch where Triton does not run.

Importing this package does not import triton. The operators `torch.ops.replfx.*` are registered when a kernel first
runs, or by importing `replfx.kernels.synthesis_ops` and `replfx.kernels.matrix_ops`.
"""

from replfx.kernels.public import synthesize, synthesize_low_rank, synthesized_linear

__all__ = ["synthesize", "synthesize_low_rank", "synthesized_linear"]
