"""Merge an adapter into its unquantized base, save the result, reload it elsewhere, compare, and only then publish it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from lora_lab.adapters import deltas
from lora_lab.adapters.attach import attach_trained, trainable
from lora_lab.base.layers import layers_of
from lora_lab.base.load import load_model
from lora_lab.base.overruled import SENTENCEPIECE
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.base.weights import Weights
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import first_examples
from lora_lab.data.encode import Encoder
from lora_lab.errors import MergeError
from lora_lab.export import text
from lora_lab.merge import bases, stream
from lora_lab.report import card
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import ADAPTER, Setup
from lora_lab.runtime import console, storage
from lora_lab.verify import layers, parity, sentences

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel


def merge(trained: Trained, as_trained: parity.Reference) -> dict[str, Any]:
    """Merge the run's adapter at `export.dtype` into `merged/`, which appears only if it passes.

    Args:
        as_trained: the rows to compare on, and what the model as trained (on its own base, quantized or not) says of them; it must not
            be loaded any more.

    Returns:
        The report, which is also in `merge_report.json`.

    Raises:
        MergeError: the merged checkpoint differs by more than the `merge` section allows; nothing is published.
    """
    run, setup, rows = trained.run, trained.setup, as_trained.rows
    config, base = setup.config, setup.base
    names, measured = bases.policies(config, base), {}
    one: Adapted | None = None
    for name in names:
        if one is not None:
            one = None
            clear_device_cache(garbage_collection=True)  # models hold cycles: the last one is still here otherwise
        one = adapted(name, trained)
        merging = parity.Reference(rows, parity.logits(one.model, rows, setup.device))
        measured[name] = parity.compare(as_trained.logits, merging.logits, rows)
    chosen = min(measured, key=lambda name: measured[name].loss)
    if one is None or chosen != names[-1]:
        one = None
        clear_device_cache(garbage_collection=True)
        one = adapted(chosen, trained)
        merging = parity.Reference(rows, parity.logits(one.model, rows, setup.device))
    answers, layered = one.answers(rows), one.told
    with storage.new_folder(run.merged, {"base": base.fingerprint, "made_with": settings(config)}) as temporary:
        how = _write(temporary, one, trained)
        save_tokenizer(setup.encoder.tokenizer, temporary)
        if (base.folder / SENTENCEPIECE).is_file():
            shutil.copy(base.folder / SENTENCEPIECE, temporary)
        setup.task.describe(temporary)
        del one
        clear_device_cache(garbage_collection=True)
        report = _verify(temporary, setup, merging, as_trained, answers)
        report |= {
            "base": chosen,
            "bases": {name: dataclasses.asdict(gap) for name, gap in measured.items()},
            "written": how,
            "compared": layered,
        }
        (temporary / "README.md").write_text(_card(trained, report), encoding="utf-8")
        storage.write_text(run.merge_report, storage.dump_json(report))
        _show(report)
        if report["refused"]:
            raise MergeError(
                f"{run.merged}: not published, because {'; '.join(report['refused'])}. The adapter is untouched; see "
                f"{run.merge_report}. Merge at export.dtype=float32, or raise the limit if the gap is acceptable."
            )
    return report


def reference(trained: Trained) -> parity.Reference:
    """What the trained model, on its own base, says of the rows that a merge is judged on; in no more memory than the base's files
    ask for."""
    setup, config = trained.setup, trained.setup.config
    rows = judged_on(setup)
    model = load_model(setup.base, setup.kind, config.model.dtype, config.quant, setup.device, config.seed)
    model = attach_trained(model, trained.run.adapter, ADAPTER).eval()
    said = parity.logits(model, rows, setup.device, setup.accelerator.autocast)
    del model
    clear_device_cache(garbage_collection=True)
    return parity.Reference(rows, said)


def judged_on(setup: Setup) -> parity.Probe:
    """The rows that a merge is judged on."""
    count = setup.config.merge.parity_rows
    return parity.probe(first_examples(setup.some_rows(), count), count, setup.task)


def settings(config: RunConfig) -> dict[str, Any]:
    """What decides the merged weights, beside base and adapter."""
    merge = config.merge
    return {"dtype": config.export.dtype, "base": merge.base, "correction_rank": merge.correction_rank}


def _write(folder: Path, one: Adapted, trained: Trained) -> str:
    """Write the merged checkpoint, tensor by tensor where that can be done; how it was written.

    Args:
        one: it is merged, where tensors alone do not do.
    """
    setup, adapter, model = trained.setup, trained.run.adapter, one.model
    export = setup.config.export
    reason = deltas.reason_against(adapter)
    if not reason:
        skeleton, weights = setup.skeleton(), _weights(one, setup)
        reason = stream.reason_against(skeleton, weights, found := deltas.read(adapter, skeleton))
        if not reason:
            if skeleton.can_generate():
                skeleton.generation_config = model.get_base_model().generation_config
            _carry_along(skeleton, setup.encoder)
            vars(skeleton.config).pop("quantization_config", None)  # of a base that was published in few bits
            stream.write(skeleton, weights, found, getattr(torch, export.dtype), export.max_shard_size, folder)
            return "file by file" if one.policy == "full_precision" else f"tensor by tensor: merge.base={one.policy}"
    with one.merging() as merged:
        _carry_along(merged, setup.encoder)
        merged.save_pretrained(folder, max_shard_size=export.max_shard_size)
    return f"from memory: {reason}"


def _weights(one: Adapted, setup: Setup) -> Weights | stream.Held:
    """The base's tensors: of its files, or, of a base that was made, of the model."""
    return Weights(setup.base.folder) if one.policy == "full_precision" else stream.Held(one.base)


