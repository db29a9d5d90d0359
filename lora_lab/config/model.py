"""The frozen base model, and how its weights are stored."""

from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section


@section
class ModelConfig:
    """The frozen base model."""

    path: Annotated[str, Field(description="folder, .gguf file, hub id (owner/name) or package:<import name>/<path>")]
    revision: Annotated[str | None, Field(description="branch, tag or commit on the hub")] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Field(
            description="type of the unquantized weights, and what is computed in; float16: for cards without bfloat16 (T4, RTX 20, "
            "V100), with a scaled loss"
        ),
    ] = "bfloat16"


@section
class QuantConfig:
    """How the frozen base is stored: by bitsandbytes (nf4, fp4, int8) or torchao (torchao_int8)."""

    method: Annotated[
        Literal["none", "nf4", "fp4", "int8", "torchao_int8"],
        Field(description="nf4, fp4, int8: bitsandbytes' formats; torchao_int8: torchao's, of weights alone"),
    ] = "none"
    double_quant: Annotated[bool, Field(description="quantize the scales too (nf4, fp4 only)")] = False
    skip_modules: Annotated[list[str] | None, Field(description="modules left unquantized; null: the output head")] = (
        None
    )
    cache: Annotated[
        bool, Field(description="keep the quantized base on disk (nf4, fp4 only), so that later runs load faster")
    ] = True
