"""Objectives: one file each with what a row becomes, the head, the loss and the metrics; `base.py` has what they share."""

from lora_lab.tasks.base import Task
from lora_lab.tasks.causal_lm import CausalLM
from lora_lab.tasks.classification import Classification
from lora_lab.tasks.completion import Completion
from lora_lab.tasks.masked_lm import MaskedLM
from lora_lab.tasks.preference import Preference
from lora_lab.tasks.question_answering import QuestionAnswering
from lora_lab.tasks.regression import Regression
from lora_lab.tasks.reward import Reward
from lora_lab.tasks.seq2seq import Seq2Seq
from lora_lab.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "completion": Completion,
    "masked_lm": MaskedLM,
    "classification": Classification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "seq2seq": Seq2Seq,
    "preference": Preference,
    "reward": Reward,
}
