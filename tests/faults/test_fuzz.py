"""Random damage of whatever a base or a file of rows consists of: it is used, or refused with a sentence, in bounded time."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab.base import gguf, inspect, load
from lora_lab.base.tokenizer import load_tokenizer
from lora_lab.base.weights import Weights
from lora_lab.config.data import DataConfig
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.data import build
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.sources import Row
from lora_lab.errors import LoraLabError
from lora_lab.tasks import TASKS
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from tests.conftest import CHATML, make_rows, make_tokenizer
from tests.faults.test_base_files import make_gguf

_SECONDS = 20.0  # of processor time, for one example
KIND = load.ModelKind()
TIERS = [pytest.param(1, id="few"), pytest.param(20, id="many", marks=pytest.mark.faults)]

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 70), st.floats(), st.text(max_size=8),
    st.sampled_from(["eager", "sdpa", "llama", "gelu", "float16", "../x", "/etc/passwd", "a/b", "default", "\0", "\ud83d", "[1]"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def fuzz(examples: int, strategy: st.SearchStrategy, use: Callable[[Any], object]) -> None:
    """Call `use` with examples of the strategy: only errors that are meant for users may come out of it."""

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(value: Any) -> None:
        started = time.process_time()
        with contextlib.suppress(LoraLabError):
            use(value)
        assert time.process_time() - started < _SECONDS

    run()


def opened(folder: Path, weights: bool = True) -> None:
    files = load.find(ModelConfig(path=str(folder)))
    model = load.skeleton(files.folder, KIND)
    load.new_modules(model, files.folder, "none")
    tokenizer = load_tokenizer(files.folder)
    if weights:
        load.load_model(files, KIND, "float32", QuantConfig(), torch.device("cpu"), 0)
    encoder = ChatEncoder(DataConfig(train="-"), CausalLMConfig(), tokenizer)
    encoder.encode([Row(1, {"prompt": "red cat", "completion": "blue"})], "rows", "prompt_completion")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return shutil.copytree(base, tmp_path_factory.mktemp("fuzz") / "base")


def changed(tree: dict, changes: dict) -> str:
    return json.dumps({**tree, **changes})


MORE_KEYS = {
    "config.json": ["dtype", "num_labels", "id2label", "quantization_config", "auto_map", "text_config", "layer_types", "sliding_window", "rope_parameters", "rope_scaling", "head_dim", "output_attentions", "is_encoder_decoder", "attn_implementation", "pruned_heads", "problem_type", "return_dict", "use_cache", "tie_encoder_decoder", "task_specific_params"],
    "generation_config.json": ["max_length", "temperature", "eos_token_id", "cache_implementation", "compile_config", "watermarking_config", "suppress_tokens", "num_beams", "custom_generate"],
    "tokenizer_config.json": ["chat_template", "tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "pad_token", "eos_token", "model_max_length", "padding_side", "vocab_file", "fast_tokenizer_files", "clean_up_tokenization_spaces", "model_input_names", "add_bos_token", "split_special_tokens"],
    "special_tokens_map.json": ["pad_token", "eos_token", "extra_special_tokens"],
    "tokenizer.json": ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "version"],
}  # fmt: skip


@pytest.mark.parametrize("times", TIERS)
@pytest.mark.parametrize("name", MORE_KEYS)
def test_json_of_a_base(name, times, folder, base):
    file = folder / name
    tree = json.loads(file.read_text()) if file.exists() else {}
    keys = st.sampled_from(sorted({*tree, *MORE_KEYS[name]}))

    def use(changes: dict) -> None:
        file.write_text(changed(tree, changes), encoding="utf-8", errors="surrogatepass")
        opened(folder)

    try:
        fuzz(12 * times, st.dictionaries(keys, VALUES, min_size=1, max_size=3), use)
    finally:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        if not (base / name).exists():
            file.unlink()


@pytest.mark.parametrize("times", TIERS)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_bytes_of_small_files(name, times, folder, base):
    content = (base / name).read_bytes()
    damage = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255), st.booleans())

    def use(what: tuple[int, int, bool]) -> None:
        place, byte, cut = what
        (folder / name).write_bytes(content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :])
        opened(folder, weights=False)

    try:
        fuzz(10 * times, damage, use)
    finally:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("times", TIERS)
def test_an_index(times, folder, base):
    index = folder / "model.safetensors.index.json"
    names = st.sampled_from(["model.safetensors", "a.safetensors", "../base/model.safetensors", "", "."])
    maps = st.one_of(VALUES, st.dictionaries(st.sampled_from(["lm_head.weight", "x"]), names | VALUES, max_size=3))

    def use(tree: Any) -> None:
        index.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
        inspect.weight_files(folder)

    try:
        fuzz(25 * times, st.one_of(VALUES, st.fixed_dictionaries({"weight_map": maps})), use)
    finally:
        index.unlink()


@pytest.mark.parametrize("times", TIERS)
def test_safetensors(times, folder, base):
    content = (base / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    first = sorted(name for name in header if name != "__metadata__")[0]
    entries = st.fixed_dictionaries(
        {}, optional={"dtype": SCALARS | st.sampled_from(["F32", "BF16", "I8"]), "shape": VALUES, "data_offsets": st.lists(st.integers(-9, 2**40), max_size=3) | VALUES}
    )  # fmt: skip
    headers = st.one_of(
        VALUES,
        st.builds(lambda entry: {**header, first: entry}, entries | VALUES),
        st.dictionaries(st.text(max_size=5), entries | VALUES, max_size=3),
        st.builds(lambda entry: {**header, "__metadata__": entry}, VALUES),
    )

    def use(what: Any) -> None:
        if isinstance(what, tuple):  # cut, or a byte of the head
            place, byte = what
            damaged = content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1 :]
        else:
            text = json.dumps(what).encode("utf-8", "surrogatepass")
            damaged = struct.pack("<Q", len(text)) + text + content[8 + length :]
        (folder / "model.safetensors").write_bytes(damaged)
        weights = Weights(folder)
        for name in list(weights)[:2]:
            weights[name]
        opened(folder)

    cuts = st.tuples(st.integers(0, len(content) - 1) | st.integers(0, 8 + length), st.none() | st.integers(0, 255))
    try:
        fuzz(25 * times, headers | cuts, use)
    finally:
        (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("times", TIERS)
def test_gguf(times, base, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("gguf")
    monkeypatch.setenv("LORA_LAB_CACHE", str(place / "cache"))
    content = make_gguf(place / "whole.gguf", base).read_bytes()
    texts = st.sampled_from(
        [
            4,
            12,
            16,
            24,
            32,
            content.index(b"block_count"),
            content.index(b"tokenizer.ggml.tokens"),
            content.index(b"blk.0"),
        ]
    )
    places = texts.flatmap(lambda start: st.integers(start, min(start + 60, len(content) - 9)))

    def use(what: tuple[int, int, str]) -> None:
        at, value, how = what
        if how == "cut":
            damaged = content[:at]
        elif how == "number":
            damaged = content[:at] + struct.pack("<Q", value) + content[at + 8 :]
        else:
            damaged = content[:at] + bytes([value % 256]) + content[at + 1 :]
        (place / "x.gguf").write_bytes(damaged)
        gguf.to_safetensors(place / "x.gguf")

    fuzz(10 + 2 * times, st.tuples(places, st.integers(0, 2**64 - 1), st.sampled_from(["cut", "number", "byte"])), use)


# -- templates -----------------------------------------------------------------------------------------------------------

_NAMES = st.sampled_from(
    ["messages", "m", "i", "ns.a", "tools", "eos_token", "nothing", "loop.index", "m.content", "m['role']"]
)
_ATOMS = st.one_of(
    _NAMES,
    st.integers(-5, 10**12).map(str),
    st.sampled_from(
        ["'a'", "''", "[]", "{}", "none", "true", "range(99999)", "'%s'", "'{}'", "dict(a=1)", "strftime_now('%Y')"]
    ),
)
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["~", "+", "*", "-", "/", "//", "%", "**", "in", "==", "<", "and"]), inner),
        st.builds("({}|{})".format, inner, st.sampled_from(["tojson", "length", "list", "join('xy')", "trim", "upper", "string", "int", "first", "sort", "sum", "indent(9999)", "center(9999)", "replace('', 'xy')", "batch(2)|list", "unique|list", "items|list", "reverse|list", "pprint", "format(1)"])),
        st.builds("{}.{}".format, inner, st.sampled_from(["__class__", "split('a')", "format(1)", "append(1)", "items()", "strip()", "join(['a'])", "mro()", "x"])),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
    ),
    max_leaves=6,
)  # fmt: skip
_PARTS = st.recursive(
    st.one_of(st.builds("{{{{ {} }}}}".format, _EXPRESSIONS), st.builds("{{% set ns.a = {} %}}".format, _EXPRESSIONS), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.builds("{{% for i in {} %}}{}{{% endfor %}}".format, _EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% endif %}}".format, _EXPRESSIONS, inner),
        st.builds("{{% macro f(x) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, _EXPRESSIONS),
        st.builds("{}{}".format, inner, inner),
    ),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("times", TIERS)
def test_templates(times, tokenizer):
    def use(part: str) -> None:
        tokenizer.chat_template = (
            "{% set ns = namespace(a='a') %}{% for m in messages %}" + part + "{% endfor %}" + CHATML
        )
        encoder = ChatEncoder(DataConfig(train="-", chat_template_kwargs={"tools": 1}), CausalLMConfig(), tokenizer)
        rows = [
            Row(1, {"prompt": "red cat", "completion": "blue"}),
            Row(2, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ]
        encoder.template.check_variables()
        encoder.encode(rows[:1], "rows", "prompt_completion")
        encoder.encode(rows[1:], "rows", "messages")

    fuzz(30 * times, _PARTS, use)


# -- rows ----------------------------------------------------------------------------------------------------------------

_COLUMNS = st.sampled_from(
    [
        "messages",
        "prompt",
        "completion",
        "text",
        "label",
        "tokens",
        "tags",
        "conversations",
        "tools",
        "system",
        "history",
        "chosen",
        "rejected",
        "question",
        "context",
        "answers",
        "source",
        "target",
        "instruction",
        "output",
        "text_pair",
        "input",
    ]
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUES, "content": VALUES | st.just("red"), "tool_calls": VALUES | st.just([{"function": {"name": "f", "arguments": "{}"}}]), "from": st.sampled_from(["human", "gpt", "function_call"]) | VALUES, "value": VALUES | st.just("red"), "train": VALUES, "weight": VALUES}),
    max_size=4,
)  # fmt: skip
_ROWS = st.lists(st.dictionaries(_COLUMNS, VALUES | _MESSAGES | st.just("red cat"), max_size=5), min_size=1, max_size=3)
_FORMATS = {
    "causal_lm": (
        "messages",
        "sharegpt",
        "prompt_completion",
        "alpaca",
        "question_answering",
        "text_label",
        "pair_label",
        "text",
    ),
    "classification": ("text_label", "pair_label"),
    "regression": ("text_label",),
    "token_classification": ("token_labels",),
    "question_answering": ("question_answering",),
    "preference": ("preference",),
    "seq2seq": ("source_target", "text_label"),
    "masked_lm": ("text",),
    "embedding": ("retrieval",),
}


@pytest.mark.parametrize("times", TIERS)
@pytest.mark.parametrize("task", _FORMATS)
def test_values_of_rows(task, times, tokenizer):
    from lora_lab.data.formats import FORMATS

    encoders = {}

    def use(what: tuple[str, list[dict]]) -> None:
        name, rows = what
        rows = [{**dict.fromkeys(FORMATS[name].columns, "red"), **row} for row in rows]
        if task not in encoders:
            encoders[task] = TASKS[task]().load().encoder_class(DataConfig(train="-"), TASKS[task](), tokenizer)
        from lora_lab.data.sources import checked

        for outcome in encoders[task].encode([checked(Row(n, row)) for n, row in enumerate(rows, 1)], "rows", name):
            assert outcome.problem or outcome.examples
            outcome.sentence.encode()

    tokenizer.chat_template = CHATML
    fuzz(20 * times, st.tuples(st.sampled_from(_FORMATS[task]), _ROWS), use)


@pytest.mark.parametrize("times", TIERS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt", "conll", "parquet", "jsonl.gz"])
def test_bytes_of_files_of_rows(kind, times, tokenizer, tmp_path_factory, monkeypatch):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("rows")
    monkeypatch.setenv("LORA_LAB_CACHE", str(place / "cache"))
    rows = make_rows(4)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pa.parquet.write_table(pa.Table.from_pylist(rows), place / "whole.parquet")
    content = {
        "jsonl": lines,
        "json": json.dumps(rows).encode(),
        "csv": ("prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in rows)).encode(),
        "tsv": ("prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in rows)).encode(),
        "txt": "\n\n".join(r["prompt"] for r in rows).encode(),
        "conll": "\n\n".join("\n".join(f"{word} O" for word in r["prompt"].split()) for r in rows).encode(),
        "parquet": (place / "whole.parquet").read_bytes(),
        "jsonl.gz": gzip.compress(lines, mtime=0),
    }[kind]
    task = {"txt": "completion", "conll": "token_classification"}.get(kind, "causal_lm")
    tokenizer.chat_template = CHATML
    part = st.sampled_from(
        [
            b"\0",
            b"\xff",
            b'"',
            b"\\ud83d",
            b"\xed\xa0\x80",
            b"[" * 2000,
            b"1e999",
            b"NaN",
            b"\r",
            b"\n",
            b"{}",
            b"\xef\xbb\xbf",
            b"",
            b"'" * 3,
        ]
    )
    damage = st.tuples(
        st.integers(0, len(content)),
        st.integers(0, 20),
        part | st.binary(max_size=6),
        st.sampled_from(["error", "drop"]),
    )

    def use(what: tuple[int, int, bytes, str]) -> None:
        at, gone, new, policy = what
        file = place / f"rows.{kind}"
        file.write_bytes(content[:at] + new + content[at + gone :])
        config = DataConfig(train=str(file), unusable=policy)
        build.build(config, TASKS[task]().load().encoder_class(config, TASKS[task](), tokenizer))

    fuzz(12 * times, damage, use)
