"""The worked examples in docstrings run, on small models, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import replfx
from replfx import Plan

ELSEWHERE = {
    "replfx.distributed.parallel.parallelize_module": "tests/distributed/test_tensor_parallel.py",
    "replfx.distributed.ranks.check_ranks": "tests/distributed/test_plans_of_ranks.py",
    "replfx.integrations.lightning.Unroll": "tests/integrations/test_trainers.py",
    "replfx.integrations.pretrained.from_pretrained": "tests/integrations/test_pretrained.py",
    "replfx.integrations.transformers.Unroll": "tests/integrations/test_trainers.py",
}
"""Examples that need several processes or a trainer, and the test that does the same."""


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(replfx.__path__, "replfx."):
        if found.name == "replfx.__main__":
            continue
        for test in finder.find(importlib.import_module(found.name), found.name):
            if test.examples and test.globs.get("__name__") == found.name:
                yield test


class WhereAsked(doctest.OutputChecker):
    """An example without an output shows a call, and not what it gives."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def build_model() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, patch_size=8, num_classes=10)


def given() -> dict[str, Any]:
    """The names that examples take for granted."""
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 7])
    model, pretrained = build_model(), build_model()
    criterion = nn.CrossEntropyLoss()
    return {
        **{module.__name__: module for module in (timm, torch, torchvision, replfx)},
        "nn": nn,
        "Path": Path,
        "Plan": Plan,
        "rank": 0,
        "criterion": criterion,
        "build_model": build_model,
        "model": model,
        "pretrained": pretrained,
        "images": images,
        "x": images,
        "example_inputs": images,
        "loader": [[(images, labels)] * 2],
        "batches": [(images, labels)],
        "text": replfx.plan(model).to_json(),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "parameter": nn.Parameter(torch.ones(2)),
        "loss": lambda model, batch: criterion(model(batch[0]), batch[1]),
    }


ADJUSTED: dict[str, Any] = {
    "replfx.calibration.loop.calibrate": lambda names: {"loader": [names["images"]]},
    "replfx.rewrite.unroll.materialize": lambda names: {"model": replfx.transform(names["model"])},
    "replfx.reports.report.Report": lambda names: {"model": replfx.transform(names["model"])},
    "replfx.training.accumulation.synthesize_once": lambda names: _transformed(names),
    "replfx.rewrite.unroll.unroll": lambda names: {"replfx": _WithOptimizer(names)},
}


def _transformed(names: dict[str, Any]) -> dict[str, Any]:
    model = replfx.transform(names["model"])
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


class _WithOptimizer:
    """`replfx` in an example that leaves out how the optimizer of the transformed model is made."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def transform(self, model: nn.Module) -> nn.Module:
        made = replfx.transform(model)
        self.names["optimizer"] = self.optimizer = torch.optim.AdamW(made.parameters())
        return made

    def unroll(self, model: nn.Module, optimizer: object) -> None:
        replfx.unroll(model, self.optimizer)


@pytest.fixture
def eager_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What examples compile runs as Dynamo captured it: Inductor has tests of its own."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, graph, inputs: graph.forward)


def test_every_public_name_has_an_example_or_is_a_value() -> None:
    shown = {test.name.rpartition(".")[2] for test in examples()}
    verbs = {name for name in replfx.__all__ if callable(getattr(replfx, name)) and name.islower()}
    assert verbs - shown - {"register_fusion", "register_operator"} == set()


@pytest.mark.slow
@pytest.mark.usefixtures("eager_inductor")
def test_examples_in_docstrings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(replfx.transform(build_model()).state_dict(), "weights.pt")
    failed: list[str] = []
    ran = 0
    for test in examples():
        if test.name in ELSEWHERE:
            continue
        names = given()
        names.update(ADJUSTED.get(test.name, lambda names: {})(names))
        test.globs.update({name: value for name, value in names.items() if name not in test.globs or name == "replfx"})
        runner = doctest.DocTestRunner(WhereAsked(), verbose=False, optionflags=doctest.ELLIPSIS)
        report: list[str] = []
        ran += runner.run(test, out=report.append).attempted
        if runner.failures:
            failed.append("".join(report))
    assert not failed, "\n".join(failed)
    assert ran > 50
