"""Reading a transformed model of transformers: the plan and the weights that its `save_pretrained` wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replfx.api import apply
from replfx.errors import PlanError, ReplfxError, StateDictError
from replfx.plans import Plan
from replfx.rewrite.saving import CONFIG, INDEX, MARK, PLAN, WEIGHTS, read_json
from replfx.rewrite.state import load_state_dict

__all__ = ["from_pretrained"]


def from_pretrained(
    folder: str | Path,
    *,
    model_class: type[nn.Module] | None = None,
    dtype: torch.dtype | str = "auto",
    **config_fields: object,
) -> nn.Module:
    """Read a transformed model of transformers from the folder that its `save_pretrained` wrote.

    Args:
        folder: has `config.json`, with the plan in it, and the weights as safetensors in one file or in shards. For a
            repository of a hub, what `huggingface_hub.snapshot_download` gives.
        model_class: the class of the model; by default the one of transformers that the configuration names.
        dtype: of all floating-point parameters, such as torch.bfloat16; "auto" leaves each as it was saved.
        config_fields: override fields of the configuration (`attn_implementation="eager"`).

    Returns:
        The transformed model in evaluation mode, on the CPU.

    Raises:
        PlanError: the folder has no plan, since its model was not transformed; or the plan is for another model.
        StateDictError: the weights are not all there, or of another plan.
        ReplfxError: there is no such folder, its model's class is not known, or an argument is not (`device_map=`).

    Example:
        >>> model = replfx.transform(GPT2LMHeadModel(GPT2Config(n_layer=6)), {"input_ids": tokens})
        >>> model.save_pretrained("shared")
        >>> again = replfx.from_pretrained("shared")
    """
    folder = Path(folder)
    written = read_json(folder / CONFIG)
    if PLAN not in written:
        raise PlanError(
            f"{folder / CONFIG} has no plan: its model was saved untransformed, read it with its own from_pretrained"
        )
    plan = Plan.from_json(json.dumps(written[PLAN]))
    make: Any = model_class or _class_named(written.get("architectures") or ["none"])
    config, unknown = make.config_class.from_pretrained(folder, return_unused_kwargs=True, **config_fields)
    if unknown:
        raise ReplfxError(
            f"from_pretrained does not know {', '.join(f'{name}=' for name in unknown)}, and {type(config).__name__} "
            "has no such field. The model comes on the CPU: move it with model.to(device)"
        )
    for field in (PLAN, *MARK):
        if hasattr(config, field):
            delattr(config, field)
    weights = _weights_in(folder)
    with torch.random.fork_rng():  # the weights that it begins with are written over
        model = apply(make(config), plan, inplace=True)
    _set_dtypes(model, weights, dtype)
    load_state_dict(model, _complete(model, weights))
    _read_generation(model, folder)
    return model.eval()


def _class_named(architectures: list[str]) -> Any:
    import transformers

    found = getattr(transformers, architectures[0], None)
    if found is None:
        raise ReplfxError(f"transformers has no class {architectures[0]!r}: give from_pretrained your model_class=")
    return found


def _weights_in(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    sharded = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    files = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if sharded else [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            raise StateDictError(f"the weights are not all there: {folder} has no {name}") from None
        except SafetensorError as error:
            raise StateDictError(f"{folder / name} is damaged: {error}") from error
    return weights


def _set_dtypes(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> None:
    """Parameters alone: buffers such as the frequencies of rotary embeddings are to stay exact."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            saved = weights[name].dtype if name in weights else parameter.dtype
            parameter.data = parameter.data.to(saved if dtype == "auto" else _dtype(dtype))


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ReplfxError(f'dtype must be "auto" or a torch.dtype, not {dtype!r}')
    return found


def _complete(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights also under the names that are not saved: those of tied weights, and what is made anew."""
    remade = getattr(model, "_keys_to_ignore_on_save", None) or ()
    own = model.state_dict(keep_vars=True)
    by_tensor = {id(tensor): weights[name] for name, tensor in own.items() if name in weights}
    missing = {name: by_tensor.get(id(t), t.detach() if name in remade else None) for name, t in own.items()}
    return {**{name: tensor for name, tensor in missing.items() if tensor is not None}, **weights}


def _read_generation(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
