"""A run in a few lines for the terminal: its steps beforehand, its answers and figures afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_lab import console
from lora_lab.config import RunConfig
from lora_lab.run_dir import RunDir

if TYPE_CHECKING:
    from lora_lab.tasks.causal_lm import Answer
    from lora_lab.train.cohort import Member


def describe_steps(member: Member, config: RunConfig) -> str:
    """How many optimizer steps there will be, and why."""
    plan, train = member.plan, config.train
    text = f"{member.total_steps} steps of {plan.batch_size} rows ({train.epochs} epoch{'s' * (train.epochs > 1)} of {plan.num_examples} rows"
    if train.max_steps is not None:
        ends = "ends it" if train.max_steps == member.total_steps else "is not reached"
        text += f"; train.max_steps={train.max_steps} {ends}"
    return text + ")"


def show_samples(base: list[Answer], tuned: list[Answer], count: int = 3) -> None:
    """A few held-out rows with both models' answers side by side."""
    if not base:
        return
    rows = [
        [_shorten(before.question), _shorten(before.reference), _shorten(before.text), _shorten(after.text)]
        for before, after in list(zip(base, tuned, strict=True))[:count]
    ]
    console.show_table("held-out answers", ["question", "expected", "base", "tuned"], rows, numbers=slice(0, 0))


def _shorten(text: str, limit: int = 240) -> str:
    """One line, so that a rambling answer does not fill the screen."""
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def show_end(run: RunDir, result: dict[str, Any]) -> None:
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
    console.say("next", f"lora-lab chat run={run.path}   lora-lab evaluate run={run.path}")
