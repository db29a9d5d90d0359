"""Write a GGUF file from a transformers folder by llama.cpp's own conversion: python convert.py FOLDER OUT TYPE [ENDS [BASE [SPLIT [ADAPTER ADAPTER_OUT]]]]

Started in a process of its own: the conversion that auto-round carries takes the module name `conversion` and a model's worth
of memory.

FOLDER: a transformers model folder. OUT: the file to write. TYPE: see `TYPES`, `K_QUANTS`, `CHECK` and `RANDOM`. ENDS: ids of
tokens that end answers, with commas. BASE: the folder whose `config.json` was published, see `completed`. SPLIT: llama.cpp's name
for how its tokenizer splits texts, for a vocabulary that was never published; empty: not known. ADAPTER: safetensors
with the factors `<layer>.a` [r, D] and `<layer>.b` [N, r] of an adapter of scale 1 on that model, written to ADAPTER_OUT.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from pathlib import Path

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
CHECK = (
    "check"  # a tiny Llama with the folder's tokenizer is written; fails where architecture or tokenizer are not known
)
RANDOM = "random"  # as f32, with a vocabulary of bytes in place of the folder's: of a model that tells nothing but how it computes
K_QUANTS = (
    "q2_k",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)  # made by auto-round, weight by weight: slow


_CONTROL, _UNKNOWN, _NORMAL, _USER_DEFINED, _BYTE = 3, 2, 1, 4, 6  # SentencePiece's kinds of tokens
_NOT_OF_THE_MODEL = ("quantization_config", "compression_config", "dtype", "torch_dtype", "auto_map")
_MAY_DIFFER = (
    *_NOT_OF_THE_MODEL,
    "architectures",
    "transformers_version",
    "_name_or_path",
    "use_cache",
)  # beside ids of tokens
_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}  # Nemotron H's
_LENGTHS = ("n_positions", "max_position_embeddings")
_OF_WHOLE_LAYERS = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "num_global_key_value_heads",
}  # layers without a window


def main(
    folder: str,
    out: str,
    kind: str,
    ends: str = "",
    base: str = "",
    split: str = "",
    adapter: str | None = None,
    adapter_out: str | None = None,
) -> None:
    os.environ["AUTO_ROUND_GGUF_AUTO_UPDATE"] = "0"  # it would fetch and run code
    os.environ.pop("LLAMA_CPP_ROOT", None)
    with tempfile.TemporaryDirectory(prefix="lora_lab_", dir=Path(out).parent) as scratch:
        settings = Settings(Path(folder), Path(base or folder), same=kind == RANDOM)
        view = _view(Path(folder), Path(scratch), settings, with_tokenizer=kind != RANDOM)
        _convert(str(view), out, kind, ends, settings, split, adapter, adapter_out)


def _view(folder: Path, scratch: Path, settings: Settings, with_tokenizer: bool) -> Path:
    """The folder by links, with what the conversion asks for beside: settings (`completed`), and SentencePiece's `tokenizer.model`."""
    view = scratch / folder.name
    view.mkdir()
    for one in folder.iterdir():
        (view / one.name).symlink_to(one.resolve())
    (view / "config.json").unlink()
    (view / "config.json").write_text(json.dumps(settings.written()), encoding="utf-8")
    made = _sentencepiece(folder) if with_tokenizer else None
    if made is not None:
        (view / "tokenizer.model").write_bytes(made)
    return view


def _sentencepiece(folder: Path) -> bytes | None:
    """`tokenizer.model` for a folder that lacks it and whose `tokenizer.json` is of its kind: the conversion takes such a
    tokenizer's scores from there.

    A token's score is the place of the first merge that makes it, which is what such merges were sorted by.
    """
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = tree.get("model", {})
    if (folder / "tokenizer.model").exists() or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    from sentencepiece import sentencepiece_model_pb2

    made: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        made.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
    added = {one["content"]: _CONTROL if one["special"] else _USER_DEFINED for one in tree["added_tokens"]}
    ids = model["vocab"] | {one["content"]: one["id"] for one in tree["added_tokens"]}
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = proto.trainer_spec.BPE, True
    proto.trainer_spec.vocab_size, proto.trainer_spec.unk_piece = len(ids), model["unk_token"]
    for token in sorted(ids, key=ids.get):
        kind = _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else added.get(token, _NORMAL)
        kind = _UNKNOWN if token == model["unk_token"] else kind
        proto.pieces.add(piece=token, score=-float(made.get(token, len(made))), type=kind)
    return proto.SerializeToString()


