"""Chance while a capture looks: draws are as high, or as low, as they can be, and never the user's.

Layer drop skips a block where a number drawn is below a rate, or runs it where it is. Which of them cannot be read
off a model; so each draw is steered to one end, and the capture looks again with the other where that may tell more.
The generators of Python, of NumPy and of PyTorch on a CPU are all the same Mersenne twister, so that one
state does for all three: one whose next six hundred numbers have only ones, or only zeros, for bits. After them come
ordinary ones, for algorithms that draw until a number suits them.
"""

from __future__ import annotations

import functools
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import nn

from replfx.modules.copying import held_in

__all__ = ["Draws", "Steering", "is_draw", "kept_random_states", "restart", "steered", "steered_generators", "steering"]

_WORDS, _STEERED = 624, 600
_TORCH_STATE = "<Qii Q624Q"  # seed, numbers left, whether seeded, next, words; the rest is about normal numbers


class Draws(Enum):
    """To which end draws are steered; the value is the word that the state has to hold for it."""

    HIGH = 0x12DD9BB3  # the twister gives 0xFFFFFFFF
    LOW = 0


@functools.cache
def _words(draws: Draws) -> tuple[int, ...]:
    ordinary = random.Random(draws.value)
    return (draws.value,) * _STEERED + tuple(ordinary.getrandbits(32) for _ in range(_WORDS - _STEERED))


@functools.cache
def _torch_state(draws: Draws) -> torch.Tensor:
    state = bytearray(torch.Generator().manual_seed(draws.value).get_state().numpy().tobytes())
    head = struct.calcsize(_TORCH_STATE)
    if len(state) >= head:  # else PyTorch has changed it, and the seed has to do
        seed = struct.unpack_from("<Q", state)[0]
        struct.pack_into(_TORCH_STATE, state, 0, seed, _WORDS, 1, 0, *_words(draws))
    return torch.frombuffer(state, dtype=torch.uint8)


class Steering:
    """Draws that are steered, and whether there were any.

    Args:
        draws: to which end.
        devices: CUDA devices, whose generators can't be steered but are seeded.
    """

    def __init__(self, draws: Draws, devices: Sequence[torch.device]) -> None:
        self.draws, self.devices = draws, devices
        self._drawn = False
        self._followed: list[tuple[Any, object]] = []
        self._start()

    def restart(self) -> None:
        """From here on, every generator gives what it gave before."""
        self._drawn = self.has_drawn()
        self._start()

    def _start(self) -> None:
        random.setstate(_python_state(self.draws))
        if numpy := sys.modules.get("numpy"):
            numpy.random.set_state(("MT19937", _words(self.draws), 0))
        for device in self.devices:
            torch.cuda.default_generators[device.index].manual_seed(self.draws.value)
        self.steer_torch(None)
        for generator, _ in self._followed:
            self._steer(generator)

    def steer_torch(self, generator: torch.Generator | None) -> None:
        """The next draw of PyTorch's: dropout and its like may have used up what was steered."""
        generator = generator or torch.default_generator
        if generator.device.type == "cpu":
            generator.set_state(_torch_state(self.draws))

    def draw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let an operator draw."""
        self.steer_torch(kwargs.get("generator"))
        self._drawn = True
        return func(*args, **kwargs)

    def has_drawn(self) -> bool:
        """Whether a number was drawn that Python code could see, as far as that can be known."""
        moved = not torch.equal(torch.default_generator.get_state(), _torch_state(self.draws))
        followed = any(_state_of(generator) != state for generator, state in self._followed)
        return self._drawn or moved or followed or self.has_drawn_in_python()

    def has_drawn_in_python(self) -> bool:
        """Whether Python's or NumPy's own generator was asked."""
        numpy = sys.modules.get("numpy")
        asked = numpy is not None and numpy.random.get_state()[2] != 0
        return asked or random.getstate() != _python_state(self.draws)

    def instead_of(self, model: nn.Module) -> dict[int, object]:
        """For the generators that modules of `model` hold, by their `id`: ones of their kind that are steered."""
        made = {id(held): _another(held) for held in held_in(model) if _is_generator(held)}
        for twin in made.values():
            self._steer(twin)
            self._followed.append((twin, _state_of(twin)))
        return made

    def _steer(self, generator: Any) -> None:
        if isinstance(generator, random.Random):
            generator.setstate(_python_state(self.draws))
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(self.draws.value)
            self.steer_torch(generator)
        else:
            _bits(generator).state = {"bit_generator": "MT19937", "state": {"key": _words(self.draws), "pos": 0}}


def _another(generator: Any) -> Any:
    """A generator of the kind of another one, that can be steered."""
    if isinstance(generator, random.Random):
        return random.Random()
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device)
    numpy = sys.modules["numpy"].random
    return type(generator)(numpy.MT19937())


def _python_state(draws: Draws) -> tuple[Any, ...]:
    return 3, (*_words(draws), 0), None


def _is_generator(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (random.Random, torch.Generator, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))
    return isinstance(value, kinds)


def _state_of(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return str(_bits(generator).state)


def _bits(generator: Any) -> Any:
    """The bits behind one of NumPy's generators, of the newer or the older kind."""
    return getattr(generator, "bit_generator", None) or generator._bit_generator


_CURRENT: ContextVar[Steering | None] = ContextVar("steering", default=None)


def steering() -> Steering | None:
    """What steers draws at the moment, or None."""
    return _CURRENT.get()


def restart() -> None:
    """Let what steers draws, if anything does, begin again."""
    if (current := steering()) is not None:
        current.restart()


def steered_generators(model: nn.Module) -> dict[int, object]:
    """What a copy of `model` has in the place of the generators that it holds, while draws are steered."""
    current = steering()
    return current.instead_of(model) if current is not None else {}


@contextmanager
def steered(draws: Draws, model: nn.Module) -> Iterator[Steering]:
    """Steer all draws while open; to be entered in `kept_random_states`."""
    made = Steering(draws, _cuda_devices(model))
    token = _CURRENT.set(made)
    try:
        yield made
    finally:
        _CURRENT.reset(token)


def is_draw(func: Any) -> bool:
    """Whether an operator draws numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


@contextmanager
def kept_random_states(model: nn.Module) -> Iterator[None]:
    """Put back the random states of PyTorch, of Python and, if it was imported, of NumPy."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
