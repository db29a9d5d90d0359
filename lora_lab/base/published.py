"""A base that was published in few bits: how, as its `config.json` says, and what can be done with it.

bitsandbytes' weights are trained on as they are, and merged by dequantizing them. A base of any other method is refused before anything
is loaded, with what stands in its way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lora_lab.base import inspect
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.errors import BaseModelError, ConfigError
from lora_lab.runtime.reading import read_json

_FORMATS: tuple[Literal["nf4", "fp4", "int8"], ...] = ("nf4", "fp4", "int8")
_KEYS = ("quantization_config", "compression_config")
_OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of older versions of these methods
_GPTQMODEL = (
    "gptqmodel, which reads them, needs a newer torch than lora_lab is tested with, and is built for each machine"
)
_INFERENCE = "transformers computes with them, and does not train on them"
_ONE_WAY = "transformers turns them into plain numbers, and saves those so that it cannot read them again"
_AGAINST = {  # as transformers 5.23 and peft 0.21 have it
    "gptq": _GPTQMODEL,
    "awq": _GPTQMODEL,
    "hqq": "transformers has no code at present that loads them",
    "fp8": _ONE_WAY,
    "mxfp4": _ONE_WAY,
    "compressed-tensors": "they need the package compressed-tensors, with which nothing is proved here",
    "torchao": "they need not be those that torchao makes of the same model today",
    **dict.fromkeys("auto-round fbgemm_fp8 higgs metal nvfp4 quark spqr vptq gemma".split(), _INFERENCE),
}
_INSTEAD = {"torchao": "quant=torchao_int8 to train on it in 8 bits"}


def read(folder: Path) -> QuantConfig | None:
    """How the weights of a model folder are quantized; None where they are plain.

    Raises:
        BaseModelError: by a method that cannot be trained on.
    """
    file = folder / "config.json"
    found = _described(folder)
    if found is None:
        return None
    place, how = found
    method = how.get("quant_method") or ("bitsandbytes" if _bits(how) else "an unnamed method")
    if method != "bitsandbytes":
        name = str(method)[:40]
        reason = _AGAINST.get(name)
        raise BaseModelError(
            f"{place}: these weights were published in few bits ({name}), which lora_lab neither trains on nor merges"
            f"{f', because {reason}' if reason else ''}. Name the repository of the unquantized model, and set "
            f"{_INSTEAD.get(name, 'quant=nf4 to train on it in 4 bits')}."
        )
    skipped = how.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise BaseModelError(f"{file}: quantization_config.llm_int8_skip_modules must be a list of names.")
    bits = next((one for one in _FORMATS if one == _bits(how)), None)
    if bits is None:
        raise BaseModelError(
            f"{file}: quantization_config names no kind of bitsandbytes' numbers (nf4, fp4 or 8 bits). Copy or download the folder again."
        )
    nested = bits != "int8" and how.get("bnb_4bit_use_double_quant") is True
    return QuantConfig(method=bits, double_quant=nested, skip_modules=skipped)


def _described(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """What says that the weights are quantized, and where it stands."""
    file = folder / "config.json"
    config = read_json(file, BaseModelError, max_bytes=inspect.MAX_CONFIG_BYTES)
    parts = [config, *(value for name, value in config.items() if name.endswith("_config") and isinstance(value, dict))]
    for part in parts:
        for key in _KEYS:
            how = part.get(key)
            if how is not None and not isinstance(how, dict):
                raise BaseModelError(f"{file}: {key} must be an object, not {type(how).__name__}.")
            if how:
                return file, {"quant_method": "compressed-tensors", **how} if key == "compression_config" else how
    for name, method in _OTHER_FILES.items():
        if (folder / name).is_file():
            return folder / name, {"quant_method": method}
    return None


def _bits(how: dict[str, Any]) -> str:
    """quant.method of bitsandbytes' own settings; empty where they name none."""
    if how.get("load_in_4bit") or how.get("_load_in_4bit"):
        return str(how.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if how.get("load_in_8bit") or how.get("_load_in_8bit") else ""


def check(config: RunConfig, published: QuantConfig | None, name: str) -> None:
    """Refuse settings that a base that is quantized already cannot follow.

    Args:
        name: the base's, for messages.

    Raises:
        ConfigError: naming the key.
    """
    if published is None:
        return
    found, told = [], config.quant
    if told.method not in ("none", published.method):
        found.append(
            f"quant.method={told.method}: {name} was published in {published.method}, and is trained on as it is. Set quant=none, or "
            "name the repository of the unquantized model."
        )
    if told.skip_modules is not None and told.skip_modules != published.skip_modules:
        found.append(
            f"quant.skip_modules: no effect, because {name} is quantized already, in {published.method}. Drop it, or name the "
            "repository of the unquantized model."
        )
    if config.merge.base in ("full_precision", "corrected"):
        found.append(
            f"merge.base={config.merge.base}: {name} was published in {published.method}, and its unquantized weights are not there. Set "
            "merge.base=auto, which dequantizes what training saw, or name the repository of the unquantized model."
        )
    if config.speed.prefix_cache and published.method == "int8":
        found.append(
            "speed.prefix_cache=true: not with a base in int8, which rounds a row by the rows beside it. Drop it."
        )
    if found:
        raise ConfigError(*found)
