"""The base model's tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab import storage
from lora_lab.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Used, and said aloud, for a tokenizer that has no chat template. It travels with the merged checkpoint.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def load_tokenizer(folder: Path, chat: bool = True) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a pad token, and for `chat` with a chat template.

    Raises:
        BaseModelError: the folder has no tokenizer, or one that cannot tell where in the text a token lies.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{folder}: its tokenizer cannot be loaded ({error}).") from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder}: its tokenizer gives no character offsets, which exact masks need.")
    if not chat:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise BaseModelError(f"{folder}: its tokenizer has neither a padding nor an end-of-sequence token.")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"{folder}: its tokenizer has no end-of-sequence token, so answers could never end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only pads prompts in generation; labels never depend on it
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save tokenizer and chat template, without transformers' notes about where this copy was loaded from."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if key not in ("is_local", "local_files_only")}
    file.write_text(storage.dump_json(kept), encoding="utf-8")
