"""A run as a notebook shows it: its metrics before and after, and its curve."""

from __future__ import annotations

from pathlib import Path

from lora_lab.report import curves, pages, runs


def of_run(folder: Path) -> str:
    """HTML without a page around it, in the notebook's own colours.

    Raises:
        LoraLabError: the run cannot be read.
    """
    run, notes = runs.read(folder), list[str]()
    names = dict.fromkeys((*run.base, *run.tuned))
    return pages.render(
        "notebook.html.jinja",
        run=run,
        adapter=runs.adapter_of(run.config),
        base=runs.base_of(run.config),
        metrics={name: [run.base.get(name), run.tuned.get(name)] for name in names},
        pictures=curves.of_run(curves.read_lines(folder, notes))[:1],
        notes=notes,
    )
