"""Merge an adapter into its unquantized base, save the result, reload it elsewhere, compare, and only then publish it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from lora_lab import console, storage
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, trainable
from lora_lab.base.load import BaseFiles, ModelKind, load_model
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.config import QuantConfig, RunConfig
from lora_lab.data.encode import Encoder
from lora_lab.errors import MergeError
from lora_lab.merge import parity
from lora_lab.run_dir import RunDir


def merge(
    run: RunDir,
    config: RunConfig,
    base: BaseFiles,
    kind: ModelKind,
    encoder: Encoder,
    rows: parity.Probe,
    trained_logits: list[torch.Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Merge the run's adapter at `export.dtype` into `merged/`, which appears only if it passes.

    Args:
        rows: what to compare on.
        trained_logits: logits [S, C] of the model as trained (its own base, quantized or not) on each of those rows.

    Returns:
        The report, which is also in `merge_report.json`.

    Raises:
        MergeError: the merged checkpoint differs by more than the `merge` section allows; nothing is published.
    """
    files.check_base(run.adapter, base)
    clear_device_cache(garbage_collection=True)  # models hold cycles: the trained one is still here otherwise
    model = load_model(base, kind, config.export.dtype, QuantConfig(), device, config.seed)
    model = attach(model, config.adapter, "default", kind, config.seed).eval()
    files.read_into(run.adapter, model, "default")
    if kind.new_modules:  # heads are trained in float32 and stored like the rest of the checkpoint
        for name, parameter in trainable(model).items():
            if ".modules_to_save." in name:
                parameter.data = parameter.data.to(getattr(torch, config.export.dtype))
    reference = parity.logits(model, rows)
    merged = model.merge_and_unload(safe_merge=True)
    _carry_along(merged, encoder)
    report: dict[str, Any] = {}
    with storage.new_folder(run.merged, {"base": base.fingerprint}) as temporary:
        merged.save_pretrained(temporary, max_shard_size=config.export.max_shard_size)
        save_tokenizer(encoder.tokenizer, temporary)
        del model, merged
        clear_device_cache(garbage_collection=True)
        report = _verify(temporary, config, kind, rows, reference, trained_logits, device)
        storage.write_text(run.merge_report, storage.dump_json(report))
        _show(report)
        if report["refused"]:
            raise MergeError(
                f"{run.merged}: not published, because {'; '.join(report['refused'])}. The adapter is untouched; see "
                f"{run.merge_report}. Merge at export.dtype=float32, or raise the limit if the gap is acceptable."
            )
    return report


def _carry_along(merged: torch.nn.Module, encoder: Encoder) -> None:
    """Deployments stop where training taught the model to stop."""
    if not encoder.chat or not merged.can_generate():
        return
    generation = merged.generation_config
    known = generation.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    ends = sorted({*known, *encoder.end_tokens()})
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.pad_token_id = encoder.tokenizer.pad_token_id


def _verify(
    folder: Path,
    config: RunConfig,
    kind: ModelKind,
    rows: parity.Probe,
    reference: list[torch.Tensor],
    trained: list[torch.Tensor],
    device: torch.device,
) -> dict[str, Any]:
    reloaded = parity.reloaded_logits(folder, kind.auto_class, rows, device)
    arithmetic, as_trained = parity.compare(reference, reloaded, rows), parity.compare(trained, reloaded, rows)
    return {
        "dtype": config.export.dtype,
        "trained_on": config.quant.method,
        "rows": len(rows.examples),
        "positions": rows.num_items,
        "merged_vs_full_precision_base_and_adapter": dataclasses.asdict(arithmetic),
        "merged_vs_model_as_trained": dataclasses.asdict(as_trained),
        "refused": parity.judge(arithmetic, as_trained, config.merge, config.export.dtype),
    }


def _show(report: dict[str, Any]) -> None:
    columns = {
        f"base ({report['dtype']}) + adapter": report["merged_vs_full_precision_base_and_adapter"],
        f"as trained ({report['trained_on']} base)": report["merged_vs_model_as_trained"],
    }
    title = f"merged checkpoint, reloaded by plain transformers, against ({report['positions']} positions)"
    console.metrics_table(title, columns)
