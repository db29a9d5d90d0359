"""Objectives: a folder each, with its section of the configuration (`config.py`, without torch) and the task itself (`task.py`: what a
row becomes, the head, the loss, the metrics); `base.py` has what tasks share."""

from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.tasks.classification.config import ClassificationConfig
from lora_lab.tasks.completion.config import CompletionConfig
from lora_lab.tasks.distillation.config import DistillationConfig
from lora_lab.tasks.embedding.config import EmbeddingConfig
from lora_lab.tasks.masked_lm.config import MaskedLMConfig
from lora_lab.tasks.preference.config import PreferenceConfig
from lora_lab.tasks.question_answering.config import QuestionAnsweringConfig
from lora_lab.tasks.regression.config import RegressionConfig
from lora_lab.tasks.reranker.config import RerankerConfig
from lora_lab.tasks.reward.config import RewardConfig
from lora_lab.tasks.section import TaskSection
from lora_lab.tasks.seq2seq.config import Seq2SeqConfig
from lora_lab.tasks.token_classification.config import TokenClassificationConfig

TASKS: dict[str, type[TaskSection]] = {
    "causal_lm": CausalLMConfig,
    "completion": CompletionConfig,
    "distillation": DistillationConfig,
    "masked_lm": MaskedLMConfig,
    "classification": ClassificationConfig,
    "regression": RegressionConfig,
    "token_classification": TokenClassificationConfig,
    "question_answering": QuestionAnsweringConfig,
    "seq2seq": Seq2SeqConfig,
    "preference": PreferenceConfig,
    "reward": RewardConfig,
    "embedding": EmbeddingConfig,
    "reranker": RerankerConfig,
}
