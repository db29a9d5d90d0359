"""Translate lines with a sequence-to-sequence model that the user names, for back-translation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.base import inspect
from lora_lab.base.fingerprint import fingerprint
from lora_lab.base.resolve import TOKENIZER_FILES, download, is_hub_id, local_path
from lora_lab.base.tokenizer import decode, read_tokenizer
from lora_lab.errors import BaseModelError, LoraLabError
from lora_lab.runtime import storage

if TYPE_CHECKING:
    import torch

_BATCH = 16  # lines translated at a time


def find(key: str, name: str) -> Path:
    """The folder of a translation model, downloaded when needed.

    Args:
        key: the configuration key with its value, for messages.

    Raises:
        BaseModelError: not found, not reachable, damaged, or asking for code to be run.
    """
    folder = download(key, name) if is_hub_id(name) else local_path(name, key.partition("=")[0], BaseModelError)
    if not folder.is_dir():
        raise BaseModelError(f"{key}: is a file. Name the folder of a transformers sequence-to-sequence model.")
    inspect.weight_files(folder)  # refuses pickles and configurations that name code
    return folder


def digest(folder: Path) -> str:
    """Weights, architecture, and the small files that decide what a model reads and writes."""
    small = sorted(
        file
        for file in folder.iterdir()
        if any(file.match(pattern) for pattern in TOKENIZER_FILES) and file.name != "config.json"
    )
    parts = [fingerprint(folder, inspect.weight_files(folder)), *(f"{f.name} {storage.sha256(f)}" for f in small)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Translator:
    """One sequence-to-sequence model with its tokenizer, in float32."""

    def __init__(self, key: str, folder: Path, prefix: str, device: torch.device):
        import torch
        from transformers import AutoModelForSeq2SeqLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.prefix = prefix
        self.tokenizer = read_tokenizer(folder)
        try:
            model, report = AutoModelForSeq2SeqLM.from_pretrained(
                folder,
                dtype=torch.float32,  # half precision overflows in T5, and makes ties between tokens likely
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (LoraLabError, MemoryError):
            raise
        except Exception as error:  # of transformers, safetensors and torch
            raise BaseModelError(
                f"{key}: cannot be loaded ({error}). Name the folder of a transformers sequence-to-sequence model."
            ) from error
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise BaseModelError(
                f"{key}: no weights for {absent[0]} ({len(absent)} tensors): transformers would fill them with random "
                f"numbers. The folder does not hold a whole {type(model).__name__}."
            )
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise BaseModelError(f"{key}: names no end-of-sequence token, so a translation could never end.")
        self.ends = {ends} if isinstance(ends, int) else set(ends)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masked, so that any token does
        self.tokenizer.padding_side = "right"  # positions must not depend on the longest line of a batch
        model.generation_config.max_length = None  # each batch sets its own limit
        self.model = model.to(device).eval()

    def translate(self, lines: list[str]) -> dict[str, str | None]:
        """Line -> its translation; None for a line that is too long, or whose translation does not end."""
        prompts = {line: self.prefix + line for line in lines}
        lengths = {line: self._length(prompt) for line, prompt in prompts.items()}
        done: dict[str, str | None] = dict.fromkeys(lines)
        fitting = sorted((line for line in lines if 0 < lengths[line] <= self._longest), key=lengths.__getitem__)
        for start in range(0, len(fitting), _BATCH):
            batch = fitting[start : start + _BATCH]
            outputs = self._generate([prompts[line] for line in batch], self._limit(lengths[batch[-1]]))
            for line, output in zip(batch, outputs, strict=True):
                done[line] = self._text(output, self._limit(lengths[line]))
        return done

    def _length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    @property
    def _positions(self) -> int | None:
        """Tokens that the model has positions for; None for relative positions (T5)."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def _longest(self) -> int:
        longest = self.tokenizer.model_max_length
        return longest if self._positions is None else min(longest, self._positions)

    def _limit(self, length: int) -> int:
        """Most new tokens for an input of `length` tokens: a translation that is twice as long goes in circles."""
        limit = 2 * length + 32
        return limit if self._positions is None else min(limit, self._positions - 1)

    def _generate(self, prompts: list[str], limit: int) -> list[list[int]]:
        """The new token ids for each prompt, without the start token; greedy."""
        import torch

        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                early_stopping=False,  # what a model's own file says of beams
                length_penalty=1.0,
            )
        return ids[:, 1:].tolist()

    def _text(self, ids: list[int], limit: int) -> str | None:
        # Some models are forced to end at the batch's limit. That is a cut, and must not depend on the batch.
        end = next((index for index, token in enumerate(ids[: limit - 1]) if token in self.ends), None)
        return None if end is None else decode(self.tokenizer, ids[:end], skip_special_tokens=True).strip()
