"""How many tokens of a vocabulary texts need, and how many held-out texts are then read the same: python -m benchmarks.trimming MODEL

Each row keeps the tokens of more texts than the one before. A text is read the same where the trimmed tokenizer makes the same tokens of it;
every other is written with shorter ones. The tokenizers alone are made and proved, as `lora-lab trim` does it.

Data is found by LORA_LAB_DATA.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_lab.base import load
from lora_lab.base.positions import embedded
from lora_lab.base.tokenizer import read_tokenizer
from lora_lab.config.model import ModelConfig
from lora_lab.trim import vocabulary
from lora_lab.trim.checkpoint import Cut

_DATA = Path(os.environ.get("LORA_LAB_DATA", "data"))
# each beside those before it
KEPT_FOR = {
    "WikiText-2's validation part": ["wikitext2_valid_test/validation.txt"],
    "and chats, sums, reviews, plays": [
        "dialogsum/train.jsonl", "alpaca_en_1k/train.jsonl", "gsm8k_train/train.jsonl.gz", "sst2/train.jsonl", "tiny_shakespeare/input.txt",
    ],
    "and judged answers, captions, sentences, questions, messages": [
        "alpaca_eval_pref/train.jsonl.gz", "snli_subset/train.jsonl", "stsb_en/train.jsonl", "xquad_en/test.jsonl", "sms_spam/train.jsonl",
        "wnut17/train.jsonl", "glaive_toolcall_300/train.jsonl", "multi30k_en_de/train.jsonl", "dpo_demo_en_zh/en.jsonl",
    ],
}  # fmt: skip
HELD_OUT = ("wikitext2_valid_test/test.txt", "dialogsum/test.jsonl", "alpaca_eval_pref/test.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a base")
    parser.add_argument("--min-count", type=int, default=1)
    args = parser.parse_args()
    base, kind = load.find(ModelConfig(path=args.model)), load.ModelKind()
    skeleton = load.skeleton(base.folder, kind)
    rows, tokenizer = embedded(skeleton), read_tokenizer(base.folder)
    width = int(skeleton.config.hidden_size)
    tables = 1 if skeleton.config.tie_word_embeddings else 2
    total = skeleton.num_parameters()
    print(
        f"| kept for | MB | tokens of {rows:,} | parameters | {' | '.join(HELD_OUT)} |\n|---|{'---:|' * (3 + len(HELD_OUT))}"
    )
    names: list[str] = []
    for title, more in KEPT_FOR.items():
        names += more
        texts = list(_texts("trim.vocabulary", names))
        kept = vocabulary.choose(tokenizer, base.folder, rows, texts, args.min_count, {})
        with tempfile.TemporaryDirectory() as folder:
            Cut(base, kind, kept, None).write_config(Path(folder))
            smaller = kept.write(tokenizer, Path(folder))
            read = [kept.prove(tokenizer, smaller, _texts("data.eval", [name]), name) for name in HELD_OUT]
        count = len(kept.rows(rows))
        parameters = total - tables * width * (rows - count)
        shares = [f"{one.identical:,} of {one.texts:,} ({one.identical / one.texts:.1%})" for one in read]
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"| {title} | {size:.1f} | {count:,} | {parameters / 1e6:.1f} M | {' | '.join(shares)} |", flush=True)


def _texts(key: str, names: list[str]) -> Iterator[str]:
    return vocabulary.texts_of(key, [str(_DATA / name) for name in names], "line", None)


if __name__ == "__main__":
    main()
