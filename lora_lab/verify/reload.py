"""Run a saved checkpoint on given rows with plain transformers: python reload.py FOLDER AUTO_CLASS ROWS OUTPUTS DEVICE DTYPE [ADAPTER [MODULE]]

Started in a process of its own and not importing lora_lab, nor peft without ADAPTER, so that it sees what a deployment would see.

FOLDER: a transformers model folder. AUTO_CLASS: transformers' class that loads it. ROWS: safetensors with the inputs of
forward pass i as `i.input_ids` [1, T] and so on, and perhaps `i.positions` [S] int64, of which logits are wanted.
OUTPUTS: where to write the outputs of pass i as `i.logits` and so on, float32, without the batch dimension.
DTYPE: that it is loaded as; auto: its own. ADAPTER: a peft folder. MODULE: to be
imported before, because peft has not got the adapter's method.
"""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


def at(row: Any, positions: Any, inputs: Any) -> Any:
    """What a model gave of a row [T, C] at the wanted positions, float32 on the CPU. Virtual tokens of an adapter may stand before it."""
    if positions is not None:
        ids = inputs.get("decoder_input_ids", inputs["input_ids"])
        row = row[len(row) - ids.shape[1] :][positions.to(row.device)]
    return row.float().cpu()


def main(
    folder: str,
    auto_class: str,
    rows_file: str,
    outputs_file: str,
    device: str,
    dtype: str,
    adapter: str | None = None,
    module: str | None = None,
) -> None:
    import importlib

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, auto_class)
    chosen = transformers.AutoConfig.from_pretrained(folder)._attn_implementation
    own = (
        {} if chosen in (None, "eager", "sdpa") else {"attn_implementation": "sdpa"}
    )  # no native code of a file's choice
    model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True, **own)
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        sys.exit(f"the checkpoint does not load cleanly: {problems}")
    if adapter is not None:
        from peft import PeftModel

        if module is not None:
            importlib.import_module(module)
        with warnings.catch_warnings():
            # of tensors that layers share, which are in the file once, and of BOFT without its extension; what it gives is compared
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(model, adapter)
    layers, where = _layers(), torch.device(device)
    whole = getattr(model, "is_quantized", False)  # it may not be moved
    if not whole and layers.fits(layers.size(model), layers.free_on(where)):
        model = model.to(device)
    model.eval()
    passes: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(rows_file, device=device).items():
        number, _, name = name.partition(".")
        passes.setdefault(number, {})[name] = tensor

    def said(number: str) -> dict[str, torch.Tensor]:
        inputs = dict(passes[number])
        positions = inputs.pop("positions", None)
        outputs = model(**inputs)
        return {
            f"{number}.{name}": at(outputs[name][0], positions, inputs).contiguous()
            for name in filter(outputs.__contains__, OUTPUTS)
        }

    calls = [functools.partial(said, number) for number in passes]
    if whole:
        with torch.no_grad():
            told = [call() for call in calls]
    else:
        told = layers.run(model, calls, where)
    save_file({name: tensor for one in told for name, tensor in one.items()}, outputs_file)


def _layers() -> Any:
    """The file beside this one, which is in no package here."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("layers", Path(__file__).with_name("layers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
