"""transformers' `save_pretrained` of a transformed model keeps its plan in `config.json`.

transformers is imported by those alone who have one of its models.
"""

import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from replfx.errors import ReplfxError

__all__ = ["CONFIG", "INDEX", "MARK", "PLAN", "WEIGHTS", "keep_plan_on_saving", "read_json", "stop_keeping_plan"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PLAN = "replfx_plan"
"""The field of a configuration that has the plan."""
MARK = {"transformers_weights": "the weights of a model that replfx transformed: use replfx.from_pretrained(folder)"}
"""The field that names the file of the weights. transformers raises an error that ends in this text."""

_HOOK = "save_pretrained"


def keep_plan_on_saving(model: nn.Module) -> None:
    """Have a transformed model of transformers write its plan when it is saved; does nothing to other models."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        # Not a closure: it is copied and pickled with the model, and is that copy's.
        model.__dict__[_HOOK] = functools.partial(_save_pretrained, model)


def stop_keeping_plan(model: nn.Module) -> None:
    """Undo `keep_plan_on_saving`."""
    found = model.__dict__.get(_HOOK)
    if isinstance(found, functools.partial) and found.func is _save_pretrained:
        del model.__dict__[_HOOK]


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """As transformers' own, and the plan in the configuration; `replfx.from_pretrained` reads the folder."""
    from replfx.rewrite.state import plan_of

    if push_to_hub:
        raise ReplfxError("save a transformed model without push_to_hub=True, and call model.push_to_hub(repository)")
    own = type(model).save_pretrained
    if "save_original_format" in inspect.signature(own).parameters:
        options.setdefault("save_original_format", False)  # older names would not be those of the plan
    own(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
    file = Path(save_directory) / CONFIG
    if not is_main_process:
        return
    _drop_older(file.with_name(WEIGHTS), file.with_name(INDEX))
    if file.is_file():  # adapters are saved without it
        written = {**read_json(file), **MARK, PLAN: json.loads(plan_of(model).to_json())}
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _drop_older(*files: Path) -> None:
    """Delete what an earlier save left, and would be read: weights in one file, or the list of their shards."""
    if all(file.is_file() for file in files):
        min(files, key=lambda file: file.stat().st_mtime_ns).unlink()


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a file that `save_pretrained` wrote.

    Raises:
        ReplfxError: there is no such file, or it is damaged.
    """
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise ReplfxError(f"there is no {file}: from_pretrained reads a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise ReplfxError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ReplfxError(f"{file} is damaged: it has no fields")
    return found
