"""`lora-lab trim`: find the base -> tokens that stay -> layers that go -> write -> load elsewhere and compare -> publish."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from lora_lab.base import load
from lora_lab.base.positions import embedded, usable_positions
from lora_lab.base.tokenizer import decode, read_tokenizer, save_tokenizer
from lora_lab.base.weights import Weights
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.data import build
from lora_lab.data.dataset import Dataset, Stream, first_examples, spread_examples
from lora_lab.data.encode import Example
from lora_lab.errors import ConfigError, RunError, TrimError
from lora_lab.run.prepared import find_base, prepare, with_task
from lora_lab.run.run_dir import versions
from lora_lab.run.setup import Setup
from lora_lab.runtime import console, storage
from lora_lab.tasks.base import AnyTask, Pass
from lora_lab.trim import layers, vocabulary
from lora_lab.trim.checkpoint import Cut
from lora_lab.trim.layers import Layers, Stack
from lora_lab.trim.vocabulary import Vocabulary
from lora_lab.verify import parity
from lora_lab.verify.reload import OUTPUTS, at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "trim_report.json"
_PROBES = 8  # rows that the trimmed base is compared with the base on
_ROUNDING = 16  # of the type's steps, by which outputs may differ where a smaller product is computed in another order
_CUT_ROWS = "of every text whose tokens all stay"


def trim(config: RunConfig, out: str) -> dict[str, Any]:
    """Write the trimmed base into the folder `out`, which appears only if it is what it should be.

    Returns:
        The report, which is also in the folder's `trim_report.json`.

    Raises:
        ConfigError: nothing is to be trimmed, or this task or base cannot be.
        TrimError: the trimmed base reads or says something else than the base; nothing is kept.
    """
    place = _place(out)
    config = dataclasses.replace(config, quant=QuantConfig())
    _check(config)
    setup = prepare(config)
    _check_base(setup)
    with storage.new_folder(place, _made_of(setup)) as folder:
        report = _trimmed(setup, folder)
        (folder / REPORT).write_text(storage.dump_json(report), encoding="utf-8")
        (folder / "README.md").write_text(_card(setup, report), encoding="utf-8")
        if os.path.lexists(place):
            raise RunError(f"out={place}: another process has made it meanwhile; it was not touched.")
    _show(report)
    console.say("trimmed", f"{place}; use it as any base: lora-lab train model=hub model.path={place} data.train=...")
    return report


def _place(out: str) -> Path:
    place = Path(out).expanduser()
    if os.path.lexists(place):
        raise RunError(f"out={place}: exists; nothing in it was touched. Choose another name, or remove it.")
    return place


def _check(config: RunConfig) -> None:
    told, task = config.trim, config.task
    if told.vocabulary is None and not told.layers:
        raise ConfigError("trim: nothing to trim. Set trim.vocabulary=FILES, trim.layers=N, or both.")
    if told.layers and not _predicts_tokens(config):
        raise ConfigError(
            f"trim.layers={told.layers}: layers are compared by the loss of the next token, which task={task.name} has not. Set task=completion "
            "or task=causal_lm, and train the trimmed base with any task."
        )


def _predicts_tokens(config: RunConfig) -> bool:
    """Whether the task's loss is the base's own, of next tokens, so that it can be measured without training."""
    return config.task.packed and config.task.compares_distributions


def _check_base(setup: Setup) -> None:
    """
    Raises:
        ConfigError: a base that is quantized, or a task that puts a new head on it; or more layers than there are.
    """
    told, config = setup.config.trim, setup.config
    if setup.base.published is not None:
        raise ConfigError(
            f"model.path={setup.base.name}: was published in {setup.base.published.method}. Name the unquantized model: rows and layers are cut "
            "out of its weights."
        )
    if setup.kind.new_modules or setup.kind.head == "always":
        raise ConfigError(
            f"task={config.task.name}: puts a head on the base that has no weights yet. Trim with the task that the base was made for "
            "(task=completion, causal_lm, masked_lm, seq2seq or embedding), and train the result with any."
        )
    if not told.layers:
        return
    skeleton = setup.skeleton()
    layers.name_of(skeleton)
    total = skeleton.config.num_hidden_layers
    if told.layers != "auto" and told.layers >= total:
        raise ConfigError(
            f"trim.layers={told.layers}: the base has {total} layers, and one must stay. Drop at most {total - 1}."
        )


def _made_of(setup: Setup) -> dict[str, Any]:
    """What the folder's manifest remembers."""
    return {"base": setup.base.fingerprint, "made_with": dataclasses.asdict(setup.config.trim)}


