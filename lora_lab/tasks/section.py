"""What every task's section of the configuration answers, so that nothing else needs to know the tasks by name. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task

AnswerLanguage = Annotated[Literal["en", "zh"], Field(description="how generated and found texts are split into words")]
LabelSmoothing = Annotated[
    float, Field(ge=0, lt=0.5, description="share of the target's probability that is spread over the others")
]
ClassWeights = Annotated[
    Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None,
    Field(
        description="weight of each class in the loss, in the order of its labels; balanced: inverse to its frequency"
    ),
]


@section
class TaskSection:
    """The `task` section. A subclass is one objective: its options are its fields, and what it can do are its answers."""

    name: Annotated[str, Field(description="objective")]

    packed: ClassVar[bool] = False  # rows can lie end to end in one forward pass; else they are padded
    compares_rows: ClassVar[bool] = False  # its loss compares rows of one pass
    chat: ClassVar[bool] = False  # it renders conversations
    in_pieces: ClassVar[bool] = False  # long texts are cut into pieces, so that none is too long
    cuts: ClassVar[bool] = True  # a row that is too long may lose its beginning
    cleans: ClassVar[bool] = True  # its texts may be changed before they are read (data.clean)
    augments: ClassVar[bool] = False  # changed copies of a text keep their labels
    compares_distributions: ClassVar[bool] = True  # over classes or tokens, as R-Drop does
    encoder_decoder: ClassVar[bool] = False  # it takes a base of these two parts
    numbers: ClassVar[bool] = False  # its labels are numbers, not classes
    generates: ClassVar[bool] = False  # its model writes texts
    language_model: ClassVar[bool] = False  # its model reads texts from left to right, and says how they go on
    predicts: ClassVar[bool] = False  # its model says something of a row that has no label
    asked_at: ClassVar[str] = ""  # the route under /v1 of a server where rows without labels are sent, if it predicts
    # row formats that are there for this task before others that read them, each with the options that it needs
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {}
    vectors: ClassVar[bool] = False  # its model gives texts vectors, and is compared by their directions
    measured_rows: ClassVar[tuple[str, ...]] = ()  # options that count held-out rows to be measured at length; 0: none

    @property
    def formats(self) -> tuple[str, ...]:
        """Row formats that it reads, see `data/formats.py`."""
        return ()

    @property
    def taught_by(self) -> str | None:
        """The model that reads all rows before training, and whose word is learned, as the user names it; None: there is none."""
        return None

    @property
    def apart(self) -> str | None:
        """A column of its encoder's own: training rows that are equal there come into different steps; None: any come together."""
        return None

    @property
    def answers(self) -> bool:
        """Whether its model can be asked in messages."""
        return self.chat and self.generates

    @property
    def templated(self) -> bool:
        """Whether its texts are rendered by the chat template."""
        return self.chat

    @property
    def one_class(self) -> bool:
        """Whether each row has one class of few, and its model gives each class a probability."""
        return False

    @property
    def smoothing(self) -> float:
        """Label smoothing of the training loss."""
        return 0.0

    @property
    def shots(self) -> int:
        """Training rows in the prompts by which the base is measured once more."""
        return 0

    def rules(self, run: RunConfig) -> list[str]:
        """A sentence for each value that is fine alone, but not beside others of the run."""
        return []

    def load(self) -> type[Task[Any, Any]]:
        """The objective itself, with torch behind it."""
        raise NotImplementedError


@section
class Generating(TaskSection):
    """Options of tasks whose model writes."""

    generate_rows: Annotated[
        int, Field(ge=0, description="held-out rows whose answers are generated and measured; 0: none")
    ] = 0
    max_new_tokens: Annotated[int, Field(ge=1, description="longest generated answer, in tokens")] = 128
    num_beams: Annotated[int, Field(ge=1, le=64, description="beams of the search; 1: greedy")] = 1
    few_shot: Annotated[
        int, Field(ge=0, le=64, description="evaluate the base also with this many training rows in the prompt")
    ] = 0
    language: AnswerLanguage = "en"
    label_smoothing: LabelSmoothing = 0.0

    generates: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    measured_rows: ClassVar[tuple[str, ...]] = ("generate_rows",)

    @property
    def smoothing(self) -> float:
        return self.label_smoothing

    @property
    def shots(self) -> int:
        return self.few_shot

    def rules(self, run: RunConfig) -> list[str]:
        if self.few_shot and not self.generate_rows:
            return [f"task.few_shot={self.few_shot}: generated answers are compared, so set task.generate_rows too."]
        return []
