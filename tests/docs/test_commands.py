"""The blocks of the documents: each is run here, in a folder where what it names stands ready in small, or says why it is not.

A block that is not run has a comment before it: `<!-- not run: the reason -->`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import lora_lab
from lora_lab import cli
from tests.conftest import WORDS, make_base, make_rows, write_jsonl
from tests.docs.test_documents import PAGES, name
from tests.tasks.test_tasks import make_bert, make_t5

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.*?) -->\n)?^```(?P<kind>bash|python)\n(?P<text>.*?)^```", re.M | re.S)
_COMPOSE = ("train", "plan", "trim", "config", "data")  # verbs that make a configuration
_ROWS_OF = {  # recipes whose own rows are too long for the small base
    "sentiment": ["data.train=reviews.csv", "data.eval=null", "data.columns=null"],
    "rerank": ["data.train=judged.jsonl", "data.eval=judged.jsonl", "data.max_tokens=512"],
}
_SMALL = ("quant=none", "model.dtype=float32", "hardware=cpu", "tracker=none", "data.check=warn")


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Kind, text and why it is not run, of each block that could be."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(one["kind"], one["text"], one["why"] or "") for one in found]


def run_here(page: Path) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text, why in blocks(page) if not why]


def commands(text: str) -> list[list[str]]:
    """The lines of a shell block in words; a quote may go over several lines. The environment is active here."""
    found, whole = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        whole = f"{whole}\n{line}" if whole else line
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # a quote is open
            continue
        whole = ""
        if words and words != [".", ".venv/bin/activate"]:
            found.append(words)
    assert not whole, f"a quote is not closed: {whole}"
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_every_block_is_run_or_says_why_not(page):
    for kind, text, why in blocks(page):
        if why:
            assert len(why.split()) >= 2, why
        elif kind == "bash":
            for words in commands(text):
                assert words[0] == "lora-lab", (words, "a block that is run has lines of lora-lab alone")


# -- run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small bases, rows and runs under every name that the documents use."""
    place = tmp_path_factory.mktemp("documents")
    _bases(place)
    _rows(place)
    here = Path.cwd()
    os.chdir(place)
    try:
        _runs()
    finally:
        os.chdir(here)
    return place


def _bases(place: Path) -> None:
    make_base(place / "tiny", max_position_embeddings=512, num_hidden_layers=6)
    for other in ("my-teacher", "my-student", "Qwen/Qwen3-8B", "models/smollm2-135m-instruct-hf"):
        shutil.copytree(place / "tiny", place / other)
    make_bert(place / "bert")
    make_t5(place / "my-t5")


def _rows(place: Path) -> None:
    chats = make_rows(24)
    words = [" ".join(WORDS[i % 5 : i % 5 + 6]) for i in range(60)]
    labels = [
        {"text": f"{('red', 'blue')[i % 2]} {text} {i}", "label": ("ham", "spam")[i % 2]}
        for i, text in enumerate(words)
    ]
    pairs = [{"query": row["prompt"], "positive": row["completion"]} for row in chats]
    for file in ("my.jsonl", "rows.jsonl", "other.jsonl", "a.jsonl", "judged.jsonl"):
        write_jsonl(place / file, chats)
    write_jsonl(
        place / "judged.jsonl",
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{WORDS[0]} {WORDS[0]} no"}
            for row in chats
        ],
    )
    (place / "folder").mkdir()
    shutil.copy(place / "my.jsonl", place / "folder" / "a.jsonl")
    (place / "folder" / "b.jsonl.gz").write_bytes(gzip.compress((place / "my.jsonl").read_bytes()))
    for file in ("my.csv", "reviews.csv", "mail.csv", "inbox.csv", "new.csv"):
        _write_csv(place / file, labels, "folder" if file == "inbox.csv" else "label")
    _write_csv(place / "b.csv", chats, "completion")
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in chats
    ]
    write_jsonl(place / "chats.jsonl", [{"messages": one} for one in turns])
    write_jsonl(place / "pairs.jsonl", pairs)
    write_jsonl(place / "articles.jsonl", [{"source": row["query"], "target": row["positive"]} for row in pairs])
    write_jsonl(place / "scored.jsonl", [{"text_a": row["query"], "text_b": row["positive"], "score": i % 3 / 2} for i, row in enumerate(pairs)])  # fmt: skip
    write_jsonl(place / "texts.jsonl", [{"text": row["text"]} for row in labels])
    write_jsonl(place / "unlabelled.jsonl", [{"text": row["text"]} for row in labels])
    write_jsonl(place / "documents.jsonl", [{"document": row["positive"]} for row in pairs])
    (place / "data/wikitext2_valid_test").mkdir(parents=True)
    for file in (
        "texts.txt",
        "held_out.txt",
        "data/wikitext2_valid_test/validation.txt",
        "data/wikitext2_valid_test/test.txt",
    ):
        (place / file).write_text("\n".join(row["text"] for row in labels))
    (place / "pairs.tsv").write_text("text\ttext_pair\tlabel\n" + "".join(f"{a} {i}\t{b}\t{i % 5}\n" for i, (a, b) in enumerate(itertools.pairwise(words))))  # fmt: skip
    tagged = "".join("".join(f"{word} {'B-COLOUR' if i == 0 else 'O'}\n" for i, word in enumerate(text.split())) + "\n" for text in words)  # fmt: skip
    for file in ("train.conll", "test.conll"):
        (place / file).write_text(tagged)
    (place / "mine" / "recipe").mkdir(parents=True)
    (place / "mine" / "recipe" / "own.yaml").write_text("# @package _global_\nname: own\ndata: {train: my.jsonl}\n")
    (place / "table.tsv").write_text("red\tcrimson\tscarlet\n")


