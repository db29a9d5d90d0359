"""Adapter folders: plain peft format, plus `lora_lab.json`, which says which base the adapter belongs to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import __version__
from lora_lab.adapters import ADAPTERS, prompts, reason_against
from lora_lab.base.load import BaseFiles
from lora_lab.base.resolve import is_hub_id
from lora_lab.base.tokenizer import TOKENS_AS_WRITTEN
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.errors import AdapterError, CheckpointError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import read_json, reading

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from lora_lab.adapters.base import AdapterSection

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "lora_lab.json"


def write(
    folder: Path, model: PeftModel, name: str, config: RunConfig, base: BaseFiles, learned: dict[str, Any]
) -> None:
    """Write the adapter `name` into an existing (temporary) folder: weights, peft's config, provenance.

    Args:
        learned: what the task took from the training rows, such as the names of its classes.
    """

    state = tensors_of(model, name)
    write_tensors(folder, state, model.peft_config[name], config, base, learned)


def write_tensors(
    folder: Path,
    state: dict[str, torch.Tensor],
    peft_config: PeftConfig,
    config: RunConfig,
    base: BaseFiles,
    learned: dict[str, Any],
    **provenance: Any,
) -> None:
    """As `write`, of tensors that are in no model.

    Args:
        state: by peft's names.
        provenance: what `lora_lab.json` says beside base and task.
    """
    from safetensors.torch import save_file

    whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    seen = {one.data_ptr(): key for key, one in whole.items()}
    apart = {
        key: one if seen[one.data_ptr()] == key else one.clone() for key, one in whole.items()
    }  # tied ones are one
    save_file(apart, folder / WEIGHTS, {"format": "pt"})
    was_named, was_inference = peft_config.base_model_name_or_path, peft_config.inference_mode
    peft_config.base_model_name_or_path = base.name if is_hub_id(base.name) else str(base.folder)
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    _sort_sets(folder / CONFIG, peft_config)
    peft_config.base_model_name_or_path, peft_config.inference_mode = was_named, was_inference
    content = {
        "lora_lab": __version__,
        "base": {**base.recorded(), **dataclasses.asdict(base.stored(config.quant))},
        "task": {"name": config.task.name, **learned},
        **provenance,
    }
    (folder / PROVENANCE).write_text(storage.dump_json(content), encoding="utf-8")


def _sort_sets(file: Path, config: PeftConfig) -> None:
    """Write names in order: peft writes sets as they come, which is otherwise in each process."""
    tree = read_json(file, AdapterError)
    for name, value in tree.items():
        if isinstance(value, list) and isinstance(getattr(config, name), set):
            tree[name] = sorted(value)
    file.write_text(json.dumps(tree, indent=2, sort_keys=True), encoding="utf-8")


def learned(folder: Path) -> dict[str, Any]:
    """What the task had taken from the training rows when the adapter in `folder` was written.

    Raises:
        AdapterError: there is no adapter.
        CheckpointError: the folder does not match its manifest.
    """
    task = _provenance(folder).get("task")
    return {key: value for key, value in task.items() if key != "name"} if isinstance(task, dict) else {}


def _provenance(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no adapter there. Train it first, or finish it with lora-lab resume.")
    storage.verify(folder)
    found: dict[str, Any] = read_json(folder / PROVENANCE, AdapterError)
    if not isinstance(found.get("base"), dict):
        raise AdapterError(f"{folder / PROVENANCE}: does not say which base it was trained on. Copy the adapter again.")
    return found


def check_base(folder: Path, base: BaseFiles) -> None:
    """Check that the adapter in `folder` is whole and was trained on this very base, tokenizer and template included.

    Raises:
        CheckpointError: the folder does not match its manifest.
        AdapterError: it was trained on another, even if every shape fits.
    """
    trained_on = _provenance(folder)["base"]
    changed = base.changed(trained_on)
    if "weights" in changed:
        raise AdapterError(
            f"{folder}: trained on {trained_on.get('name')} (weights {str(trained_on.get('fingerprint'))[:12]}), and model.path="
            f"{base.name} has other weights ({base.fingerprint[:12]}). Name the base that it was trained on."
        )
    readers = {min(reader, TOKENS_AS_WRITTEN) for reader in (trained_on.get("tokenizer_reader", 1), base.reader)}
    if changed and len(readers) > 1:
        raise AdapterError(
            f"{folder}: trained on {trained_on.get('name')} with tokens as another version of lora-lab read them, so the same text is another "
            "to it. Take adapters that were trained with the same tokens; train the older one anew."
        )
    if changed:
        raise AdapterError(
            f"{folder}: trained on {trained_on.get('name')}, and the {' and the '.join(changed)} in {base.folder} changed since: "
            "prompts would reach the model in other tokens than in training. Restore the files."
        )


def check_quant(folder: Path, quant: QuantConfig) -> None:
    """Check that the adapter in `folder` was trained on a base that was stored as its run says.

    Raises:
        AdapterError: naming the key with both values.
    """
    recorded, told = _provenance(folder)["base"], dataclasses.asdict(quant)
    for name in ("method", "double_quant", "skip_modules"):
        if name in recorded and recorded[name] != told[name]:
            raise AdapterError(
                f"{folder}: trained with quant.{name}={recorded[name]}, and the run says {told[name]}. Restore the one that was changed."
            )


def settings(folder: Path) -> PeftConfig:
    """What the adapter in `folder` is: the only reader of `adapter_config.json`. No module that it names is imported.

    Raises:
        AdapterError: a method that lora_lab does not train, or settings that peft does not know as this method's.
    """
    import peft

    file = folder / CONFIG
    tree = read_json(file, AdapterError)
    method, mapping = tree.pop("peft_type", None), tree.pop("auto_mapping", None)
    tree.pop("base_model_name_or_path", None)  # which base it is, its fingerprint says
    methods = {section.peft_type: section for section in ADAPTERS.values()}
    if method not in methods:
        why = f", because {reason}" if (reason := reason_against(method)) else ""
        raise AdapterError(
            f"{file}: peft_type={method}: lora_lab does not train it{why}. There are: {', '.join(methods)}."
        )
    kind = methods[method].config_class()
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(tree) - known)
    if mapping or unknown:
        raise AdapterError(
            f"{file}: '{unknown[0] if unknown else 'auto_mapping'}' is nothing that peft {peft.__version__} knows of {method}. Install "
            "the version that wrote it."
        )
    with reading(file, AdapterError):
        return kind(**tree)


def method_of(config: PeftConfig) -> type[AdapterSection]:
    """The method that a configuration of peft is of."""
    return next(section for section in ADAPTERS.values() if section.peft_type == config.peft_type)


def check_settings(folder: Path, told: PeftConfig) -> None:
    """Check that the adapter in `folder` has the settings of the run that it is in; layers follow from its tensors.

    Args:
        told: what the run's configuration makes of them on its base.

    Raises:
        AdapterError: naming the keys with both values.
    """
    saved = settings(folder)
    names = ("peft_type",) if saved.peft_type != told.peft_type else method_of(saved).settings()
    other = [
        f"{name}={_shown(getattr(saved, name))}, and the run says {_shown(getattr(told, name))}"
        for name in names
        if getattr(saved, name) != getattr(told, name)
    ]
    if other:
        raise AdapterError(f"{folder / CONFIG}: {'; '.join(other)}. Restore the one that was changed.")


def _shown(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enum


def read_into(folder: Path, model: PeftModel, name: str) -> None:
    """Load a verified folder's weights into the attached adapter `name`.

    Raises:
        AdapterError: missing, unexpected, misshapen or non-finite tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({error}).") from error
    expected = tensors_of(model, name)
    wrong = sorted(set(state) ^ set(expected)) or [key for key in state if state[key].shape != expected[key].shape]
    if wrong:
        raise AdapterError(
            f"{folder / WEIGHTS}: does not fit the adapter's settings, first at {wrong[0]} ({len(wrong)} tensors)."
        )
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise AdapterError(f"{folder / WEIGHTS}: NaN or infinity in {broken[0]} ({len(broken)} tensors).")
    put(model, name, state)


