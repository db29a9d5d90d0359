"""What every objective has in common. A new one is a folder with an `Encoder` and a `Task` in its `task.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lora_lab.adapters.attach import base_of
from lora_lab.base.load import AS, ModelKind
from lora_lab.config.run import RunConfig
from lora_lab.data.collate import Batch, PackedBatch, PaddedBatch, PlacedBatch, join_rows, pad
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoder, Example
from lora_lab.data.formats import Record
from lora_lab.errors import BaseModelError, NoRoomError
from lora_lab.fast.forward import Forward
from lora_lab.fast.isolation import tail
from lora_lab.runtime import console, ranks
from lora_lab.runtime.memory import attempts
from lora_lab.tasks import TASKS
from lora_lab.tasks.metrics import reported
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_WHY = {
    "AutoModelForMaskedLM": ": a decoder reads from left to right and cannot be trained by masking",
    "AutoModelForSeq2SeqLM": ": it has no encoder and decoder",
    "AutoModel": " of a text alone: it has an encoder and a decoder",
}
Section = TypeVar("Section", bound=TaskSection)  # the task's own
B = TypeVar("B", bound=Batch)  # what its examples are put into
Packed = TypeVar("Packed", bound=PackedBatch)
Padded = TypeVar("Padded", bound=PaddedBatch)

_EVAL_TOKENS = 2048  # tokens of one forward pass in evaluation
TRIED_TOKENS = (
    48  # of a row that accelerations are tried on: they compute token by token, so that more would show nothing else
)


@dataclasses.dataclass(frozen=True)
class LossSum:
    """A sum over the items of a batch and what it is divided by, so that any split of a step adds up to the same."""

    loss: torch.Tensor  # scalar, float32, the weighted sum (not the mean)
    weight: float  # sum of the weights
    num_items: int
    logits: torch.Tensor | None  # [S, C] float32, detached; of a loss in chunks the likeliest token alone, [S, 1] int64
    # weighted sums beside the loss, such as of a reward, by the names under which the step's means are logged
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def without_logits(self) -> LossSum:
        return dataclasses.replace(self, logits=None)


@dataclasses.dataclass(frozen=True)
class StepBatches(Generic[B]):
    """What one optimizer step learns from: a forward pass for each batch."""

    batches: list[B]
    weight: float  # what the sum of their losses is divided by

    def __len__(self) -> int:
        return len(self.batches)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated or found answer beside the reference."""

    question: str
    reference: str
    text: str


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """A model's metrics on the held-out rows, its answers to some of them, and what does not fit into one number."""

    metrics: dict[str, float]
    answers: list[Answer] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # such as a confusion matrix

    def with_also(self, other: EvalResult) -> EvalResult:
        """Both together."""
        return EvalResult(
            {**self.metrics, **other.metrics}, self.answers + other.answers, {**self.details, **other.details}
        )


