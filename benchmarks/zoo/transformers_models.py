"""Small models of transformers' architectures with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from benchmarks.zoo import transformers_configs as configs
from benchmarks.zoo.subject import Inputs, Subject, Variant

SOURCE = "transformers"


def names(store: Path, on_count: Callable[[int, int], object] = lambda done, total: None) -> list[str]:
    """Names of the subjects, of those that this version of transformers has."""
    known = transformers.CONFIG_MAPPING
    return [f"{SOURCE}:{t}" for types in configs.ARCHITECTURES.values() for t in types if t in known]


def subject(name: str) -> Subject:
    """A model by its name."""
    model_type = name.partition(":")[2]
    for (auto, inputs), types in configs.ARCHITECTURES.items():
        if model_type in types:
            fields = types[model_type]
            build, feed = partial(_build, auto, model_type, fields), partial(_fed, inputs, model_type, fields)
            return Subject(name, model_type, (Variant("tiny", build, feed),))
    raise LookupError(f"no architecture {model_type}")


def tiny_config(model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A small configuration of a model type, with these fields in it."""
    kind = transformers.CONFIG_MAPPING[model_type]
    return kind(**_tiny_fields(kind, fields))


def _tiny_fields(kind: type[PretrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What to give to a configuration's class, the configurations inside of it included."""
    usual = kind().to_dict()
    chosen = {name: value for name, value in configs.TINY.items() if name in usual}
    for name, inner in kind.sub_configs.items():
        if name not in fields and hasattr(inner, "model_type") and isinstance(usual.get(name), dict):
            chosen[name] = _tiny_fields(inner, {})
    for name, value in fields.items():
        inner = kind.sub_configs.get(name)
        nested = isinstance(value, dict) and hasattr(inner, "model_type") and "model_type" not in value
        chosen[name] = _tiny_fields(inner, value) if nested else value
    return chosen


def _build(auto: str, model_type: str, fields: Mapping[str, Any]) -> nn.Module:
    kind, config = getattr(transformers, auto), tiny_config(model_type, fields)
    model: nn.Module = kind.from_config(config) if auto.startswith("Auto") else kind(config)
    return model


def _fed(inputs: str, model_type: str, fields: Mapping[str, Any]) -> Inputs:
    return INPUTS[inputs](tiny_config(model_type, fields))


# ---- inputs


def _ids() -> Tensor:
    return torch.randint(3, configs.VOCABULARY, (2, configs.LENGTH))


def _text(config: Any) -> dict[str, object]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(2, configs.LENGTH, dtype=torch.int64)}


def _text_pair(config: Any) -> Inputs:
    return {"input_ids": _ids(), "decoder_input_ids": _ids()}


def _image(config: Any) -> Inputs:
    side = getattr(config, "image_size", None) or getattr(config.get_text_config(), "image_size", 32)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width)}


def _wave(config: Any) -> Inputs:
    return {"input_values": torch.randn(2, 800)}


def _spectrogram(config: Any) -> Inputs:
    if hasattr(config, "num_mel_bins"):
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)}
    return {"input_features": torch.randn(2, 32, config.feature_projection_input_dim)}


def _mel_to_text(config: Any) -> Inputs:
    mel = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": mel, "decoder_input_ids": _ids()}


def _image_and_text(config: Any) -> Inputs:
    vision = getattr(config, "vision_config", config)
    return {**_text(config), "pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size)}


INPUTS: dict[str, Callable[[Any], Inputs]] = {
    configs.TEXT: _text,
    configs.TEXT_PAIR: _text_pair,
    configs.IMAGE: _image,
    configs.WAVE: _wave,
    configs.SPECTROGRAM: _spectrogram,
    configs.MEL_TO_TEXT: _mel_to_text,
    configs.IMAGE_AND_TEXT: _image_and_text,
}
