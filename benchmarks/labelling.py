"""Whether choosing rows to label beats chance, and how many wrong labels are found: python -m benchmarks.labelling --data DIR [--seeds 10]

The frozen base's vectors (MiniLM) and a logistic regression on them, which is retrained from nothing at each budget: 20 rows drawn at random, the same for
every way, then 40 and 40 more that each way chooses. Accuracy on held-out rows, beside random choice with the same seed: the mean difference
with its 95 % interval over seeds (paired, Student's t). Then 10 % of 1,000 labels are turned, and `check=labels` looks for them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from lora_lab.config import compose
from lora_lab.explain import choosing, suspicious
from lora_lab.explain.features import features
from lora_lab.run.prepared import prepare

_OUT = Path(__file__).parent / "results" / "labelling.json"
_POOL, _HELD_OUT, _BUDGETS, _TURNED = 1000, 800, (20, 60, 100), 0.1
CASES = {
    "sst2": ("sst2/train.jsonl", "sst2/validation.jsonl"),
    "waimai_zh": ("waimai_zh/train.jsonl", "waimai_zh/test.jsonl"),
    "sms_spam": ("sms_spam/train.jsonl", "sms_spam/test.jsonl"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="names, comma between")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(_OUT.read_text()) if _OUT.exists() else {}
    for case in args.cases:
        vectors, labels = _vectors(case, args.data, args.model)
        pool, held_out = (vectors[:_POOL], labels[:_POOL]), (vectors[_POOL:], labels[_POOL:])
        found[case] = {
            "choice": _choice(pool, held_out, args.seeds),
            "suspicious": [_turned(*pool, seed) for seed in range(args.seeds)],
            "classes": np.bincount(labels).tolist(),
        }
        found[case] |= _summary(found[case])
        print(case, json.dumps(found[case]["summary"], indent=1), flush=True)
        _OUT.write_text(json.dumps(found, indent=1) + "\n")


def _vectors(case: str, data: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the pool's rows, then of the held-out ones, with the numbers of their classes."""
    folder = Path(tempfile.mkdtemp(prefix="labelling_"))
    for name, file, count in zip(("train", "eval"), CASES[case], (_POOL, _HELD_OUT), strict=True):
        lines = (data / file).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in random.Random(0).sample(lines, min(count, len(lines)))]
        text = "".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    setup = prepare(compose.compose([
        "task=classification", "model=hub", f"model.path={model}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl", "data.check=off", "data.duplicates=keep", "data.shared=keep",
        "data.max_tokens=128", "data.too_long=truncate_prompt", "export.targets=[]", f"run_dir={folder}/run",
    ]))  # fmt: skip
    examples = [*setup.training_rows(), *setup.held_out_rows()]  # type: ignore[list-item]
    [base] = setup.bases()
    names = setup.task.learned["labels"]
    return features(base.eval(), setup.task, examples, case), np.array([names.index(e["labels"][0]) for e in examples])


def _choice(pool: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray], seeds: int) -> dict[str, Any]:
    """For each way the scores of each seed at each budget."""
    found: dict[str, Any] = {}
    for way in ("random", "uncertain", "diverse"):
        found[way] = [_path(way, *pool, *held_out, seed) for seed in range(seeds)]
    return found


def _path(
    way: str, vectors: np.ndarray, labels: np.ndarray, others: np.ndarray, true: np.ndarray, seed: int
) -> list[list[float]]:
    known = choosing.at_random(len(vectors), _BUDGETS[0], seed)
    while len(set(labels[known].tolist())) < 2:  # of a rare class none may be among them
        seed += 10_000
        known = choosing.at_random(len(vectors), _BUDGETS[0], seed)
    scores = []
    for place, budget in enumerate(_BUDGETS):
        model = LogisticRegression(C=10.0, max_iter=2000).fit(vectors[known], labels[known])
        said = model.predict(others)
        scores.append([float((said == true).mean()), float(f1_score(true, said, average="macro"))])
        if place + 1 == len(_BUDGETS):
            break
        left = np.setdiff1d(np.arange(len(vectors)), known)
        count = _BUDGETS[place + 1] - budget
        if way == "random":
            chosen = choosing.at_random(len(left), count, seed + 1000 * (place + 1))
        elif way == "uncertain":
            chosen = choosing.uncertain(model.predict_proba(vectors[left]), count)
        else:
            chosen = choosing.diverse(vectors[left], vectors[known], count)
        known = [*known, *left[chosen].tolist()]
    return scores


def _turned(vectors: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    turned = draw.random(len(labels)) < _TURNED
    classes = labels.max() + 1
    noisy = np.where(turned, (labels + draw.integers(1, classes, len(labels))) % classes, labels)
    places = suspicious.suspicious(suspicious.out_of_fold(vectors, noisy, 5, seed), noisy)
    hits = turned[places]
    first = hits[: int(turned.sum())]
    return {"precision": float(hits.mean()), "recall": float(hits.sum() / turned.sum()), "precision_of_first": float(first.mean()),
            "named": len(places), "turned": int(turned.sum())}  # fmt: skip


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    scores = {way: np.array(one) for way, one in found["choice"].items()}  # [seeds, budgets, 2]
    for number, name in enumerate(("accuracy", "macro_f1")):
        for place, budget in enumerate(_BUDGETS):
            own = {"random": round(float(scores["random"][:, place, number].mean()), 4)}
            for way in ("uncertain", "diverse"):
                gaps = scores[way][:, place, number] - scores["random"][:, place, number]
                half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
                own[way] = f"{gaps.mean():+.4f} ± {half:.4f}"
            told[f"{name} at {budget}"] = own
    for name in ("precision", "recall", "precision_of_first", "named", "turned"):
        told[f"suspicious {name}"] = round(float(np.mean([one[name] for one in found["suspicious"]])), 3)
    return {"summary": told}


if __name__ == "__main__":
    main()
