"""replfx: deep networks whose blocks share weights while they train (Replacement Learning, on torch.fx).

    model = replfx.transform(model)

replaces some of a model's blocks: they make their weights from the blocks before and after them and own almost none.
Then train as before.
"""

import replfx.interrupted  # noqa: F401 (first, for Ctrl-C while torch is imported)
from replfx.api import apply, inspect, plan, report, transform
from replfx.backends import backend
from replfx.calibration import calibrate
from replfx.distributed.parallel import parallelize_module
from replfx.distributed.ranks import check_ranks
from replfx.errors import (
    CalibrationError,
    CaptureError,
    CompileError,
    FusionError,
    NoChainError,
    PlanError,
    ReplfxError,
    StateDictError,
    VerifyError,
)
from replfx.fusion import Choice, Fusion, Interface, register_fusion
from replfx.integrations.pretrained import from_pretrained
from replfx.live.check_stage import check_stage
from replfx.operators import Match, Operator, Site, Source, register_operator
from replfx.plans import Plan, Replacement
from replfx.reports.report import BlockReport, Report, Totals
from replfx.rewrite.state import load_state_dict, plan_of
from replfx.rewrite.unroll import materialize, unroll
from replfx.show.drawing import Drawing, draw
from replfx.tracing import CaptureInfo, Cost, capture
from replfx.training.accumulation import synthesize_once
from replfx.training.grouping import parameter_groups
from replfx.training.schedule import Schedule
from replfx.version import __version__

__all__ = [
    "BlockReport",
    "CalibrationError",
    "CaptureError",
    "CaptureInfo",
    "Choice",
    "CompileError",
    "Cost",
    "Drawing",
    "Fusion",
    "FusionError",
    "Interface",
    "Match",
    "NoChainError",
    "Operator",
    "Plan",
    "PlanError",
    "Replacement",
    "ReplfxError",
    "Report",
    "Schedule",
    "Site",
    "Source",
    "StateDictError",
    "Totals",
    "VerifyError",
    "__version__",
    "apply",
    "backend",
    "calibrate",
    "capture",
    "check_ranks",
    "check_stage",
    "draw",
    "from_pretrained",
    "inspect",
    "load_state_dict",
    "materialize",
    "parallelize_module",
    "parameter_groups",
    "plan",
    "plan_of",
    "register_fusion",
    "register_operator",
    "report",
    "synthesize_once",
    "transform",
    "unroll",
]
