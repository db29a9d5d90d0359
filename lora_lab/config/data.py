"""Where rows come from, and what becomes of them."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lora_lab.data.augment import AugmentConfig
from lora_lab.data.clean import Language, Step
from lora_lab.data.formats import FORMATS
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal["auto", *FORMATS]


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
            description="path of the list of rows in .json files that hold one object, such as data or a.b",
        ),
    ] = None
    sample_by: Annotated[
        Literal["line", "paragraph", "document"], Field(description="what a row of a text file is")
    ] = "line"
    streaming: Annotated[
        bool, Field(description="read and tokenize rows of JSONL files as they are needed, not all beforehand")
    ] = False
    processes: Annotated[
        int | None,
        Field(
            ge=1,
            description="processes that tokenize the rows of a file together; null: one for each core, for files of 32 MiB and more",
        ),
    ] = None
    max_tokens: Annotated[int, Field(ge=8, description="longest row, in tokens")] = 1024
    too_long: Annotated[
        Literal["error", "drop", "truncate_prompt"], Field(description="what happens to rows above max_tokens")
    ] = "error"
    unusable: Annotated[
        Literal["error", "drop"],
        Field(description="what happens to rows that cannot be read or leave nothing to learn"),
    ] = "error"
    duplicates: Annotated[
        Literal["keep", "drop"], Field(description="what happens to rows equal to an earlier row")
    ] = "keep"
    shared: Annotated[
        Literal["keep", "drop"], Field(description="what happens to training rows that are held-out rows as well")
    ] = "keep"
    check: Annotated[
        Literal["error", "warn", "off"],
        Field(
            description="checks of the whole data set before training: refuse errors, only report them, or skip the checks"
        ),
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
            description="changes to input texts, made in chat too; only mask_pii changes answers as well; see data/clean.py for "
            "the order"
        ),
    ] = dataclasses.field(default_factory=list)
    clean_language: Annotated[Language, Field(description="language of stop words and stems")] = "en"
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    max_train_rows: Annotated[int | None, Field(ge=1, description="rows to read, from the first on; null: all")] = None
    max_eval_rows: Annotated[
        int | None, Field(ge=1, description="held-out rows to read, from the first on; null: all")
    ] = None
