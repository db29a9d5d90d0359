"""The one schema: what a run can be told, what each value means, and which values contradict each other.

Hydra composes (see `compose.py`), these dataclasses decide. Nothing here imports torch.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

from lora_lab.adapters.lora import LoraAdapter
from lora_lab.data.augment import AugmentConfig
from lora_lab.data.clean import Language, Step
from lora_lab.errors import ConfigError
from lora_lab.schema import adapter_of, describe, keys, repaired, section, unreadable, validate

SCHEMA_VERSION = 1


@section
class ModelConfig:
    """The frozen base model."""

    path: Annotated[str, Field(description="folder, .gguf file, hub id (owner/name) or package:<import name>/<path>")]
    revision: Annotated[str | None, Field(description="branch, tag or commit on the hub")] = None
    dtype: Annotated[Literal["bfloat16", "float32"], Field(description="type of the unquantized weights")] = "bfloat16"


@section
class QuantConfig:
    """How the frozen base is stored (bitsandbytes)."""

    method: Annotated[Literal["none", "nf4", "fp4", "int8"], Field(description="bitsandbytes format")] = "none"
    double_quant: Annotated[bool, Field(description="quantize the scales too (nf4, fp4 only)")] = False
    skip_modules: Annotated[list[str] | None, Field(description="modules left unquantized; null: the output head")] = (
        None
    )
    cache: Annotated[
        bool, Field(description="keep the quantized base on disk (nf4, fp4 only), so that later runs load faster")
    ] = True


TaskName = Literal[
    "causal_lm",
    "completion",
    "masked_lm",
    "classification",
    "regression",
    "token_classification",
    "question_answering",
    "seq2seq",
    "preference",
    "reward",
]


@section
class TaskConfig:
    """What is learned and how it is measured. Each option says which tasks know it; elsewhere it is an error."""

    name: Annotated[TaskName, Field(description="objective")] = "causal_lm"
    generate_rows: Annotated[
        int,
        Field(ge=0, description="causal_lm, seq2seq: held-out rows whose answers are generated and measured; 0: none"),
    ] = 0
    max_new_tokens: Annotated[
        int, Field(ge=1, description="causal_lm, seq2seq: longest generated answer, in tokens")
    ] = 128
    num_beams: Annotated[int, Field(ge=1, le=64, description="causal_lm, seq2seq: beams of the search; 1: greedy")] = 1
    few_shot: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="causal_lm, seq2seq: evaluate the base with so many training rows in the prompt too",
        ),
    ] = 0
    answer_format: Annotated[
        Literal["text", "json"],
        Field(description="causal_lm: json: answers are compared as parsed JSON and valid_json is reported"),
    ] = "text"
    language: Annotated[
        Literal["en", "zh"],
        Field(description="causal_lm, seq2seq, question_answering: how generated and found texts are split into words"),
    ] = "en"
    prefix: Annotated[str, Field(description="seq2seq: put before every source, such as 'summarize: '")] = ""
    multi_label: Annotated[bool, Field(description="classification: a row has any number of classes")] = False
    class_weights: Annotated[
        Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None,
        Field(
            description="classification, token_classification: weight of each class in the loss, in the order of its "
            "labels; balanced: inverse to its frequency"
        ),
    ] = None
    label_smoothing: Annotated[
        float,
        Field(
            ge=0,
            lt=0.5,
            description="causal_lm, seq2seq, classification, token_classification, preference (dpo, simpo): share of "
            "the target's probability that is spread",
        ),
    ] = 0.0
    mask_probability: Annotated[
        float, Field(gt=0, lt=1, description="masked_lm: share of the tokens that is to be guessed")
    ] = 0.15
    whole_words: Annotated[bool, Field(description="masked_lm: mask all tokens of a word together")] = False
    pseudo_perplexity_rows: Annotated[
        int, Field(ge=0, description="masked_lm: held-out rows whose tokens are masked one by one; 0: none")
    ] = 0
    stride: Annotated[
        int, Field(ge=0, description="question_answering: tokens that two windows of a long context share")
    ] = 64
    max_answer_tokens: Annotated[int, Field(ge=1, description="question_answering: longest answer, in tokens")] = 30
    loss: Annotated[Literal["dpo", "ipo", "simpo", "orpo", "kto"], Field(description="preference: the loss")] = "dpo"
    beta: Annotated[
        float, Field(gt=0, description="preference: strength of the reference; orpo: weight of the odds ratio")
    ] = 0.1
    gamma: Annotated[float, Field(ge=0, description="preference (simpo): the reward margin that is asked for")] = 0.5
    desirable_weight: Annotated[float, Field(gt=0, description="preference (kto): weight of good answers")] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0, description="preference (kto): weight of bad answers")] = 1.0


# Which tasks know which option; an option that another task would ignore is an error.
_GENERATING = ("causal_lm", "seq2seq")
TASK_OPTIONS: dict[str, tuple[str, ...]] = {
    "generate_rows": _GENERATING,
    "max_new_tokens": _GENERATING,
    "num_beams": _GENERATING,
    "few_shot": _GENERATING,
    "answer_format": ("causal_lm",),
    "language": (*_GENERATING, "question_answering"),
    "prefix": ("seq2seq",),
    "multi_label": ("classification",),
    "class_weights": ("classification", "token_classification"),
    "label_smoothing": (*_GENERATING, "classification", "token_classification", "preference"),
    "mask_probability": ("masked_lm",),
    "whole_words": ("masked_lm",),
    "pseudo_perplexity_rows": ("masked_lm",),
    "stride": ("question_answering",),
    "max_answer_tokens": ("question_answering",),
    "loss": ("preference",),
    "beta": ("preference",),
    "gamma": ("preference",),
    "desirable_weight": ("preference",),
    "undesirable_weight": ("preference",),
}
# Tasks of language models, whose rows can lie end to end in one forward pass.
PACKED_TASKS = ("causal_lm", "completion", "preference")


FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "preference",
    "feedback_messages",
    "feedback",
    "prompt_completion",
    "alpaca",
    "question_answering",
    "source_target",
    "token_labels",
    "text_label",
    "pair_label",
    "text",
]


@section
class Source:
    """One of several places that rows come from."""

    path: Annotated[str, Field(min_length=1, description="file, folder, pattern, package:... or hub:owner/name")]
    weight: Annotated[
        float | None, Field(gt=0, description="share of this source among the rows of an epoch, relative to the others")
    ] = None
    format: Annotated[FormatName | None, Field(description="row format; null: data.format")] = None
    columns: Annotated[dict[str, str] | None, Field(description="as data.columns, which null means")] = None
    subset: Annotated[str | None, Field(description="configuration of a hub data set")] = None
    split: Annotated[str, Field(min_length=1, description="split of a hub data set")] = "train"


@section
class DataConfig:
    """Rows for training and held-out rows."""

    train: Annotated[
        str | list[str | Source],
        Field(
            description="JSONL, JSON, CSV, TSV, Parquet, text or CoNLL (also .gz): file, folder, pattern, package:..., "
            "hub:owner/name, or a list of these or of {path: ..., weight: ...}"
        ),
    ]
    eval: Annotated[str | list[str | Source] | None, Field(description="held-out rows, named in the same ways")] = None
    eval_ratio: Annotated[
        float | None, Field(gt=0, lt=1, description="hold this share of data.train out instead of naming data.eval")
    ] = None
    stratify: Annotated[
        str | None, Field(description="column whose values keep their shares on both sides of eval_ratio")
    ] = None
    split_seed: Annotated[int, Field(ge=0, lt=2**32, description="which rows eval_ratio holds out")] = 0
    format: Annotated[FormatName, Field(description="row format; auto looks at the columns and says what it found")] = (
        "auto"
    )
    columns: Annotated[
        dict[str, str] | None,
        Field(description="our column name to yours, such as {prompt: question, completion: answer}"),
    ] = None
    label_names: Annotated[
        list[str] | None, Field(min_length=2, description="names of the classes 0, 1, ... of a label column")
    ] = None
    field: Annotated[
        str | None,
        Field(
            min_length=1,
            description="where the list of rows lies in .json files that are one object, such as data or a.b",
        ),
    ] = None
    sample_by: Annotated[
        Literal["line", "paragraph", "document"], Field(description="what a row of a text file is")
    ] = "line"
    streaming: Annotated[
        bool, Field(description="read and tokenize rows of JSONL files as they are needed, not all beforehand")
    ] = False
    max_tokens: Annotated[int, Field(ge=8, description="longest row, in tokens")] = 1024
    too_long: Annotated[
        Literal["error", "drop", "truncate_prompt"], Field(description="what happens to rows above max_tokens")
    ] = "error"
    unusable: Annotated[
        Literal["error", "drop"],
        Field(description="what happens to rows that cannot be read or leave nothing to learn"),
    ] = "error"
    duplicates: Annotated[
        Literal["keep", "drop"], Field(description="what happens to rows that an earlier row equals")
    ] = "keep"
    shared: Annotated[
        Literal["keep", "drop"], Field(description="what happens to training rows that are held-out rows as well")
    ] = "keep"
    check: Annotated[
        Literal["error", "warn", "off"],
        Field(description="checks of the whole data set before training: refuse errors, only say them, or skip them"),
    ] = "error"
    supervise: Annotated[
        Literal["answers", "last_answer", "all"],
        Field(description="loss on every assistant turn, on the last one, or on every token"),
    ] = "answers"
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Field(description="variables of the chat template, such as {enable_thinking: false}, everywhere it is used"),
    ] = None
    clean: Annotated[
        list[Step],
        Field(
            description="changes to input texts (never to answers), made in chat too; see data/clean.py for the order"
        ),
    ] = dataclasses.field(default_factory=list)
    clean_language: Annotated[Language, Field(description="language of stop words and stems")] = "en"
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    max_train_rows: Annotated[int | None, Field(ge=1, description="read only the first so many rows")] = None
    max_eval_rows: Annotated[int | None, Field(ge=1, description="read only the first so many held-out rows")] = None


@section
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], Field(description="torch AdamW, or bitsandbytes' 8-bit")
    ] = "adamw"
    lr: Annotated[float, Field(gt=0, le=0.1, description="peak learning rate")] = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=1, description="decoupled weight decay")] = 0.0
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2, description="AdamW betas")
    ] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: Annotated[float, Field(gt=0, description="AdamW epsilon")] = 1e-8
    schedule: Annotated[Literal["linear", "cosine", "constant"], Field(description="after the warm-up")] = "linear"
    warmup_steps: Annotated[float, Field(ge=0, description="steps; below 1: share of all steps")] = 0.03
    max_grad_norm: Annotated[float | None, Field(gt=0, description="clip the gradient's norm; null: do not clip")] = 1.0


@section
class TrainConfig:
    """Length of the run, batches, evaluation and checkpoints."""

    epochs: Annotated[int, Field(ge=1, description="passes over the rows, at most")] = 1
    max_steps: Annotated[int | None, Field(ge=1, description="optimizer steps, at most (whichever ends first)")] = None
    batch_size: Annotated[int, Field(ge=1, description="sequences per optimizer step")] = 8
    micro_batch_size: Annotated[
        int | None, Field(ge=1, description="sequences per forward pass; less needs less memory; null: batch_size")
    ] = None
    packing: Annotated[
        bool | None,
        Field(
            description="one padding-free row per micro-batch; false: a forward per row; null: packing where the task can, "
            "else rows of like length padded together"
        ),
    ] = None
    neftune_alpha: Annotated[
        float | None,
        Field(gt=0, description="uniform noise on the embeddings, scaled by alpha/sqrt(T D) (arXiv:2310.05914)"),
    ] = None
    fgm_epsilon: Annotated[
        float | None,
        Field(
            gt=0, description="train on adversarially moved embeddings too, by this L2 norm a row (arXiv:1605.07725)"
        ),
    ] = None
    rdrop_alpha: Annotated[
        float | None, Field(gt=0, description="pull two dropout passes together with this weight (arXiv:2106.14448)")
    ] = None
    gradient_checkpointing: Annotated[bool, Field(description="recompute activations: slower, far less memory")] = False
    recompute_every: Annotated[
        int, Field(ge=1, description="with gradient_checkpointing: recompute every so-many-th layer only")
    ] = 1
    offload_activations: Annotated[
        bool, Field(description="with gradient_checkpointing: what is kept lies in the machine's memory (GPU)")
    ] = False
    eval_steps: Annotated[
        int | None, Field(ge=1, description="held-out loss every so many steps; null: each epoch")
    ] = None
    save_steps: Annotated[int | None, Field(ge=1, description="checkpoint every so many steps; null: each epoch")] = (
        None
    )
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints to keep, beside the best")] = 2
    keep_best: Annotated[
        bool, Field(description="with held-out rows: end with the adapter of the lowest loss, not the last")
    ] = True
    early_stopping_patience: Annotated[
        int | None, Field(ge=1, description="stop after so many evaluations without a better held-out loss")
    ] = None


@section
class HardwareConfig:
    """Where it runs."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:N")] = (
        "auto"
    )
    threads: Annotated[int | None, Field(ge=1, le=1024, description="CPU threads; null: torch's choice")] = None


