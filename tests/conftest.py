"""Hypothesis profiles: the same examples every time under CI, fresh ones elsewhere. And clean registries."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from replfx.fusion import fusions
from replfx.operators.base import operators

# No deadline: an example's time is that of the machine's load. Bounded, because an example trains nothing
# but traces, copies and differentiates a whole model.
settings.register_profile(
    "default", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, database=None)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Forget afterwards what a test registers."""
    kept = [(registry, dict(registry._entries)) for registry in (fusions, operators)]
    yield
    for registry, entries in kept:
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compile nothing that another test has compiled, and count from nothing."""
    from torch._dynamo.utils import counters  # not with every test's start: it takes long to import

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, what needs one is skipped, also where it is asked for."""
    if torch.cuda.is_available():
        return
    skipped = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skipped)
