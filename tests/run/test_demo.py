"""The demo's rows are what their script makes, and the held-out part shares nothing with the training part."""

from __future__ import annotations

import json
from pathlib import Path

from lora_lab.demo import orders


def shipped(split: str) -> list[dict]:
    text = Path(orders.__file__).with_name(f"orders_{split}.jsonl").read_text(encoding="utf-8")
    assert text == orders.to_jsonl(orders.make_rows(split, orders.SIZES[split]))
    return [json.loads(line) for line in text.splitlines()]


def test_splits_share_no_row_and_no_slot_value():
    train, held_out = shipped("train"), shipped("eval")
    answers = [[json.loads(row["output"]) for row in rows] for rows in (train, held_out)]
    assert len({row["input"] for row in train + held_out}) == len(train) + len(held_out)
    for slot in ("customer", "city", "item", "quantity", "reference"):
        mine, theirs = ({answer[slot] for answer in part} for part in answers)
        assert not mine & theirs, slot
        words = [{word for value in part for word in str(value).split()} for part in (mine, theirs)]
        assert not words[0] & words[1], slot


def test_answers_follow_from_the_text():
    for row in shipped("train") + shipped("eval"):
        answer = json.loads(row["output"])
        for slot in ("customer", "city", "item", "reference"):
            assert answer[slot] in row["input"]
