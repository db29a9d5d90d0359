"""What is learned and how it is measured."""

from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section

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
