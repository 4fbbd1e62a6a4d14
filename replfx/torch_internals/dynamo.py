"""What compiling uses of PyTorch's private names: Dynamo's, which takes seconds to import, and the names around it."""

from functools import lru_cache
from types import CodeType
from typing import Any

from torch import fx

from replfx.torch_internals import missing, must_speak_of, private

__all__ = [
    "GET_DATA",
    "InductorWrapper",
    "InstructionTranslator",
    "RunningContext",
    "ShortenTraceback",
    "TracingContext",
    "compiled_count",
    "config",
    "copy_source",
    "counters",
    "detect_fake_mode",
    "eval_frame",
    "foreach_add",
    "foreach_mul",
    "lookup_backend",
    "register_backend",
    "set_source",
    "source_of",
    "stance",
    "tracing",
    "uses_cuda_graphs",
]

try:
    from torch import _foreach_add as foreach_add
    from torch import _foreach_mul as foreach_mul
    from torch import _TorchCompileInductorWrapper as InductorWrapper
    from torch._C._autograd import _get_data_attr as GET_DATA  # type: ignore[attr-defined]
    from torch._dynamo import config, eval_frame, output_graph, register_backend
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as _cache_entries
    from torch._dynamo.eval_frame import _TorchDynamoContext as RunningContext
    from torch._dynamo.exc import ShortenTraceback
    from torch._dynamo.source import SyntheticLocalSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import counters
    from torch._guards import TracingContext, detect_fake_mode, tracing
except ImportError as error:
    raise missing(f"what replfx.compile imports ({error})") from error


# ---- where an input of Dynamo's graph comes from

_SOURCE = "_dynamo_source"


@lru_cache(maxsize=1)
def _check_sources() -> None:
    must_speak_of(output_graph, (_SOURCE,))


def source_of(node: fx.Node) -> str:
    """Dynamo's expression for where an input comes from: `L['self']._modules['fc']._parameters['weight']`; or ""."""
    _check_sources()
    source = getattr(node, _SOURCE, None)
    if source is None:
        return ""
    return str(source.name if isinstance(source.name, str) else source.name())


def copy_source(node: fx.Node, twin: fx.Node) -> None:
    """Let a copy of a node come from where the node does."""
    _check_sources()
    if hasattr(node, _SOURCE):
        setattr(twin, _SOURCE, getattr(node, _SOURCE))


def set_source(node: fx.Node, name: str) -> None:
    """Let an input come from nowhere: AOTAutograd asks each for its source."""
    _check_sources()
    setattr(node, _SOURCE, SyntheticLocalSource(name))


# ---- what it does


def compiled_count(code: CodeType) -> int:
    """How often Dynamo has compiled this code."""
    return len(_cache_entries(code))


def stance() -> str:
    """What `torch.compiler.set_stance` has asked for."""
    return str(private(private(eval_frame, "_stance"), "stance"))


def uses_cuda_graphs(compiler: Any) -> bool:
    """Whether it is Inductor, and records CUDA graphs."""
    if not isinstance(compiler, InductorWrapper):
        return False
    from torch._inductor import config as inductor

    return bool(compiler.config.get("triton.cudagraphs", inductor.triton.cudagraphs))
