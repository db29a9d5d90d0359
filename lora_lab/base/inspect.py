"""Look at a model folder before anything loads it: is it whole, and does it name code or leave its folder?

A model folder is a download. Its index may point outside the folder, its config may ask for remote code, its weights
may be pickles: transformers trusts some of that, we do not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_lab import storage
from lora_lab.errors import BaseModelError, CheckpointError

_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_pipelines")
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked to be whole and inside the folder.

    Raises:
        BaseModelError: no config, no safetensors, a missing, cut or foreign shard, or a config that names code.
    """
    config = _read_json(folder / "config.json")
    _refuse_code(folder / "config.json", config)
    index = folder / _INDEX
    names = sorted(set(_read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    files = [_inside(folder, name) for name in names]
    for file in files:
        try:
            storage.check_safetensors(file)
        except CheckpointError as error:
            raise BaseModelError(str(error)) from error
    return files


def _refuse_code(file: Path, node: Any) -> None:
    """Refuse keys that name code, at any depth, and model types that are no plain names (some libraries build code of them)."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in _CODE_KEYS:
            raise BaseModelError(f"{file}: '{key}' names code to run; lora_lab never runs code from a model.")
        if key == "model_type" and not re.fullmatch(r"[A-Za-z0-9_.-]{0,100}", str(value)):
            raise BaseModelError(f"{file}: model_type {value!r} is not a name. The folder is not trusted.")
        _refuse_code(file, value)


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise BaseModelError(
            f"{folder / _INDEX}: weight file {name!r} is outside the folder; the index is not trusted."
        )
    file = folder / name
    if not file.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = (
            f" There is {pickled[0]}, a pickle, which lora_lab does not read: convert it with transformers' save_pretrained."
            if pickled
            else " Copy or download the model again."
        )
        raise BaseModelError(f"{folder}: {name} is missing.{hint}")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(f"{file.parent}: no {file.name}, so this is not a transformers model folder.") from error
    except (ValueError, OSError) as error:
        raise BaseModelError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise BaseModelError(f"{file}: must hold a JSON object.")
    return tree