@ranks.said
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said of one batch."""

    examples: list[Example]
    logits: torch.Tensor  # [S, C] float32 on the CPU; of large vocabularies the prediction alone, [S, 1]
    predicted: np.ndarray  # [S] class of each item
    targets: np.ndarray  # [S]


@ranks.said
class Measured(NamedTuple):
    """What one pass of an evaluation gave."""

    place: int  # among all passes
    loss: float
    weight: float
    seen: Predictions  # without its examples, which every process has


class Pass(NamedTuple):
    """One forward pass as a deployment would make it, for one row."""

    inputs: dict[str, torch.Tensor]  # [1, T] each
    positions: torch.Tensor | None  # [S] which of the logits count; None: all


class Task(Generic[Section, B]):
    """An objective: what rows become, which model learns from them, its loss and its metrics."""

    encoder_class: ClassVar[type[Encoder]]
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    head: ClassVar[Literal["none", "always", "missing"]] = "none"  # see `ModelKind`
    unread: ClassVar[tuple[str, ...]] = ()  # modules of the base that it does not read, see `ModelKind`
    one_place: ClassVar[bool] = (
        False  # whether the model gives one thing for a row, so that it may read one place of it
    )

    def __init__(self, config: RunConfig, encoder: Encoder, learned: dict[str, Any], model: PretrainedConfig):
        """
        Args:
            learned: what `learn` found in the training rows, or a trained adapter remembers.
            model: the model's `config.json`.
        """
        self.config = self.section(config)
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.learned = learned
        self.model = model
        self.eval_tokens = _EVAL_TOKENS  # less once that did not fit
        self.forward = Forward(
            self.config.packed,
            self.one_place,
            together=config.train.packing is not False and not config.adapter.against_packing,
        )  # of the model, once it is loaded

    @classmethod
    def section(cls, config: RunConfig) -> Section:
        """The task's own section of a run, by which it was chosen."""
        return cast(Section, config.task)

    # -- before training ------------------------------------------------------------------------------------------------

    @classmethod
    def learn(cls, config: RunConfig, train: Dataset | Stream) -> dict[str, Any]:
        """What must be known of the training rows before the model is built; kept with the adapter, so plain values.

        Raises:
            DataError: the rows do not fit the task.
        """
        return {}

    @classmethod
    def kind(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> ModelKind:
        """The transformers model that the base becomes."""
        return ModelKind(cls.auto_class, cls.peft_task_type, cls.head, cls.settings(config, tokenizer, learned))

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        """Entries of the model's `config.json` that the task decides."""
        return {}

    @classmethod
    def reported(cls, config: Section) -> tuple[str, ...]:
        """Names of the metrics that held-out rows may be given, as far as the options say; no model is needed."""
        return reported(cls.metrics)

    @classmethod
    def takes(cls, config: PretrainedConfig) -> bool:
        """Whether transformers knows a base's architecture as the model of this task."""
        import transformers

        return type(config) in getattr(transformers, cls.auto_class)._model_mapping

    @classmethod
    def check_base(cls, config: PretrainedConfig) -> None:
        """Refuse a base that the task cannot train: transformers knows its architecture, but not as such a model.

        Raises:
            BaseModelError: saying why, and which tasks there are for it.
        """
        if cls.takes(config):
            return
        fitting = [name for name, section in TASKS.items() if section(name=name).load().takes(config)]
        if fitting:  # else transformers says what it is
            raise BaseModelError(
                f"model.path: transformers cannot build {AS[cls.auto_class]} from {config.model_type}"
                f"{_WHY.get(cls.auto_class, '')}. Use task={', '.join(fitting)}, or another base."
            )

    def check(self, data: Dataset) -> None:
        """Refuse held-out rows that training cannot have prepared for.

        Raises:
            DataError: naming file and row.
        """

    # -- a teacher, where `config.taught_by` names one --------------------------------------------------------------------

    teacher_options: ClassVar[
        tuple[str, ...]
    ] = ()  # fields of its section that decide what is kept of a teacher's word
    vocabulary: int  # tokens that teacher and student choose among
    soft_numbers: int  # that are kept of each supervised token

    def soft_targets(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        """What is kept of what a teacher says of some tokens: further columns of the rows, [S, ...] each, int32 or float32. An example
        has each as a flat array over its supervised tokens.

        Args:
            logits: [S, V] of the teacher.
            targets: [S] the rows' own tokens.
        """
        raise NotImplementedError

    def of_soft_targets(self, data: Dataset) -> str:
        """A clause about what a teacher said of some rows, which have it."""
        return ""

    # -- a step ---------------------------------------------------------------------------------------------------------

    def step(self, model: PeftModel, parts: Iterable[list[Example]], rng: np.random.Generator) -> StepBatches[B]:
        """What one optimizer step learns from. What a loss must know of the whole step is found out here, with the model as it
        is before the step; to generate, inside `self.forward.generating(model)`.

        Args:
            parts: the examples of each micro-batch.
            rng: of what is drawn anew in every step, in the order of the examples. torch's own generators are seeded as well.
        """
        groups = parts if self.forward.together else [[example] for part in parts for example in part]
        batches = [self.collate(group, rng) for group in groups if group]
        return StepBatches(batches, sum(batch.weight for batch in batches))

    def collate(self, examples: list[Example], rng: np.random.Generator) -> B:
        """Put examples into one batch, on the CPU, that the loss can be computed of."""
        raise NotImplementedError

    @property
    def shares_passes(self) -> bool:
        """Whether several adapters can learn in one pass over all their rows: `losses_of_members` gives each its own."""
        return False

    def losses_of_members(self, model: PeftModel, batches: Sequence[B]) -> list[LossSum]:
        """The summed loss of each adapter's batch, from one pass over all of them."""
        raise NotImplementedError

    def logits(self, model: PeftModel, batch: B) -> torch.Tensor:
        """[S, C] float32: for each item of the batch a score for each class (or token)."""
        raise NotImplementedError

    def loss(self, model: PeftModel, batch: B, rdrop_alpha: float | None = None) -> LossSum:
        """The summed loss of a batch. With `rdrop_alpha`, of two passes with different dropout, and their divergence."""
        logits = self.logits(model, batch)
        return self.loss_of(logits, batch, model.training, rdrop_alpha, lambda: self.logits(model, batch))

    def loss_of(
        self,
        logits: torch.Tensor,
        batch: B,
        training: bool,
        rdrop_alpha: float | None = None,
        again: Callable[[], torch.Tensor] | None = None,
    ) -> LossSum:
        """`loss`, of the logits of a batch; with `rdrop_alpha` of those that come `again`, too."""
        smoothing = self.config.smoothing if training else 0.0  # in evaluation the loss is the true one
        loss = self.item_losses(logits, batch, smoothing)
        if rdrop_alpha is not None and again is not None:
            other = again()
            loss = (loss + self.item_losses(other, batch, smoothing)) / 2 + rdrop_alpha * divergence(logits, other)
        if batch.weights is not None:
            loss = loss * batch.weights
        return LossSum(loss.sum(), batch.weight, len(batch.targets), logits.detach())

    def item_losses(self, logits: torch.Tensor, batch: B, smoothing: float) -> torch.Tensor:
        """[S] the loss of each item."""
        return cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)

    def shortened(self, example: Example) -> Example:
        """The last tokens of an example, to try the model on: what the model reads is real, what is to be learned need not be."""
        return tail(example, TRIED_TOKENS)

    def accelerate(self, model: PeftModel, batch: B, prove: bool = True) -> str:
        """Let the task's own computations use what `speed` allows on this model; says what was done, if anything could be.

        Args:
            batch: to try it on.
            prove: whether results are compared; False for a model whose tensors have no content.
        """
        return ""

    # -- measuring --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, model: PeftModel, data: Dataset) -> EvalResult:
        """The loss (weighted mean over all items) and what `metrics` makes of all predictions.

        Raises:
            NoRoomError: not even one row at a time fits into memory.
        """
        begun: list[list[Example]] = []
        for attempt in attempts(lambda lacked: self._measure_with_less(data, begun[-1:], lacked), together=True):
            with attempt:
                groups = self._eval_groups(data)
                attempt.told = self._measured(model, groups, begun)
        found = sorted(itertools.chain(*attempt.heard), key=lambda one: one.place)
        seen = [dataclasses.replace(one.seen, examples=groups[one.place]) for one in found]
        return self.metrics(sum(one.loss for one in found) / sum(one.weight for one in found), seen)

    def _measure_with_less(self, data: Dataset, begun: list[list[Example]], lacked: str) -> None:
        """After a failed allocation: no kept weights, then half as many tokens in a pass. All is measured anew, since it is drawn in
        order. Every process does the same.

        Args:
            begun: the pass that did not fit, if it was one of this process; empty: what comes before all passes did not.
        """
        longest = int(data.lengths.max())
        every = ranks.gather([[example.num_tokens for example in part] for part in begun])
        failed = [sizes for part in every for sizes in part if sizes]
        if freed := max(ranks.gather(self.forward.drop_kept_weights())):
            done = f"weights are dequantized in every pass, which gives back {freed / 2**30:.2f} GiB"
        elif self.forward.together and self.eval_tokens > 1 and all(len(sizes) > 1 for sizes in failed):
            tokens = min(map(sum, failed), default=longest)
            self.eval_tokens = min(self.eval_tokens, tokens) // 2
            done = f"{self.eval_tokens} tokens in a pass"
        else:
            raise NoRoomError(
                f"{data.key}: a row of {longest} tokens does not fit into memory, by itself and without gradients ({lacked}). Set a "
                "smaller data.max_tokens, quant=nf4 or speed.dequantize=always; lora-lab plan shows what needs how much."
            )
        console.say("memory", f"held-out rows do not fit: {done}; what is measured stays the same")

    def _eval_groups(self, data: Dataset) -> list[list[Example]]:
        """The examples of each pass of an evaluation."""
        groups = [
            [example for i in places for example in data[i]]
            for places in eval_batches(data.lengths, self.forward.together, self.eval_tokens)
        ]
        if self.forward.together:
            return groups
        return [[example] for group in groups for example in group]  # a place may hold several short texts

    def _measured(self, model: PeftModel, groups: list[list[Example]], begun: list[list[Example]]) -> list[Measured]:
        """One attempt at this process's part of `measure`; `begun` gets the examples of each pass, and none once all fitted."""
        batches = self.step(model, groups, np.random.default_rng(0)).batches
        found = []
        own, others = ranks.own_and_others([batch.num_tokens for batch in batches])
        for place in [*others, *own]:
            begun.append(groups[place])
            batch = batches[place]
            out = self.loss(model, batch.to(model.device))
            if place in others:
                continue
            assert out.logits is not None  # only passes that members share leave them out
            seen = dataclasses.replace(self.observed(groups[place], out.logits, batch), examples=[])
            found.append(Measured(place, out.loss.item(), out.weight, seen))
            del out  # the next batch's logits need the room
        begun.append([])
        return found

    @torch.no_grad()
    def losses_of(self, model: PeftModel, examples: list[Example]) -> np.ndarray:
        """[n, 2] the summed loss of each example and the weight by which the whole mean divides, as `measure` adds them up."""
        batches = self.step(model, [[example] for example in examples], np.random.default_rng(0)).batches
        found = (self.loss(model, batch.to(model.device)) for batch in batches)
        return np.array([(one.loss.item(), one.weight) for one in found])

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: B) -> Predictions:
        """What is kept of a batch until all have been seen."""
        predicted = logits.argmax(-1).cpu()
        kept = logits.cpu() if logits.shape[-1] <= 1000 else predicted[:, None].float()
        return Predictions(examples, kept, predicted.numpy(), batch.targets.cpu().numpy())

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row that has no label, or no answer, with any that is read: what is predicted does not depend on it.

        Raises:
            RowError: a column is missing.
        """
        raise NotImplementedError

    def without_label(self, example: Example) -> Example:
        """An example of `unlabelled` without what stands in the place of its label and the model would read for nothing."""
        return example

    @torch.no_grad()
    def predict(self, model: PeftModel, examples: list[Example]) -> list[tuple[float, dict[str, Any]]]:
        """What the model says of each example (see `unlabelled`), as plain values, and how sure it is of that beside other examples of
        the same row."""
        batch = self.collate(examples, np.random.default_rng(0)).to(model.device)
        return self.said(self.observed(examples, self.logits(model, batch), batch))

    explains: ClassVar[str] = "log-probability of what is expected"  # what `explained` is

    def explained(self, model: PeftModel, batch: B) -> torch.Tensor:
        """The number that an explanation takes apart, float32, summed over the rows of a batch."""
        return -self.item_losses(self.logits(model, batch), batch, 0.0).sum()

    def as_said(self, example: Example, found: dict[str, Any]) -> Example | None:
        """The example with what was said of it in the place of its label; None: that is no label."""
        return None

    def of_row(self, found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """What was said of a row, with what can only be told beside the row as it was given."""
        return found

    def off(self, found: dict[str, Any], example: Example) -> float | None:
        """How far what was said of a row is from its label; 0: it is right, None: that cannot be told."""
        return None

    def prompt(self, record: Record) -> str:
        """What a model that generates is given for a row, of `unlabelled`: all before its answer.

        Raises:
            RowError: it cannot be asked.
        """
        raise NotImplementedError

    def said(self, seen: Predictions) -> list[tuple[float, dict[str, Any]]]:
        """`predict`, of what was observed."""
        raise NotImplementedError

    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """Metrics by the names the field uses; `loss` among them. An own one declares them with `metrics.reports`."""
        raise NotImplementedError

    def examine(self, model: PeftModel, data: Dataset, title: str) -> EvalResult:
        """What takes too long to be measured during training, such as generated answers. `title`: of the progress bar."""
        return EvalResult({})

    def read_beside(self) -> list[str]:
        """What `measure` and `examine` read beside the held-out rows, in its order, such as documents to be found."""
        return []

    def baselines(self, data: Dataset) -> dict[str, EvalResult]:
        """What is reached on held-out rows without any model, by name."""
        return {}

    # -- merged checkpoints -----------------------------------------------------------------------------------------------

    def passes(self, example: Example) -> list[Pass]:
        """The forward passes by which models are compared on a row."""
        raise NotImplementedError

    def describe(self, folder: Path) -> None:
        """Write what a merged checkpoint needs beside model and tokenizer into its folder."""

    def compared_targets(self, example: Example) -> torch.Tensor:
        """[S] what the logits of `compared` should say."""
        return self.collate([example], np.random.default_rng(0)).targets

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        """The logits [S, C] that a row's passes give.

        Args:
            outputs: of each pass, by transformers' names, without the batch dimension, at `positions` only.
        """
        logits = outputs[0]["logits"]
        return logits if logits.dim() == 2 else logits[None]


AnyTask: TypeAlias = Task[Any, Any]  # to those who know no task by name


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration sees what comes behind a token, so that it cannot predict it."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def logits_at(
    model: PeftModel, inputs: dict[str, torch.Tensor], places: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """A language model's logits [S, V] float32 at `places` (see `head_only_at`); some models use their output layer's weight without
    calling it, and give [B, T, V]."""
    with head_only_at(model, places):
        logits: torch.Tensor = model(**inputs).logits
    return (logits if logits.dim() == 2 else logits[places]).float()


@contextlib.contextmanager
def head_only_at(model: PeftModel, places: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Inside the block a language model's output layer reads the hidden states at `places` only, [S, D] of [B, T, D], so its
    logits are [S, V]: those at all other places would be thrown away, and are most of the memory.

    Args:
        places: row and token of each, [S] int64.
    """
    head = base_of(model).get_output_embeddings()
    if head is None or isinstance(head, torch.nn.Embedding):  # it is called on tokens
        yield
        return

    def wanted(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = inputs
        return (
            hidden if hidden.dim() != 3 else hidden[places],
            *others,
        )  # ProphetNet's has several predictions of each token

    handle = head.register_forward_pre_hook(wanted)
    try:
        yield
    finally:
        handle.remove()


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[S] mean of both KL divergences between the distributions of logits [S, C] (R-Drop, arXiv:2106.14448)."""
    p, q = log_softmax(first, -1), log_softmax(second, -1)
    forth, back = kl_div(q, p, reduction="none", log_target=True), kl_div(p, q, reduction="none", log_target=True)
    return (forth + back).sum(-1) / 2


def another(text: Any) -> str:
    """As short a text as there is that is another than the one given: for rows that are read with two."""
    return "?" if str(text).strip() == "." else "."


def eval_batches(lengths: np.ndarray, together: bool, tokens: int = _EVAL_TOKENS) -> list[list[int]]:
    """Places of the examples that evaluation puts together: of like length, as many as fit into so many tokens (at least one)."""
    batches: list[list[int]] = []
    limit = tokens if together else 0
    room = 0
    for place in np.argsort(lengths, kind="stable"):
        size = int(lengths[place])
        if size > room:
            batches.append([])
            room = limit
        batches[-1].append(int(place))
        room -= size
    return batches


class PaddedTask(Task[Section, Padded]):
    """A task whose rows are padded to the longest of their batch."""

    def logits(self, model: PeftModel, batch: Padded) -> torch.Tensor:
        return self.read(model(**batch.inputs), batch)

    def read(self, outputs: Any, batch: Padded) -> torch.Tensor:
        """The logits of a batch among the model's outputs, by transformers' names; there may be more padding in them."""
        logits: torch.Tensor = outputs.logits  # [B, C] or [B, T, C]
        return (logits if batch.places is None else logits[batch.places]).float()

    @property
    def shares_passes(self) -> bool:
        """As long as its loss is of logits that are read from each row, and a step needs no model."""
        kind = type(self)
        read = kind.logits in (PaddedTask.logits, PlacedTask.logits)
        return read and kind.loss is Task.loss and kind.step is Task.step and self.forward.together

    def losses_of_members(self, model: PeftModel, batches: Sequence[Padded]) -> list[LossSum]:
        found = self.logits_of_members(model, batches)
        return [
            self.loss_of(logits, batch, model.training).without_logits()
            for logits, batch in zip(found, batches, strict=True)
        ]

    def logits_of_members(self, model: PeftModel, batches: Sequence[Padded]) -> list[torch.Tensor]:
        """The logits of each batch, from one pass over all of them."""
        inputs, rows = join_rows(batches, self.tokenizer.pad_token_id)
        outputs = {name: value for name, value in model(**inputs).items() if name.endswith("logits")}
        parts = [SimpleNamespace(**{name: value[own] for name, value in outputs.items()}) for own in rows]
        return [self.read(part, batch) for part, batch in zip(parts, batches, strict=True)]

    def shortened(self, example: Example) -> Example:
        cut = max(0, len(example.input_ids) - TRIED_TOKENS)
        own = dict(example.own)
        if "pair_start" in own:
            own["pair_start"] = max(0, own["pair_start"] - cut)
        return dataclasses.replace(example, input_ids=example.input_ids[cut:], weights=example.weights[cut:], own=own)

    def passes(self, example: Example) -> list[Pass]:
        batch = self.collate([example], np.random.default_rng(0))
        return [Pass(batch.inputs, None if batch.places is None else batch.places[1])]

    def row_outputs(self, model: PeftModel, batch: Padded) -> torch.Tensor:
        """All that the model says of a batch, flat, float32: row after row, and nothing of the padding."""
        return self.logits(model, batch).flatten()

    def inputs(self, rows: Sequence[np.ndarray], pair_starts: list[int] | None = None) -> dict[str, torch.Tensor]:
        """What a model is called with, of rows of token ids; token types where the tokenizer knows them."""
        ids = pad(rows, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.arange(ids.shape[1])[None]
        found = {"input_ids": ids, "attention_mask": (places < lengths[:, None]).long()}
        if pair_starts is not None and "token_type_ids" in self.tokenizer.model_input_names:
            starts = torch.tensor([start or len(row) for start, row in zip(pair_starts, rows, strict=True)])
            found["token_type_ids"] = ((places >= starts[:, None]) & (places < lengths[:, None])).long()
        return found


class PlacedTask(PaddedTask[Section, PlacedBatch]):
    """Such a task whose items are tokens, each said by a language model's output layer."""

    def logits(self, model: PeftModel, batch: PlacedBatch) -> torch.Tensor:
        return logits_at(model, batch.inputs, batch.places)

    def logits_of_members(self, model: PeftModel, batches: Sequence[PlacedBatch]) -> list[torch.Tensor]:
        inputs, rows = join_rows(batches, self.tokenizer.pad_token_id)
        places = [(batch.places[0] + own.start, batch.places[1]) for batch, own in zip(batches, rows, strict=True)]
        found = logits_at(model, inputs, (torch.cat([row for row, _ in places]), torch.cat([one for _, one in places])))
        return list(found.split([len(batch.targets) for batch in batches]))
