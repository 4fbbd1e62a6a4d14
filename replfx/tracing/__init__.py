"""Capture: symbolic tracing, the recorder, and what each node costs."""

from replfx.tracing.info import CaptureInfo, Cost, ModuleCall, info_of, nodes_in
from replfx.tracing.inputs import ExampleInputs, Inputs
from replfx.tracing.ladder import capture, fake_run

__all__ = [
    "CaptureInfo",
    "Cost",
    "ExampleInputs",
    "Inputs",
    "ModuleCall",
    "capture",
    "fake_run",
    "info_of",
    "nodes_in",
]
