"""Files of a base model that are damaged, odd or of somebody else's making: a base that transformers would load, or a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_lab.base import gguf, inspect, load
from lora_lab.base.tokenizer import load_tokenizer, save_tokenizer
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.errors import BaseModelError
from tests.conftest import CHATML

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
KIND = load.ModelKind()


def opened(folder: Path):
    """The base as every verb opens it: files, skeleton, tokenizer, weights."""
    files = load.find(ModelConfig(path=str(folder)))
    load.skeleton(files.folder, KIND)
    load_tokenizer(files.folder)
    return load.load_model(files, KIND, "float32", QuantConfig(), torch.device("cpu"), 0)


def refusal(folder: Path) -> str:
    with pytest.raises(BaseModelError) as raised:
        opened(folder)
    assert len(str(raised.value)) < 1500
    return str(raised.value)


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory) -> Path:
    """The same base in several files."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("shards") / "base")
    (folder / WEIGHTS).unlink()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def sharded(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "sharded")


def edit(file: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(file.read_text(encoding="utf-8"))
    replaced = change(tree)
    file.write_text(json.dumps(tree if replaced is None else replaced), encoding="utf-8")


# -- which weights -------------------------------------------------------------------------------------------------------


def test_shards_are_the_files_that_transformers_would_load(sharded, base):
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    found = inspect.weight_files(sharded)
    theirs, _ = _get_resolved_checkpoint_files(str(sharded), None, None, True, None, False)
    assert [str(file) for file in found] == sorted(theirs)
    assert len(found) > 1
    whole = opened(base)
    assert all(torch.equal(tensor, whole.get_parameter(name)) for name, tensor in opened(sharded).named_parameters())


def test_one_file_beside_an_index_of_others_is_refused(sharded, base):
    shutil.copy(base / WEIGHTS, sharded)
    said = refusal(sharded)
    assert f"holds {WEIGHTS} and {INDEX}" in said
    assert "Remove the index if the single file is the model" in said
    for shard in sharded.glob("model-*"):  # a stale index: the shards are gone
        shard.unlink()
    assert "Remove the index" in refusal(sharded)
    (sharded / INDEX).unlink()
    assert inspect.weight_files(sharded) == [sharded / WEIGHTS]


def test_an_index_of_the_single_file_is_no_contradiction(copy):
    from safetensors import safe_open

    with safe_open(copy / WEIGHTS, "pt") as tensors:
        names = list(tensors.keys())
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert inspect.weight_files(copy) == [copy / WEIGHTS]


def _drop_one(tree):
    tree["weight_map"].pop(sorted(tree["weight_map"])[3])


def _add_one(tree):
    tree["weight_map"]["model.more.weight"] = next(iter(tree["weight_map"].values()))


def _outside(tree):
    tree["weight_map"] = dict.fromkeys(tree["weight_map"], "../base/model.safetensors")


INDEXES = {
    "empty": (lambda tree: {"weight_map": {}}, "at least one"),
    "absent": (lambda tree: {}, "'weight_map' must be an object"),
    "list": (lambda tree: {"weight_map": ["model.safetensors"]}, "'weight_map' must be an object"),
    "of lists": (lambda tree: {"weight_map": {key: ["a"] for key in tree["weight_map"]}}, "no .safetensors"),
    "a list itself": (lambda tree: [tree], "must hold a JSON object, not list"),
    "partial": (_drop_one, "leaves out tensor"),
    "too much": (_add_one, "which is not in it"),
    "outside": (_outside, "is outside the folder"),
    "pickled": (lambda tree: {"weight_map": {"a": "pytorch_model.bin"}}, "no .safetensors"),
    "missing shard": (lambda tree: {"weight_map": {"a": "model-9.safetensors"}}, "model-9.safetensors is missing"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_fit_is_refused(case, sharded):
    change, said = INDEXES[case]
    edit(sharded / INDEX, change)
    assert said in refusal(sharded)


def test_links_of_a_hub_snapshot_are_followed_and_others_are_not(base, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(base, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load.find(ModelConfig(path=str(snapshot))).fingerprint == load.find(ModelConfig(path=str(base))).fingerprint
    load_tokenizer(snapshot)
    for name in (WEIGHTS, "tokenizer.json"):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(base / name)
        assert "a link that leaves the folder" in refusal(snapshot)
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(Path("../../blobs") / name)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_named_pipe_is_no_file_of_a_model(name, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert "not a regular file" in refusal(copy)


def test_only_pickled_weights_are_refused_with_the_way_out(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    assert "a pickle, which lora_lab does not read: convert it" in refusal(copy)


# -- config.json ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "dtype": ({"dtype": "load"}, "dtype 'load' is no type of numbers"),
    "text for a number": ({"hidden_size": "64"}, "cannot build a causal language model"),
    "no heads": ({"num_attention_heads": 0}, "cannot build a causal language model"),
    "negative": ({"vocab_size": -5}, "vocab_size -5 is out of range"),
    "layers": ({"num_hidden_layers": 10_000_000}, "num_hidden_layers 1e+07 is out of range"),
    "layers of a part": ({"text_config": {"num_hidden_layers": 10_000_000}}, "num_hidden_layers 1e+07 is out of range"),
    "labels": ({"num_labels": 100_000_000}, "num_labels 1e+08 is out of range"),
    "vocabulary": ({"vocab_size": 2**40}, "vocab_size 1.09951e+12 is out of range"),
    "hidden": ({"hidden_size": 2**33}, "hidden_size 8.58993e+09 is out of range"),
    "not finite": ({"hidden_size": float("nan")}, "hidden_size nan is out of range"),
    "experts": ({"num_local_experts": 10**9}, "num_local_experts 1e+09 is out of range"),
    "no model type": ({"model_type": "no_such_model"}, "cannot build"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "'transformers_weights' names other weights"),
    "code": ({"auto_map": {"AutoConfig": "x.Y"}}, "'auto_map' names code to run"),
    "code in a list": ({"parts": [[{"auto_map": {"AutoConfig": "x.Y"}}]]}, "'auto_map' names code to run"),
    "kernel": ({"attn_implementation": "owner/name"}, "names code to run from elsewhere"),
    "kernel, private name": ({"_attn_implementation": "owner/name:f"}, "names code to run from elsewhere"),
    "kernel of a part": ({"vision_config": {"attn_implementation": {"": "owner/name"}}}, "names code to run from elsewhere"),
    "kernel of experts": ({"experts_implementation": "owner/name"}, "names code to run from elsewhere"),
    "internal": ({"_attn_implementation_internal": "sdpa"}, "names code to run"),
    "quantized 8 bit": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "says that bitsandbytes quantized these weights, and they are plain numbers",
    ),
    "quantized by another": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "these weights were published"),
    "quantized, a list": ({"quantization_config": [1]}, "quantization_config must be an object, not list"),
    "wrong shape": ({"intermediate_size": 96}, "cannot be loaded"),
    "deep": (json.loads('{"a":' * 150 + "1" + "}" * 150), "nested deeper than 100"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_an_odd_config_is_a_sentence(case, copy):
    changes, said = CONFIGS[case]
    edit(copy / "config.json", lambda tree: tree.update(changes))
    assert said in refusal(copy)


@pytest.mark.parametrize("chosen", ["flash_attention_2", "flash_attention_3", "paged|eager", "flex_attention"])
def test_a_config_chooses_no_native_code(chosen, copy, base, capsys):
    if "|" in chosen:
        edit(copy / "config.json", lambda tree: tree.update(_attn_implementation=chosen))
        assert "names code to run from elsewhere" in refusal(copy)
        return
    edit(copy / "config.json", lambda tree: tree.update(_attn_implementation=chosen))
    model = opened(copy)
    assert model.config._attn_implementation == opened(base).config._attn_implementation == "sdpa"
    assert capsys.readouterr().out.count(f"config.json asks for {chosen}") == 1
    edit(copy / "config.json", lambda tree: tree.update(_attn_implementation="eager"))
    assert opened(copy).config._attn_implementation == "eager"


def test_an_adapter_beside_the_model_is_refused(copy):
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"}))
    assert "holds adapter_config.json, and transformers would put that adapter onto the model" in refusal(copy)


SMALL = {
    "generation_config.json": (b"[1]", b'{"a": 1', b"\xff", b"[" * 5000),
    "tokenizer_config.json": (b"[1]", b"{", b'{"tokenizer_class": 5}', b'{"a":' * 5000, b'{"fast_tokenizer_files": ["tokenizer.../../x.json"]}', b'{"auto_map": 1}', b'{"model_max_length": []}', b'{"padding_side": "up", "pad_token": "a"}'),
    "special_tokens_map.json": (b"[1]", b'{"pad_token": '),
    "tokenizer.json": (b"{", b"[]", b'{"version": "1.0", "model": {"type": "Newer"}, "added_tokens": []}', b'{"a":' * 5000, b"\xff\xfe", b"null"),
    "chat_template.jinja": (b"\xff\xfe\xfa",),
    "config.json": (b"", b"null", b"\xff", b'{"model_type": "a\\nb"}'),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in SMALL.items() for content in all_])
def test_small_files_that_cannot_be_read_are_named(name, content, copy):
    (copy / name).write_bytes(content)
    assert str(copy) in refusal(copy)


def test_a_file_of_absurd_size_is_refused_unread(copy, base):
    with open(copy / "tokenizer.json", "r+b") as stream:
        stream.truncate(2**40)  # takes no space
    assert "tokenizer.json: larger than 64 MiB" in refusal(copy)
    shutil.copy(base / "tokenizer.json", copy)
    with open(copy / "config.json", "r+b") as stream:
        stream.truncate(2**40)
    assert "config.json: larger than" in refusal(copy)


# -- safetensors ---------------------------------------------------------------------------------------------------------


def _header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HEADERS = {
    "empty": b"", "cut": b"\x10\0", "zeros": bytes(4096), "length": _header(b"{}", length=2**63), "long": _header(b"{}", length=2**28),
    "a list": _header(b"[1]"), "a number": _header(b"5"), "text": _header(b'"a"'), "null": _header(b"null"), "no JSON": _header(b"{a}"), "not UTF-8": _header(b'{"\xff":1}'),
    "deep": _header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "entry a list": _header(b'{"a":[]}'), "entry a number": _header(b'{"a":1}'),
    "offsets text": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', bytes(4)),
    "offsets negative": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', bytes(4)),
    "offsets mixed": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":["a","b"]}}', bytes(4)),
    "overlap": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "hole": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "twice": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "shape": _header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)), "type": _header(b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "shape huge": _header(b'{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,4]}}', bytes(4)),
    "metadata": _header(b'{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "other tensors": _header(_ONE, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_weights_that_are_no_safetensors_are_a_sentence(case, copy):
    (copy / WEIGHTS).write_bytes(HEADERS[case])
    assert str(copy) in refusal(copy)


def test_every_cut_of_the_head_of_the_weights_is_a_sentence(copy):
    content = (copy / WEIGHTS).read_bytes()
    for end in (*range(0, 64, 3), 500, 2000, len(content) // 2, len(content) - 1):
        (copy / WEIGHTS).write_bytes(content[:end])
        with pytest.raises(BaseModelError, match="model.safetensors"):
            inspect.weight_files(copy)


# -- tokenizers with several templates ------------------------------------------------------------------------------------


def _named(folder: Path, names: list[str]) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    templates = [{"name": name, "template": CHATML if name == "default" else "other"} for name in names]
    edit(folder / "tokenizer_config.json", lambda tree: tree.update(chat_template=templates))


def test_the_default_of_several_templates_is_used_and_saved(copy, tmp_path, capsys):
    _named(copy, ["tool_use", "default", "rag"])
    tokenizer = load_tokenizer(copy)
    assert tokenizer.chat_template == CHATML
    assert "'default' is used of the tokenizer's chat templates; not used: tool_use, rag" in capsys.readouterr().out
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == CHATML
    assert not (tmp_path / "saved/additional_chat_templates").exists()


def test_a_template_in_a_folder_of_its_own_is_told_of(copy, capsys):
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates/tool_use.jinja").write_text("other")
    assert load_tokenizer(copy).chat_template == CHATML
    assert "not used: tool_use" in capsys.readouterr().out


def test_several_templates_without_a_default_are_refused(copy):
    _named(copy, ["tool_use", "rag"])
    assert "has the chat templates tool_use, rag, and none is called 'default'" in refusal(copy)


@pytest.mark.parametrize(
    "template", [5, [], [5], [{"name": "default"}], {"default": 5}, {"a": 1}, True, "x" * (2**20 + 1)]
)
def test_a_template_that_is_no_text_is_refused(template, copy):
    (copy / "chat_template.jinja").unlink()
    edit(copy / "tokenizer_config.json", lambda tree: tree.update(chat_template=template))
    assert str(copy) in refusal(copy)


# -- GGUF ----------------------------------------------------------------------------------------------------------------


def make_gguf(file: Path, folder: Path, kind: str | None = None) -> Path:
    """The base of `folder` as GGUF: its matrices in `kind`, such as Q4_0; None: in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in load_file(folder / WEIGHTS).items():
        name = name.removesuffix(".weight")
        layer, _, part = name.removeprefix("model.layers.").partition(".") if "layers" in name else ("", "", name)
        numbers, own = tensor.numpy(), None
        if kind is not None and tensor.dim() == 2:
            own = GGMLQuantizationType[kind]
            numbers = quantize(numbers, own)
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{names[part]}.weight", numbers, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(base, tmp_path_factory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", base)


@pytest.mark.parametrize("name", [WEIGHTS, "chat_template.jinja", "config.json", "manifest.json", "tokenizer.json"])
def test_a_damaged_conversion_is_made_again(name, gguf_file, capsys):
    folder = gguf.to_safetensors(gguf_file)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    content = bytearray(before[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    capsys.readouterr()
    assert gguf.to_safetensors(gguf_file) == folder
    assert "It is made again." in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / name).unlink()
    gguf.to_safetensors(gguf_file)
    assert (folder / name).read_bytes() == before[name]
    capsys.readouterr()
    gguf.to_safetensors(gguf_file)
    assert not capsys.readouterr().out


def test_a_conversion_in_progress_is_waited_for(gguf_file, monkeypatch):
    """Whoever comes second finds the entry that the first has made under its lock."""
    folder = gguf.to_safetensors(gguf_file)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    assert gguf.to_safetensors(gguf_file) == folder


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _head(pairs: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + pairs + tensors


GGUFS = {
    "magic only": b"GGUF", "no version": b"GGUF\3\0\0\0", "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "not GGUF": b"GGUX" + bytes(50),
    "counts": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "many pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 60_000),
    "long key": _head(struct.pack("<Q", 2**62), 1), "huge array": _head(_text(b"a") + struct.pack("<IIQ", 9, 0, 2**60), 1),
    "huge texts": _head(_text(b"a") + struct.pack("<IIQ", 9, 8, 2**40), 1), "arrays of arrays": _head(_text(b"a") + struct.pack("<IIQ", 9, 9, 5), 1),
    "unknown type": _head(_text(b"a") + struct.pack("<I", 77), 1), "layers": _head(_text(b"llama.block_count") + struct.pack("<II", 4, 2**31), 1),
    "dimensions": _head(b"", 0, _text(b"t") + struct.pack("<I", 2**31), 1), "shape": _head(b"", 0, _text(b"t") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0), 1),
    "nothing in it": _head(b"", 0), "unknown architecture": _head(_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"nothing"), 1),
    "architecture a number": _head(_text(b"general.architecture") + struct.pack("<II", 4, 5), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_file_that_cannot_be_read_is_a_sentence(case, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(GGUFS[case])
    with pytest.raises(BaseModelError, match="x.gguf"):
        load.find(ModelConfig(path=str(file)))


def test_every_cut_of_the_head_of_a_gguf_file_is_a_sentence(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    for end in (*range(4, 400, 7), 2000, 6000, 12_000, len(content) // 2, len(content) - 1):
        (tmp_path / "x.gguf").write_bytes(content[:end])
        with pytest.raises(BaseModelError, match="x.gguf"):
            gguf.read_head(tmp_path / "x.gguf")
    gguf.read_head(gguf_file)
