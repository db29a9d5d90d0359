"""The same faults for lora_lab and for transformers' Trainer with peft, side by side: python -m benchmarks.faults

Both train the same LoRA on the same tiny base and rows with dropout, save every second of eight steps, and are harmed in the same
ways, in forked children of one warm process (`tests/faults/zygote.py`):

    kills: SIGKILL around file operations and at random moments; then resumed (`resume`, `resume_from_checkpoint=True`).
    damage: one file of the newest checkpoint is flipped, cut, zeroed, emptied, swapped or removed; then resumed.
    full disks: no file may grow from some operation on; then, with room again, resumed.

Counts: --kills, --damages, --disks. Writes benchmarks/results/faults.json. With --write also the tables of docs/reliability.md: this
one, and that of the fault programme (`make test-faults` leaves it in runs/faults.json).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/faults.json"
DOCUMENT = ROOT / "docs/reliability.md"
_TRAINER = "benchmarks.faults:trainer"
BY_HAND = "of these, resumed after the newest checkpoint was removed by hand"


# -- what is compared -------------------------------------------------------------------------------------------------


def trainer(argv: list[str]) -> int:
    """transformers' Trainer with peft in FOLDER: `BASE ROWS FOLDER [resume]`; the adapter goes into `FOLDER/adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    from tests.faults.programme import SAVE_STEPS, STEPS

    base, rows, folder, *resume = argv
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = []
    for line in Path(rows).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"][:48]
        examples.append({"input_ids": ids, "labels": ids})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(one["input_ids"]) for one in batch)
        pad = [width - len(one["input_ids"]) for one in batch]
        return {
            "input_ids": torch.tensor([one["input_ids"] + [0] * more for one, more in zip(batch, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - more) + [0] * more for more in pad]),
            "labels": torch.tensor([one["labels"] + [-100] * more for one, more in zip(batch, pad, strict=True)]),
        }

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS,
        save_steps=SAVE_STEPS, save_total_limit=2, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True,
        dataloader_pin_memory=False, seed=0, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    job = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    saved = any(Path(folder).glob("checkpoint-*"))
    job.train(resume_from_checkpoint=True if resume and saved else None)
    model.save_pretrained(str(Path(folder) / "adapter"))
    return 0


class System:
    """How one of the two is started, resumed, and what it ends with."""

    def __init__(self, world: Any, name: str):
        self.world, self.name, self.run = world, name, world.root / "run"

    def _plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        return plan if self.name == "lora_lab" else {**plan, "target": _TRAINER}

    def start(self, **plan: Any) -> Any:
        argv = ["train", *self.world.settings("run")] if self.name == "lora_lab" else self._words()
        return self.world.run(*argv, **self._plan(plan))

    def resume(self, **plan: Any) -> Any:
        """What its user would do next."""
        if self.name == "lora_lab":
            if not (self.run / "config.yaml").is_file():
                return self.start(**plan)
            return self.world.run("resume", f"run={self.run}", **plan)
        return self.world.run(*self._words(), "resume", **self._plan(plan))

    def _words(self) -> list[str]:
        return [str(self.world.base), str(self.world.rows), str(self.run)]

    def weights(self) -> str:
        """SHA-256 of the trained adapter's tensors."""
        from tests.faults.programme import sha

        file = self.run / "adapter/adapter_model.safetensors"
        return sha(file) if file.exists() else "missing"

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        pattern, mark = ("checkpoints/step-*", "step-") if self.name == "lora_lab" else ("checkpoint-*", "checkpoint-")
        found = [path for path in self.run.glob(pattern) if path.name.removeprefix(mark).isdigit()]
        return max(found, key=lambda path: int(path.name.removeprefix(mark)), default=None)


# -- faults -------------------------------------------------------------------------------------------------------------


