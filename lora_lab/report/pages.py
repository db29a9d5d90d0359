"""Pages of HTML from the templates beside this file; whatever their texts hold, a browser only shows it."""

from __future__ import annotations

from typing import Any

from lora_lab.runtime import console


def render(template: str, **values: Any) -> str:
    """A page. Texts are escaped, and characters that a browser would obey without showing them are written out."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lora_lab.report", "templates"), autoescape=True, finalize=_finalized
    )
    return environment.get_template(template).render(**values)


def _finalized(value: Any) -> Any:
    return value if hasattr(value, "__html__") else console.shown(value)  # a drawing is HTML already
