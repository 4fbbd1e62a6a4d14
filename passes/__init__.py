"""The passes, one a file: each turns a graph into a graph."""
