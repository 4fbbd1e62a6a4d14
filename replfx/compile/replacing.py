"""The backend that replaces blocks of a plain model, in Dynamo's own graph."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from replfx.chains.chain import Block, Chains
from replfx.chains.find import find_chains
from replfx.chains.policy import Policy
from replfx.chains.select import select
from replfx.compile.backend import Backend, RefusedError
from replfx.compile.coefficients import Coefficients
from replfx.compile.watching import CompiledCalls, Watch, module_named, root_named
from replfx.dtensors import is_distributed
from replfx.dynamo.own_parameters import Owned, own_parameters
from replfx.dynamo.placeholder_modules import stack_of
from replfx.errors import CompileError, ReplfxError
from replfx.live import syntheses_of
from replfx.modules.paths import head_of, is_named, is_region, region_path
from replfx.modules.structure import attribute_at, block_digest
from replfx.modules.tree import named_tensors
from replfx.passes import run_passes
from replfx.plans import Plan, Replacement
from replfx.regions.region import Region
from replfx.rewrite.build import insertion
from replfx.rewrite.state import plans_in
from replfx.torch_internals.dynamo import counters, source_of

__all__ = ["ReplacingBackend"]


class ReplacingBackend:
    """A backend for `torch.compile` that replaces blocks of the model that it compiles; `replfx.backend` makes one.

    One backend is for one model: it holds the coefficients. They are there after the model's first call. The model
    itself stays as it is, and so do the parameters of its replaced blocks, which get no gradient any more. Its replaced
    blocks have a forward pre-hook, for a call of the compiled model that Dynamo runs eagerly to be an error.

    Args:
        policy: which blocks are replaced, and by what.
        backend: what compiles the rewritten graph.

    Attributes:
        plan: what has been replaced so far; "@blocks.1" is the piece of the graph that ran in `blocks.1`.
        notes: why nothing was replaced in a graph, and where a chain was cut in two.

    Example:
        >>> backend = replfx.backend(every=2)
        >>> compiled = torch.compile(model, backend=backend)
        >>> compiled(images)  # compiles
        >>> optimizer = torch.optim.AdamW([*model.parameters(), *backend.parameters()])
    """

    __name__ = "replfx"

    def __init__(self, policy: Policy, backend: Backend) -> None:
        self.policy, self.backend = policy, backend
        self.plan = Plan("", ())
        self.notes: list[str] = []
        self._coefficients = Coefficients()
        self._blocks: dict[str, dict[str, str]] = {}  # all blocks of chains so far, with `Region.parameters`
        self._model: dict[str, TensorWeakRef] = {}  # the parameters of these blocks
        self._calls = CompiledCalls()
        self._watched: Any = WeakIdKeyDictionary()  # modules of replaced blocks

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The coefficients of the replaced blocks, by names such as `blocks.1.replfx.fusion.previous`.

        Raises:
            CompileError: the model has not been called yet, or nothing in it could be replaced; the message says why.
        """
        if not self.plan.replacements:
            raise CompileError(self._nothing())
        return iter(self._coefficients.hand_out().items())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The coefficients, for an optimizer; as `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The coefficients as they stand, to be saved beside the model's `state_dict`; they share memory with these."""
        return self._coefficients.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved coefficients: at once, or as soon as the blocks that they belong to are replaced.

        Raises:
            CompileError: coefficients of another shape than this backend's, or that lack some of its own; also from
                the model's first call, if it comes later.
        """
        self._coefficients.load_state_dict(state)

    def _nothing(self) -> str:
        if not self.notes:
            return "the backend has compiled nothing yet: call the compiled model once, then ask for its parameters"
        return f"nothing was replaced: {'; '.join(self.notes[:4])}{_graph_breaks()}"

    # ---- compiling

    def __call__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Replace blocks in one graph of Dynamo's and compile it.

        Args:
            graph_module: Dynamo's graph; it stays as it is.
            inputs: what it will be called with.
            mode: as for `Backend`.
            options: as for `Backend`.

        Raises:
            CompileError: a selection that is impossible, a replaced block whose neighbours this graph lacks, another
                model than before, or an option that nobody knows.
        """
        try:
            with torch.inference_mode(False):
                rewritten = self._rewritten(graph_module, inputs)
        except ReplfxError as error:
            raise RefusedError(str(error)) from error
        if rewritten is None:
            return self.backend(graph_module, inputs, mode=mode, options=options)
        compiled = torch.compile(
            rewritten.function(),
            backend=self.backend,
            fullgraph=True,
            mode=mode,
            options=None if options is None else dict(options),
        )
        return rewritten.caller(compiled)

    def _rewritten(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> "_Rewritten | None":
        """The graph with blocks replaced; None if nothing is replaced here."""
        one_graph = self._calls.note()
        sources = [source_of(node) for node in graph_module.graph.find_nodes(op="placeholder")]
        roots = {id(root): root for root in map(root_named, sources) if root is not None}
        if any(plans_in(root) or syntheses_of(root) for root in roots.values()):
            raise CompileError(
                "the model is transformed already: compile it with backend='replfx', which replaces nothing"
            )
        if is_distributed():
            raise CompileError(
                "the backend's coefficients would not be averaged over the processes: transform the model with "
                "replfx.transform before it is wrapped, and compile that"
            )
        owned = own_parameters(graph_module, inputs)
        found = find_chains(owned.graph_module)
        root = found.capture.root
        real = {id(value) for value in inputs if isinstance(value, nn.Parameter)}
        self._check_model(root, real)
        replacements = self._planned(found)
        watched = _watched(found, owned.paths, sources, replacements, one_graph)
        made = self._carried_out(owned, found, replacements) if replacements else None
        self._remember(found, replacements, real)
        for module, path in watched:
            if module not in self._watched:
                self._watched[module] = module.register_forward_pre_hook(Watch(path, self._calls))
        return made

    def _carried_out(self, owned: Owned, found: Chains, replacements: tuple[Replacement, ...]) -> "_Rewritten":
        root = found.capture.root
        planned = Plan(type(root).__name__, replacements)
        fresh = run_passes(owned.graph_module, [insertion(root, found, planned)]).graph_module
        assert isinstance(fresh, fx.GraphModule)
        own = {id(parameter) for parameter in root.parameters()}
        for replacement in replacements:
            layer = fresh.get_submodule(head_of(root, replacement.path))
            self._coefficients.share(replacement.path.removeprefix("@"), layer, own)
        return _Rewritten(fresh, _places(owned.paths, root, fresh))

    # ---- which blocks

    def _planned(self, found: Chains) -> tuple[Replacement, ...]:
        """The blocks to replace here: those replaced before, and in chains that are new those that the policy says."""
        chains, here, root = found.chains, found.blocks, found.capture.root
        before = [again for r in self.plan.replacements if (again := self._again(r, here, root)) is not None]
        unknown = {p for chain in chains if self._blocks.keys().isdisjoint(chain.paths) for p in chain.paths}
        chosen = self._chosen(found) if unknown or not chains else ()
        return (*before, *(r for r in chosen if r.path in unknown))

    def _again(self, known: Replacement, here: Mapping[str, Block], root: nn.Module) -> Replacement | None:
        """A replacement of an earlier graph, for this one; None if its block has no part in this one."""
        if known.path not in here:
            own = {self._model[name]() for name in self._blocks[known.path].values() if name in self._model}
            if own.isdisjoint(root.parameters()):
                return None
            raise CompileError(
                f"`{known.path}` was replaced in a graph before, and here it is no block between two of its kind; "
                f"compile the model as a whole, or use replfx.transform {_FAST_PATH}"
            )
        kinds = {}
        for path in filter(None, (known.path, known.previous, known.next)):
            if path not in here:
                raise CompileError(
                    f"`{known.path}` is made from `{path}`, which is no block of its kind in this graph (a graph break "
                    "between them, or a drop-path that runs in training alone): call the model in training mode first, "
                    "or use replfx.transform"
                )
            region = here[path].region
            if region is None or list(region.parameters.items()) != list(self._blocks[path].items()):
                raise CompileError(
                    f"`{path}` reads other parameters than in a graph before or in another order: use replfx.transform "
                    f"{_FAST_PATH}"
                )
            kinds[path] = block_digest(here[path].site.block)  # buffers that only training reads are part of it
        return replace(
            known,
            interface=here[known.path].site.interface,  # a mask that one graph has and another has not
            kind=kinds[known.path],
            previous_kind=kinds.get(known.previous or ""),
            next_kind=kinds.get(known.next or ""),
        )

    def _chosen(self, found: Chains) -> tuple[Replacement, ...]:
        """What the policy would replace if this were the first graph."""
        policy = self.policy
        if policy.select is not None:
            paths = list(found.blocks)
            globs = [glob if is_region(glob) else region_path(glob) for glob in policy.select]
            named = tuple(glob for glob in globs if any(is_named(path, glob) for path in paths))
            if not named:
                self._note(f"select={policy.select} names none of the blocks of a graph: {', '.join(paths)}")
                return ()
            policy = replace(policy, select=named)
        selection = select(found, policy)
        if selection.nothing is not None:
            regions = [block.region for block in found.blocks.values()]
            hint = _FILLED if any(region is not None and region.aside for region in regions) else ""
            self._note(f"in a graph of {len(found.capture.nodes)} nodes, {selection.nothing.message}{hint}")
        return selection.plan.replacements

    def _remember(self, found: Chains, replacements: Sequence[Replacement], real: Set[int]) -> None:
        chains, known = found.chains, {r.path for r in self.plan.replacements}
        for chain in chains:
            before = _number_before(chain.paths[0])
            if before in self._blocks and chain.paths[0] not in self._blocks:
                self._note(f"a graph ends between `{before}` and `{chain.paths[0]}`: both stay{_graph_breaks()}")
        for block in found.blocks.values():
            assert block.region is not None
            self._blocks.setdefault(block.path, block.region.parameters)
            for name in block.region.parameters.values():
                parameter = found.capture.root.get_parameter(name)
                if id(parameter) in real:
                    self._model[name] = TensorWeakRef(parameter)
        fresh = tuple(r for r in replacements if r.path not in known)
        self.plan = replace(self.plan, replacements=(*self.plan.replacements, *fresh))

    def _note(self, text: str) -> None:
        if text not in self.notes:  # each shape has graphs of its own
            self.notes.append(text)

    def _check_model(self, root: nn.Module, real: Set[int]) -> None:
        """A name that is known must be the same parameter's, as long as that is there."""
        for name, parameter in root.named_parameters():
            known = self._model[name]() if name in self._model else None
            if known is not None and known is not parameter and id(parameter) in real:
                raise CompileError(_OTHER)


def _watched(
    found: Chains,
    owned: Sequence[str | None],
    sources: Sequence[str],
    replacements: Sequence[Replacement],
    one_graph: bool,
) -> list[tuple[nn.Module, str]]:
    """The modules of the model that run if a replaced block runs as it is, and nowhere else; with the block's path.

    Raises:
        CompileError: a block is no call of any module, so that nothing would tell, and Dynamo may leave its graph.
    """
    expressions = dict(zip(owned, sources, strict=True))
    blocks = found.blocks
    watched: list[tuple[nn.Module, str]] = []
    for path in (replacement.path for replacement in replacements):
        region = blocks[path].region
        assert region is not None
        own = set(region.parameters.values())
        called = [at for at in _called_in(region) if at and _holds_only(own, at, expressions)]
        some = {at: next(name for name in own if name.startswith(f"{at}.")) for at in called}
        modules = [module_named(expressions[name], at) for at, name in some.items()]
        if not any(module is not None for module in modules) and not one_graph:
            raise CompileError(
                f"`{path}` is no call of a module, so that nothing would tell if Dynamo ran it as it is, with its own "
                "weights: compile with fullgraph=True, or use replfx.transform"
            )
        watched += [(module, path) for module in modules if module is not None]
    return watched


def _called_in(region: Region) -> list[str]:
    """The paths of all modules that ran nodes of it."""
    return list(dict.fromkeys(path for node in region.nodes for _, path, _ in stack_of(node)))


def _holds_only(own: Set[str], path: str, parameters: Mapping[str | None, object]) -> bool:
    """Whether some of the graph's parameters are of the module at `path`, and all of these a block's own."""
    inside = {name for name in parameters if name is not None and name.startswith(f"{path}.")}
    return bool(inside & own) and inside <= own


_numbers = count()
_FAST_PATH = (
    "(torch.nn.TransformerEncoderLayer is another function in evaluation, unless "
    "torch.backends.mha.set_fastpath_enabled(False) was called)"
)
_FILLED = (
    "; in Dynamo's graph a block that fills a cache, or whose attention weights are asked for, gives these beside its "
    "activation: use replfx.transform, which leaves the filling to the cache itself"
)
_OTHER = "this backend holds the coefficients of another model: make one with replfx.backend(…) for each model"


@dataclass(frozen=True)
class _Rewritten:
    """A graph with replaced blocks, and where the inputs of Dynamo's graph go.

    Attributes:
        graph_module: takes the inputs that are no parameters.
        places: for each input of Dynamo's graph the name of the parameter or buffer that it stands for in
            `graph_module`; "" if it is no parameter; None if nothing needs it any more.
    """

    graph_module: fx.GraphModule
    places: tuple[str | None, ...]

    def function(self) -> Callable[..., Any]:
        """(state, rest) → what the graph gives; with code of its own, for Dynamo compiles a code some eight times."""

        def run(state: dict[str, Tensor], rest: tuple[Any, ...]) -> Any:
            return functional_call(self.graph_module, state, rest)

        # By its place, too: where Dynamo finds that one code gets other sizes, it makes them symbols.
        code = run.__code__.replace(co_filename=f"<replfx {next(_numbers)}>")
        return FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)

    def caller(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the inputs of Dynamo's graph that calls `compiled(state, rest)`."""
        state = [(index, name) for index, name in enumerate(self.places) if name]
        rest = [index for index, name in enumerate(self.places) if name == ""]
        parameters = dict(self.graph_module.named_parameters())
        first, name = next((index, name) for index, name in state if name in parameters)
        known = TensorWeakRef(parameters[name])

        def run(*args: Any) -> Any:
            # Models of one class share what Dynamo compiled. functional_call gives tensors that are no parameters.
            if args[first] is not known() and isinstance(args[first], nn.Parameter) and known() is not None:
                raise CompileError(_OTHER)
            return compiled({name: args[index] for index, name in state}, tuple(args[index] for index in rest))

        return run


def _graph_breaks() -> str:
    """Dynamo's own reasons, as far as it has counted any."""
    reasons = "; ".join(reason.strip().splitlines()[0] for reason in list(counters["graph_break"])[:2])
    return f"; Dynamo broke the graph (TORCH_LOGS=graph_breaks says where): {reasons}" if reasons else ""


def _places(owned: Sequence[str | None], root: nn.Module, fresh: nn.Module) -> tuple[str | None, ...]:
    where = {id(tensor): name for name, tensor in named_tensors(fresh)}
    return tuple("" if path is None else where.get(id(attribute_at(root, path))) for path in owned)


def _number_before(path: str) -> str | None:
    """`@blocks.5` for `@blocks.6`."""
    found = re.fullmatch(r"(.*\D)?(\d+)", path)
    return found and f"{found[1] or ''}{int(found[2]) - 1}"