# -- the walk ---------------------------------------------------------------------------------------------------------------


def _trimmed(setup: Setup, folder: Path) -> dict[str, Any]:
    """Write the trimmed base into a folder, prove it, and report."""
    report: dict[str, Any] = {
        "base": setup.base.recorded(),
        "settings": dataclasses.asdict(setup.config.trim),
        "versions": versions(),
    }
    kept, tokenizer = _cut_tokens(setup, folder, report)
    chosen, before, said = _cut_layers(setup, kept, report)
    cut = Cut(setup.base, setup.kind, kept, None if chosen is None else chosen.kept)
    cut.write_config(folder)
    cut.write_weights(folder, setup.config.export.max_shard_size)
    if kept is None:
        save_tokenizer(tokenizer, folder)
    setup.task.describe(folder)
    report["outputs"] = _compare(setup, folder, said)
    after = _after(setup, folder, () if before is None else before.rows)
    report["size"] = {"before": _size(setup.base.folder), "after": _size(folder)}
    if before is not None and after is not None:
        both = [row for row in before.rows if row in after.rows]
        report["measured"] = {
            "rows": setup.some_rows().key,
            "before": before.figures(both),
            "after": after.figures(both),
        }
    return report


def _cut_tokens(
    setup: Setup, folder: Path, report: dict[str, Any]
) -> tuple[Vocabulary | None, PreTrainedTokenizerBase]:
    """Choose the tokens that stay, and write and prove the tokenizer; None: all stay."""
    told, data, base = setup.config.trim, setup.config.data, setup.base.folder
    tokenizer = read_tokenizer(base)
    if told.vocabulary is None:
        return None, tokenizer

    def texts(key: str, names: Any) -> Iterator[str]:
        return vocabulary.texts_of(key, names, data.sample_by, data.field)

    rows = embedded(setup.skeleton())
    kept = vocabulary.choose(
        tokenizer, base, rows, texts("trim.vocabulary", told.vocabulary), told.min_count, data.chat_template_kwargs
    )
    Cut(setup.base, setup.kind, kept, None).write_config(folder)  # it decides how the tokenizer is read
    smaller = kept.write(tokenizer, folder)
    read = {"vocabulary": kept.prove(tokenizer, smaller, texts("trim.vocabulary", told.vocabulary), "trim.vocabulary")}
    if data.eval is not None:
        read["held out"] = kept.prove(tokenizer, smaller, texts("data.eval", data.eval), "data.eval")
    kept.prove_lossless(tokenizer, smaller)
    vocabulary.say(kept, read["vocabulary"])
    report["tokens"] = {
        "before": rows,
        "after": len(kept.rows(rows)),
        "used": kept.used,
        "texts": {name: one.told() for name, one in read.items()},
    }
    return kept, smaller


@dataclasses.dataclass(frozen=True)
class Said:
    """What the base, without the layers that go, says of some rows."""

    passes: list[Pass]  # with the new ids
    outputs: list[dict[str, torch.Tensor]]  # of the tokens that stay
    dtype: torch.dtype


