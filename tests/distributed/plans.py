"""What each process of test_plans_of_ranks.py does: one group of processes goes through all differences."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import replfx
from tests.support.models import tower


def work() -> dict[str, str | None]:
    """What `check_ranks` says here in each situation, None where it is content."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {name: said(model) for name, model in models(rank, world).items()}
    every_second = dist.new_group(list(range(0, world, 2)))
    found["a group that agrees"] = said(replfx.transform(tower(7), every=2 + rank % 2), every_second)
    return found


def said(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> str | None:
    """What `check_ranks` raises."""
    try:
        replfx.check_ranks(model, group)
    except replfx.PlanError as error:
        return str(error)
    return None


def models(rank: int, world: int) -> dict[str, nn.Module]:
    """By what differs between the ranks, this rank's model."""
    last = rank == world - 1
    alike = replfx.transform(tower(7))
    wrapped = nn.ModuleDict({"backbone": replfx.transform(tower(7), every=3 if last else 2)})
    gradient = {"neighbour_gradient": 0.5} if last else {}
    return {
        "nothing": alike,
        "nothing, wrapped": DistributedDataParallel(replfx.transform(tower(7))),
        "nothing, wrapped on one rank": torch.compile(alike) if last else alike,
        "nothing, untransformed": tower(7),
        "blocks of one shape": replfx.transform(tower(7), select="blocks.3" if last else "blocks.1"),
        "how many": replfx.transform(tower(7), select=["blocks.1"] if last else ["blocks.1", "blocks.5"]),
        "fusion": replfx.transform(tower(7), fusion="channel" if last else "scalar"),
        "option": replfx.transform(tower(7), **gradient),
        "one untransformed": tower(7) if last else alike,
        "all but one untransformed": alike if last else tower(7),
        "one materialized": replfx.materialize(alike) if last else alike,
        "within": wrapped,
        "no module": "model" if last else alike,
        "several": replfx.transform(tower(7), every=2 if rank == 0 else 3),
    }


def without_the_check() -> None:
    """Two ranks that deleted different blocks of one shape: DDP has no objection."""
    model = replfx.transform(tower(7), select=f"blocks.{1 + 2 * dist.get_rank()}", operator="identity")
    DistributedDataParallel(model)(torch.rand(2, 4)).sum().backward()
    with pytest.raises(replfx.PlanError, match=re.escape("rank 1 replaces `blocks.3`, rank 0 `blocks.1`")):
        replfx.check_ranks(model)
