"""How often lora-lab inspect names a planted wrong row first: python -m benchmarks.inspecting [--seeds 0,1]

For each of 20 held-out rows of SST-2 and of waimai_zh a training row is planted: the held-out text without 40 % of its words (characters in
Chinese), with the wrong label. One run learns all 20 among 380 right rows. Where the model then says the wrong label, the planted row should be the first that
is named for it; where it still says the right one, the first that is named against it. Beside it: which training row is nearest in words
(BM25), which knows no model, and other measures: cosines and raw dot products, by the adapter's weights, by those of the trained head, and by all.

Finds data and models by LORA_LAB_DATA and LORA_LAB_MODELS.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_lab.adapters import files
from lora_lab.adapters.attach import trainable
from lora_lab.config import compose
from lora_lab.explain import influence
from lora_lab.run import inspection, pipeline
from lora_lab.run.prepared import Trained
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import ADAPTER
from lora_lab.tasks.bm25 import BM25, words

_OUT = Path(__file__).parent / "results" / "inspecting.json"
_PLANTED, _ROWS, _KEPT, _LEAST = (
    20,
    380,
    0.6,
    8,
)  # planted rows, right rows, words that stay, words of a held-out text at least
CASES = {
    "sst2": ("sst2/train.jsonl", "sst2/validation.jsonl"),
    "waimai_zh": ("waimai_zh/train.jsonl", "waimai_zh/test.jsonl"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="names, comma between")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument(
        "--work", type=Path, help="where runs are kept, and taken up again (default: a temporary folder)"
    )
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for case in args.cases:
        for seed in args.seeds:
            found.append(
                {
                    "case": case,
                    "seed": seed,
                    **_planted(
                        case, seed, args.data, args.model, args.work or Path(tempfile.mkdtemp(prefix="inspecting_"))
                    ),
                }
            )
            print(found[-1], flush=True)
    _OUT.write_text(json.dumps(found, indent=1) + "\n")


def _planted(case: str, seed: int, data: Path, model: str, work: Path) -> dict[str, Any]:
    draw = random.Random(seed)
    train, held_out = (_read(data / name) for name in CASES[case])
    asked = draw.sample([row for row in held_out if len(_pieces(row["text"])) >= _LEAST], _PLANTED)
    rows = [*draw.sample(train, _ROWS), *(_wrong(row, draw) for row in asked)]
    folder = work / f"{case}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", rows)
    _write(folder / "eval.jsonl", asked)
    config = compose.compose([
        "task=classification", "model=hub", f"model.path={model}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl", "data.check=off", "train.epochs=5", "train.batch_size=16", "optim.lr=1e-3",
        "train.keep_best=false", "train.save_steps=50", "train.keep_checkpoints=3", "export.targets=[]", f"run_dir={folder}/run", f"seed={seed}",
    ])  # fmt: skip
    run = RunDir(folder / "run") if (folder / "run/result.json").exists() else pipeline.train(config)
    trained = Trained.of(run, config, need_train=True)
    with trained.loaded() as live:
        questions = [inspection._row(live, example) for example in trained.setup.held_out_rows()]
        examples = list(trained.setup.training_rows())
        states = influence.states(trained.run)
        scores = _scores(live, [one.example for one in questions], examples, states)
    planted = {f"train.jsonl row {_ROWS + number + 1}": number for number in range(_PLANTED)}
    order = [planted.get(example.origin) for example in examples]
    words_of = [words(row["text"]) for row in rows]
    nearest = np.stack([BM25(words_of).scores(words(row["text"])) for row in asked])
    said_wrong = [one.example["labels"] != [one.expected] for one in questions]
    signs = np.array([1 if wrong else -1 for wrong in said_wrong])[:, None]
    return {
        "planted": _PLANTED, "said_wrong": sum(said_wrong), "states": [*states],
        "precision@1": {name: _first(signs * own, order) for name, own in scores.items()},
        "precision@1 where wrong": {name: _first(own[said_wrong], order, np.flatnonzero(said_wrong)) for name, own in scores.items()},
        "precision@1 of BM25": _first(nearest, [planted.get(f"train.jsonl row {number + 1}") for number in range(len(rows))]),
    }  # fmt: skip


def _scores(live: Any, asked: list[Any], examples: list[Any], states: dict[str, Path]) -> dict[str, np.ndarray]:
    """By the weights that count and by the measure: [asked, training rows] each."""
    parameters = trainable(live.model)
    sizes = [one.numel() for one in parameters.values()]
    head = torch.cat([torch.full((size,), "lora_" not in name) for name, size in zip(parameters, sizes, strict=True)])
    found: dict[str, np.ndarray] = {}

    def add(name: str, places: list[int], values: torch.Tensor) -> None:
        found.setdefault(name, np.zeros((len(asked), len(examples))))[:, places] += values.numpy() / len(states)

    influence._own = lambda parameters: parameters  # a trained head's gradients too
    sketch = influence.Sketch(int((~head).sum()), torch.device("cpu"))
    for folder in states.values():
        files.read_into(folder, live.model, ADAPTER)
        rows = {p: row for places, own in influence.together(live, asked) for p, row in zip(places, own, strict=True)}
        questions = torch.stack([rows[place] for place in range(len(asked))])
        short = np.zeros((len(examples), len(sketch(questions[:, ~head])[0])), dtype=np.float32)
        for places, own in influence.together(live, examples):
            short[places] = sketch(own[:, ~head]).numpy()
            add("dot, all", places, questions @ own.T)
            add("dot, adapter", places, questions[:, ~head] @ own[:, ~head].T)
            for name, kept in (("all", head | True), ("adapter", ~head), ("head", head)):
                unit = [torch.nn.functional.normalize(one[:, kept], dim=1) for one in (questions, own)]
                add(f"cosine, {name}", places, unit[0] @ unit[1].T)
        shares = torch.from_numpy(influence.shares_of(sketch(questions[:, ~head]).numpy(), short))
        add("share (inspect)", list(range(len(examples))), shares)
    return found


def _first(scores: np.ndarray, order: list[int | None], asked: np.ndarray | None = None) -> float | None:
    asked = np.arange(len(scores)) if asked is None else asked
    hits = [order[int(row.argmax())] == number for number, row in zip(asked, scores, strict=True)]
    return float(np.mean(hits)) if hits else None


def _wrong(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    pieces = _pieces(row["text"])
    kept = sorted(draw.sample(range(len(pieces)), max(2, round(_KEPT * len(pieces)))))
    return {"text": _joiner(row["text"]).join(pieces[place] for place in kept), "label": 1 - int(row["label"])}


def _pieces(text: str) -> list[str]:
    return text.split() if " " in text else list(text)


def _joiner(text: str) -> str:
    return " " if " " in text else ""


def _read(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{"text": row["text"], "label": int(row["label"])} for row in rows]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
