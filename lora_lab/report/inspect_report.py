"""What `lora-lab inspect` found, as tables in the terminal and as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_lab.report import pages, pictures
from lora_lab.runtime import console, storage

_TOKENS, _PARTS = 4, 12  # of a row, and parts of the model, in the terminal
_CHARS = 60  # of a text there
_LARGE_ERROR = 0.05  # of what all tokens get, from which what they get is not to be trusted


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    _show_layers(found["layers"])
    rows = found["rows"]
    if rows:
        header = [
            "row",
            "expected",
            "said",
            f"tokens that raise it (tuned; {found['explains']})",
            "that lower it",
            "error",
        ]
        console.show_table("rows", header, [_row_cells(row) for row in rows], slice(5, None))
    large = [row["row"] for row in rows for model in ("base", "tuned") if row[model]["relative_error"] > _LARGE_ERROR]
    if large:
        console.say("error", f"what tokens get does not add up for {', '.join(dict.fromkeys(large))}: do not trust it")
    taught = found["taught"]
    if taught["reason"]:
        console.say("taught", f"no training rows are named: {taught['reason']}")
        return
    cells = [
        [own["row"] if not place else "", one["row"], one["label"], one["share"], one["cosine"], _short(one["text"])]
        for own in taught["rows"]
        for place, one in enumerate(own["for"][:3])
    ]
    title = f"training rows that taught it most, of {taught['looked_at']:,} looked through (of {taught['of']:,})"
    console.show_table(title, ["row", "taught by", "its label", "share", "cosine", "its text"], cells, slice(3, 5))


def _show_layers(layers: dict[str, Any]) -> None:
    if layers["no_updates"]:
        console.say("layers", f"no sizes of updates: {layers['no_updates']}")
    ablation = layers["ablation"]
    if ablation["reason"]:
        console.say("layers", f"none is switched off: {ablation['reason']}")
    parts = layers["parts"]
    order = sorted(parts, key=lambda one: -one.get("rise", one.get("energy", 0.0)))[:_PARTS]
    names = ("size", "effective_rank", "energy", "rise", "margin")
    cells = [[one["part"], *(one.get(name) for name in names)] for one in parts if one in order]
    if not cells:
        return
    title = "the adapter by layer"
    if ablation["rows"]:
        title += (
            f"; rise: of the loss of {ablation['rows']} held-out rows ({ablation['loss']:.4f}) without it, ± 95 % interval; without all of "
            f"them {ablation['rise_without_all']:+.4f}"
        )
    if len(cells) < len(parts):
        title += f" (the {len(cells)} largest of {len(parts)})"
    console.show_table(title, ["", "update / weight", "effective rank", "energy", "rise", "±"], cells)


def _row_cells(row: dict[str, Any]) -> list[Any]:
    pairs = [
        (value, token.replace("\n", "⏎").strip())
        for own in row["tuned"]["sequences"]
        for token, value in zip(own["tokens"], own["integrated_gradients"], strict=True)
    ]
    up = [f"{token} {value:+.2f}" for value, token in sorted(pairs, reverse=True)[:_TOKENS] if value > 0]
    down = [f"{token} {value:+.2f}" for value, token in sorted(pairs)[:_TOKENS] if value < 0]
    error = f"{row['tuned']['relative_error']:.1%}"
    return [row["row"], _short(row["expected"]), _short(row["said"]), ", ".join(up), ", ".join(down), error]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CHARS else f"{line[:_CHARS]} …"


def write(file: Path, found: dict[str, Any]) -> None:
    """Write the page."""
    layers = found["layers"]
    rises = [(one["part"], one["rise"], one["margin"]) for one in layers["parts"] if "rise" in one]
    taught = {row["row"]: row for row in found["taught"]["rows"]}
    page = pages.render(
        "inspect.html.jinja",
        found=found,
        rows=[
            {**row, "taught": taught.get(row["row"]), "models": _models(row, found["base"])} for row in found["rows"]
        ],
        layers=layers,
        picture=pictures.rises(rises, "How far the held-out loss rises without a part"),
        table=_table(layers["updates"]),
        large_error=_LARGE_ERROR,
    )
    storage.write_text(file, page)


def _models(row: dict[str, Any], base: str) -> list[dict[str, Any]]:
    """Both models with each token's share of the largest that any token of the row has."""
    shown = []
    for key, title in (("base", base), ("tuned", "tuned")):
        views = {
            name: [_shaded(own["tokens"], own[name], _largest(row, name)) for own in row[key]["sequences"]]
            for name in ("integrated_gradients", "gradient_x_input")
        }
        shown.append({"title": title, **row[key], "views": views})
    return shown


def _largest(row: dict[str, Any], name: str) -> float:
    values = [abs(value) for key in ("base", "tuned") for own in row[key]["sequences"] for value in own[name]]
    return max(values, default=0.0) or 1.0


def _shaded(tokens: list[str], values: list[float], largest: float) -> list[tuple[str, float, float]]:
    shown = [token.replace("\n", "⏎") for token in tokens]
    return [(token, value, abs(value) / largest) for token, value in zip(shown, values, strict=True)]


def _table(updates: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Sizes of updates by layer and kind of weight; None: there are none, or none in layers."""
    inside = [one for one in updates if one["layer"] is not None]
    if not inside:
        return None
    kinds = list(dict.fromkeys(_kind(one) for one in inside))
    largest = max(one["size"] for one in inside) or 1.0
    rows: dict[int, dict[str, Any]] = {}
    for one in inside:
        rows.setdefault(one["layer"], {})[_kind(one)] = {**one, "share": one["size"] / largest}
    return {"kinds": kinds, "rows": rows}


def _kind(update: dict[str, Any]) -> str:
    """The name of a weight inside its layer."""
    name: str = update["module"].split(f".{update['layer']}.", 1)[-1]
    return name
