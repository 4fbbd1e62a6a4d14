"""Candidates: the calls in a captured graph that may be blocks."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from replfx.chains.chain import Block
from replfx.chains.slots import input_slots
from replfx.modules.paths import block_at, window_path
from replfx.modules.structure import class_of, is_container
from replfx.modules.tree import inner_path
from replfx.regions.obstacles import called_again, leaking, unfit_to_share
from replfx.tracing import CaptureInfo, ModuleCall, nodes_in

__all__ = ["Candidate", "Candidates", "is_layer"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A call that may be a block: it has weights to fuse, runs once, and gives its result through its output alone."""

    call: ModuleCall  # its place in the graph; of a window, from the first member to the last
    module: nn.Module  # the module; of a window, an `nn.Sequential` of the members

    @property
    def path(self) -> str:
        """Where it is in the model."""
        return self.call.path


class Candidates:
    """Looks for candidates in one captured graph.

    Attributes:
        modules: all modules of the model by path, a shared one under each of its paths.
        counts: how often each path was called.
        refused: paths of calls that would be candidates but for the reason given.
    """

    def __init__(self, info: CaptureInfo) -> None:
        self.info = info
        self.modules = dict(info.root.named_modules(remove_duplicate=False))
        self.counts = Counter(call.path for call in info.calls)
        self.refused: dict[str, str] = {}

    def path(self, of: str) -> str:
        """What a block at this path of the model goes by."""
        return of

    def placed(self, block: Block) -> Block:
        """A block of a chain as it is replaced."""
        return block

    def blocks(self) -> list[Candidate]:
        """Calls of modules; torch.nn's layers alone are no blocks."""
        found: list[Candidate] = []
        for call in self.info.calls:
            module = self.modules.get(call.path)
            if module is None or not call.path or is_layer(module) or not _has_weights(module):
                continue
            found += self._fit(call, module)
        return sorted(found, key=_begin)

    def windows(self) -> list[Candidate]:
        """Runs of siblings in a container, from one layer with weights to before the next one."""
        found: list[Candidate] = []
        calls = {call.path: call for call in self.info.calls if self.counts[call.path] == 1}
        for parent, module in self.modules.items():
            if is_container(module):
                children = [inner_path(parent, name) for name in module._modules]
                for start, stop in self._spans(children, calls):
                    found += self._window(parent, children, start, stop, calls)
        return sorted(found, key=_begin)

    # ---- windows

    def _spans(self, children: list[str], calls: dict[str, ModuleCall]) -> Iterator[tuple[int, int]]:
        """Start and stop of each window: a layer with weights, and siblings that take its output and keep the shape."""
        position = 0
        while position < len(children):
            start, position = position, position + 1
            anchor = self.modules[children[start]]
            if not is_layer(anchor) or not _has_weights(anchor) or children[start] not in calls:
                continue
            while position < len(children) and self._goes_on(children, position, calls):
                position += 1
            yield start, position

    def _goes_on(self, children: list[str], position: int, calls: dict[str, ModuleCall]) -> bool:
        before, here = calls.get(children[position - 1]), calls.get(children[position])
        module = self.modules[children[position]]
        if before is None or here is None or not is_layer(module) or _has_weights(module):
            return False
        if list(input_slots(here).values()) != [before.output] or here.start != before.stop:
            return False
        known = isinstance(here.output, fx.Node) and "shape" in here.output.meta
        if known:
            return bool(nodes_in(here.output)[0].meta["shape"] == nodes_in(before.output)[0].meta.get("shape"))
        return not class_of(module).__module__.endswith((".pooling", ".upsampling", ".flatten", ".pixelshuffle"))

    def _window(
        self, parent: str, children: list[str], start: int, stop: int, calls: dict[str, ModuleCall]
    ) -> list[Candidate]:
        first, last = calls[children[start]], calls[children[stop - 1]]
        path = children[start] if stop == start + 1 else window_path(parent, start, stop)
        call = replace(first, path=path, stop=last.stop, output=last.output)
        return self._fit(call, block_at(self.info.root, path))

    # ---- what disqualifies

    def _fit(self, call: ModuleCall, module: nn.Module) -> list[Candidate]:
        """The candidate that a call is, if nothing disqualifies it."""
        reason = self._unfit(call, module)
        if reason is None:
            return [Candidate(call, module)]
        self.refused[call.path] = reason
        return []

    def _unfit(self, call: ModuleCall, module: nn.Module) -> str | None:
        if again := called_again(self.counts[call.path]):
            return again
        if not input_slots(call):
            return "it takes no activation"
        return unfit_to_share(module) or leaking(call, self.info.nodes[call.start : call.stop])


def _begin(candidate: Candidate) -> tuple[int, int]:
    """Sorts candidates as they begin, outer ones before those inside them."""
    return candidate.call.start, -candidate.call.stop


def is_layer(module: nn.Module) -> bool:
    """One of torch.nn's own layers: a part of a block rather than a block."""
    return not module._modules and class_of(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))


def _has_weights(module: nn.Module) -> bool:
    """Whether it has parameters that a fusion could make."""
    return any(parameter.dim() >= 2 for parameter in module.parameters())
