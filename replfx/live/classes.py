"""Dynamic subclasses: a module keeps its class, and some of its parameters become computed attributes.

`nn.utils.parametrize` and FSDP2's `fully_shard` change a module's class in the same way. There is one subclass for each
class of the user's and each set of computed names. It has the name of the user's class, and pickle stores that
class and the names in its place.
"""

import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from replfx.errors import FusionError
from replfx.torch_internals import FLAT_WEIGHTS, is_fx_symbolic_tracing, renew_flat_weights

__all__ = ["LINK", "SUBMODULE", "computed_by", "links_of", "make_computed", "make_plain"]

SUBMODULE = "replfx"
"""The name of the submodule that a replaced block has more than before."""

LINK = "_replfx_link"
"""The attribute of a module that tells what its computed parameters are."""

_Namespace: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Traits:
    """What a dynamic subclass has more than the class that it is made of.

    Attributes:
        computed: the parameters that are computed attributes.
        role: of a module that has the synthesis as its submodule: "block" if it is the block and runs its own
            computation, "operator" if an operator runs in its place, "member" if it is the first of several modules
            that make up the block. None for a module inside of a block.
    """

    computed: tuple[str, ...]
    role: str | None


def make_computed(module: nn.Module, synthesis: nn.Module, names: Mapping[str, str], role: str | None) -> None:
    """Give a module its dynamic subclass.

    Args:
        module: changed in place; the computed parameters are no parameters of its own any more.
        synthesis: the `Synthesis` that computes them.
        names: its name for each of them, by the module's own.
        role: as `Traits` has it.

    Raises:
        FusionError: Python cannot change the module's class.
    """
    if names:  # not by attribute assignment, which would make the synthesis a submodule
        module.__dict__[LINK] = (synthesis, names, tuple(module._parameters))
    for leaf in names:
        del module._parameters[leaf]
    if isinstance(module, nn.RNNBase) and names:  # a list of its weights would be a second one
        module.__dict__.update({name: [] for name in FLAT_WEIGHTS})
    try:
        module.__class__ = live_class(type(module), Traits(tuple(names), role))
    except TypeError as error:
        raise FusionError(
            f"the class of {type(module).__qualname__} cannot be changed, as replacing needs: {error}"
        ) from error


