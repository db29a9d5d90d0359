"""Load the frozen base: find its folder, read its tokenizer, load and quantize its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.base import gguf, inspect
from lora_lab.base.fingerprint import fingerprint
from lora_lab.base.resolve import is_hub_id, local_path
from lora_lab.config import HardwareConfig, ModelConfig, QuantConfig
from lora_lab.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, before any weight is loaded."""

    name: str  # as the user named it
    folder: Path
    fingerprint: str  # see `fingerprint.py`


def find(model: ModelConfig) -> BaseFiles:
    """Find the base model, downloading or converting it when needed, and check its files.

    Raises:
        BaseModelError: not found, not reachable, damaged, or asking for code to be run.
    """
    folder = _download(model) if is_hub_id(model.path) else local_path(model.path, "model.path", BaseModelError)
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise BaseModelError(
                f"model.path={model.path}: a file must be .gguf; name the folder of a transformers model."
            )
        folder = gguf.to_safetensors(folder)
    return BaseFiles(model.path, folder, fingerprint(folder, inspect.weight_files(folder)))


def _download(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelError(
            f"model.path={model.path}: no such folder here, and the hub did not give it ({type(error).__name__}: {reason}). "
            "Check the name and your HF_TOKEN, or give a local folder."
        ) from error


def torch_device(hardware: HardwareConfig) -> torch.device:
    """The device that `hardware.device` names.

    Raises:
        ConfigError: CUDA is asked for and torch has none.
    """
    import torch

    name = hardware.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"hardware.device={hardware.device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
                "devices. Use hardware=cpu, or install a CUDA build of torch."
            )
        name = f"cuda:{index}"
    return torch.device(name)


def load_model(files: BaseFiles, dtype: str, quant: QuantConfig, device: torch.device) -> PreTrainedModel:
    """The base model on its device: quantized if asked, in evaluation mode, every parameter frozen.

    Args:
        dtype: torch type of everything that is not quantized; also the type that quantized layers compute in.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=getattr(torch, dtype),
            quantization_config=bitsandbytes_config(quant, dtype),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BaseModelError(
            f"model.path={files.name}: cannot be loaded with quant.method={quant.method} ({error})."
        ) from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise BaseModelError(
            f"model.path={files.name}: no weights for {absent[0]} ({len(absent)} tensors): transformers would fill them "
            f"with random numbers. The folder does not hold a whole {type(model).__name__}."
        )
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in place at the first evaluation, and gradients are lost after
        # that. A frozen base stays as it is.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def bitsandbytes_config(quant: QuantConfig, dtype: str) -> BitsAndBytesConfig | None:
    """transformers' description of a quantization; None for none."""
    import torch
    from transformers import BitsAndBytesConfig

    if quant.method == "none":
        return None
    if quant.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=quant.skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.method,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=quant.skip_modules,
    )
