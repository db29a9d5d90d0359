"""The merged checkpoint in fewer bits, for serving on small cards; plain transformers loads it, with the library that it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base.load import quantization_config
from lora_lab.base.quantized import SHARD
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.config.model import QuantConfig
from lora_lab.errors import ExportError
from lora_lab.export import text
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Setup
from lora_lab.verify.parity import Probe, compare, loss_increase, reloaded_logits

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig, TorchAoConfig

_PACKED_IN, _PACKED_OUT = 64, 32  # of bitsandbytes on CPUs


def check(setup: Setup) -> Iterator[str]:
    """A library that is missing, or layers that it does not compute with here."""
    method = setup.config.export.quantization
    if method == "torchao_int8" and importlib.util.find_spec("torchao") is None:
        yield "export.quantization=torchao_int8 needs torchao. pip install 'lora-lab[torchao]'"
    odd = _not_packed(setup) if method in ("nf4", "fp4") and setup.device.type == "cpu" else []
    if odd:
        name, layer = odd[0]
        yield (
            f"export.quantization={method}: {name} is {layer.in_features} x {layer.out_features}, and on this CPU bitsandbytes computes in 4 "
            f"bits only with multiples of {_PACKED_IN} inputs and {_PACKED_OUT} outputs ({len(odd)} layers are others). Choose int8, or export "
            "on a GPU."
        )


def _not_packed(setup: Setup) -> list[tuple[str, Linear4bit]]:
    """Layers that bitsandbytes cannot pack: it packs 4-bit weights in whole blocks before it computes, where a CPU multiplies bfloat16
    (`bitsandbytes.functional._convert_weight_packed_for_cpu`)."""
    import torch
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    if not has_avx512bf16():
        return []
    model = setup.skeleton()
    with torch.device("meta"):
        AutoHfQuantizer.from_config(_config(setup)).preprocess_model(model, device_map={"": "cpu"})
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, Linear4bit)]
    return [(name, one) for name, one in layers if one.in_features % _PACKED_IN or one.out_features % _PACKED_OUT]


def make(trained: Trained, rows: Probe, folder: Path) -> dict[str, Any]:
    """Quantize the merged checkpoint and save it; its loss beside the merged checkpoint's.

    Raises:
        ExportError: it does not load, or its loss is higher by more than `merge.max_loss_increase`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    setup, merged, auto_class = trained.setup, trained.run.merged, trained.setup.kind.auto_class
    model = getattr(transformers, auto_class).from_pretrained(
        merged, quantization_config=_config(setup), dtype="auto", device_map={"": setup.device}, use_safetensors=True
    )
    model.save_pretrained(folder, max_shard_size=SHARD)
    save_tokenizer(setup.encoder.tokenizer, folder)
    writes = auto_class == "AutoModelForCausalLM"
    answers = text.Answers.of(setup.encoder, rows.examples, model.eval() if writes else None)
    del model
    own = reloaded_logits(folder, auto_class, rows, setup.device)
    reference, agreed = answers.compared(merged, auto_class, rows, own, setup.device)
    gap = compare(reference, own, rows)
    found = text.folder_problems(folder, setup.encoder, answers.asked)
    found += loss_increase(gap, setup.config.merge, "against the merged checkpoint")
    if found:
        raise ExportError(
            f"quantized: {'; '.join(found)}. Nothing is kept; raise the limit if that is acceptable, or choose another "
            "export.quantization."
        )
    return {
        "quantization": setup.config.export.quantization,
        "loader": "transformers",
        "positions": rows.num_items,
        "loss": gap.loss,
        "loss_of_merged": gap.reference_loss,
        "top1_agreement": gap.top1_agreement,
        "kl": gap.kl,
        "texts": len(answers.asked),
        **agreed.told(),
    }


def _config(setup: Setup) -> BitsAndBytesConfig | TorchAoConfig | None:
    own = QuantConfig(method=setup.config.export.quantization)
    return quantization_config(own, setup.config.export.dtype, setup.kind)
