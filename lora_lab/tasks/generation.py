"""Generate many answers with a progress bar: rows of like length together, padded where the model expects it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.prompts import generating
from lora_lab.data.collate import pad
from lora_lab.runtime import console
from lora_lab.tasks.section import Generating

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_ROWS = 32  # generated together


def generate_all(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    config: Generating,
    end_tokens: list[int],
    title: str | None,
    **options: Any,
) -> list[str]:
    """Texts generated for rows of token ids, in their order; greedy, or the best of `task.num_beams`.

    Args:
        end_tokens: ids that end an answer.
        title: of the progress bar; None: none.
        options: of transformers' `generate`.
    """
    settings = {
        "do_sample": False,
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "eos_token_id": end_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    texts: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: less padding
    size = 1 if model.active_peft_config.is_prompt_learning else _ROWS  # padding would come behind virtual tokens
    with console.steps(title, len(rows)) if title else contextlib.nullcontext() as progress:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            texts.update(zip(chosen, _generate(model, tokenizer, [rows[i] for i in chosen], settings), strict=True))
            if progress is not None:
                progress.advance(len(chosen))
    return [texts[i] for i in range(len(rows))]


def _generate(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], settings: dict[str, Any]
) -> list[str]:
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder:
        ids, mask = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)
    else:  # a decoder goes on where its prompt ends, so padding stands before it
        ids = pad([row[::-1] for row in rows], tokenizer.pad_token_id).flip(1)
        mask = pad([[1] * len(row) for row in rows], 0).flip(1)
    with generating():
        done = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **settings)
    return tokenizer.batch_decode(done if encoder_decoder else done[:, ids.shape[1] :], skip_special_tokens=True)
