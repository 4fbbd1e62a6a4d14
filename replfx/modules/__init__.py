"""Module trees and values without a graph: paths, copies, what a module is made of."""
