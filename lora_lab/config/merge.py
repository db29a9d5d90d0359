"""What is made of a trained adapter: exports, merged checkpoints, lower ranks."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section


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
        str | None,
        Field(description="owner/name: upload the exports to this private repository, with the token in HF_TOKEN"),
    ] = None
    max_shard_size: Annotated[
        str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$", description="largest safetensors file, such as 500MB or 5GB")
    ] = "2GB"


@section
class MergeConfig:
    """When a merged checkpoint is refused (see `verify/parity.py`)."""

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
    density: Annotated[float, Field(gt=0, lt=1, description="pruning methods: share of the values to keep")] = 0.5
    search_trials: Annotated[
        int,
        Field(ge=0, description="weightings to try; the lowest mean held-out loss wins (needs Optuna); 0: none"),
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
            description="how much the held-out loss may rise, by the upper end of the 95 % interval; the lowest such rank "
            "is saved",
        ),
    ] = 0.01
