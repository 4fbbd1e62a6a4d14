"""Ten minutes of a GPU: the flagship at a scale, steps, kernels, tests, each with a bound on its time."""
