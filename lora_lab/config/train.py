"""How it is trained: optimizer, length, batches, device, accelerations, curves."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section


@section
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], Field(description="torch AdamW, or bitsandbytes' 8-bit")
    ] = "adamw"
    lr: Annotated[
        float,
        Field(
            gt=0,
            le=0.1,
            description="peak learning rate; short runs on small bases want 1e-3 to 2e-3, see docs/regret.md",
        ),
    ] = 2e-4
    loraplus_lr_ratio: Annotated[
        float | None,
        Field(ge=1, le=1000, description="LoRA+: B learns so many times faster than A (arXiv:2402.12354); null: alike"),
    ] = None
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
    micro_batch_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="a forward pass is filled up to so many tokens, padding included, with at least one sequence and at most "
            "micro_batch_size; null: whatever its sequences have",
        ),
    ] = None
    packing: Annotated[
        bool | None,
        Field(
            description="one padding-free row per micro-batch; false: a forward per row; null: packing where the task can, "
            "else rows of similar length padded together"
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
        int, Field(ge=1, description="with gradient_checkpointing: recompute only every n-th layer")
    ] = 1
    offload_activations: Annotated[
        bool, Field(description="with gradient_checkpointing: offload kept activations to host RAM (GPU)")
    ] = False
    eval_steps: Annotated[
        int | None, Field(ge=1, description="steps between held-out evaluations; null: each epoch")
    ] = None
    save_steps: Annotated[int | None, Field(ge=1, description="steps between checkpoints; null: each epoch")] = None
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints to keep, beside the best")] = 2
    keep_best: Annotated[
        bool, Field(description="with held-out rows: end with the adapter of the lowest loss, not the last")
    ] = True
    early_stopping_patience: Annotated[
        int | None, Field(ge=1, description="stop after this many evaluations without a better held-out loss")
    ] = None


@section
class HardwareConfig:
    """Where it runs."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:N")] = (
        "auto"
    )
    threads: Annotated[int | None, Field(ge=1, le=1024, description="CPU threads; null: torch's choice")] = None
    processes: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="processes of this machine that share each step, one for each card; null: one, or those that torchrun, "
            "accelerate launch or srun started",
        ),
    ] = None
    shard: Annotated[
        bool,
        Field(
            description="several processes: each holds a part of every layer of the frozen base (quant none, nf4, fp4), which is put "
            "together for as long as it computes; false: each holds all of it"
        ),
    ] = False
    timeout: Annotated[
        float,
        Field(
            ge=1, le=86400, description="seconds that a process waits for the others before the run ends, to be resumed"
        ),
    ] = 600.0
    deterministic: Annotated[
        bool,
        Field(
            description="GPU: kernels that give the same bits each time, so that a resumed run does too; false: faster"
        ),
    ] = True
    memory_gib: Annotated[
        float | None,
        Field(
            gt=0,
            le=1024,
            description="GPU: take at most this much; null: all of it, under WSL what is free at the start",
        ),
    ] = None
    offload_embeddings: Annotated[
        bool,
        Field(description="GPU: frozen input embeddings stay in main memory, and each pass copies its tokens' rows"),
    ] = False


@section
class SpeedConfig:
    """Exact accelerations: each computes what it replaces, up to rounding, and is left out where it cannot be proved."""

    fused_projections: Annotated[
        bool, Field(description="layers that read the same input, and their LoRA, as one function")
    ] = True
    fused_mlp: Annotated[bool, Field(description="a gated MLP with its LoRA as one function")] = True
    fused_dense: Annotated[
        bool,
        Field(
            description="encoders: a linear layer with its activation, or with dropout, residual and LayerNorm, as one function (CPU)"
        ),
    ] = True
    fused_norms: Annotated[bool, Field(description="RMS norms that keep no float32 copies")] = True
    liger_kernels: Annotated[
        bool, Field(description="norms and gates by Liger's kernels, where liger-kernel is installed (CUDA)")
    ] = True
    block_attention: Annotated[
        bool, Field(description="attention by blocks of matrix products (CPU, bfloat16, packed rows)")
    ] = True
    varlen_attention: Annotated[
        bool,
        Field(description="attention of all packed rows in one call (CUDA, half precision; torch's flash kernels)"),
    ] = True
    short_rows: Annotated[bool, Field(description="attention of short padded rows by matrix products (CPU)")] = True
    unpadded: Annotated[
        bool,
        Field(description="padded rows lie end to end between the first and the last layer (CPU; with short_rows)"),
    ] = True
    chunked_loss: Annotated[bool, Field(description="language models: never hold all logits at once")] = True
    last_layer_rows: Annotated[
        bool, Field(description="packed rows: the last layer, after its attention, only where there is a loss")
    ] = True
    prefix_cache: Annotated[
        bool,
        Field(
            description="packed rows: keep what the frozen layers before the lowest adapted one make of each row "
            "(adapter.layers_to_transform); equal up to rounding, so a resumed run is too"
        ),
    ] = False
    fused_4bit: Annotated[
        bool,
        Field(
            description="nf4, fp4: few rows that nobody learns from are multiplied without dequantizing (CUDA, generation)"
        ),
    ] = True
    dequantize: Annotated[
        Literal["auto", "once", "always"],
        Field(
            description="nf4, fp4, torchao_int8: weights are kept dequantized, or dequantized in every pass; auto: by the free memory"
        ),
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
