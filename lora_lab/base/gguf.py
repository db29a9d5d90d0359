"""A GGUF base is dequantized once into a cached transformers folder, so that later loads take a second.

GGUF holds quantized blocks that transformers can read but not train on. The cache is keyed by the file's bytes.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from lora_lab import storage
from lora_lab.base.fingerprint import remembered_sha256
from lora_lab.base.resolve import cache_dir
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.errors import BaseModelError

_FORMAT = 1  # raised when the conversion changes, so that older cache entries are not used


def to_safetensors(file: Path) -> Path:
    """The folder with the dequantized model and its tokenizer, made on first use.

    The weights are stored in bfloat16, the type that nearly all models in GGUF were published in; the rounding is far
    below the error of the file's own quantization.

    Raises:
        BaseModelError: the file is not GGUF, is cut, or holds an architecture that transformers cannot read.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BaseModelError(f"model.path={file}: not a GGUF file (its first bytes are not 'GGUF').")
    folder = cache_dir() / "gguf" / f"{remembered_sha256(file)[:32]}-{_FORMAT}"
    if folder.exists():  # it appears whole or not at all
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BaseModelError(
            f"{folder.parent}: cannot be made ({error.strerror}). Set LORA_LAB_CACHE to a folder that can be written."
        ) from error
    with FileLock(f"{folder}.lock"):  # another process may be converting the same file
        storage.recover(folder.parent, folder.name)
        if not folder.exists():
            _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise BaseModelError(f"model.path={file}: reading GGUF needs the package gguf: pip install gguf") from error
    except (ValueError, OSError, KeyError, RuntimeError, IndexError) as error:
        raise BaseModelError(f"model.path={file}: transformers cannot read this GGUF file ({error}).") from error
    with storage.new_folder(folder, {"source": file.name}) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
