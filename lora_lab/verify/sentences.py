"""Proof that sentence-transformers, where it is installed, loads a merged folder and gives texts the vectors that they should have."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from lora_lab.errors import MergeError
from lora_lab.runtime import children, storage

if TYPE_CHECKING:
    from lora_lab.verify.parity import Probe

LIBRARY = "sentence_transformers"
ALLOWED = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}  # of 1 - cosine


def check(
    folder: Path, rows: Probe, vectors: Sequence[torch.Tensor], device: torch.device, dtype: str
) -> dict[str, Any]:
    """What is found of a merged folder, for its report; empty where the library is not installed. Texts that are cut are left out.

    Args:
        vectors: [texts, D] of each row, of length 1.
        dtype: of the checkpoint.

    Raises:
        MergeError: it does not load there, or a text has another vector.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        return {}
    limit = min(rows.task.encoder.config.max_tokens, rows.task.pooling.max_tokens or sys.maxsize)
    scored = rows.examples[0]["score"] is not None
    texts, queries, whole = [], [], []
    for example in rows.examples:
        lengths = [len(ids) for ids in rows.task.encoder.sequences(example)]
        whole += [length < limit for length in lengths]  # others may be cut elsewhere
        texts += example["texts"]
        queries += [place == 0 and not scored for place in range(len(lengths))]
    kept = [place for place, is_whole in enumerate(whole) if is_whole]
    if not kept:
        return {"texts": 0}
    vectors = torch.cat(list(vectors))[kept]
    texts, queries = [texts[place] for place in kept], [queries[place] for place in kept]
    found = _encoded(folder, texts, queries, device)
    gaps = 1 - torch.nn.functional.cosine_similarity(vectors.double(), found.double(), dim=-1)
    worst = max(gaps.max().item(), 0.0)
    if not worst <= ALLOWED[dtype]:
        raise MergeError(
            f"{folder}: sentence-transformers gives a text another vector (1 - cosine {worst:.1e}, allowed {ALLOWED[dtype]:.0e}): "
            f"{texts[int(gaps.argmax())][:80]!r}. Nothing is published; the adapter is untouched."
        )
    return {"texts": len(texts), "largest_1_minus_cosine": worst}


def _encoded(folder: Path, texts: list[str], queries: list[bool], device: torch.device) -> torch.Tensor:
    """[texts, D] float32, by the library in a process of its own."""
    with storage.scratch() as scratch:
        given, said = Path(scratch) / "texts.json", Path(scratch) / "vectors.safetensors"
        given.write_text(storage.dump_json({"texts": texts, "queries": queries}), encoding="utf-8")
        script = str(Path(__file__).with_name("reload_sentences.py"))
        command = [sys.executable, "-P", script, str(folder), str(given), str(said), str(device)]
        done = children.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            storage.check_scratch(scratch, reason)
            raise MergeError(f"{folder}: sentence-transformers cannot load the merged checkpoint ({reason}).")
        return load_file(said)["vectors"]
