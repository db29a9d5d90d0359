"""Small GGUF files with a vocabulary of their own, and what llama.cpp's own tokenizer makes of texts by them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.base.hard_texts import HARD_TEXTS
from tests.conftest import WORDS

CONTROL, USER_DEFINED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")
# In a process of its own: it listens on 127.0.0.1, and what goes wrong in llama.cpp ends the process.
_ORACLE = """
import json, os, sys, urllib.request, xllamacpp

BETWEEN = 2**30  # no token of any vocabulary

def ids(address, texts, begins):
    content = [part for text in texts for part in (text, BETWEEN)]
    asked = json.dumps({"content": content, "add_special": begins, "parse_special": True}).encode()
    request = urllib.request.Request(address + "/tokenize", asked, {"Content-Type": "application/json"})
    found = [[]]
    for token in json.load(urllib.request.urlopen(request))["tokens"]:
        found.append([]) if token == BETWEEN else found[-1].append(token)
    return found[:-1]

files, texts = json.load(sys.stdin)
found, servers = [], []
for file in files:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, -1
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    found.append([ids(server.listening_address, texts, False), ids(server.listening_address, texts[:1], True)[0]])
    servers.append(server)
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
os._exit(0)  # taking a server down now and then waits for ever
"""


def llama_cpp(files: Sequence[Path], texts: Sequence[str], scratch: Path) -> list[tuple[list[list[int]], list[int]]]:
    """For each file llama.cpp's ids of each text, and those of the first text with what it puts around texts."""
    out = scratch / "ids.json"
    done = subprocess.run(
        [sys.executable, "-c", _ORACLE, str(out)],
        input=json.dumps([[str(file) for file in files], list(texts)]),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@functools.cache
def byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary whose merges run over everything that any rule splits, so that each split shows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=12_000,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*HARD_TEXTS * 2, " ".join(WORDS)], trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write_gguf(file: Path, keys: dict[str, Any], architecture: str = "llama", name: str = "tiny") -> Path:
    """A model of one layer, with these keys below `tokenizer.`; None leaves a key out."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_name(name)
    size = len(keys["ggml.tokens"])
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 1), (writer.add_head_count_kv, 1), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, size),
    ):  # fmt: skip
        add(value)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.{key}", value)
        elif key == "ggml.token_type":
            writer.add_key_value(f"tokenizer.{key}", value, GGUFValueType.ARRAY, GGUFValueType.INT32)
        elif value is not None:
            writer.add_array(f"tokenizer.{key}", value)
    shapes = {
        "token_embd": (size, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        **{f"blk.0.{part}": (32, 32) for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    }  # fmt: skip
    draw = np.random.default_rng(0)
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", draw.standard_normal(shape).astype(np.float32) * 0.02)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def byte_level_gguf(file: Path, pre: str | None, **keys: Any) -> Path:
    """A file with the vocabulary of `byte_level`, its control tokens, and two that a user defined."""
    vocabulary, merges = byte_level()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *USER_DEFINED]
    kinds = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in tokens]
    own = {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens, "ggml.token_type": kinds,
        "ggml.merges": [" ".join(pair) for pair in merges], "ggml.bos_token_id": 1, "ggml.eos_token_id": 2,
    }  # fmt: skip
    return write_gguf(file, own | keys)
