"""What benchmarks/speed.py measured, as a table and as a plot: python -m benchmarks.speed_report [RESULT.json]"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

Runs = list[dict[str, Any]]
_FIGURES = ("tokens_per_second", "peak_gib", "load_seconds", "first_step_seconds")
_COLOURS = {
    "lora_lab": "#1b6ca8", "lora_lab_plain": "#7fb2d6", "trl": "#c44e52", "trl_bf16": "#dd8452", "trl_packed": "#e5ae38",
    "transformers_peft": "#8c8c8c", "litgpt": "#55a868",
}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Medians, ranges, and ratios to lora_lab, as Markdown."""
    machine, runs = result["machine"], result["runs"]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    lines = [
        "# Speed and memory beside other tools",
        "",
        "Made by `python -m benchmarks.speed`. Same rows, same order, same adapter to start from (LitGPT: its own); medians (least "
        "to most) over runs that take turns. `lora_lab_plain` is the same loop and packing with `speed=plain`: transformers' and "
        "peft's own modules.",
        "",
        f"- {runs[0]['when']} to {runs[-1]['when']}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"commit {commits}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}, {platform.system()}",
    ]
    for name in dict.fromkeys(run["workload"] for run in runs):
        lines += ["", f"## {name}", "", *_rate(_of(runs, name))]
        lines += [
            "| system | runs | tokens/s | lora_lab is faster by | peak GiB | lora_lab needs | load s | first step s | first loss | last loss |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *_lines(_of(runs, name)),
        ]
    return "\n".join(lines) + "\n"


def _of(runs: Runs, workload: str) -> Runs:
    return [run for run in runs if run["workload"] == workload]


def _rate(runs: Runs) -> list[str]:
    products = [run for run in runs if run["system"] == "matrix_products"]
    speeds = [run["tokens_per_second"] for run in runs if run["system"] == "lora_lab"]
    if not (products and speeds):
        return []
    rate = statistics.median(run["gflops_per_second"] for run in products)
    needed = products[0]["gflop_per_token"]
    return [
        f"Plain bfloat16 products at this model's shapes: {rate:.0f} GFLOP/s ({_range([run['gflops_per_second'] for run in products])}). "
        f"A token needs {needed:.3f} GFLOP, so lora_lab works at {statistics.median(speeds) * needed / rate:.0%} of that rate.",
        "",
    ]


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def _median(values: list[float | None]) -> float | None:
    return None if None in values else statistics.median(values)


def _memory(this: dict[str, float | None], ours: dict[str, float | None]) -> str:
    """Peak in GiB and our share of it; nothing where it was not measured."""
    return " | " if this["peak_gib"] is None else f"{this['peak_gib']:.2f} | {ours['peak_gib'] / this['peak_gib']:.0%}"


def _lines(runs: Runs) -> list[str]:
    found, lines = {}, []
    for system in dict.fromkeys(run["system"] for run in runs if "step_seconds" in run):
        own = [run for run in runs if run["system"] == system]
        found[system] = this = {key: _median([run[key] for run in own]) for key in _FIGURES}
        ours = found.get("lora_lab", this)
        losses = [statistics.median(run["losses"][place] for run in own) for place in (0, -1)]
        lines.append(
            f"| {system} | {len(own)} | {this['tokens_per_second']:.0f} ({_range([run['tokens_per_second'] for run in own])}) | "
            f"{ours['tokens_per_second'] / this['tokens_per_second']:.2f} x | {_memory(this, ours)} | {this['load_seconds']:.1f} | {this['first_step_seconds']:.1f} | "
            f"{losses[0]:.4f} | {losses[1]:.4f} |"
        )
    return lines


def plot(result: dict[str, Any], out: Path) -> None:
    """Tokens a second and memory of each workload, and how they go with the rows' length and the model's size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = [run for run in result["runs"] if "step_seconds" in run]
    names = list(dict.fromkeys(run["workload"] for run in runs))
    curves = {kind: [name for name in names if name.startswith(f"{kind}_")] for kind in ("length", "size")}
    curves = {kind: found for kind, found in curves.items() if len(found) > 1}
    single = [name for name in names if not any(name in found for found in curves.values())]
    mpl.rcParams["svg.hashsalt"] = "lora_lab"
    figure = Figure(figsize=(12, 2.2 + 2.1 * len(single) + (3.6 if curves else 0)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[max(1, 2.1 * len(single)), 3.6]) if curves else (figure, None)
    for row, (name, axes) in enumerate(zip(single, upper.subplots(len(single), 2, squeeze=False), strict=True)):
        _bars(_of(runs, name), name, axes, last=row == len(single) - 1)
    if curves:
        for (kind, found), ax in zip(curves.items(), lower.subplots(1, len(curves), squeeze=False)[0], strict=True):
            _curve(runs, kind, found, ax)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _bars(runs: Runs, name: str, axes: Any, last: bool) -> None:
    systems = list(dict.fromkeys(run["system"] for run in runs))[::-1]
    for ax, key, label in zip(axes, ("tokens_per_second", "peak_gib"), ("tokens/s", "peak memory, GiB"), strict=True):
        for place, system in enumerate(systems):
            values = [run[key] for run in runs if run["system"] == system]
            middle = statistics.median(values)
            error = [[middle - min(values)], [max(values) - middle]]
            ax.barh(place, middle, xerr=error, color=_COLOURS.get(system, "#555555"), ecolor="#333333")
            ax.text(max(values), place, f" {middle:.0f}" if middle > 20 else f" {middle:.1f}", va="center", fontsize=8)
        ax.set_yticks(range(len(systems)), systems, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.12)
        if last:
            ax.set_xlabel(label)
    axes[0].set_title(name, loc="left", fontsize=10, fontweight="bold")


def _curve(runs: Runs, kind: str, names: list[str], ax: Any) -> None:
    labels = [name.removeprefix(f"{kind}_") for name in names]
    for system in dict.fromkeys(run["system"] for run in runs if run["workload"] in names):
        points = [
            [run["tokens_per_second"] for run in runs if (run["workload"], run["system"]) == (name, system)]
            for name in names
        ]
        places = [place for place, values in enumerate(points) if values]
        ax.plot(places, [statistics.median(points[p]) for p in places], "o-", color=_COLOURS.get(system), label=system)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yscale("log")
    for axis in ("major", "minor"):
        getattr(ax.yaxis, f"set_{axis}_formatter")("{x:.0f}")
    ax.set_xlabel({"length": "tokens in each row", "size": "weights of the model"}[kind])
    ax.set_ylabel("tokens/s")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "speed.json"
    result = json.loads(file.read_text())
    file.with_suffix(".md").write_text(table(result))
    plot(result, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