@section
class SpeedConfig:
    """Exact accelerations: each computes what it replaces, up to rounding, and is left out where it cannot be proved."""

    fused_projections: Annotated[
        bool, Field(description="layers that read the same input, and their LoRA, as one function")
    ] = True
    fused_mlp: Annotated[bool, Field(description="a gated MLP with its LoRA as one function")] = True
    fused_norms: Annotated[bool, Field(description="RMS norms that keep no float32 copies")] = True
    block_attention: Annotated[
        bool, Field(description="attention by blocks of matrix products (CPU, bfloat16, packed rows)")
    ] = True
    chunked_loss: Annotated[bool, Field(description="language models: never hold all logits at once")] = True
    last_layer_rows: Annotated[
        bool, Field(description="packed rows: the last layer behind its attention only where there is a loss")
    ] = True
    prefix_cache: Annotated[
        bool,
        Field(
            description="packed rows: keep what the frozen layers before the lowest adapted one make of each row "
            "(adapter.layers_to_transform); equal up to rounding, so a resumed run is too"
        ),
    ] = False
    dequantize: Annotated[
        Literal["auto", "once", "always"],
        Field(description="4-bit weights: kept dequantized, or dequantized in every pass; auto: by the free memory"),
    ] = "auto"


@section
class TrackerConfig:
    """Where curves go beside `metrics.jsonl`, through accelerate's trackers."""

    name: Annotated[
        Literal[
            "auto",
            "none",
            "tensorboard",
            "wandb",
            "trackio",
            "mlflow",
            "swanlab",
            "comet_ml",
            "clearml",
            "aim",
            "dvclive",
        ],
        Field(description="auto: tensorboard when it is installed"),
    ] = "auto"
    project: Annotated[str, Field(min_length=1, description="project name shown by the tracker")] = "lora_lab"