def _unwrapped(merged: PreTrainedModel) -> PreTrainedModel:
    """The model with what was trained whole in its place, where peft's method has left its wrapper (LN tuning does)."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            merged.set_submodule(name, module.unload_and_optionally_merge_module(True, True, None))
    return merged


@dataclasses.dataclass
class Adapted:
    """A run's adapter on an unquantized base."""

    policy: str
    trained: Trained
    model: PeftModel
    base: dict[str, torch.Tensor]  # the base's tensors by name, without the adapter
    in_files: bool  # the base's weights are mapped from files, and lie on the CPU

    @property
    def told(self) -> str:
        """How it is compared."""
        count = len(dict.fromkeys(layers_of(self.model)))
        if not self.in_files:
            return "as a whole"
        return f"{count} layers, one after another" if count else "as a whole: it has no list of layers"

    def answers(self, rows: parity.Probe) -> text.Answers:
        """What it answers, where it is a model that writes."""
        setup = self.trained.setup
        writes = setup.kind.auto_class == "AutoModelForCausalLM"
        return text.Answers.of(setup.encoder, rows.examples, self.model if writes else None, setup.device)

    @contextlib.contextmanager
    def merging(self) -> Iterator[PreTrainedModel]:
        """The merged model, in files again where the base is."""
        model, where = self.model, self.trained.run.path
        self.base.clear()  # else what is replaced would stay in memory
        with storage.scratch(where) if self.in_files else contextlib.nullcontext() as scratch:
            if scratch is not None:
                _merge_into(model, bases.Drawer(scratch))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All adapters are already merged")
                merged = model.merge_and_unload(safe_merge=True)
            yield _unwrapped(merged)


def _merge_into(model: PeftModel, drawer: bases.Drawer) -> None:
    """Merge the adapter into each layer in turn, whose new weights go to files."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(model.modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        module.merge(safe_merge=True)
        for parameter in module.get_base_layer().parameters():
            parameter.data = drawer(parameter.data)


def adapted(policy: str, trained: Trained) -> Adapted:
    """The run's adapter on the base that a policy names."""
    setup = trained.setup
    whole = bases.as_a_whole(setup)
    # the files have no name any more when this is done, and go with the tensors
    with contextlib.nullcontext() if whole else storage.scratch(trained.run.path) as scratch:
        base = bases.load(policy, setup, None if scratch is None else bases.Drawer(scratch))
    tensors = base.state_dict()
    model = attach_trained(base, trained.run.adapter, ADAPTER).eval()
    layers.forget(model.parameters())  # of which some methods look at all
    for name, parameter in trainable(model).items():
        if ".modules_to_save." in name:  # heads are trained in float32 and stored like the rest of the checkpoint
            parameter.data = parameter.data.to(getattr(torch, setup.config.export.dtype))
    return Adapted(policy, trained, model, tensors, not whole)


def _card(trained: Trained, report: dict[str, Any]) -> str:
    gap = report["merged_vs_model_as_trained"]
    proved = {
        "merged into": report["base"],
        "reloaded by plain transformers, positions compared": report["positions"],
        "loss": gap["loss"],
        "loss of the model as trained": gap["reference_loss"],
        "top-1 agreement with it": gap["top1_agreement"],
    }
    return card.card(trained, proved)


def _carry_along(merged: torch.nn.Module, encoder: Encoder) -> None:
    """Deployments stop where training taught the model to stop."""
    if not encoder.chat or not merged.can_generate():
        return
    add_ends(merged.generation_config, encoder)


def add_ends(generation: GenerationConfig, encoder: Encoder) -> None:
    """Name the tokens that end the run's answers, beside those that are known."""
    known = generation.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    ends = sorted({*known, *encoder.end_tokens()})
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.pad_token_id = encoder.tokenizer.pad_token_id


def _verify(
    folder: Path, setup: Setup, merging: parity.Reference, as_trained: parity.Reference, answers: text.Answers
) -> dict[str, Any]:
    """Load the checkpoint elsewhere, and compare it.

    Args:
        merging: what the model that was merged said.
    """
    rows, config = merging.rows, setup.config
    reloaded, agreed = answers.compared(folder, setup.kind.auto_class, rows, merging.logits, setup.device)
    refused = text.folder_problems(folder, answers.encoder, answers.asked)
    elsewhere: dict[str, Any] = {}
    if setup.config.task.vectors:
        elsewhere["sentence_transformers"] = sentences.check(
            folder, rows, merging.logits, setup.device, config.export.dtype
        )
    if agreed.parting:
        refused.append(f"greedy answers part: {agreed.parting}")
    arithmetic = parity.compare(merging.logits, reloaded, rows)
    gap = parity.compare(as_trained.logits, reloaded, rows)
    return {
        "dtype": config.export.dtype,
        "trained_on": setup.base.stored(config.quant).method,
        "rows": len(rows.examples),
        "positions": rows.num_items,
        "merged_vs_base_and_adapter": dataclasses.asdict(arithmetic),
        "merged_vs_model_as_trained": dataclasses.asdict(gap),
        "texts": len(answers.asked),
        **agreed.told(),
        **elsewhere,
        "refused": parity.judge(arithmetic, gap, config.merge, config.export.dtype) + refused,
    }


def _show(report: dict[str, Any]) -> None:
    columns = {
        f"{report['base']} base ({report['dtype']}) + adapter": report["merged_vs_base_and_adapter"],
        f"as trained ({report['trained_on']} base)": report["merged_vs_model_as_trained"],
    }
    title = f"merged checkpoint, reloaded by plain transformers, against ({report['positions']} positions)"
    console.metrics_table(title, columns)
    if len(report["bases"]) > 1:
        title = (
            f"what to merge into: base + adapter against the model as trained (taken: {report['base']}, by its loss)"
        )
        console.metrics_table(title, report["bases"])
