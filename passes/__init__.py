"""The passes, one a file: from a captured graph to a transformed model.

`find_chains` → `select_blocks` → (`replfx.building` for blocks that are modules, `insert_fusion` for regions of the
graph) → `release` → `verify`. Each is a frozen dataclass whose fields are its options, on `torch.fx.passes.infra`.
"""

from replfx.passes.chains import Block, Chain, Chains, chains_of
from replfx.passes.find_chains import FindChains
from replfx.passes.insert_fusion import InsertFusion
from replfx.passes.pipeline import run_passes
from replfx.passes.release import Release
from replfx.passes.rewritten import limit
from replfx.passes.select_blocks import SelectBlocks, plan_of
from replfx.passes.verify import Verify, refuse_reads_of_freed

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
    "limit",
    "plan_of",
    "refuse_reads_of_freed",
    "run_passes",
]
