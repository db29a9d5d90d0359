"""The model card: what a published folder is made of, as README.md with the front matter that hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lora_lab import __version__
from lora_lab.base.resolve import is_hub_id
from lora_lab.config.run import RunConfig
from lora_lab.errors import BaseModelError
from lora_lab.run import run_dir
from lora_lab.run.prepared import Trained
from lora_lab.runtime.reading import read_bytes

_FRONT_CHARS = 2**16  # of a model card, in which its front matter stands


def card(trained: Trained, report: dict[str, Any]) -> str:
    """Text of the card.

    Args:
        report: what was proved of the published files, each figure by its name.
    """
    run, config, base = trained.run, trained.setup.config, trained.setup.base
    result, manifest = run_dir.read_result(run)[0] or {}, run_dir.read_manifest(run) or {}
    front: dict[str, Any] = {"tags": ["lora_lab", config.task.name]}
    if is_hub_id(base.name):
        front["base_model"] = base.name
    licence = base_licence(base.folder)
    if licence:
        front["license"] = licence
    lines = [
        f"# {config.name}", "",
        f"{Path(base.name).name}, fine-tuned for {config.task.name} with lora_lab {__version__}.", "",
        "## Base", "",
        f"- {base.name if is_hub_id(base.name) else Path(base.name).name}, weights {base.fingerprint[:16]}",
        f"- licence: {licence or 'the folder names none; look it up before you publish'}",
        f"- trained on: {config.model.dtype}, quant {base.stored(config.quant).method}", "",
        "## Data", "",
        *_data(manifest), "",
        "## Training", "",
        *_training(config, result), "",
        "## Held-out metrics", "",
        *_metrics(result), "",
        "## Proved of these files", "",
        *(f"- {name}: {_shown(value)}" for name, value in report.items()), "",
    ]  # fmt: skip
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n" + "\n".join(lines)


def base_licence(folder: Path) -> str | None:
    """The licence that the base's own card names, or the first line of its LICENSE file."""
    readme = folder / "README.md"
    if readme.is_file():
        text = read_bytes(readme, BaseModelError).decode(errors="replace")
        found = re.match(r"---\n(.*?)\n---", text[:_FRONT_CHARS], re.DOTALL)
        try:
            front = yaml.safe_load(found[1]) if found else None
        except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a card that says nothing
            front = None
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            return front["license"]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        file = folder / name
        if file.is_file():
            words = read_bytes(file, BaseModelError).decode(errors="replace").strip().splitlines()
            return words[0].strip() if words else None
    return None


def _data(manifest: dict[str, Any]) -> list[str]:
    return [
        f"- {key}: {Path(name).name}, SHA-256 {digest[:16]}"
        for key, files in manifest.get("data", {}).items()
        for name, digest in files.items()
    ] or ["- not recorded"]


def _training(config: RunConfig, result: dict[str, Any]) -> list[str]:
    adapter, optim = config.adapter, config.optim
    lines = [
        f"- adapter: {adapter.label}, {adapter.describe()}",
        f"- {optim.name}, lr={optim.lr:g}, {optim.schedule}; {config.train.batch_size} rows a step; seed {config.seed}",
    ]
    if adapter.registered_by:
        lines.append(
            f"- peft loads it after `import {adapter.registered_by}` (`pip install lora-lab`), and not without"
        )
    if result.get("made_of"):
        made = result["made_of"]
        parts = ", ".join(f"{Path(one['run']).name} x {one['weight']:g}" for one in made["adapters"])
        return [lines[0], f"- not trained but made of trained adapters ({made['method']}): {parts}"]
    if result.get("by_client"):
        losses = ", ".join(result["by_client"]["losses"]) or "no loss"
        return [
            lines[0],
            f"- trained by a client of lora-lab serve: {result['steps']} steps, {result['tokens']:,} tokens, {losses}",
        ]
    if result:
        lines.append(
            f"- {result['steps']} steps, {result['tokens']:,} tokens, last training loss {result['train_loss']:.4f}"
        )
    return lines


def _metrics(result: dict[str, Any]) -> list[str]:
    base, tuned = result.get("base") or {}, result.get("tuned") or {}
    if not tuned:
        return ["- none measured"]
    rows = [f"| {name} | {_shown(base.get(name))} | {_shown(value)} |" for name, value in tuned.items()]
    return ["| | base | tuned |", "|---|---|---|", *rows]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
