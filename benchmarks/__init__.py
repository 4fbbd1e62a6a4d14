"""Benchmarks: ``python -m benchmarks COMMAND``, one command a question."""
