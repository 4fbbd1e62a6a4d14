"""Models whose layers are no modules: drawn layers in a loop over parameters, written without the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "KINDS", "Functional", "Spec", "specs", "values_of"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "tanh": lambda x: x.tanh(),
    "silu": lambda x: x * torch.sigmoid(x),
}

# Of each kind of layer the shapes of its parameters, for a width in and a width out.
KINDS: dict[str, Callable[[int, int], dict[str, tuple[int, ...]]]] = {
    "product": lambda i, o: {"w": (i, o)},
    "linear": lambda i, o: {"w": (o, i), "b": (o,)},
    "normed": lambda i, o: {"g": (i,), "s": (i,), "w": (i, o)},
    "mlp": lambda i, o: {"w1": (i, 2 * i), "b1": (2 * i,), "w2": (2 * i, o), "b2": (o,)},
    "attention": lambda i, o: {"g": (i,), "q": (i, i), "k": (i, i), "v": (i, i), "o": (i, o)},
}


@dataclass(frozen=True)
class Spec:
    """What is drawn of a model.

    Attributes:
        kind: one of `KINDS`.
        widths: one more than there are layers.
        activation: one of `ACTIVATIONS`.
        residual: each layer adds its input.
        extra: what every layer reads besides: nothing, an input, something made of one, or a buffer.
        dropout: each layer ends with F.dropout.
        storage: how the parameters are kept: a list for each role, one list, a dict, or attributes.
        head, tail: something that is not repeated, before and after.
        traceable: whether symbolic tracing gets through.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str
    residual: bool
    extra: str | None
    dropout: bool
    storage: str
    head: bool
    tail: bool
    traceable: bool

    @property
    def depth(self) -> int:
        return len(self.widths) - 1


@st.composite
def specs(draw: st.DrawFn, depths: tuple[int, int] = (3, 8)) -> Spec:
    """Any model of these; widths change only where nothing is residual."""
    residual = draw(st.booleans())
    depth = draw(st.integers(*depths))
    width = st.integers(2, 5)
    widths = [draw(width)] * (depth + 1) if residual or draw(st.booleans()) else [draw(width) for _ in range(depth + 1)]
    return Spec(
        kind=draw(st.sampled_from(sorted(KINDS))),
        widths=tuple(widths),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        residual=residual,
        extra=draw(st.sampled_from((None, "input", "computed", "buffer"))),
        dropout=draw(st.booleans()),
        storage=draw(st.sampled_from(("lists", "one list", "dict", "attributes"))),
        head=draw(st.booleans()),
        tail=draw(st.booleans()),
        traceable=draw(st.booleans()),
    )


class Functional(nn.Module):
    """The model of a `Spec`; takes `(2, 3, widths[0])`, and a `(3, 1)` if its extra comes from an input."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.paths: list[dict[str, str]] = []  # of each layer: role → path of the parameter
        shapes = [KINDS[spec.kind](i, o) for i, o in zip(spec.widths, spec.widths[1:], strict=False)]
        for index, roles in enumerate(shapes):
            self.paths.append({role: self._keep(index, role, shape) for role, shape in roles.items()})
        if spec.extra == "buffer":
            self.register_buffer("mask", torch.rand(3, 1))
        if spec.head:
            self.head = nn.Parameter(torch.randn(spec.widths[0], spec.widths[0]))
        if spec.tail:
            self.tail = nn.Parameter(torch.randn(spec.widths[-1], 2))

    def _keep(self, index: int, role: str, shape: tuple[int, ...]) -> str:
        parameter = nn.Parameter(torch.randn(shape) / shape[0] ** 0.5)
        if self.spec.storage == "attributes":
            setattr(self, f"{role}{index}", parameter)
            return f"{role}{index}"
        name = f"{role}s" if self.spec.storage == "lists" else "store"
        if not hasattr(self, name):
            setattr(self, name, nn.ParameterDict() if self.spec.storage == "dict" else nn.ParameterList())
        holder: Any = getattr(self, name)
        if self.spec.storage == "dict":
            holder[f"{role}_{index}"] = parameter
            return f"{name}.{role}_{index}"
        holder.append(parameter)
        return f"{name}.{len(holder) - 1}"

    def weights(self, index: int) -> dict[str, Tensor]:
        """The parameters of one layer by role, fetched as the storage has them."""
        found: dict[str, Tensor] = {}
        for role, path in self.paths[index].items():
            name, _, key = path.partition(".")
            holder: Any = getattr(self, name)
            found[role] = holder if not key else holder[int(key) if key.isdigit() else key]
        return found

    def layer(self, index: int, x: Tensor, extra: Tensor | None) -> Tensor:
        spec = self.spec
        y = _formula(spec.kind, x, self.weights(index), ACTIVATIONS[spec.activation], spec.widths[index])
        if extra is not None:
            y = y * extra
        if spec.dropout:
            y = F.dropout(y, 0.1 + index / 100, self.training)
        return x + y if spec.residual else y

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        spec = self.spec
        if not spec.traceable:
            assert not isinstance(x, fx.Proxy)
        extra = mask
        if spec.extra == "computed":
            extra = (mask + 1).sqrt()
        if spec.extra == "buffer":
            extra = self.mask
        if spec.head:
            x = torch.einsum("...i,ij->...j", x, self.head).sin()
        for index in range(spec.depth):
            x = self.layer(index, x, extra)
        return torch.einsum("...i,ij->...j", x, self.tail).exp() if spec.tail else x

    def inputs(self) -> tuple[Tensor, ...]:
        x = torch.randn(2, 3, self.spec.widths[0])
        return (x, torch.rand(3, 1)) if self.spec.extra in ("input", "computed") else (x,)


def _formula(kind: str, x: Tensor, p: dict[str, Tensor], act: Callable[[Tensor], Tensor], width: int) -> Tensor:
    if kind == "product":
        return act(x @ p["w"])
    if kind == "linear":
        return act(F.linear(x, p["w"], p["b"]))
    if kind == "normed":
        return act(F.layer_norm(x, (width,), p["g"], p["s"]) @ p["w"])
    if kind == "mlp":
        return act(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    h = F.layer_norm(x, (width,), p["g"])
    scores = (h @ p["q"]) @ (h @ p["k"]).transpose(-1, -2) * width**-0.5
    return act((scores.softmax(-1) @ (h @ p["v"])) @ p["o"])


class _Keeping(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


def values_of(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[fx.Node, object]:
    """What every node of a graph gives on these inputs."""
    keeping = _Keeping(graph_module)
    keeping.garbage_collect_values = False
    keeping.run(*inputs)
    return keeping.values