def _cut_layers(
    setup: Setup, kept: Vocabulary | None, report: dict[str, Any]
) -> tuple[Layers | None, Measured | None, Said]:
    """Measure the base, choose the layers that go, and note what it says without them."""
    config = setup.config
    model = load.load_model(setup.base, setup.kind, config.model.dtype, config.quant, setup.device, config.seed)
    before = None
    if _predicts_tokens(config):
        before = _measured(model, setup.task, _examples(setup.some_rows()), setup.device)
    chosen = None
    stack = None
    if config.trim.layers:
        stack = Stack(model.get_submodule(layers.name_of(model)))  # type: ignore[arg-type]
        rows = _calibration(setup.training_rows(), config.trim.calibration_rows)
        count = None if config.trim.layers == "auto" else config.trim.layers
        parts = layers.passes(model, setup.task, rows)
        chosen = layers.choose(model, stack, setup.task, parts, count, config.trim.max_loss_increase)
        report["layers"] = {
            "before": chosen.total,
            "after": len(chosen.kept),
            "calibration_rows": len(rows),
            "loss": chosen.whole,
            "dropped": [dataclasses.asdict(one) for one in chosen.dropped],
        }
        if setup.held_out is not None:
            examples = _examples(setup.held_out)
            for place, one in enumerate(report["layers"]["dropped"], 1):
                with stack.given(dict.fromkeys(dropped.layer for dropped in chosen.dropped[:place])):
                    measured = _measured(model, setup.task, examples, setup.device)
                figures = measured.figures(measured.rows)
                one["held_out"] = {name: figures[name] for name in ("loss", "bits_per_byte")}
    gone = [] if chosen is None else [one.layer for one in chosen.dropped]
    passes = _probes(setup, kept)
    if stack is None:
        outputs = _outputs(model, passes, setup.device)
    else:
        with stack.given(dict.fromkeys(gone)):
            outputs = _outputs(model, passes, setup.device)
    rows_kept = None if kept is None else torch.from_numpy(kept.rows(embedded(model)))
    said = Said(
        [_renumbered(one, kept) for one in passes],
        [{name: _of_kept(name, one, rows_kept) for name, one in output.items()} for output in outputs],
        model.dtype,
    )
    del model, stack
    clear_device_cache(garbage_collection=True)
    return chosen, before, said


def _calibration(data: Dataset | Stream, count: int) -> list[Example]:
    return spread_examples(data, count) if isinstance(data, Dataset) else first_examples(data, count)


def _probes(setup: Setup, kept: Vocabulary | None) -> list[Pass]:
    """Passes over training rows whose tokens all stay.

    Raises:
        ConfigError: no row is so.
    """
    found: list[Pass] = []
    for example in first_examples(setup.training_rows(), 64 * _PROBES):
        passes = setup.task.passes(example)
        if all(kept is None or bool((kept.new[ids.numpy()] >= 0).all()) for one in passes for ids in _ids(one)):
            found += passes[:1]
        if len(found) == _PROBES:
            break
    if not found:
        raise ConfigError(
            f"trim.vocabulary: no row of data.train has only tokens that stay, so nothing can be compared. Name files like those rows, or lower "
            f"trim.min_count={setup.config.trim.min_count}."
        )
    return found


def _ids(one: Pass) -> list[torch.Tensor]:
    return [tensor for name, tensor in one.inputs.items() if name.endswith("input_ids")]


def _renumbered(one: Pass, kept: Vocabulary | None) -> Pass:
    if kept is None:
        return one
    new = torch.from_numpy(kept.new)
    return Pass(
        {name: new[tensor] if name.endswith("input_ids") else tensor for name, tensor in one.inputs.items()},
        one.positions,
    )