def _write_csv(file: Path, rows: list[dict[str, str]], label: str) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        first, last = list(rows[0])
        writer.writerow([first, label])
        writer.writerows([row[first], row[last]] for row in rows)


def _runs() -> None:
    """Trained runs that commands name."""
    chat = ("model=hub", "model.path=tiny", "data.train=my.jsonl", "data.eval_ratio=0.2", "train.max_steps=2")
    sorts = ("model=hub", "model.path=bert", "task=classification", "data.train=reviews.csv", "data.eval=reviews.csv", "optim.lr=0.01", "train.epochs=20", "train.batch_size=8")  # fmt: skip
    vectors = ("model=hub", "model.path=bert", "task=embedding", "data.train=pairs.jsonl", "data.eval_ratio=0.2", "train.max_steps=2")  # fmt: skip
    told = {
        "runs/a": (*chat, "quant=nf4"), "runs/reviews/1": sorts, "runs/retriever/1": vectors,
        "runs/distilled/1": (*chat, "task=distillation", "task.teacher=runs/large"),
    }  # fmt: skip
    same = {"runs/a": ("runs/large", "runs/b", "runs/c", "DIR", "runs/chat/1", "elsewhere/large"), "runs/reviews/1": ("runs/spam/2026-01-31_12-00-00",)}  # fmt: skip
    for where, own in told.items():
        lora_lab.train(lora_lab.load_config(*_SMALL, *own, "export.targets=[]", f"run_dir={where}"))
        for other in same.get(where, ()):
            shutil.copytree(where, other)


def newest(text: str) -> str:
    """A path with its `...` filled in: the newest run there."""
    above = text.removesuffix("/...")
    found = [path.parent for path in Path(above).glob("*/config.yaml")]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else text


def small(words: list[str]) -> list[str]:
    """A command as it is run here: on a small base, a few steps long, and on a run that there is."""
    verb, *rest = words
    rest = [
        f"{key}={newest(value)}" if value.endswith("/...") else text
        for text in rest
        for key, _, value in [text.partition("=")]
    ]
    if verb == "init":
        return [verb, *rest, "model=hub", f"model.path={'bert' if rest[0].endswith('.csv') else 'tiny'}", "quant=none"]
    if verb == "merge" and "export.dtype=float32" not in rest:
        return [verb, *rest, "export.dtype=float32"]  # weights that are random say little apart in bfloat16
    if verb not in _COMPOSE or "--keys" in rest:
        return [verb, *rest]
    said = {text.partition("=")[0]: text.partition("=")[2] for text in rest}
    encoder = said.get("model") == "minilm" or said.get("recipe") == "sentiment"
    named = "model.path" in said or ("--config-dir" in rest and said["recipe"] != "own")  # init has named one
    base = [] if named else [f"model.path={'bert' if encoder else 'tiny'}"]
    steps = "4" if "-m" in rest else "2"
    rest = [{"trim.layers=6": "trim.layers=2"}.get(text, text) for text in rest]  # the small base has six
    asked = (
        ["task.yes_word=y", "task.no_word=n"] if said.get("task.score") == "yes_no" else []
    )  # each one of its tokens
    less = [f"train.max_steps={steps}", "export.targets=[]"] if verb in ("train", "plan") else []
    less += _ROWS_OF.get(said.get("recipe", ""), [])
    return [verb, *rest, *base, *(_SMALL if verb != "trim" else _SMALL[1:3]), *less, *asked]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)], ids=name)
def test_blocks_run(page, folder, tmp_path, monkeypatch, reload_here):
    """In a copy of the folder; each command must end well, and each Python block too. All that do not are told at the end."""
    place = tmp_path / "here"
    shutil.copytree(folder, place)
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    failed = []
    for kind, text in run_here(page):
        if kind == "python":
            with contextlib.redirect_stdout(None):
                exec(compile(text, str(page), "exec"), names)  # noqa: S102  (our own document)
            continue
        for words in commands(text):
            told = small(words[1:])
            code = cli.main(told)
            if code != 0:
                failed.append(f"{shlex.join(words)} (run as {shlex.join(told)}): exit code {code}")
    assert not failed, "\n".join(failed)
