"""Pages of HTML from the templates beside this file; whatever their texts hold, a browser only shows it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from lora_lab.runtime import console

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A page. Texts are escaped, and characters that a browser would obey without showing them are written out."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader("lora_lab.report", "templates"), autoescape=True, finalize=_finalized)


def _finalized(value: Any) -> Any:
    return value if hasattr(value, "__html__") else console.shown(value)  # a drawing is HTML already
