"""Generate many answers with a progress bar: rows of like length together, padded where the model expects it."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.attach import base_of
from lora_lab.adapters.prompts import generating
from lora_lab.data.collate import pad
from lora_lab.errors import NoRoomError
from lora_lab.runtime import console, ranks
from lora_lab.runtime.memory import attempts, free_bytes
from lora_lab.tasks import finished_rows
from lora_lab.tasks.section import Generating

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 32  # generated together, at most
_SHARE = 0.5  # of the free memory that rows which are generated together may take


def generate_all(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    config: Generating,
    end_tokens: list[int],
    title: str | None,
    **options: Any,
) -> list[str]:
    """Texts generated for rows of token ids, in their order; greedy, or the best of `task.num_beams`. Each process of a run generates a part of
    them; all of them where processes keep step, because answers are of unlike length.

    Args:
        end_tokens: ids that end an answer.
        title: of the progress bar; None: none.
        options: of transformers' `generate`.

    Raises:
        NoRoomError: one row by itself does not fit into memory.
    """
    settings = {
        "do_sample": False,
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "eos_token_id": end_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    if ranks.in_step():
        return _generated(model, tokenizer, rows, settings, title)
    part = ranks.own([len(row) for row in rows])
    found = ranks.together(lambda: _generated(model, tokenizer, [rows[i] for i in part], settings, title))
    places = ranks.dealt([len(row) for row in rows], ranks.size())
    texts = {i: text for own, those in zip(places, found, strict=True) for i, text in zip(own, those, strict=True)}
    return [texts[i] for i in range(len(rows))]


def _generated(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    settings: dict[str, Any],
    title: str | None,
) -> list[str]:
    """As `generate_all`, by this process alone.

    Args:
        settings: of transformers' `generate`.
    """
    texts: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: less padding
    # padding would come behind virtual tokens
    most = 1 if model.active_peft_config.is_prompt_learning else ROWS
    free = free_bytes(model.device)
    tokens = room(model, min(ranks.gather(free)) if ranks.in_step() else free, settings["num_beams"])
    with console.steps(title, len(rows)) if title else contextlib.nullcontext() as progress:
        while order:
            chosen = _fitting(order, rows, settings["max_new_tokens"], most, tokens)
            longest = len(rows[chosen[-1]])
            for attempt in attempts(functools.partial(_halve, chosen, longest, settings["max_new_tokens"])):
                with attempt:
                    found = _generate(model, tokenizer, [rows[i] for i in chosen], settings)
                if not attempt.fitted:
                    most = max(1, len(chosen) // 2)
            texts.update(zip(chosen, found, strict=True))
            order = order[len(chosen) :]
            if progress is not None:
                progress.advance(len(chosen))
    return [texts[i] for i in range(len(rows))]


def room(model: PeftModel, free: int, beams: int) -> int:
    """Tokens, prompts and answers, that are worked on together in so many free bytes."""
    return int(_SHARE * free) // (_token_bytes(base_of(model)) * beams)


def _fitting(order: list[int], rows: list[list[int]], new: int, most: int, tokens: int) -> list[int]:
    """The next rows that are generated together: as many as may have so many tokens, `new` ones each included, and at least one."""
    count = 1
    while count < min(most, len(order)) and (count + 1) * (len(rows[order[count]]) + new) <= tokens:
        count += 1
    return order[:count]


def _token_bytes(model: PreTrainedModel) -> int:
    """What a token of a row takes in memory while answers are generated: keys and values in every layer, and what one layer
    computes of it. An estimate by what `config.json` names; what it does not name is left out."""
    text = model.config.get_text_config(decoder=True)

    def given(*names: str) -> int:
        values = (getattr(text, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), 0)

    heads, width = given("num_attention_heads", "num_heads"), given("hidden_size", "d_model")
    head = given("head_dim", "d_kv") or (width // heads if heads else 0)
    kept = 2 * given("num_hidden_layers", "num_decoder_layers") * (given("num_key_value_heads") or heads) * head
    computed = 4 * width + 3 * given("intermediate_size", "d_ff")
    return max(1, (kept + computed) * model.dtype.itemsize)


def _halve(chosen: list[int], longest: int, new: int, lacked: str) -> None:
    """After a failed allocation: the first half of the rows, in place.

    Raises:
        NoRoomError: there is one row only.
    """
    if len(chosen) == 1:
        raise NoRoomError(
            f"task.max_new_tokens={new}: an answer to a row of {longest} tokens does not fit into memory, generated by itself "
            f"({lacked}). Set a smaller task.max_new_tokens, task.num_beams=1, a smaller data.max_tokens or quant=nf4."
        )
    del chosen[len(chosen) // 2 :]
    console.say("memory", f"answers are generated {len(chosen)} at a time from now on")


def _generate(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], settings: dict[str, Any]
) -> list[str]:
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder:
        ids, mask = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)
    else:  # a decoder goes on where its prompt ends, so padding stands before it
        ids = pad([row[::-1] for row in rows], tokenizer.pad_token_id).flip(1)
        mask = pad([[1] * len(row) for row in rows], 0).flip(1)
    ids, mask = ids.to(model.device), mask.to(model.device)
    with generating():
        if len(rows) > 1 and finished_rows.possible(base_of(model), settings):
            answers = finished_rows.generate(model, ids, mask, settings)
        else:
            made = model.generate(input_ids=ids, attention_mask=mask, **settings)
            answers = (made if encoder_decoder else made[:, ids.shape[1] :]).tolist()
    return tokenizer.batch_decode(answers, skip_special_tokens=True)