def _prepared(system: System, until: Callable[[System], Any] | None = None) -> tuple[str, list, float]:
    """Expected weights, the events of an unharmed run and its seconds; the world is kept as it is before the run."""
    world = system.world
    system.start()  # once more, so that caches are warm for both
    shutil.rmtree(system.run)
    world.keep()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "events"
        done = system.start(roots=[str(system.run)], record=str(file))
        events = [tuple(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    assert done.rc == 0, done.said
    return system.weights(), events, done.seconds


def kills(system: System, tries: int) -> dict[str, int]:
    """Killed, then resumed: how often to the same bytes, to others, or not at all."""
    from tests.faults.test_programme_kills import moments

    expected, events, seconds = _prepared(system)
    found = dict.fromkeys(("tried", "same bytes", "other bytes", "stuck", BY_HAND), 0)
    for moment in moments(events, tries, seconds):
        system.world.restore()
        if system.start(roots=[str(system.run)], **moment).rc != -9:
            continue
        found["tried"] += 1
        _go_on(system, expected, found)
    return found


def damages(system: System, tries: int) -> dict[str, int]:
    """A file of the newest checkpoint damaged, then resumed: same bytes, refused in a sentence, a stack trace, or another result
    without a word."""
    from tests.faults.test_programme_corruption import DAMAGES, harm

    expected, events, _ = _prepared(system)
    late = next(n for n, (_, _, path) in enumerate(events, start=1) if _of_last_save(path))
    system.world.restore()
    assert system.start(roots=[str(system.run)], kill_at=late).rc == -9
    undisturbed = system.world
    undisturbed.keep()
    assert system.resume().rc == 0
    resumed = system.weights()
    draw = random.Random(3)
    found = dict.fromkeys(("tried", "same bytes", "refused", "stack trace", "silent"), 0)
    undisturbed.restore()
    files = sorted(file for file in system.newest().rglob("*") if file.is_file())
    for number in range(tries):
        undisturbed.restore()
        harm(draw.choice(files), DAMAGES[number % len(DAMAGES)], draw.choice(files), draw)
        done = system.resume()
        found["tried"] += 1
        if done.rc == 0:
            found["same bytes" if system.weights() in (expected, resumed) else "silent"] += 1
        else:
            found["stack trace" if done.trace or done.hang else "refused"] += 1
    return found


def _go_on(system: System, expected: str, found: dict[str, int]) -> None:
    """Resume, and count what came of it; where it is stuck, once more without the newest checkpoint."""
    if system.resume().rc == 0:
        found["same bytes" if system.weights() == expected else "other bytes"] += 1
        return
    found["stuck"] += 1
    newest = system.newest()
    if newest is not None:
        shutil.rmtree(newest)
        found[BY_HAND] += system.resume().rc == 0


def _of_last_save(path: str) -> bool:
    return bool(re.search(r"(step|checkpoint)-8\b", path))


def full_disks(system: System, tries: int) -> dict[str, int]:
    """No file may grow from some operation on; then there is room again: same bytes, other bytes, or stuck; and how often it was
    told in a sentence."""
    from tests.faults.programme import spread
    from tests.faults.test_programme_disks import openings

    expected, events, _ = _prepared(system)
    found = dict.fromkeys(("tried", "told", "same bytes", "other bytes", "stuck", BY_HAND), 0)
    for number in spread(openings(events), tries):
        system.world.restore()
        done = system.start(roots=[str(system.run)], limit_at=number)
        found["tried"] += 1
        found["told"] += not (done.trace or done.hang)
        _go_on(system, expected, found)
    return found


# -- the tables ---------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores and commit."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores, commit {commit or 'unknown'}"


def comparison_table(result: dict[str, Any]) -> list[str]:
    """The two side by side, one line for each outcome."""
    found = ["| fault | outcome | lora_lab | Trainer + peft |", "|---|---|---:|---:|"]
    titles = {
        "kills": "killed (SIGKILL), resumed",
        "damages": "newest checkpoint damaged, resumed",
        "disks": "disk full, resumed",
    }
    for fault, title in titles.items():
        ours, theirs = (result["systems"][name][fault] for name in ("lora_lab", "trainer"))
        found += [f"| {title} | {outcome} | {ours[outcome]} | {theirs[outcome]} |" for outcome in ours]
    return found


def write_documents(result: dict[str, Any] | None, programme: dict[str, Any] | None) -> None:
    """Fill the marked blocks of docs/reliability.md."""
    from tests.faults.table import markdown_table

    text = DOCUMENT.read_text(encoding="utf-8")
    if result is not None:
        libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        text = _filled(text, "comparison", [f"{result['machine']}; {libraries}.", "", *comparison_table(result)])
    if programme is not None:
        where = f"{programme['machine']}; {programme['minutes']} minutes on {programme['workers']} processes."
        text = _filled(text, "programme", [where, "", *markdown_table(programme)])
    DOCUMENT.write_text(text, encoding="utf-8")


def _filled(text: str, block: str, lines: list[str]) -> str:
    begin, end = f"<!-- {block}: begin -->", f"<!-- {block}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damages", type=int, default=120)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument(
        "--write", action="store_true", help="fill the tables of docs/reliability.md with what there is"
    )
    parser.add_argument("--only-write", action="store_true", help="the same, without trying anything")
    arguments = parser.parse_args()
    if not arguments.only_write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(_compare(arguments), indent=2) + "\n", encoding="utf-8")
        print("\n".join(comparison_table(json.loads(RESULTS.read_text(encoding="utf-8")))))
    if arguments.write or arguments.only_write:
        report = ROOT / "runs/faults.json"
        write_documents(
            *(json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in (RESULTS, report))
        )


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    import importlib.metadata

    from tests.faults.programme import World, Zygote

    systems: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lora_lab_faults_") as scratch:
        zygote = Zygote(Path(scratch) / "cache")
        for name in ("lora_lab", "trainer"):
            world = World(Path(scratch) / name, zygote)
            system = System(world, name)
            plan = {"cwd": scratch, "env": world.environment(), **({} if name == "lora_lab" else {"target": _TRAINER})}
            warm = (
                ["train", *world.settings("warm")]
                if name == "lora_lab"
                else [str(world.base), str(world.rows), f"{scratch}/warm"]
            )
            done = zygote.warm_up(*warm, **plan)
            assert done.rc == 0, done.said
            systems[name] = {}
            for fault, harm, tries in (("kills", kills, arguments.kills), ("damages", damages, arguments.damages),
                                       ("disks", full_disks, arguments.disks)):  # fmt: skip
                shutil.rmtree(system.run, ignore_errors=True)
                systems[name][fault] = harm(system, tries)
                print(name, fault, systems[name][fault], flush=True)
        zygote.close()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    return {"machine": machine(), "versions": versions, "systems": systems}


if __name__ == "__main__":
    main()