def completed(saved: dict, published: dict, read: dict, same: bool = False) -> dict:
    """The settings of a saved `config.json`, and those of the published one that transformers does not write again.

    llama.cpp's conversion asks for settings by the names that they were published under. What is saved wins: a setting that
    transformers reads under another name (`rotary_pct`, now in `rope_parameters`) is taken from the published file only if both
    files describe the same model, and what `rope_parameters` and the number of positions say stands for their older names.

    Args:
        saved: as transformers reads the folder.
        published: the base's `config.json` as it is.
        read: as transformers reads that.
        same: the folder was made of the base in another size, so what the published file says holds for it.
    """
    if saved.get("model_type") != published.get("model_type"):
        return _with_older_names(saved)
    alike = same or all(
        saved.get(key) == value
        for key, value in read.items()
        if key not in _MAY_DIFFER and not key.endswith(("token_id", "_config"))
    )
    own = {
        key: value
        for key, value in published.items()
        if key not in saved and key not in _NOT_OF_THE_MODEL and (alike or key in read)
    }
    parts = {
        key: completed(part, published[key], read[key], same)
        for key, part in saved.items()
        if key.endswith("_config") and all(isinstance(one.get(key), dict) for one in (saved, published, read))
    }
    return _with_older_names({**own, **saved, **parts}, saved)


def _with_older_names(settings: dict, saved: dict | None = None) -> dict:
    """Settings with what transformers 5 keeps of them under another name.

    Args:
        saved: those that decide; None: all of them.
    """
    saved = settings if saved is None else saved
    found, rope = dict(settings), saved.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # else there are some for each kind of layer
        share = rope.get("partial_rotary_factor", 1.0)
        found |= {key: share for key in ("partial_rotary_factor", "rotary_pct") if key not in saved}
    if saved.get("multi_query") and "num_kv_heads" in saved and not saved.get("new_decoder_architecture"):
        found["num_kv_heads"] = 1  # transformers says the number of heads, which Falcon does not look at
    if saved.get("model_type") == "granitemoehybrid" and saved.get("layer_types"):
        found["layer_types"] = [_LAYERS.get(kind, kind) for kind in saved["layer_types"]]
    if saved.get("model_type") == "nemotron_h" and (
        kinds := saved.get("layers_block_type") or saved.get("layer_types")
    ):
        found |= {
            "num_hidden_layers": len(kinds),
            "hybrid_override_pattern": "".join(_LETTERS.get(kind, "?") for kind in kinds),
        }
    if found.get("scoring_func") == "noaux_tc":  # dots.llm1 names how experts are chosen; they are scored so
        found["scoring_func"] = "sigmoid"
    if saved.get("model_type") == "glm4_moe_lite":  # llama.cpp knows it by the published number of layers alone
        found.setdefault("scoring_func", "sigmoid")
    for key, older in _OF_WHOLE_LAYERS.items():  # Gemma 4's, which are kept for each layer that differs
        own = {layer[key] for layer in (saved.get("per_layer_config") or {}).values() if key in layer}
        if len(own) == 1 and older not in found:
            found[older] = own.pop()
    length = next((saved[key] for key in _LENGTHS if key in saved), None)
    if length is not None and "n_ctx" not in saved:
        found["n_ctx"] = length
    return found


class Settings:
    """What the conversion is told of a folder's `config.json`, see `completed`."""

    def __init__(self, folder: Path, base: Path, same: bool) -> None:
        self._published, self._read, self._same = _json(base), _read(base), same
        self._folder, self._own = folder, self._of(folder)

    def _of(self, folder: Path) -> dict:
        return completed(_read(folder), self._published, self._read, self._same)

    def written(self) -> dict:
        """As the folder's `config.json`, which a part of the conversion reads by itself."""
        read = _read(self._folder)
        changed = {key: value for key, value in self._own.items() if key not in read or read[key] != value}
        return {**_json(self._folder), **changed}

    def take_over(self, conversion: object, view: Path) -> None:
        """Have the conversion read no other.

        Args:
            view: what stands for the folder.
        """
        load = conversion.ModelBase.load_hparams

        def load_hparams(folder: Path, is_mistral_format: bool) -> dict:
            found = load(folder, is_mistral_format)
            if is_mistral_format:
                return found
            return found | copy.deepcopy(self._own if Path(folder) == view else self._of(Path(folder)))

        conversion.ModelBase.load_hparams = staticmethod(load_hparams)


