"""What compiled fusion layers cost: training steps through compilers, and the fusion kernels alone."""
