"""Look at a model folder before anything loads it: is it whole, and does it name code or leave its folder?

A model folder is a download. Its index may point outside the folder, its config may ask for remote code or for a billion layers,
its weights may be pickles: transformers trusts some of that, we do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.base.resolve import TOKENIZER_FILES
from lora_lab.errors import BaseModelError, CheckpointError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import MAX_BYTES, check_file, read_json, reading

KNOWN_ATTENTION = (None, "eager", "sdpa")  # what a config.json may choose: transformers' own code
_CODE_KEYS = (
    "auto_map",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "trust_remote_code",
    "custom_pipelines",
)
_CODE_CHOICES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_SCALES = (".SCB", ".absmax")  # bitsandbytes' names for what belongs to a quantized weight
_BOUNDED = (".jinja", ".model", ".spm")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", _INDEX)
MAX_CONFIG_BYTES = 16 * 2**20  # the names of 100,000 classes, twice
# Sizes by the names that configurations give them. What is above is no model that exists; building its skeleton alone takes hours.
_LIMITS = (
    (re.compile(r"num_labels"), 100_000),
    (re.compile(r"(.*_)?vocab_size|vocab_size_.*"), 2**24),
    (re.compile(r"(.*_)?(num|n)_(.*_)?(layers?|blocks?|stages?)|n_layers?|.*_layers|depths?"), 2_000),
    (re.compile(r"(.*_)?experts|(num|n)_.*experts.*"), 4_096),
    (re.compile(r"(.*_)?(num|n)_(.*_)?heads?(_kv)?|n_heads?"), 2**14),
    (re.compile(r"(.*_)?(hidden|intermediate|embedding|embed|ffn|inner|head|state)_(size|dim)|d_model|d_ff|d_kv|n_embd|n_inner|dim"), 2**20),
)  # fmt: skip
_TYPE_NAME = re.compile(r"(torch\.)?(auto|b?float\d*\w*|half|double|u?int\d+)")


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model folder, checked to be whole and inside the folder.

    Raises:
        BaseModelError: no config or one that cannot be trusted, no safetensors, weights that could be two models, an index that
            does not fit its shards, or a file that is missing, cut, no regular file or outside the folder.
    """
    require_config(folder)
    check_files(folder)
    single, index = folder / _SINGLE, folder / _INDEX
    if not index.exists():
        files = [_whole(_there(folder, _SINGLE))]
        _check_quantized(folder, files)
        return files
    listed = _listed(index)
    if single.exists() and set(listed) != {_SINGLE}:
        raise BaseModelError(
            f"{folder}: holds {_SINGLE} and {_INDEX}, which names other files. transformers loads {_SINGLE} and does not look at "
            f"the index. Remove the index if the single file is the model, or {_SINGLE} if the shards are."
        )
    files = []
    for name, tensors in sorted(listed.items()):
        file = _whole(_there(folder, name))
        _compare(index, file, tensors)
        files.append(file)
    _check_quantized(folder, files)
    return files


def without_weights(folder: Path) -> bool:
    """Whether a model folder holds its description and no weights of any kind."""
    require_config(folder)
    return not any(file.suffix in _WEIGHTS for file in folder.iterdir())


def require_config(folder: Path) -> None:
    """Refuse a folder that holds no model.

    Raises:
        BaseModelError: it has no `config.json`.
    """
    with reading(folder, BaseModelError):
        if not (folder / "config.json").exists():
            raise BaseModelError(f"{folder}: no config.json, so this is not a transformers model folder.")