@section
class ExportConfig:
    """What is made of the adapter after training."""

    targets: Annotated[
        list[Literal["hf", "adapter", "vllm", "gguf", "ollama", "gguf_lora", "quantized"]],
        Field(
            description="hf: merged transformers folder; adapter: peft; vllm: the adapter as vLLM and SGLang load it; gguf: merged, "
            "for llama.cpp; ollama: that with a Modelfile; gguf_lora: the adapter for llama.cpp; quantized: merged, in fewer bits"
        ),
    ] = dataclasses.field(default_factory=list)
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Field(description="type of the merged weights")] = (
        "bfloat16"
    )
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"],
        Field(description="numbers of a GGUF file; those with a k take llama-quantize, or minutes"),
    ] = "f16"
    quantization: Annotated[
        Literal["nf4", "fp4", "int8", "torchao_int8"],
        Field(description="of target quantized: bitsandbytes', or torchao's"),
    ] = "nf4"
    push_to_hub: Annotated[
        str | None, Field(description="owner/name: upload what was exported there, private; the token is HF_TOKEN's")
    ] = None
    max_shard_size: Annotated[
        str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$", description="largest safetensors file, such as 500MB or 5GB")
    ] = "2GB"


@section
class MergeConfig:
    """When a merged checkpoint is refused (see `merge/parity.py`)."""

    base: Annotated[
        Literal["auto", "full_precision", "dequantized", "corrected"],
        Field(
            description="quantized base: merge into the published weights, into what training saw, or into the published ones "
            "corrected towards that; auto: the better of the first two, measured"
        ),
    ] = "auto"
    correction_rank: Annotated[int, Field(ge=1, description="corrected: rank of the correction of each layer")] = 64
    adapters: Annotated[
        list[str], Field(description="run folders whose adapters are combined into a new run, which is then merged")
    ] = dataclasses.field(default_factory=list)
    weights: Annotated[
        list[Annotated[float, Field(allow_inf_nan=False)]] | None,
        Field(description="weight of each adapter; null: 1 / their number"),
    ] = None
    method: Annotated[
        Literal["cat", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties"],
        Field(
            description="cat: the exact weighted sum of the updates; svd: that at a lower rank; the others prune (arXiv:2306.01708, "
            "arXiv:2311.03099)"
        ),
    ] = "cat"
    rank: Annotated[
        int | None,
        Field(ge=1, description="all but cat: rank of the result; null: svd the largest rank, else the ranks' sum"),
    ] = None
    density: Annotated[float, Field(gt=0, lt=1, description="pruning methods: share of the numbers that is kept")] = 0.5
    search_trials: Annotated[
        int,
        Field(ge=0, description="try so many weights and take the lowest mean held-out loss (needs Optuna); 0: none"),
    ] = 0
    parity_rows: Annotated[int, Field(ge=1, description="held-out rows to compare on")] = 32
    max_logit_diff: Annotated[
        float, Field(gt=0, description="float32 only: largest |logit difference| to base+adapter")
    ] = 1e-3
    max_kl: Annotated[float, Field(gt=0, description="largest mean KL divergence to base+adapter, in nats")] = 0.02
    min_top1_agreement: Annotated[float, Field(gt=0, le=1, description="least share of equal top-1 tokens")] = 0.95
    max_loss_increase: Annotated[
        float, Field(gt=0, description="most loss the merge may add to the model as trained (quantized base), in nats")
    ] = 0.1


@section
class ShrinkConfig:
    """Lower ranks of a trained adapter (`lora-lab shrink`)."""

    ranks: Annotated[
        list[Annotated[int, Field(ge=1)]] | None,
        Field(min_length=1, description="ranks to try; null: the powers of two below the adapter's rank"),
    ] = None
    tolerance: Annotated[
        float,
        Field(
            ge=0,
            description="how much the held-out loss may rise, in its own unit and as sure as the rows allow; the lowest such rank "
            "is saved",
        ),
    ] = 0.01


@section
class SweepConfig:
    """Several runs at once (`train -m`): how they share a base, what they may spend, how they are compared."""

    execution: Annotated[
        Literal["auto", "joint", "turns"],
        Field(description="runs on one base share passes, or take turns step by step; auto: joint where it is exact"),
    ] = "auto"
    joint_tokens: Annotated[int, Field(ge=1, description="tokens of a shared pass, about and at most")] = 4096
    strategy: Annotated[
        Literal["grid", "halving"], Field(description="train all to their end, or stop the worse ones early")
    ] = "grid"
    eta: Annotated[int, Field(ge=2, description="halving: one in so many runs goes on after each rung")] = 3
    rungs: Annotated[
        int | None, Field(ge=2, description="halving: rungs, the last one's end included; null: until one run is left")
    ] = None
    budget: Annotated[
        str | None,
        Field(
            pattern=r"^[1-9]\d*(steps|tokens|minutes)$",
            description="of all runs together: 2000steps, 5000000tokens, 30minutes",
        ),
    ] = None
    metric: Annotated[str, Field(min_length=1, description="held-out metric that runs are ranked by")] = "loss"
    top: Annotated[int, Field(ge=2, description="how many of the best runs are repeated over seeds")] = 2
    seeds: Annotated[int, Field(ge=0, description="further seeds of each of them: the noise floor; 0: none")] = 0


@section
class RunConfig:
    """Everything one run is told: the sections, its name, its folder and its seed."""

    name: Annotated[str, Field(pattern=r"^[^/\x00\n]{1,100}$", description="name of the run")] = "run"
    run_dir: Annotated[str, Field(min_length=1, description="folder of the run; must not hold another run")]
    seed: Annotated[int, Field(ge=0, lt=2**32, description="adapter initialization, row order and dropout")] = 0
    model: ModelConfig
    data: DataConfig
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    adapter: LoraAdapter = dataclasses.field(default_factory=LoraAdapter)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    hardware: HardwareConfig = dataclasses.field(default_factory=HardwareConfig)
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    merge: MergeConfig = dataclasses.field(default_factory=MergeConfig)
    shrink: ShrinkConfig = dataclasses.field(default_factory=ShrinkConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)


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
    config, errors = validate(_ADAPTER, tree)
    # Past the bad values, the good ones must still not contradict each other: name those problems as well.
    if config is not None and told:
        config = with_defaults(config, void(config, told))
    readable = config or validate(_ADAPTER, repaired(tree, errors, all_keys()))[0]
    problems = describe(errors, all_keys()) + (contradictions(readable) if readable else [])
    if problems:
        raise ConfigError(*problems)
    return config


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
    found += _merge_contradictions(config.merge)
    if config.speed.dequantize == "once" and quant.method not in ("nf4", "fp4"):
        found.append(f"speed.dequantize=once: no effect with quant.method={quant.method}. Use nf4 or fp4, or drop it.")
    if config.speed.prefix_cache:
        reasons = {
            f"task={task.name}, whose rows are padded": task.name not in PACKED_TASKS,
            "train.packing=false": train.packing is False,
            "quant=int8, which rounds a row by the rows beside it": quant.method == "int8",
            "train.neftune_alpha": train.neftune_alpha,
            "train.fgm_epsilon": train.fgm_epsilon,
        }
        found += [
            f"speed.prefix_cache=true: not with {why}. Drop one of the two." for why, given in reasons.items() if given
        ]
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        found.append(
            f"train.micro_batch_size={train.micro_batch_size}: must be at most train.batch_size={train.batch_size}, "
            f"the sequences of a whole step. Did you mean train.batch_size={train.micro_batch_size}?"
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
    found += _task_contradictions(config) + _data_contradictions(data)
    if data.eval is None and data.eval_ratio is None:
        needs_eval = {
            "train.eval_steps": train.eval_steps,
            "train.early_stopping_patience": train.early_stopping_patience,
            "task.generate_rows": task.generate_rows or None,
            "task.pseudo_perplexity_rows": task.pseudo_perplexity_rows or None,
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
        key, why = re.match(r"([\w.]+)(?:=.*?)?: (.*)", sentence, re.DOTALL).groups()
        if key == "data.eval_ratio" and key in told and "data.eval" not in told and "already" in why:
            return {"data.eval": f"data.eval: data.eval_ratio={config.data.eval_ratio:g} holds rows out."}
        own = key in told or key not in all_keys() or all_keys()[key].is_required()
        by = any(re.search(rf"(?<![\w.]){re.escape(one)}(?![\w-])", why) for one in told)
        if not own and by and any(words in why for words in _VOID):
            found[key] = sentence
    return found


def with_defaults(config: RunConfig, names: Iterable[str]) -> RunConfig:
    """The configuration with the defaults of these keys."""
    for key in names:
        *parents, last = key.split(".")
        config = _replaced(config, parents, last, all_keys()[key].get_default(call_default_factory=True))
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


def _task_contradictions(config: RunConfig) -> list[str]:
    task, data, train, found = config.task, config.data, config.train, []
    for field in dataclasses.fields(task):
        value, tasks = getattr(task, field.name), TASK_OPTIONS.get(field.name)
        if tasks is not None and value != field.default and task.name not in tasks:
            found.append(
                f"task.{field.name}={value}: no effect with task={task.name}; it is for {', '.join(tasks)}. Drop it."
            )
    if task.multi_label and task.class_weights == "balanced":
        found.append("task.class_weights=balanced: not defined for task.multi_label=true. Give a list, or drop it.")
    if task.multi_label and task.label_smoothing:
        found.append("task.label_smoothing: not defined for task.multi_label=true. Drop it.")
    if task.name == "preference":
        found += _preference_contradictions(task, train)
    if task.few_shot and not task.generate_rows:
        found.append(f"task.few_shot={task.few_shot}: generated answers are compared, so set task.generate_rows too.")
    if train.packing and task.name not in PACKED_TASKS:
        found.append(f"train.packing=true: rows of task={task.name} are padded. Leave train.packing out.")
    if train.packing is False and task.name == "preference":
        found.append("train.packing=false: task=preference compares the rows of one pass. Leave train.packing out.")
    if train.rdrop_alpha and task.name in ("preference", "reward", "regression"):
        found.append(
            f"train.rdrop_alpha: compares distributions over classes or tokens, and task={task.name} has none."
        )
    if task.name not in _CHAT_TASKS:
        for name in ("supervise", "chat_template_kwargs"):
            default = next(field.default for field in dataclasses.fields(data) if field.name == name)
            if getattr(data, name) != default:
                found.append(f"data.{name}: no effect with task={task.name}, which renders no conversation. Drop it.")
    if data.augment.methods and task.name not in _AUGMENTED_TASKS:
        found.append(f"data.augment.methods: would move the labels of task={task.name}. Drop it.")
    if data.too_long != "error" and task.name in _IN_PIECES:
        found.append(f"data.too_long: no effect with task={task.name}, which cuts long texts into pieces. Drop it.")
    if data.too_long == "truncate_prompt" and task.name in _NEVER_CUT:
        found.append(f"data.too_long=truncate_prompt: rows of task={task.name} are never cut. Use error or drop.")
    return found


_CHAT_TASKS = ("causal_lm", "preference", "reward")
_AUGMENTED_TASKS = ("causal_lm", "completion", "masked_lm", "classification", "regression", "seq2seq")
_IN_PIECES = ("completion", "masked_lm")
_NEVER_CUT = ("token_classification", "question_answering")


def _preference_contradictions(task: TaskConfig, train: TrainConfig) -> list[str]:
    losses = {
        "gamma": ("simpo",),
        "label_smoothing": ("dpo", "simpo"),
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
    }
    found = []
    for name, knowing in losses.items():
        default = next(field.default for field in dataclasses.fields(task) if field.name == name)
        if getattr(task, name) != default and task.loss not in knowing:
            found.append(f"task.{name}: no effect with task.loss={task.loss}; it is for {', '.join(knowing)}. Drop it.")
    if task.loss == "kto" and train.batch_size == 1:
        found.append("train.batch_size=1: task.loss=kto compares each answer with another row's, so a step needs two.")
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
