"""Capture: symbolic tracing, the recorder, and what each node costs."""

from replfx.tracing.capturing import capture, capture_lazily, ghost_of, real_twin
from replfx.tracing.chance import Draws, restart, steered
from replfx.tracing.costs import Meter
from replfx.tracing.held import Held, HeldElsewhereError
from replfx.tracing.info import CaptureInfo, Cost, Look, ModuleCall, Place, info_of, is_flag, name_of, nodes_in
from replfx.tracing.inputs import ExampleInputs, Inputs, calls_of, check_has_weights, check_is_whole
from replfx.tracing.leaks import Traces
from replfx.tracing.limits import Limits, limits_of
from replfx.tracing.totals import costs_of
from replfx.tracing.undisturbed import undisturbed

__all__ = [
    "CaptureInfo",
    "Cost",
    "Draws",
    "ExampleInputs",
    "Held",
    "HeldElsewhereError",
    "Inputs",
    "Limits",
    "Look",
    "Meter",
    "ModuleCall",
    "Place",
    "Traces",
    "calls_of",
    "capture",
    "capture_lazily",
    "check_has_weights",
    "check_is_whole",
    "costs_of",
    "ghost_of",
    "info_of",
    "is_flag",
    "limits_of",
    "name_of",
    "nodes_in",
    "real_twin",
    "restart",
    "steered",
    "undisturbed",
]