def _json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _read(folder: Path) -> dict:
    """As transformers reads it, where it knows the architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except ValueError:  # an architecture that it does not know
        return _json(folder)


def _convert(
    folder: str,
    out: str,
    kind: str,
    ends: str,
    settings: Settings,
    split: str,
    adapter: str | None,
    adapter_out: str | None,
) -> None:
    import gguf
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    try:
        conversion = get_conversion(folder, auto_update=False)
    except NotImplementedError as error:
        [architecture] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["architectures"]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("auto-round", "gguf"))
        cause = error.__cause__  # that it is not in the list, or what its module fails with
        cause = "" if cause is None or isinstance(cause, NotImplementedError) else f" ({cause!r})"
        sys.exit(f"Error: {architecture} is not supported by {versions}{cause}")
    settings.take_over(conversion, Path(folder))
    if split:
        _know_split(conversion, split)
    if kind in K_QUANTS:
        _write_k_quants(folder, out, kind)
        return
    hparams = conversion.ModelBase.load_hparams(Path(folder), False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)
    if kind == CHECK:
        model = _of(model_class, Path(folder), gguf.LlamaFileType.MOSTLY_F16, Path(out))
        model.set_gguf_parameters()
        _with_ends(model, ends)
        model.set_vocab()
        _write_tiny(model, out)
        return
    model = _of(
        model_class, Path(folder), getattr(gguf.LlamaFileType, TYPES["f32" if kind == RANDOM else kind]), Path(out)
    )
    if kind == RANDOM:
        vocabulary = _bytes(hparams)
        model.set_vocab = lambda: _write_vocabulary(model.gguf_writer, *vocabulary)
        model._create_vocab_sentencepiece = lambda: vocabulary  # some cut the embedding to it
    else:
        _with_ends(model, ends)
    model.write()
    if adapter is not None:
        model = _of(model_class, Path(folder), gguf.LlamaFileType.ALL_F32, Path(adapter_out), eager=True)
        _write_adapter(model, adapter_out, adapter)


def _know_split(conversion: object, split: str) -> None:
    """Have a vocabulary that was never published, such as a trimmed one, be known by how it splits texts: the conversion knows the
    published ones by the ids that a text gets."""
    models = sys.modules[conversion.ModelBase.__module__].TextModel
    published = models.get_vocab_base_pre

    def get_vocab_base_pre(model: object, tokenizer: object) -> str:
        try:
            return published(model, tokenizer)
        except NotImplementedError:
            return split

    models.get_vocab_base_pre = get_vocab_base_pre


def _of(model_class: type, *words: object, **options: object) -> object:
    """A model of the conversion; Mistral 3's class hands everything to one of another class, which does the writing."""
    model = model_class(*words, **options)
    return getattr(model, "impl", model)


def _with_ends(model: object, ends: str) -> None:
    """Have the file name the end-of-turn token beside the end of sequence: the conversion does not look for it, and llama.cpp knows
    it by itself only if its name is a common one."""
    import gguf

    set_vocab, keys = model.set_vocab, gguf.Keys.Tokenizer

    def and_ends() -> None:
        set_vocab()
        known = model.gguf_writer.kv_data[0]
        others = [
            int(end) for end in ends.split(",") if end and int(end) != getattr(known.get(keys.EOS_ID), "value", None)
        ]
        if others and keys.EOT_ID not in known:
            model.gguf_writer.add_eot_token_id(others[0])

    model.set_vocab = and_ends


def _write_tiny(model: object, out: str) -> None:
    """The tokenizer of a model that is to be converted, in a file that llama.cpp loads at once."""
    import gguf
    import numpy as np

    width, known = 32, model.gguf_writer.kv_data[0]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in known.items():
        if key.startswith("tokenizer."):
            writer.kv_data[0][key] = value
    tokens = len(known[gguf.Keys.Tokenizer.LIST].value)
    writer.add_tensor("token_embd.weight", np.zeros((tokens, width), dtype=np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(hparams: dict) -> tuple[list, list, list]:
    """A vocabulary of bytes and of names that mean nothing: tokens, scores and kinds."""
    import gguf

    size = {**hparams, **hparams.get("text_config", {})}["vocab_size"]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*known, *(f"<{number}>" for number in range(len(known), size))][:size]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * size][:size]
    return tokens, [0.0] * size, [gguf.TokenType(one) for one in kinds]


def _write_vocabulary(writer: object, tokens: list, scores: list, kinds: list) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _write_k_quants(folder: str, out: str, kind: str) -> None:
    from auto_round import AutoRound

    with tempfile.TemporaryDirectory(prefix="lora_lab_", dir=Path(out).parent) as scratch:
        AutoRound(folder, iters=0, disable_opt_rtn=True).quantize_and_save(scratch, format=f"gguf:{kind}")
        [file] = Path(scratch).rglob("*.gguf")
        file.rename(out)


def _write_adapter(model: object, out: str, adapter: str) -> None:
    """llama.cpp multiplies `lora_b @ lora_a` by alpha / rank.

    What the conversion does to a weight's rows (for some models it reorders those of attention) it must do to `b`'s rows, so `b`
    goes through it as if it were the weight; columns are left alone by it.
    """
    import gguf
    from safetensors.torch import load_file

    factors = load_file(adapter)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    layers = sorted(name.removesuffix(".a") for name in factors if name.endswith(".a"))
    [rank] = {len(factors[f"{layer}.a"]) for layer in layers}
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for layer in layers:
        number = next((int(part) for part in layer.split(".") if part.isdigit()), None)
        [(name, up)] = model.modify_tensors(factors[f"{layer}.b"], f"{layer}.weight", number)
        writer.add_tensor(f"{name}.lora_a", factors[f"{layer}.a"].numpy())
        writer.add_tensor(f"{name}.lora_b", up.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
