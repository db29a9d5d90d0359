"""The one schema: what a run can be told, what each value means, and which values contradict each other.

Hydra composes (see `compose.py`), these dataclasses decide. Nothing here imports torch.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.fields import FieldInfo

from lora_lab.adapters import ADAPTERS
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.config import quoting
from lora_lab.config.data import DataConfig, Source
from lora_lab.config.evaluate import EvaluateConfig
from lora_lab.config.merge import ExportConfig, MergeConfig, ShrinkConfig
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.config.sweep import SweepConfig
from lora_lab.config.train import HardwareConfig, OptimConfig, SpeedConfig, TrackerConfig, TrainConfig
from lora_lab.config.trim import TrimConfig
from lora_lab.errors import ConfigError
from lora_lab.schema.sections import (
    adapter_of,
    default_of,
    describe,
    keys,
    one_of,
    renamed,
    repaired,
    section,
    sorted_out,
    unreadable,
    validate,
    values_of,
)
from lora_lab.serve.config import ServeConfig
from lora_lab.tasks import TASKS
from lora_lab.tasks.causal_lm.config import CausalLMConfig

SCHEMA_VERSION = 2

if TYPE_CHECKING:  # whoever reads a configuration knows no method and no task
    from lora_lab.adapters.base import AdapterSection
    from lora_lab.tasks.section import TaskSection

    _Adapter = AdapterSection
    _Task = TaskSection
else:
    _Adapter = one_of(ADAPTERS, by="method")
    _Task = one_of(TASKS, by="name")


@section
class RunConfig:
    """Everything one run is told: the sections, its name, its folder and its seed."""

    name: Annotated[str, Field(pattern=r"^[^/\x00\n]{1,100}$", description="name of the run")] = "run"
    run_dir: Annotated[str, Field(min_length=1, description="folder of the run; must not hold another run")]
    seed: Annotated[int, Field(ge=0, lt=2**32, description="adapter initialization, row order and dropout")] = 0
    model: ModelConfig
    data: DataConfig
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    adapter: _Adapter = dataclasses.field(default_factory=LoraAdapter)
    task: _Task = dataclasses.field(default_factory=CausalLMConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    hardware: HardwareConfig = dataclasses.field(default_factory=HardwareConfig)
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    merge: MergeConfig = dataclasses.field(default_factory=MergeConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    shrink: ShrinkConfig = dataclasses.field(default_factory=ShrinkConfig)
    trim: TrimConfig = dataclasses.field(default_factory=TrimConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)

    def __repr__(self) -> str:
        """What differs from the defaults."""
        told = [(key, value) for key, value, default in values_of(self) if value != default]
        return "\n".join(["RunConfig, beside defaults:", *(f"  {key}={quoting.written(value)}" for key, value in told)])


_ADAPTER = adapter_of(RunConfig)


@functools.cache
def all_keys() -> dict[str, FieldInfo]:
    """Every key of the configuration (such as `adapter.r`) with its pydantic description, in order."""
    return keys(RunConfig)


def parse(tree: dict[str, Any], told: Iterable[str] = ()) -> RunConfig:
    """Turn a composed tree of plain values into a `RunConfig`.

    Args:
        told: keys and groups that were told beside the tree's own; what they leave without effect has its default.

    Raises:
        ConfigError: every unknown key, wrong type, out-of-range and contradictory value, all in one message.
    """
    problems = unreadable(tree)
    if problems:
        raise ConfigError(*problems)
    told = set(told)
    tree, notices = renamed(tree)
    for notice in notices:
        _tell(notice)
    tree, foreign = sorted_out(RunConfig, tree)
    problems = [sentence for key, sentence in foreign.items() if not _is_void(key, sentence, told)]
    config, errors = validate(_ADAPTER, tree)
    # Past the bad values, the good ones must still not contradict each other: name those problems as well.
    if config is not None and told:
        config = with_defaults(config, void(config, told))
    readable = config or validate(_ADAPTER, repaired(tree, errors, all_keys()))[0]
    problems += describe(errors, all_keys()) + (contradictions(readable) if readable else [])
    if problems:
        raise ConfigError(*problems)
    return config


@functools.cache
def _tell(notice: str) -> None:
    """Say it once: a configuration is parsed several times until it is composed."""
    from lora_lab.runtime import console

    console.say("renamed", notice)


def contradictions(config: RunConfig) -> list[str]:
    """Values that are fine alone but not together; also options that the others would leave without effect."""
    quant, data, train, task = config.quant, config.data, config.train, config.task
    found = []
    if quant.double_quant and quant.method not in ("nf4", "fp4"):
        found.append(
            f"quant.double_quant=true: no effect with quant.method={quant.method}. Use nf4 or fp4, or set it false."
        )
    if quant.skip_modules and quant.method == "none":
        found.append("quant.skip_modules: no effect with quant.method=none. Drop it or choose a method.")
    if not quant.cache and quant.method not in ("nf4", "fp4"):
        found.append(f"quant.cache=false: no effect with quant.method={quant.method}, which is never kept. Drop it.")
    if config.merge.base in ("dequantized", "corrected") and quant.method == "none":
        found.append(f"merge.base={config.merge.base}: no effect with quant.method=none. Drop it.")
    if config.optim.loraplus_lr_ratio is not None and not config.adapter.second_factor:
        found.append(
            f"optim.loraplus_lr_ratio={config.optim.loraplus_lr_ratio:g}: no effect with adapter.method={config.adapter.method}, which has no second "
            "factor. Drop it, or train with adapter=lora."
        )
    found += _merge_contradictions(config.merge) + _trim_contradictions(config.trim) + _suite_contradictions(config)
    if config.speed.dequantize == "once" and quant.method not in ("nf4", "fp4", "torchao_int8"):
        found.append(
            f"speed.dequantize=once: no effect with quant.method={quant.method}. Use nf4, fp4 or torchao_int8, or drop it."
        )
    if config.speed.prefix_cache:
        reasons = {
            f"task={task.name}, whose rows are padded": not task.packed,
            "train.packing=false": train.packing is False,
            f"adapter={config.adapter.method}, whose rows have passes of their own": config.adapter.against_packing,
            "quant=int8, which rounds a row by the rows beside it": quant.method == "int8",
            "train.neftune_alpha": train.neftune_alpha,
            "train.fgm_epsilon": train.fgm_epsilon,
        }
        found += [
            f"speed.prefix_cache=true: not with {why}. Drop one of the two." for why, given in reasons.items() if given
        ]
    found += _hardware_contradictions(config.hardware) + _shard_contradictions(config)
    if (config.serve.certificate is None) != (config.serve.certificate_key is None):
        found.append(
            "serve.certificate: a certificate and serve.certificate_key belong together. Name both, or neither."
        )
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        found.append(
            f"train.micro_batch_size={train.micro_batch_size}: must be at most train.batch_size={train.batch_size}, "
            f"the sequences of a whole step. Did you mean train.batch_size={train.micro_batch_size}?"
        )
    apart = (
        "train.packing=false"
        if train.packing is False
        else config.adapter.against_packing and f"adapter={config.adapter.method}"
    )
    if train.micro_batch_tokens is not None and apart:
        found.append(
            f"train.micro_batch_tokens={train.micro_batch_tokens}: no effect with {apart}, where each row has a pass of its own. Drop it."
        )
    if not train.gradient_checkpointing:
        found += [
            f"train.{name}: no effect without train.gradient_checkpointing=true. Set that too, or drop it."
            for name, value in (
                ("recompute_every", train.recompute_every != 1),
                ("offload_activations", train.offload_activations),
            )
            if value
        ]
    found += config.adapter.rules(config) + _task_contradictions(config) + _data_contradictions(data)
    if data.eval is None and data.eval_ratio is None:
        needs_eval = {
            "train.eval_steps": train.eval_steps,
            "train.early_stopping_patience": train.early_stopping_patience,
            **{f"task.{name}": getattr(task, name) or None for name in task.measured_rows},
            "data.max_eval_rows": data.max_eval_rows,
        }
        found += [
            f"{key}={value}: needs held-out rows. Set data.eval=FILE or data.eval_ratio=0.1, or {key}={0 if 'rows' in key and 'task' in key else 'null'}."
            for key, value in needs_eval.items()
            if value is not None
        ]
    return found


_VOID = ("no effect", "names held-out rows already", "needs held-out rows", "are padded")


def void(config: RunConfig, told: Iterable[str]) -> dict[str, str]:
    """Settings that were not told but that something told leaves without effect, such as a recipe's `data.eval_ratio` beside
    `data.eval=FILE`: key -> the sentence that would refuse it.

    Args:
        told: keys and groups that the command line sets.
    """
    told = set(told)
    found: dict[str, str] = {}
    while True:
        more = _next_void(config, told | found.keys())
        if not more:
            return found
        found.update(more)
        config = with_defaults(config, more)


def _next_void(config: RunConfig, told: set[str]) -> dict[str, str]:
    found = {}
    for sentence in contradictions(config):
        parts = re.match(r"([\w.]+)(?:=.*?)?: (.*)", sentence, re.DOTALL)
        assert parts is not None, sentence
        key, why = parts.groups()
        if key == "data.eval_ratio" and key in told and "data.eval" not in told and "already" in why:
            return {"data.eval": f"data.eval: data.eval_ratio={config.data.eval_ratio:g} holds rows out."}
        if _is_void(key, why, told):
            found[key] = sentence
    return found


def _is_void(key: str, why: str, told: set[str]) -> bool:
    """Whether a sentence says of a key that was not told that what was told leaves it without effect."""
    own = key in told or key not in all_keys() or all_keys()[key].is_required()
    by = any(re.search(rf"(?<![\w.]){re.escape(one)}(?![\w-])", why) for one in told)
    return not own and by and any(words in why for words in _VOID)


def with_defaults(config: RunConfig, names: Iterable[str]) -> RunConfig:
    """The configuration with the defaults of these keys."""
    for key in names:
        *parents, last = key.split(".")
        config = _replaced(config, parents, last, default_of(config, key))
    return config


def _replaced(node: Any, parents: list[str], last: str, value: Any) -> Any:
    if not parents:
        return dataclasses.replace(node, **{last: value})
    return dataclasses.replace(node, **{parents[0]: _replaced(getattr(node, parents[0]), parents[1:], last, value)})


def _merge_contradictions(merge: MergeConfig) -> list[str]:
    found, count = [], len(merge.adapters)
    if count == 1 or len(set(merge.adapters)) != count:
        found.append(f"merge.adapters={merge.adapters}: name two or more different run folders.")
    if merge.weights is not None and len(merge.weights) != count:
        found.append(f"merge.weights: {len(merge.weights)} weights for {count} adapters. Give each adapter one.")
    if not count:
        told = {
            "merge.method": merge.method != "cat",
            "merge.rank": merge.rank is not None,
            "merge.search_trials": merge.search_trials,
        }
        found += [
            f"{key}: no effect without merge.adapters. Name the runs, or drop it."
            for key, given in told.items()
            if given
        ]
    if merge.correction_rank != 64 and merge.base != "corrected":
        found.append(
            f"merge.correction_rank={merge.correction_rank}: no effect without merge.base=corrected. Set that, or drop it."
        )
    alone = {
        "merge.rank": merge.rank is not None and merge.method == "cat",
        "merge.density": merge.density != 0.5 and merge.method in ("cat", "svd"),
    }
    found += [f"{key}: no effect with merge.method={merge.method}. Drop it." for key, given in alone.items() if given]
    if merge.weights is not None and merge.search_trials:
        found.append("merge.weights: merge.search_trials searches for them. Drop one of the two.")
    return found


def _trim_contradictions(trim: TrimConfig) -> list[str]:
    plain = TrimConfig()
    alone = {
        "min_count": ("trim.vocabulary", trim.vocabulary is None),
        "max_loss_increase": ("trim.layers=auto", trim.layers != "auto"),
        "calibration_rows": ("trim.layers", trim.layers == 0),
    }
    return [
        f"trim.{name}={getattr(trim, name):g}: no effect without {needs}. Set that, or drop it."
        for name, (needs, lacking) in alone.items()
        if lacking and getattr(trim, name) != getattr(plain, name)
    ]


def _suite_contradictions(config: RunConfig) -> list[str]:
    evaluate, task = config.evaluate, config.task
    if evaluate.suite:
        if not task.language_model:
            return [
                f"evaluate.suite: lm-eval asks how a text goes on, and the model of task={task.name} does not say that. Drop it."
            ]
        return [
            "evaluate.chat_template=true: no effect with task="
            + f"{task.name}, whose model reads plain texts. Drop it."
        ] * (evaluate.chat_template and not task.chat)
    told = {
        f"evaluate.{field.name}": getattr(evaluate, field.name)
        for field in dataclasses.fields(evaluate)
        if getattr(evaluate, field.name) != default_of(evaluate, field.name)
    }
    return [
        f"{key}={value}: no effect without evaluate.suite. Name the tasks, or drop it." for key, value in told.items()
    ]


def _hardware_contradictions(hardware: HardwareConfig) -> list[str]:
    if hardware.device != "cpu":
        return []
    told = {
        "hardware.deterministic=false": not hardware.deterministic,
        f"hardware.memory_gib={hardware.memory_gib}": hardware.memory_gib is not None,
        "hardware.offload_embeddings=true": hardware.offload_embeddings,
    }
    return [f"{key}: no effect with hardware.device=cpu. Drop it." for key, given in told.items() if given]


def _shard_contradictions(config: RunConfig) -> list[str]:
    if not config.hardware.shard:
        return []
    method = config.quant.method
    reasons = {
        "hardware.processes=1, which holds the whole base": config.hardware.processes == 1,
        f"quant={method}, whose weights are no plain tensors": method not in ("none", "nf4", "fp4"),
        "hardware.offload_embeddings=true, which is for a card that holds all else": config.hardware.offload_embeddings,
        "speed.dequantize=once, which keeps whole weights": config.speed.dequantize == "once",
        "speed.prefix_cache=true, because all processes go through all layers": config.speed.prefix_cache,
        "sweep.execution=batched, because its members take turns": config.sweep.execution == "batched",
        f"adapter={config.adapter.method}: {config.adapter.against_sharding}": config.adapter.against_sharding,
    }
    return [f"hardware.shard=true: not with {why}. Drop one of the two." for why, given in reasons.items() if given]


def _task_contradictions(config: RunConfig) -> list[str]:
    task, data, train, adapter = config.task, config.data, config.train, config.adapter
    found = task.rules(config)
    if against := adapter.against_task(task):
        found.append(f"task={task.name}: not with adapter={adapter.method}, because {against}. Use adapter=lora.")
    if train.packing and adapter.against_packing:
        found.append(
            f"train.packing=true: not with adapter={adapter.method}, because {adapter.against_packing}. Leave train.packing out."
        )
    if train.gradient_checkpointing and adapter.against_checkpointing:
        found.append(
            f"train.gradient_checkpointing=true: not with adapter={adapter.method}, because {adapter.against_checkpointing}. Drop it."
        )
    if train.packing and not task.packed:
        found.append(f"train.packing=true: rows of task={task.name} are padded. Leave train.packing out.")
    if train.packing is False and task.packed and task.compares_rows:
        found.append(f"train.packing=false: task={task.name} compares the rows of one pass. Leave train.packing out.")
    if train.rdrop_alpha and not task.compares_distributions:
        found.append(
            f"train.rdrop_alpha: compares distributions over classes or tokens, and task={task.name} has none."
        )
    found += [
        f"data.{name}: no effect with task={task.name}, which renders no conversation. Drop it."
        for name, used in (("supervise", task.chat), ("chat_template_kwargs", task.templated))
        if not used and getattr(data, name) != default_of(data, name)
    ]
    if data.clean and not task.cleans:
        found.append(
            f"data.clean: no effect with task={task.name}, whose labels belong to places of the text. Drop it, and clean the file itself."
        )
    if data.augment.methods and not task.augments:
        found.append(f"data.augment.methods: would invalidate the label positions of task={task.name}. Drop it.")
    if data.too_long != "error" and task.in_pieces:
        found.append(f"data.too_long: no effect with task={task.name}, which cuts long texts into pieces. Drop it.")
    if data.too_long == "truncate_prompt" and not task.cuts:
        found.append(f"data.too_long=truncate_prompt: rows of task={task.name} are never cut. Use error or drop.")
    return found


_NOT_VARIABLES = (
    "messages",
    "conversation",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "chat_template",
    "documents",
)


def _data_contradictions(data: DataConfig) -> list[str]:
    found = []
    if data.eval is not None and data.eval_ratio is not None:
        found.append(
            f"data.eval_ratio={data.eval_ratio:g}: data.eval names held-out rows already. Drop one of the two."
        )
    if data.stratify and data.eval_ratio is None:
        found.append(f"data.stratify={data.stratify}: no effect without data.eval_ratio. Drop it or set the ratio.")
    if data.eval_ratio is not None and data.max_eval_rows is not None:
        found.append("data.max_eval_rows: no effect with data.eval_ratio. Drop it, or lower the ratio.")
    names = data.label_names or []
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        found.append(
            f"data.label_names: {twice[0]!r} is there twice, and every class has one number. Drop one of the two."
        )
    blanks = [name for name in names if name != name.strip()]
    if blanks:
        found.append(
            f"data.label_names: {blanks[0]!r} has blanks around it, which no label of a row has. Write {blanks[0].strip()!r}."
        )
    for name in ("train", "eval"):
        sources = getattr(data, name)
        weights = [s.weight for s in sources if isinstance(s, Source)] if isinstance(sources, list) else []
        if any(weight is not None for weight in weights) and (None in weights or len(weights) != len(sources)):
            found.append(f"data.{name}: some sources have a weight and others none. Give every source one, or none.")
        if name == "eval" and any(weight is not None for weight in weights):
            found.append("data.eval: held-out rows are all measured once, so weights have no effect. Drop them.")
    for name in data.chat_template_kwargs or {}:
        if name in _NOT_VARIABLES:
            found.append(
                f"data.chat_template_kwargs.{name}: not a variable of the template but set by the rows. Drop it."
            )
    alone = "data.streaming=true" if data.streaming else "data.augment" if data.augment.methods else ""
    if data.processes is not None and alone and data.eval is None:
        found.append(
            f"data.processes={data.processes}: no effect with {alone}, whose rows one process encodes. Drop it."
        )
    if data.streaming:
        refused = {
            "data.eval_ratio": data.eval_ratio,
            "data.duplicates=drop": data.duplicates == "drop" or None,
            "data.shared=drop": data.shared == "drop" or None,
            "data.max_train_rows": data.max_train_rows,
        }
        found += [
            f"{key}: needs all rows beforehand, and data.streaming=true reads them as they come. Drop one of the two."
            for key, value in refused.items()
            if value is not None
        ]
    return found