def _of_kept(name: str, output: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return output if rows is None or not name.endswith("logits") else output.index_select(-1, rows)


@torch.no_grad()
def _outputs(model: PreTrainedModel, passes: list[Pass], device: torch.device) -> list[dict[str, torch.Tensor]]:
    found = []
    for inputs, positions in passes:
        result = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        found.append({name: at(result[name][0], positions, inputs) for name in OUTPUTS if name in result})
    return found


def _compare(setup: Setup, folder: Path, said: Said) -> dict[str, Any]:
    """Load the trimmed base elsewhere, and compare what it says.

    Raises:
        TrimError: it is more than rounding.
    """
    now = parity.reloaded_outputs(folder, setup.kind.auto_class, said.passes, setup.device, setup.config.model.dtype)
    worst, equal, largest, positions = 0.0, True, 0.0, 0
    for one, other in zip(said.outputs, now, strict=True):
        for name, expected in one.items():
            if name not in other or other[name].shape != expected.shape:
                raise TrimError(f"{folder}: gives no {name} of {tuple(expected.shape)}. Nothing is kept.")
            gap = (expected - other[name]).abs().max().item()
            worst = gap if math.isnan(gap) else max(worst, gap)
            equal &= torch.equal(expected, other[name])
            largest = max(largest, expected.abs().max().item())
            positions += len(expected)
    limit = _ROUNDING * torch.finfo(said.dtype).eps * largest
    if not worst <= limit:
        raise TrimError(
            f"the trimmed base says something else than the base: outputs differ by {worst:.1e}, and rounding moves them by {limit:.1e} at most. "
            "Nothing is kept: this architecture cannot be trimmed so."
        )
    return {"rows": len(said.passes), "positions": positions, "same_bits": equal, "largest_difference": worst}


# -- what is measured ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a base without an adapter makes of rows."""

    rows: dict[str, np.ndarray]  # row -> loss (nats), weight, bytes and tokens of all its examples
    processor_seconds: float | None  # None on a GPU

    def figures(self, rows: Iterable[str]) -> dict[str, Any]:
        """Of some of the rows. The loss is for the layers alone: between vocabularies, bits per byte are compared."""
        rows = list(rows)
        nats, weight, count, tokens = np.sum([self.rows[row] for row in rows], axis=0)
        return {
            "texts": len(rows),
            "bits_per_byte": float(nats) / math.log(2) / float(count),
            "bytes": int(count),
            "tokens": int(tokens),
            "loss": float(nats / weight),
            "processor_seconds": self.processor_seconds,
        }


@torch.no_grad()
def _measured(model: PreTrainedModel, task: AnyTask, examples: Sequence[Example], device: torch.device) -> Measured:
    task.forward.part_rows()  # plain passes, of a model that no adapter lies on
    rows: dict[str, np.ndarray] = {}
    started = time.process_time()
    with console.steps("measure", len(examples)) as steps:
        for one in examples:
            loss, weight = task.losses_of(model, [one])[0]  # type: ignore[arg-type]
            text = decode(task.tokenizer, task.compared_targets(one).tolist(), skip_special_tokens=True)
            rows[one.origin] = rows.get(one.origin, 0) + np.array([loss, weight, len(text.encode()), one.num_tokens])
            steps.advance()
    seconds = time.process_time() - started
    return Measured(rows, round(seconds, 2) if device.type == "cpu" else None)


def _examples(data: Dataset | Stream) -> list[Example]:
    return list(data if isinstance(data, Dataset) else data.sample())


def _after(setup: Setup, folder: Path, rows: Container[str]) -> Measured | None:
    """The trimmed base as a run would find it, on the same rows, encoded anew; None: the task has no loss to measure."""
    config = setup.config
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder), revision=None))
    found = find_base(smaller)
    if not _predicts_tokens(config):
        return None
    told = config.data
    if not config.task.in_pieces:  # rows of more tokens than before are measured too
        most = usable_positions(found.model) or 2 * told.max_tokens
        told = dataclasses.replace(told, max_tokens=max(told.max_tokens, min(2 * told.max_tokens, most)))
        found.encoder.config = told
    data = build.build(told, found.encoder, need_train=told.eval is None)
    found, task = with_task(smaller, found, setup.task.learned)
    model = load.load_model(found.base, found.kind, config.model.dtype, config.quant, setup.device, config.seed)
    # what eval_ratio holds out hangs on which rows there are, and so on their lengths
    parts = [data.held_out] if told.eval is not None else [data.train, data.held_out]
    examples = [one for part in parts if part is not None for one in _examples(part) if one.origin in rows]
    return _measured(model, task, examples, setup.device)


