"""A run in a few lines for the terminal: its steps beforehand, its answers and figures afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_lab.config.run import RunConfig
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import console

if TYPE_CHECKING:
    from lora_lab.tasks.base import Answer
    from lora_lab.tasks.section import TaskSection
    from lora_lab.training.cohort import Member


def describe_steps(member: Member, config: RunConfig) -> str:
    """How many optimizer steps there will be, and why."""
    plan, train = member.plan, config.train
    text = f"{member.total_steps} steps of {plan.batch_size} rows ({train.epochs} epoch{'s' * (train.epochs > 1)} of {plan.num_examples} rows"
    if train.max_steps is not None:
        ends = "ends it" if train.max_steps == member.total_steps else "is not reached"
        text += f"; train.max_steps={train.max_steps} {ends}"
    return text + ")"


def show_samples(answers: dict[str, list[Answer]], count: int = 3) -> None:
    """A few held-out rows with each model's answers side by side."""
    given = {name: found for name, found in answers.items() if found}
    if not given:
        return
    rows = [
        [_shorten(text) for text in (each[0].question, each[0].reference, *(one.text for one in each))]
        for each in list(zip(*given.values(), strict=True))[:count]
    ]
    console.show_texts("held-out answers", ["question", "expected", *given], rows)


def show_details(details: dict[str, Any], most: int = 20) -> None:
    """Metrics of each class or kind of entity, and which classes are taken for which."""
    for key, title in (("per_class", "each class"), ("per_type", "each kind of entity")):
        found = list(details.get(key, {}).items())
        if found:
            rows = [[name, *figures.values()] for name, figures in found[:most]]
            left = f" (the first {most} of {len(found)})" if len(found) > most else ""
            console.show_table(title + left, ["", *found[0][1]], rows)
    matrix = details.get("confusion_matrix")
    if matrix and len(matrix["labels"]) <= most:
        rows = [[label, *counts] for label, counts in zip(matrix["labels"], matrix["rows"], strict=True)]
        console.show_table("rows: the true class; columns: the predicted one", ["", *matrix["labels"]], rows)


def _shorten(text: str, limit: int = 240) -> str:
    """One line, so that a rambling answer does not fill the screen."""
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def show_end(run: RunDir, result: dict[str, Any], task: TaskSection) -> None:
    """The figures that matter, where things lie, and what to do next."""
    speed = result["tokens_per_second"]
    console.say(
        "done",
        f"{result['steps']} steps, train loss {result['train_loss']:.4f}"
        + (f", {speed:.0f} tokens/s" if speed else "")
        + f", peak memory {result['peak_memory_gib']:.1f} GiB, {sum(result['seconds'].values()):.0f} s",
    )
    console.say("adapter", run.adapter)
    if run.merged.exists():
        console.say("merged", run.merged)
    ask = [f"lora-lab chat run={run.path}"] if task.answers else []
    if not ask and (task.predicts or task.generates):
        ask = [f"lora-lab predict run={run.path} data=FILE"]
    console.say("next", "   ".join([*ask, f"lora-lab evaluate run={run.path}"]))
