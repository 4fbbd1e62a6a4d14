"""From a plan to a model and back: build, verify, mark, unroll."""
