"""torch.compile(model, backend="replfx"): the passes that run over Dynamo's graph of a transformed model.

Importing it registers the backend's name, where the distribution that declares it is not installed.
"""

import contextlib
from functools import partial

from replfx.compile.backend import Backend
from replfx.compile.caching import forget
from replfx.compile.replacing import ReplacingBackend
from replfx.torch_internals.dynamo import register_backend

__all__ = ["Backend", "ReplacingBackend", "forget"]

with contextlib.suppress(AssertionError):  # it has the name already
    register_backend(partial(Backend()), name="replfx")
