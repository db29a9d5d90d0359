"""Answers to many prompts: rows that have ended leave the batch, and each answer is the one that `generate` gives to all together."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lora_lab.data.collate import pad
from lora_lab.tasks import finished_rows
from tests.fast.test_fast import make_decoder
from tests.tasks.test_tasks import make_t5

ENDS = list(range(2, 60, 4))  # many, so that answers end at many lengths
SETTINGS = {"do_sample": False, "max_new_tokens": 24, "num_beams": 1, "eos_token_id": ENDS, "pad_token_id": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        **{kind: make_decoder(folder / kind, kind) for kind in ("llama", "gemma3_text", "qwen3")},
        "t5": make_t5(folder / "t5"),
    }


def prompts(seed, encodes):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(8, 30, (length,), generator=generator).tolist() for length in (3, 4, 4, 6, 7, 7, 9, 12)]
    if encodes:
        return pad(rows, 0), pad([[1] * len(row) for row in rows], 0)
    return pad([row[::-1] for row in rows], 0).flip(1), pad([[1] * len(row) for row in rows], 0).flip(1)


def wild(model, seed):
    """Weights that make answers of many lengths."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def widths_of(answers):
    """How many rows each call of `generate` has where half of them end it."""
    left = [len(row) if row[-1] in ENDS else 10**9 for row in answers]
    found = [len(left)]
    while len(left) > 1 and (now := sorted(left)[(len(left) + 1) // 2 - 1]) < SETTINGS["max_new_tokens"]:
        left = [length for length in left if length > now]
        found += [len(left)] if left else []
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "t5"])
def test_rows_that_have_ended_leave_and_every_answer_stays_the_same(made, kind, seed, monkeypatch):
    encodes = kind == "t5"
    load = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    model = wild(load.from_pretrained(made[kind], dtype=torch.float32), seed)
    ids, mask = prompts(seed, encodes)
    whole = model.generate(input_ids=ids, attention_mask=mask, **SETTINGS)[:, 1 if encodes else ids.shape[1] :]
    expected = [finished_rows._cut(row, ENDS) for row in whole.tolist()]

    widths, plain = [], model.generate

    def counting(**told):
        widths.append(len(told["decoder_input_ids" if encodes else "input_ids"]))
        return plain(**told)

    monkeypatch.setattr(model, "generate", counting)
    assert finished_rows.possible(model, SETTINGS)
    found = finished_rows.generate(model, ids, mask, SETTINGS)
    assert found == expected
    assert widths == widths_of(expected)
    monkeypatch.setattr(finished_rows, "_selectable", lambda cache: False)  # whose rows cannot be told apart
    assert finished_rows.generate(model, ids, mask, SETTINGS) == expected
