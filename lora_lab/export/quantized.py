"""The merged checkpoint in fewer bits, for serving on small cards; plain transformers loads it, with the library that it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base.load import bitsandbytes_config
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.config.model import QuantConfig
from lora_lab.errors import ExportError
from lora_lab.export import text
from lora_lab.export.job import Job
from lora_lab.verify.parity import compare, loss_increase, reloaded_logits

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, TorchAoConfig


def check(job: Job) -> Iterator[str]:
    """A library that is missing."""
    if job.config.export.quantization == "torchao_int8" and importlib.util.find_spec("torchao") is None:
        yield "export.quantization=torchao_int8 needs torchao. pip install 'lora-lab[torchao]'"


def make(job: Job, folder: Path) -> dict[str, Any]:
    """Quantize the merged checkpoint and save it; its loss beside the merged checkpoint's.

    Raises:
        ExportError: it does not load, or its loss is higher by more than `merge.max_loss_increase`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, job.kind.auto_class).from_pretrained(
        job.merged, quantization_config=_config(job), dtype="auto", device_map={"": job.device}, use_safetensors=True
    )
    model.save_pretrained(folder)
    save_tokenizer(job.encoder.tokenizer, folder)
    writes = job.kind.auto_class == "AutoModelForCausalLM"
    answers = text.Answers.of(job.encoder, job.rows.examples, model.eval() if writes else None)
    del model
    own = reloaded_logits(folder, job.kind.auto_class, job.rows, job.device)
    reference, agreed = answers.compared(job.merged, job.kind.auto_class, job.rows, own, job.device)
    gap = compare(reference, own, job.rows)
    found = text.folder_problems(folder, job.encoder, answers.asked)
    found += loss_increase(gap, job.config.merge, "against the merged checkpoint")
    if found:
        raise ExportError(
            f"quantized: {'; '.join(found)}. Nothing is kept; raise the limit if that is acceptable, or choose another "
            "export.quantization."
        )
    return {
        "quantization": job.config.export.quantization,
        "loader": "transformers",
        "positions": job.rows.num_items,
        "loss": gap.loss,
        "loss_of_merged": gap.reference_loss,
        "top1_agreement": gap.top1_agreement,
        "kl": gap.kl,
        "texts": len(answers.asked),
        **agreed.told(),
    }


def _config(job: Job) -> BitsAndBytesConfig | TorchAoConfig:
    method = job.config.export.quantization
    if method == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return bitsandbytes_config(QuantConfig(method=method), job.config.export.dtype, job.kind)
