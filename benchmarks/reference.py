"""`docs/reference.md`: every verb and every key, as the code declares them. `python -m benchmarks.reference` writes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from lora_lab.config.origins import key_rows
from lora_lab.schema.groups import GROUPS, choices
from lora_lab.verbs import VERBS
from lora_lab.verbs.base import Verb

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
_HEAD = """\
# Reference: every verb and every key

This page is generated (`make docs`). `lora-lab VERB --help` and `lora-lab config --keys` say the same in the terminal; [runs.md](runs.md)
says how keys become a run.
"""


def page() -> str:
    """The page as Markdown."""
    verbs = itertools.chain.from_iterable(_verb(name, verb) for name, verb in VERBS.items())
    return (
        "\n".join([_HEAD, "## Verbs", "", *verbs, "## Groups", "", *_groups(), "## Keys", "", *_keys()]).rstrip() + "\n"
    )


def _verb(name: str, verb: Verb) -> Iterator[str]:
    yield from (f"### lora-lab {name}", "", f"{verb.summary[:1].upper()}{verb.summary[1:]}.", "")
    yield from ("```text", verb.examples.rstrip("\n"), "```", "")
    own = [f"`{word.name}=`" for word in verb.words]
    if own:
        yield from (f"Words of its own: {', '.join(own)}.", "")
    rows = [
        (" ".join((option.flags[-1], option.settings.get("metavar", ""))).strip(), option.settings.get("help", ""))
        for option in verb.options
    ]
    if rows:
        yield from ("| option | does |", "|---|---|", *(f"| `{flag}` | {_cell(text)} |" for flag, text in rows), "")
    if verb.takes is not None:
        yield from (f"Keys that a trained run may be told: {', '.join(f'`{key}`' for key in verb.takes.keys)}.", "")


def _groups() -> Iterator[str]:
    yield from ("| group | choices |", "|---|---|")
    for group in GROUPS:
        yield f"| `{group}=` | {', '.join(f'`{one}`' for one in choices(group))} |"
    yield ""


def _keys() -> Iterator[str]:
    for section, rows in itertools.groupby(
        key_rows(), key=lambda row: row[0].partition(".")[0] if "." in row[0] else ""
    ):
        yield from (
            f"### {section or 'The run itself'}",
            "",
            "| key | takes | default | meaning |",
            "|---|---|---|---|",
        )
        for key, kind, default, meaning in rows:
            shown = "must be set" if default == "???" else f"`{_cell(default)}`" if default else ""
            yield f"| `{key}` | {_cell(kind)} | {shown} | {_cell(meaning)} |"
        yield ""


def _cell(text: str) -> str:
    """A text inside a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
