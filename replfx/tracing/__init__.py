"""Capture: symbolic tracing, the recorder, and what each node costs."""

from replfx.tracing.info import CaptureInfo, Cost, ModuleCall, Place, info_of, nodes_in
from replfx.tracing.inputs import ExampleInputs, Inputs, check_has_weights, check_is_whole
from replfx.tracing.ladder import capture, capture_lazily, ghost_of
from replfx.tracing.totals import costs_of, real_twin

__all__ = [
    "CaptureInfo",
    "Cost",
    "ExampleInputs",
    "Inputs",
    "ModuleCall",
    "Place",
    "capture",
    "capture_lazily",
    "check_has_weights",
    "check_is_whole",
    "costs_of",
    "ghost_of",
    "info_of",
    "nodes_in",
    "real_twin",
]