def make_plain(module: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Take the dynamic subclass off again; `values` are own parameters by name, for those that were computed."""
    *_, order = module.__dict__.pop(LINK, ((),))
    module.__class__ = _without(type(module))
    known = {**module._parameters, **values}
    module._parameters.clear()  # an optimizer's state_dict counts parameters in the order that they had
    module._parameters.update({leaf: known.pop(leaf) for leaf in order if leaf in known} | known)
    if isinstance(module, nn.RNNBase):
        renew_flat_weights(module)


def links_of(module: nn.Module) -> Mapping[str, str]:
    """The computed parameters of a module, with the names that its Synthesis has for them."""
    link = vars(module).get(LINK)
    return {} if link is None else link[1]


def computed_by(module: nn.Module) -> Any:
    """The `Synthesis` that computes parameters of a module; None if none does."""
    link = vars(module).get(LINK)
    return None if link is None else link[0]


# ---- classes


def live_class(base: type[nn.Module], traits: Traits) -> type[nn.Module]:
    """The dynamic subclass of `base` with these traits; the same one each time."""
    for known in base.__subclasses__():  # which holds them weakly: a class that nobody uses any more may go
        if known.__dict__.get("_replfx_traits") == traits:
            return known
    namespace: _Namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_replfx_traits": traits,
        "__reduce_ex__": _reduce,
        **{leaf: property(_reader(leaf), _refuse_to_set(leaf)) for leaf in traits.computed},
    }
    if traits.computed:
        unused = getattr(base, "__jit_unused_properties__", [])
        namespace |= {"__jit_unused_properties__": [*unused, *traits.computed], "parametrizations": _Guarded()}
        namespace["register_parameter"] = _registrar(base)
        if issubclass(base, nn.RNNBase):
            namespace |= FLAT_WEIGHTS
    if traits.role is not None:
        namespace |= {"synthesized": _synthesized, **_hiding(base)}
    if traits.role in ("block", "operator"):
        namespace["forward"] = _forward(base, traits.role)
    if traits.role == "operator":
        namespace["__getattr__"] = _attribute(base)
    return type(base.__name__, (base,), namespace)


def _without(cls: type[nn.Module]) -> type[nn.Module]:
    """The class without dynamic subclasses of ours in it, also where something else was made of one of those since."""
    if "_replfx_traits" in cls.__dict__:
        return _without(cls.__bases__[0])
    if not any("_replfx_traits" in parent.__dict__ for parent in cls.__mro__):
        return cls
    # As FSDP2 and parametrize make theirs: by type(), from what was there.
    own = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_without(parent) for parent in cls.__bases__), own)


# ---- pickling and copying


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle the user's class and what was added, since the dynamic class has no place of its own."""
    cls = type(self)
    mine = next(known for known in cls.__mro__ if "_replfx_traits" in known.__dict__)
    base, traits = mine.__bases__[0], mine.__dict__["_replfx_traits"]
    rebuild, arguments, *rest = super(mine, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
    if rebuild is copyreg.__newobj__ and arguments[0] is mine:  # type: ignore[attr-defined]
        return _new, (base, traits, arguments[1:]), *rest
    if cls is not mine:  # made by something else, which knows how
        return rebuild, arguments, *rest
    return _rebuilt, (base, traits, rebuild, arguments), *rest


def _new(base: type[nn.Module], traits: Traits, arguments: tuple[Any, ...]) -> nn.Module:
    cls = live_class(base, traits)
    return cls.__new__(cls, *arguments)


def _rebuilt(base: type[nn.Module], traits: Traits, rebuild: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    made = rebuild(*arguments)
    if type(made) is base:
        made.__class__ = live_class(base, traits)
    return made


# ---- computed attributes


def _reader(leaf: str) -> Callable[[nn.Module], Any]:
    def read(self: nn.Module) -> Any:
        if leaf in self._parameters:  # it was made in another way, or is given one for a while
            return self._parameters[leaf]
        link = self.__dict__.get(LINK)
        if link is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {leaf!r}")
        synthesis, names, _ = link
        if torch.compiler.is_compiling():
            return synthesis.weight(names[leaf])
        if is_fx_symbolic_tracing() and get_proxy_mode() is None:
            raise FusionError(
                f"torch.fx would take the synthesised `{leaf}` of a {type(self).__name__} for a constant: trace "
                "replfx.materialize(model)"
            )
        try:
            return synthesis.weight(names[leaf])
        except AttributeError as error:  # Python would say that the module has no such attribute
            raise FusionError(f"the synthesised `{leaf}` of a {type(self).__name__} cannot be made: {error}") from error

    read.__name__ = leaf
    return read


def _refuse_to_set(leaf: str) -> Callable[[nn.Module, Any], None]:
    def write(self: nn.Module, value: Any) -> None:
        raise FusionError(
            f"the `{leaf}` of this {type(self).__name__} is synthesised from the neighbouring blocks and cannot be "
            "set: call replfx.materialize or replfx.unroll first"
        )

    return write


def _registrar(base: type[nn.Module]) -> Callable[[nn.Module, str, nn.Parameter | None], None]:
    @functools.wraps(base.register_parameter)
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in links_of(self) and name not in self._parameters:
            _refuse_to_set(name)(self, param)
        base.register_parameter(self, name, param)

    return register_parameter


class _Guarded:
    """What `torch.nn.utils.parametrize` asks a module for. There can be none of a computed weight."""

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        own = module._modules.get("parametrizations")
        if own is not None:
            return own
        return _NoParametrizations(links_of(module))


class _NoParametrizations(nn.ModuleDict):
    def __init__(self, computed: Mapping[str, str]) -> None:
        super().__init__()
        self.computed = tuple(computed)

    def __contains__(self, name: object) -> bool:
        if name in self.computed:
            raise FusionError(
                f"the `{name}` is synthesised from the neighbouring blocks and cannot be parametrised: call "
                "replfx.materialize or replfx.unroll first"
            )
        return False


# ---- what a replaced block has


def _synthesized(self: nn.Module) -> dict[str, Tensor]:
    """The weights of this block that are synthesised, as they stand: parameter name → tensor."""
    made: dict[str, Tensor] = self._modules[SUBMODULE].synthesized()  # type: ignore[union-attr, operator]
    return made


def _forward(base: type[nn.Module], role: str) -> Callable[..., Any]:
    own = base.forward

    @functools.wraps(own)
    def run_block(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler merges what is read twice
            return own(self, *args, **kwargs)
        with self._modules[SUBMODULE].call(args, kwargs):  # type: ignore[union-attr, operator]
            return own(self, *args, **kwargs)

    @functools.wraps(own)
    def run_operator(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._modules[SUBMODULE].operate(args, kwargs)  # type: ignore[union-attr, operator]

    return run_block if role == "block" else run_operator


def _attribute(base: type[nn.Module]) -> Callable[[nn.Module, str], Any]:
    """A look-up of what a block had before its modules were freed, without weights."""
    own = base.__getattr__  # looked up here, since Dynamo takes some classes' `base.__getattr__` for a bound method

    def get(self: nn.Module, name: str) -> Any:
        try:
            return own(self, name)
        except AttributeError:
            synthesis = self.__dict__.get("_modules", {}).get(SUBMODULE)
            skeleton = None if synthesis is None else synthesis.skeleton
            if skeleton is None or name.startswith("__"):
                raise
            return getattr(skeleton.module, name)

    return get


def _hiding(base: type[nn.Module]) -> _Namespace:
    """Iteration over a block's modules, as its `forward` may use it, without the module that was added."""

    @functools.wraps(base.named_children)
    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        # Others, such as FSDP and `Module.to`, are to find it.
        synthesis: Any = self._modules.get(SUBMODULE)  # none while it is copied
        hidden = synthesis is not None and (torch.compiler.is_compiling() or synthesis.runs())
        return (named for named in base.named_children(self) if named[0] != SUBMODULE or not hidden)

    return {"named_children": named_children, **_of_container(base)}


def _of_container(base: type[nn.Module]) -> _Namespace:
    """A container's own iteration over its modules, without the module that was added."""
    if issubclass(base, nn.ModuleDict):
        return {
            "__len__": lambda self: len(_own_modules(self)),
            "__iter__": lambda self: iter(_own_modules(self)),
            "__contains__": lambda self, key: key in _own_modules(self),
            "keys": lambda self: _own_modules(self).keys(),
            "items": lambda self: _own_modules(self).items(),
            "values": lambda self: _own_modules(self).values(),
        }
    if issubclass(base, nn.Sequential | nn.ModuleList):
        return {
            "__len__": lambda self: len(_own_modules(self)),
            "__iter__": lambda self: iter(_own_modules(self).values()),
            "__getitem__": _item,
        }
    return {}


def _own_modules(self: nn.Module) -> dict[str, nn.Module | None]:
    return {name: module for name, module in self._modules.items() if name != SUBMODULE}


def _item(self: nn.Module, index: int | slice) -> Any:
    found: list[Any] = list(_own_modules(self).values())
    if isinstance(index, slice):
        return nn.Sequential(*found[index]) if isinstance(self, nn.Sequential) else nn.ModuleList(found[index])
    return found[index]