def put(model: PeftModel, name: str, state: dict[str, torch.Tensor]) -> None:
    """Give the attached adapter `name` these tensors, by the names that peft writes them under.

    peft's own way (`set_peft_model_state_dict`) passes the names through transformers' renamings for checkpoints of old, which fit the
    names of today as well in some families (Laguna's `shared_expert`), and drops what has no place then without a word.

    Raises:
        KeyError: a name that the adapter does not have.
    """
    import torch

    from lora_lab.adapters.beginnings import Residual

    whole = model.state_dict()
    places = {id(tensor): place.rpartition(".")[0] for place, tensor in whole.items()}
    own = tensors_of(model, name, whole)
    with torch.no_grad():
        for key, value in state.items():
            module = model.get_submodule(places.get(id(own[key]), ""))
            if isinstance(module, Residual):
                module.take(value)
            else:
                own[key].copy_(value)


def tensors_of(model: PeftModel, name: str, whole: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What is saved of an adapter, by the names that peft writes it under.

    Args:
        whole: the model's `state_dict()`, to find its tensors again.
    """
    from peft import get_peft_model_state_dict

    if prompts.is_prompt(model, name):
        return prompts.tensors_of(model, name)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, whole, adapter_name=name, save_embedding_layers=False
    )
    return _once(found, method_of(model.peft_config[name]).saved_once)


def _once(tensors: dict[str, torch.Tensor], shared: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What layers share, once, under its shortest name: peft names it for each of them."""
    first: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        first.setdefault((tensors[name].data_ptr(), tensors[name].shape), name)
    names = set(first.values())
    return {name: one for name, one in tensors.items() if name in names or not any(part in name for part in shared)}