def check_files(folder: Path) -> None:
    """Check the small files of the folder of a model or tokenizer, whichever a library will read of them.

    Raises:
        BaseModelError: a configuration that names code or absurd sizes, a file that is no regular file, is too large or is a link
            out of the folder, an adapter beside the model.
    """
    with reading(folder, BaseModelError):
        for file in _small_files(folder):
            _refuse_foreign(folder, file)
            check_file(
                file, BaseModelError, MAX_BYTES if file.suffix in _BOUNDED or file.name in _VOCABULARIES else None
            )
    for name in _SMALL:
        if (folder / name).exists():
            tree = read_json(folder / name, BaseModelError, max_bytes=MAX_CONFIG_BYTES)
            _refuse_code(folder / name, tree)
            if name == "config.json":
                check_config(folder / name, tree)
    if (folder / _ADAPTER).exists():
        raise BaseModelError(
            f"{folder}: holds {_ADAPTER}, and transformers would put that adapter onto the model. Merge it into the base, or move "
            "it to a folder of its own."
        )


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check the sizes that a configuration names, before a model is built from them, and what else it may not choose.

    Args:
        file: where it comes from, for messages.

    Raises:
        BaseModelError: naming the key, its value and what is allowed.
    """
    if "transformers_weights" in config:
        raise BaseModelError(
            f"{file}: 'transformers_weights' names other weights than {_SINGLE} and its shards. Remove the key, and give the "
            "weights these names."
        )
    for key, value in _entries(config):
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and not _TYPE_NAME.fullmatch(value):
            raise BaseModelError(f"{file}: {key} {value[:60]!r} is no type of numbers, such as 'bfloat16'.")
        limit = next((most for name, most in _LIMITS if name.fullmatch(key)), None)
        if limit is not None:
            _check_size(file, key, value, limit)


def _check_size(file: Path, key: str, value: Any, limit: int) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not -1 <= number <= limit:  # some write -1 for none
            raise BaseModelError(
                f"{file}: {key} {number:g} is out of range (up to {limit:,}). The folder is not trusted."
            )


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth, in lists too."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield from ((str(key), value) for key, value in node.items())
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _refuse_code(file: Path, tree: dict[str, Any]) -> None:
    """Refuse keys that name code, at any depth, and model types that are no plain names (some libraries build code of them)."""
    for key, value in _entries(tree):
        if key in _CODE_KEYS:
            raise BaseModelError(f"{file}: '{key}' names code to run; lora_lab never runs code from a model.")
        if key == "model_type" and not re.fullmatch(r"[A-Za-z0-9_.-]{0,100}", str(value)):
            raise BaseModelError(f"{file}: model_type {str(value)[:200]!r} is not a name. The folder is not trusted.")
        if key in _CODE_CHOICES:
            for choice in value.values() if isinstance(value, dict) else [value]:
                if choice is not None and not re.fullmatch(r"\w+", str(choice)):
                    raise BaseModelError(
                        f"{file}: {key} {str(choice)[:200]!r} names code to run from elsewhere; lora_lab never runs code that a "
                        "model names. Remove the key: nothing of the model is lost."
                    )


def _small_files(folder: Path) -> list[Path]:
    """Everything beside the weights that a library, or a model card of ours, may read."""
    patterns = (*TOKENIZER_FILES, "additional_chat_templates/*", "README.md", "LICENSE*")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _refuse_foreign(folder: Path, file: Path) -> None:
    """Refuse links that leave the folder; those of a hub snapshot lead into its `blobs`."""
    inside = folder.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append((inside.parent.parent / "blobs").resolve())
    with reading(file, BaseModelError):
        target = file.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise BaseModelError(
            f"{file}: a link that leaves the folder (to {target}), so the folder is not trusted. If the link is yours, put a copy "
            f"of the file in its place: cp --remove-destination {target} {file}"
        )


def _listed(index: Path) -> dict[str, set[str]]:
    """Shard -> tensors, as an index has them."""
    weight_map = read_json(index, BaseModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(
            f"{index}: 'weight_map' must be an object that names every tensor's file, and at least one. Copy or download it again."
        )
    listed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BaseModelError(
                f"{index}: weight file {str(name)[:200]!r} is outside the folder or no .safetensors; the index is not trusted."
            )
        listed.setdefault(name, set()).add(tensor)
    return listed


def _there(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.exists():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = (
            f" There is {pickled[0]}, a pickle, which lora_lab does not read: convert it with transformers' save_pretrained."
            if pickled
            else " Copy or download the model again."
        )
        raise BaseModelError(f"{folder}: {name} is missing.{hint}")
    _refuse_foreign(folder, file)
    return file


def _whole(file: Path) -> Path:
    check_file(file, BaseModelError, None)
    try:
        with reading(file, BaseModelError):
            storage.check_safetensors(file)
    except CheckpointError as error:
        raise BaseModelError(str(error)) from error
    return file


def _check_quantized(folder: Path, files: list[Path]) -> None:
    """Refuse weights that are plain where the configuration says that bitsandbytes quantized them: layers would be made for
    scales that are nowhere."""
    file = folder / "config.json"
    how = read_json(file, BaseModelError, max_bytes=MAX_CONFIG_BYTES).get("quantization_config") or {}
    if not isinstance(how, dict):
        raise BaseModelError(f"{file}: quantization_config must be an object, not {type(how).__name__}.")
    if how.get("quant_method") != "bitsandbytes":
        return
    if not any(name.endswith(_SCALES) for weights in files for name in _names(weights)):
        raise BaseModelError(
            f"{file}: quantization_config says that bitsandbytes quantized these weights, and they are plain numbers. Remove it; "
            "to quantize them, set quant.method."
        )


def _names(file: Path) -> set[str]:
    """The tensors of a safetensors file."""
    from safetensors import safe_open

    with reading(file, BaseModelError), safe_open(file, "np") as tensors:
        return set(tensors.keys())


def _compare(index: Path, file: Path, listed: set[str]) -> None:
    """Refuse an index that contradicts its shard: transformers loads whole shards, whatever the index leaves out."""
    there = _names(file)
    for names, sentence in (
        (listed - there, "names tensor {} of {}, which is not in it"),
        (there - listed, "leaves out tensor {} of {}"),
    ):
        if names:
            raise BaseModelError(
                f"{index}: {sentence.format(repr(min(names)), file.name)} ({len(names)} tensors): the index belongs to other weights. "
                "Copy or download the folder again."
            )
