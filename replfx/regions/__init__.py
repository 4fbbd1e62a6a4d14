"""Blocks that are no modules: repeated stretches of a graph."""
