"""Write a GGUF file from a transformers folder by llama.cpp's own conversion: python convert.py FOLDER OUT TYPE [ADAPTER ADAPTER_OUT]

Started in a process of its own: the conversion that auto-round carries takes the module name `conversion` and a model's worth
of memory.

FOLDER: a transformers model folder. OUT: the file to write. TYPE: see `TYPES`, `K_QUANTS` and `CHECK`. ADAPTER: safetensors with the factors
`<layer>.a` [r, D] and `<layer>.b` [N, r] of an adapter of scale 1 on that model, written to ADAPTER_OUT.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
CHECK = "check"  # nothing is written; fails where the architecture or the tokenizer is not known
K_QUANTS = (
    "q2_k",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)  # made by auto-round, weight by weight: slow


def main(folder: str, out: str, kind: str, adapter: str | None = None, adapter_out: str | None = None) -> None:
    os.environ["AUTO_ROUND_GGUF_AUTO_UPDATE"] = "0"  # it would fetch and run code
    os.environ.pop("LLAMA_CPP_ROOT", None)
    if kind in K_QUANTS:
        _write_k_quants(folder, out, kind)
        return
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
    hparams = conversion.ModelBase.load_hparams(Path(folder), False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)
    if kind == CHECK:
        model = model_class(Path(folder), gguf.LlamaFileType.MOSTLY_F16, Path(out))
        model.set_gguf_parameters()
        model.set_vocab()
        return
    model_class(Path(folder), getattr(gguf.LlamaFileType, TYPES[kind]), Path(out)).write()
    if adapter is not None:
        model = model_class(Path(folder), gguf.LlamaFileType.ALL_F32, Path(adapter_out), eager=True)
        _write_adapter(model, adapter_out, adapter)


def _write_k_quants(folder: str, out: str, kind: str) -> None:
    import tempfile

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
