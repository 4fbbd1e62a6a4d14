"""The passes, one a file: from a captured graph to a transformed model.

`find_chains` → `select_blocks` → `insert_fusion` → `release` → `verify`. Each is a frozen dataclass whose fields
are its options, on `torch.fx.passes.infra`; only `insert_fusion` changes the model.
"""

from replfx.passes.chains import Block, Chain, Chains, chains_of
from replfx.passes.find_chains import FindChains
from replfx.passes.insert_fusion import InsertFusion
from replfx.passes.pipeline import run_passes
from replfx.passes.release import Release
from replfx.passes.rewritten import limit
from replfx.passes.select_blocks import SelectBlocks, plan_of
from replfx.passes.verify import Verify, does_not_run

__all__ = [
    "Block",
    "Chain",
    "Chains",
    "FindChains",
    "InsertFusion",
    "Release",
    "SelectBlocks",
    "Verify",
    "chains_of",
    "does_not_run",
    "limit",
    "plan_of",
    "run_passes",
]
