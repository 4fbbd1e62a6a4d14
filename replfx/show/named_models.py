"""Models by their names on the command line, with random weights, and example inputs that fit them."""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replfx import interrupted
from replfx.errors import ReplfxError
from replfx.tracing import ExampleInputs

__all__ = ["FORMS", "Named", "UsersError", "build", "inputs_of"]

FORMS = "timm:NAME, torchvision:NAME, transformers:NAME or package.module:FACTORY"
"""How a model is written on the command line."""

_BATCH = 2  # BatchNorm in training mode refuses a batch of one
_TOKENS = 64  # in each sequence of a language model's example
_LARGEST = 1_500_000_000  # parameters of a model that is built without being asked for in this size
_HEADS = (  # what a configuration is built as: the first of these that knows it
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


class UsersError(Exception):
    """The user's own code raised: in a factory, or while its module was imported. The cause is what it raised."""


@dataclass(frozen=True)
class Named:
    """A model, and example inputs where it says which it takes."""

    model: nn.Module  # with random weights
    inputs: ExampleInputs | None = None  # floats or integers of the right shapes; None for a factory
    vocabulary: int | None = None  # how many tokens it knows, if it takes tokens


def build(name: str, config: Sequence[str] = ()) -> Named:
    """The model that a name on the command line means.

    Args:
        name: in one of `FORMS`.
        config: KEY=VALUE each, for transformers alone.

    Raises:
        ReplfxError: there is no such model, or a package is not installed.
        UsersError: the factory raises.
    """
    source, colon, rest = name.partition(":")
    if not colon or not rest:
        raise ReplfxError(f"{name!r} names no model: write {FORMS}")
    if source == "transformers":
        return _from_transformers(rest, _fields(config))
    if config:
        raise ReplfxError(f"--config is for transformers:NAME, and {name!r} is none")
    builders: dict[str, Callable[[str], Named]] = {"timm": _from_timm, "torchvision": _from_torchvision}
    return builders[source](rest) if source in builders else _from_factory(source, rest)


def inputs_of(named: Named, shape: tuple[int, ...] | None, tokens: int | None) -> ExampleInputs | None:
    """The example inputs: the model's own, or one tensor of this shape, of integers below `tokens` if that is given."""
    if shape is None:
        if tokens is not None:
            raise ReplfxError("--tokens says what is in the input of --input: give its shape too, as in --input 2,64")
        return named.inputs
    tokens = tokens or named.vocabulary
    made = torch.rand(shape) if tokens is None else torch.randint(tokens, shape)
    if isinstance(named.inputs, Mapping):
        return dict.fromkeys(named.inputs, made)
    return made


# ---- timm, torchvision


def _from_timm(name: str) -> Named:
    timm = _extra("timm", "vision")
    if not timm.is_model(name):
        raise ReplfxError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name)
    return Named(model, torch.rand(_BATCH, *timm.data.resolve_model_data_config(model)["input_size"]))


def _from_torchvision(name: str) -> Named:
    models = _extra("torchvision.models", "vision")
    if name not in models.list_models():
        raise ReplfxError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    detectors = models.list_models(models.detection)
    backbone = {"weights_backbone": None} if name in {*detectors, *models.list_models(models.segmentation)} else {}
    model: nn.Module = models.get_model(name, weights=None, **backbone)
    side = 299 if name.startswith("inception") else 224
    if name in detectors:  # in training mode it would ask for targets
        return Named(model.eval(), ([torch.rand(3, side, side) for _ in range(_BATCH)],))
    frames = (16,) if name in models.list_models(models.video) else ()
    return Named(model, torch.rand(_BATCH, 3, *frames, side, side))


# ---- transformers


def _from_transformers(name: str, fields: dict[str, object]) -> Named:
    """A model of a configuration's class, by the type of the configuration ("gpt2") or the model's class."""
    transformers = _extra("transformers", "transformers")
    known = transformers.CONFIG_MAPPING
    kind: Any = getattr(transformers, name, None)
    configuration = getattr(kind, "config_class", None)
    if name in known:
        config = _configured(known[name], fields)
        make = _head_for(transformers, config)
    elif configuration is not None:
        config, make = _configured(configuration, fields), kind
    else:
        raise ReplfxError(
            f"transformers has no configuration and no model class {name!r}{_near(name, list(known.keys()))}"
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a training step fills none
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config).parameters())
    if size > _LARGEST:
        raise ReplfxError(
            f"{name} has {size / 1e9:.1f} billion parameters as it is configured; make it smaller, for example with "
            "--config num_hidden_layers=6 --config hidden_size=256 --config intermediate_size=512"
        )
    model = make(config)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return Named(model, _transformers_inputs(model, config, vocabulary), vocabulary)


def _configured(kind: Any, fields: dict[str, object]) -> Any:
    usual = kind()
    unknown = [field for field in fields if not hasattr(usual, field)]
    if unknown:
        fitting = [*usual.to_dict(), *kind.attribute_map]
        raise ReplfxError(f"--config {unknown[0]}: {kind.__name__} has no such field{_near(unknown[0], fitting)}")
    try:
        return kind(**fields)
    except Exception as error:  # each class has checks of its own
        raise ReplfxError(f"{kind.__name__} does not take {fields}: {type(error).__name__}: {error}") from error


def _head_for(transformers: Any, config: Any) -> Callable[[Any], nn.Module]:
    auto = next(
        head for head in _HEADS if head == "AutoModel" or type(config) in getattr(transformers, head)._model_mapping
    )
    make: Callable[[Any], nn.Module] = getattr(transformers, auto).from_config
    return make


def _transformers_inputs(model: Any, config: Any, vocabulary: int | None) -> dict[str, Tensor] | None:
    """Tokens or pixels, by the name of the model's main input; None for any other."""
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": torch.rand(_BATCH, getattr(config, "num_channels", 3), height, width)}
    if model.main_input_name != "input_ids" or vocabulary is None:
        return None
    places = getattr(config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    ids = torch.randint(vocabulary, (_BATCH, min(_TOKENS, places)))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}


def _fields(settings: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE each; a value is JSON, or else text."""
    fields: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ReplfxError(f"--config {setting!r}: write it as KEY=VALUE")
        try:
            fields[key] = json.loads(text)
        except ValueError:
            fields[key] = text
    return fields


# ---- the user's own


def _from_factory(module: str, name: str) -> Named:
    with _users_code(), _folder_on_path():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it is their module that misses another one
            raise ReplfxError(f"cannot import {module!r}: {error}; start replfx in the folder that it is in") from error
    factory = getattr(found, name, None)
    if not callable(factory):
        raise ReplfxError(f"{module!r} has no callable {name!r}")
    with _users_code():
        model = factory()
    if not isinstance(model, nn.Module):
        raise ReplfxError(f"{module}:{name} gave {type(model).__name__}, not a torch.nn.Module")
    return Named(model)


@contextlib.contextmanager
def _users_code() -> Iterator[None]:
    try:
        yield
    except ReplfxError:
        raise
    except Exception as error:
        raise UsersError from error


@contextlib.contextmanager
def _folder_on_path() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.pop(0)


# ---- messages


def _extra(module: str, extra: str) -> Any:
    try:
        with interrupted.ending_at_once():
            return importlib.import_module(module)
    except ImportError as error:
        raise ReplfxError(f"this needs {module.partition('.')[0]}: pip install 'replfx[{extra}]'") from error


def _near(name: str, known: Sequence[str]) -> str:
    """A hint at a name that may have been meant."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return f"; near it: {', '.join(near)}" if near else ""