def _size(folder: Path) -> dict[str, int]:
    """Numbers that a base's files hold, and their bytes."""
    weights = Weights(folder)
    files = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    return {
        "parameters": sum(shape.numel() for shape in weights.shapes.values()),
        "bytes": sum(file.stat().st_size for file in files),
    }


# -- what is said -----------------------------------------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    rows: list[list[Any]] = []

    def line(name: str, before: Any, after: Any) -> None:
        numbers = isinstance(before, (int, float)) and isinstance(after, (int, float)) and before
        change = f"{100 * (after / before - 1):+.1f} %" if numbers else ""
        rows.append([name, *(f"{one:,}" if isinstance(one, int) else one for one in (before, after)), change])

    size = report["size"]
    for name in ("parameters", "bytes"):
        line(name, size["before"][name], size["after"][name])
    for name in ("tokens", "layers"):
        if name in report:
            line(name, report[name]["before"], report[name]["after"])
    if "measured" in report:
        measured = report["measured"]
        for name in ("bits_per_byte", "tokens", "processor_seconds"):
            line(f"{name.replace('_', ' ')} ({measured['rows']})", measured["before"][name], measured["after"][name])
    console.show_table("trimmed base beside the base", ["", "before", "after", ""], rows)
    for name, one in report.get("tokens", {}).get("texts", {}).items():
        console.say(
            "read", f"{one['identical']:,} of {one['texts']:,} texts become the same tokens ({name}); {one['tokens']:,} tokens, "
            f"{one['tokens_after']:,} now"
        )  # fmt: skip
    if "layers" in report:
        _show_layers(report["layers"])
    outputs = report["outputs"]
    how = "the same bits" if outputs["same_bits"] else f"at most {outputs['largest_difference']:.1e} apart, by rounding"
    console.say(
        "outputs", f"loaded by plain transformers: {how}, on {outputs['positions']} positions of {outputs['rows']} rows"
    )


def _show_layers(told: dict[str, Any]) -> None:
    rows: list[list[Any]] = [["none", told["loss"], "", ""]]
    for one in told["dropped"]:
        held_out = one["held_out"]["bits_per_byte"] if "held_out" in one else ""
        rows.append([one["layer"], one["loss"], f"{one['loss'] - told['loss']:+.4f}", held_out])
    console.show_table(
        f"layers dropped, one after another, by the loss on {told['calibration_rows']} rows of data.train",
        ["dropped", "loss", "", "held out, bits per byte"],
        rows,
    )


def _card(setup: Setup, report: dict[str, Any]) -> str:
    """A README of what it was made of."""
    size = report["size"]
    lines = [
        "# A trimmed base",
        "",
        f"Made by `lora-lab trim` of `{setup.base.name}` (fingerprint `{setup.base.fingerprint}`). The licence of that model holds for this one.",
        "",
        f"- Parameters: {size['before']['parameters']:,} before, {size['after']['parameters']:,} now.",
    ]
    if "tokens" in report:
        lines.append(
            f"- Tokens: {report['tokens']['before']:,} before, {report['tokens']['after']:,} now; outputs are those {_CUT_ROWS}."
        )
    if "layers" in report:
        gone = ", ".join(str(one["layer"]) for one in report["layers"]["dropped"]) or "none"
        lines.append(f"- Layers dropped of {report['layers']['before']} (numbered from 0): {gone}.")
    return "\n".join([*lines, "", f"`{REPORT}` says more. Adapters of that model do not fit on this one.", ""])
