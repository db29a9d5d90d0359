"""docs/gpu.md, made of what was measured. What was not measured stands there as such, and no figure is estimated from others.

Imports nothing but Python's own modules.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import runner, slices
from benchmarks.gpu.slices import Cell, Scale, Workload

NOT_MEASURED, _NOT_RUN = "not measured", "not run"
_LARGE = ("numpy", "scipy", "pandas", "pyarrow")  # most of what travels where they are not there
Known = Mapping[str, Mapping[str, Any]]  # name of a cell -> what is written of it

_HEAD = """# On a card

Made by `make bench-gpu`. {state}

1. Where there is a network: `python -m benchmarks.gpu --wheels FOLDER --python 3.12 --there FILE`, with the output of `pip freeze` on the
   machine with the card as FILE.
2. There: this repository, and in it FOLDER as `.bench-gpu/wheels`. `PYTHON=python3 BENCH=--check make bench-gpu` says what is missing.
3. `PYTHON=python3 make bench-gpu`. Each slice stops below 8 minutes, and the same command goes on where it stopped.
   `BENCH="--slices 2 --only profile"` measures some cells, `--retry` those that failed.
4. On any machine: `python -m benchmarks.gpu --plans` adds what `lora-lab plan` says of the card that was measured.

- Bases have the true shape of the named model and random weights, in 4 bits (NF4, double quantization). Rows are exactly as long as
  named, and half of each is learned. LoRA with r = 16 on all linear layers. All systems train the same rows from the same adapter.
- *allocated*, *reserved*: most GiB of the card's memory in tensors, and held by torch for them, in the steps after loading. CUDA's own
  (about 0.6) is not in them.
- *share*: of the rate of plain bfloat16 products at the model's shapes, measured in the same slice; a token's work is counted as in
  `benchmarks/speed_worker.py`, without what checkpointing computes again.
- *dry run*: GiB that `lora-lab plan` foresees for the training step, on a card that does not exist: no measurement.
- Tokens/s hold for the card that they were measured on. A memory cap on a large card is not a small card: it says what fits, not how
  fast that would be.
- *not measured*: nobody has run it. *absent*: the other tool was not installed. *failed*: with the reason below the table.
"""

_NOT_BUILT = """## Not built

| what | why |
|---|---|
| offloaded activations on a stream of their own | transformers copies them on the stream that computes, which is slower and in order. Whether two streams wait for each other shows on a card alone, and where they do not, numbers are wrong without a word |
| Liger's rotary embedding | [speed.md](speed.md#what-was-tried-and-left-out) |
| a kernel of our own that dequantizes 4 bits | a gain over bitsandbytes' kernel must be measured first |
| `quant=int8` without its wait in each layer | bitsandbytes looks for outliers there; `quant=nf4` waits for nothing and takes half the memory |
| paged states for adapters | they are small: no preset takes `optim=paged_adamw_8bit`, which waits for the card after each tensor. `optim=adamw` and `optim=adamw_8bit` do not |
| the gated MLP in tiles where members share a pass | each has tokens of its own there, and such passes are short (`sweep.joint_tokens`) |
"""


@dataclasses.dataclass(frozen=True)
class _Of:
    """What is known of one card, or of none."""

    scale: Scale
    card: str | None
    cells: dict[int, Known]
    plans: Mapping[tuple[str, str | None], Mapping[str, Any]]

    def found(self, number: int, name: str) -> Mapping[str, Any]:
        """Figures of a cell; empty where there are none."""
        found: Mapping[str, Any] = self.cells[number].get(name, {}).get("found", {})
        return found

    def why(self, number: int, name: str) -> str:
        """In the place of a figure that is not there."""
        cell = self.cells[number].get(name, {})
        if "error" in cell:
            return "failed"
        return "absent" if "absent" in cell else NOT_MEASURED

    def figure(self, number: int, name: str, key: str, form: str = "{:.2f}") -> str:
        """A figure of a cell, or why there is none."""
        value = self.found(number, name).get(key)
        if value is None:
            return "–" if self.found(number, name) else self.why(number, name)
        return form.format(value)

    def plan(self, name: str) -> tuple[float | None, bool]:
        """Foreseen GiB of the training step, and whether for this card's memory."""
        for card in dict.fromkeys((self.card, None)):
            found = self.plans.get((name, card), {}).get("found")
            if found:
                return found["train"], card is not None
        return None, False


def page(out: Path, scale: Scale) -> str:
    """The page, as Markdown.

    Args:
        out: folder of `slice_N.json` and `plans.json`.
    """
    written = {number: runner.read(out / f"slice_{number}.json") for number in slices.TITLES}
    plans = {(one["name"], one["card"]): one for one in runner.read(out / "plans.json")}
    every = [cell for cells in written.values() for cell in cells]
    cards = list(dict.fromkeys(cell["card"] for cell in every))
    lines = [_HEAD.format(state=_state(cards, plans))]
    for card in cards or [None]:
        own = {
            number: {cell["name"]: cell for cell in cells if cell["card"] == card} for number, cells in written.items()
        }
        lines += _of_card(_Of(scale, card, own, plans), [cell for cell in every if cell["card"] == card])
    lines += [_NOT_BUILT, *_travelling(targets(out))]
    return "\n".join(lines).rstrip() + "\n"


def targets(out: Path) -> list[dict[str, Any]]:
    """Which wheels were collected, for each kind of machine."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("wheels_*.json"))]


def _travelling(targets: list[dict[str, Any]]) -> list[str]:
    if not targets:
        return []
    rows = []
    for one in targets:
        there = [f"{name} {version}" for name, version in one["there"].items()]
        few = ", ".join(there) if len(there) < 5 else f"{len(there)} libraries, among them {', '.join(_LARGE)}"
        sizes = {group: sum(file["mib"] for file in files) for group, files in one["groups"].items()}
        counts = {group: len(files) for group, files in one["groups"].items()}
        cells = [f"{size:.1f} ({counts[group]})" for group, size in sizes.items()]
        rows.append([f"{few}; Python {one['python']}", *cells, f"{sum(sizes.values()):.1f}"])
    return [
        "## What travels", "",
        "MiB of wheels (how many) for a machine without a network, as `python -m benchmarks.gpu --wheels FOLDER --there FILE` collected "
        f"them on {', '.join(sorted({one['when'][:10] for one in targets}))}. FILE is what `pip freeze` writes there. bitsandbytes goes "
        "along with one CUDA library, Unsloth without its pages for a browser.", "",
        *_table(["what is there", "lora_lab, its tests", "TRL", "Unsloth, beside lora_lab's", "in all"], rows), "",
    ]  # fmt: skip


def _state(cards: list[str | None], plans: Mapping[Any, Mapping[str, Any]]) -> str:
    if not cards:
        text = "**Nothing on this page has been measured: no card was at hand.**"
    elif cards == [None]:
        text = "**Measured on a CPU, which only shows that the harness runs.**"
    else:
        text = f"Measured on: {', '.join(card for card in cards if card)}."
    commits = ", ".join(dict.fromkeys(one["commit"] for one in plans.values()))
    versions = next((one["versions"] for one in plans.values()), {})
    own = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{text} Dry runs are of commit {commits} ({own}); [memory.md](memory.md) has more." if plans else text


def _of_card(of: _Of, cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    if cells:
        one = cells[-1]
        commits = ", ".join(dict.fromkeys(cell["commit"] or cell["sources"] for cell in cells))
        when = sorted(cell["when"] for cell in cells)
        lines += [
            f"## {of.card or 'CPU'}", "",
            f"- {one['card_gib'] or '–'} GiB, driver {one['driver'] or '–'}; {when[0]} to {when[-1]}; commit {commits}",
            *(f"- {name}: {_versions(cells, name)}" for name in dict.fromkeys(cell["group"] for cell in cells)),
            "",
        ]  # fmt: skip
    lines += ["## What it must show", "", *_aims(of), ""]
    for number, title in slices.TITLES.items():
        lines += [f"## {number}. {title}", "", *_SECTIONS[number](of), *_failures(of.cells[number]), ""]
    return lines


def _versions(cells: list[dict[str, Any]], group: str) -> str:
    versions = next(cell["versions"] for cell in cells if cell["group"] == group)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _failures(cells: Known) -> list[str]:
    failed = [f"- {name}: {cell['error']}" for name, cell in cells.items() if "error" in cell]
    return ["", "Failed:", "", *failed] if failed else []


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


# -- what it must show --------------------------------------------------------------------------------------------------


def _aims(of: _Of) -> list[str]:
    scale, rows = of.scale, []
    for size in dict.fromkeys((one.batch_size, one.tokens) for one in scale.workloads):
        own = _fastest(of, size, "lora_lab")
        for peer, aim in (("TRL + peft", "2.0"), ("Unsloth", "1.0")):
            names = ("trl", "trl_liger") if peer.startswith("TRL") else ("unsloth",)
            other = max((one for name in names if (one := _fastest(of, size, name))), default=None)
            got = f"{own / other:.2f}" if own and other else NOT_MEASURED
            rows.append(
                [f"{size[0]} x {size[1]:,}: tokens/s, times those of {peer}, both at their best", f">= {aim}", got, "–"]
            )
    single = f"{dataclasses.replace(scale.workloads[0], batch_size=1)}: {slices.LEAST}"
    rows.append([f"{single}: allocated GiB", "<= 6.5", of.figure(2, single, "peak_gib"), _dry(of, single)])
    rows += [_row_aim(of), _joint_aim(of), _plan_aim(of)]
    return _table(["figure", "aim", "measured", "dry run"], rows)


def _dry(of: _Of, name: str) -> str:
    plan = of.plan(name)[0]
    return _NOT_RUN if plan is None else f"{plan:.2f}"


def _row_aim(of: _Of) -> list[str]:
    scale, cap = of.scale, of.scale.caps[-1]
    longest = [of.found(3, f"{cap} GiB: longest row{how}").get("fits_tokens") for how in ("", " offloaded")]
    known = [one for one in longest if one is not None]
    got = f"{max(known):,}" if known else NOT_MEASURED
    plain, offloaded = (_dry(of, slices.aimed_row(scale, offload)[0]) for offload in (False, True))
    dry = f"{slices.AIMED_ROW:,} tokens: {plain} GiB, offloaded {offloaded}"
    return [f"{scale.main}: longest row in {cap} GiB, tokens", f">= {slices.AIMED_ROW:,}", got, dry]


def _fastest(of: _Of, size: tuple[int, int], system: str) -> float | None:
    speeds = [
        of.found(2, f"{one}: {system}").get("tokens_per_second")
        for one in of.scale.workloads
        if (one.batch_size, one.tokens) == size
    ]
    return max((one for one in speeds if one), default=None)


def _joint_aim(of: _Of) -> list[str]:
    tokens, members = slices.joint_aim(of.scale)
    joint, turns = (of.found(4, f"{tokens:,} tokens: {members} {how}") for how in ("joint", "in turns"))
    got = NOT_MEASURED
    if joint and turns:
        got = f"{joint['tokens_per_second'] / turns['tokens_per_second']:.2f}, {joint['peak_gib']:.1f} GiB"
    plan = of.plan(f"{tokens:,} tokens: {members} joint")[0]
    dry = _NOT_RUN if plan is None else f"{plan:.2f} GiB"
    return [f"{members} members, a row of {tokens} tokens each: times turns", ">= 1.4, within 20 GiB", got, dry]


def _plan_aim(of: _Of) -> list[str]:
    ratios = [ratio for name in of.cells[2] if (ratio := _foreseen(of, 2, name)) is not None]
    got = f"{min(ratios):.2f} to {max(ratios):.2f} ({len(ratios)} cells)" if ratios else NOT_MEASURED
    return ["plan, times the reserved peak", "0.95 to 1.10", got, "–"]


def _foreseen(of: _Of, number: int, name: str) -> float | None:
    """The plan for this card, times the reserved peak."""
    plan, own = of.plan(name)
    reserved = of.found(number, name).get("peak_reserved_gib")
    return plan / reserved if own and plan and reserved else None


# -- slices -------------------------------------------------------------------------------------------------------------


def _correct(of: _Of) -> list[str]:
    found = of.found(1, "tests")
    failed = found.get("failed")
    row = [
        "`make test-gpu`",
        *(of.figure(1, "tests", key, "{}") for key in ("passed", "skipped")),
        of.why(1, "tests") if failed is None else str(len(failed)),
        of.figure(1, "tests", "finished", "{}").replace("True", "yes").replace("False", "no"),
    ]
    lines = _table(["tests on the card", "passed", "skipped", "failed", "all were run"], [row])
    return [*lines, "", *(f"- failed: `{name}`" for name in failed)] if failed else lines


def _beside(of: _Of) -> list[str]:
    first = of.scale.workloads[0]
    rate = of.figure(2, f"{first.shape}: matrix products", "gflops_per_second", "{:,.0f}")
    lines = [f"Plain bfloat16 products at this model's shapes, GFLOP/s: {rate}.", ""]
    cells = slices.of(2, of.scale)
    for workload in (*of.scale.workloads, dataclasses.replace(first, batch_size=1)):
        own = [cell for cell in cells if cell.name.startswith(f"{workload}: ")]
        lines += [
            f"### {workload}",
            "",
            *_training_table(of, workload, [one for one in own if one.kind == "train"]),
            "",
        ]
        lines += [line for cell in own if cell.kind == "profile" for line in _profile(of, cell)]
    return lines[:-1]


def _profile(of: _Of, cell: Cell) -> list[str]:
    """What a step of lora_lab's is spent on."""
    found = of.found(2, cell.name)
    if not found:
        return [f"A step by parts: {of.why(2, cell.name)}.", ""]
    shares = {**found["parts"], "no kernel at all": found["no_kernel"]}
    told = ", ".join(f"{part} {own / found['step_seconds']:.0%}" for part, own in shares.items())
    return [f"A step of {found['step_seconds']:.2f} s by parts: {told}.", ""]


def _training_table(of: _Of, workload: Workload, cells: list[Cell]) -> list[str]:
    number = cells[0].slice
    ours = of.found(number, f"{workload}: lora_lab").get("tokens_per_second")
    header = ["", "tokens/s", "times lora_lab", "share", "allocated", "reserved", "dry run", "dry run / reserved", "first loss", "last loss"]  # fmt: skip
    rows = []
    for cell in cells:
        found, name = of.found(number, cell.name), cell.name
        speed, losses = found.get("tokens_per_second"), found.get("losses") or [None, None]
        plan, ratio = of.plan(name)[0], _foreseen(of, number, name)
        dry = "–" if cell.given["system"] != "lora_lab" else _NOT_RUN
        rows.append(
            [
                name.partition(": ")[2], of.figure(number, name, "tokens_per_second", "{:,.0f}"),
                f"{speed / ours:.2f}" if speed and ours else "–", _share(of, workload, found),
                *(of.figure(number, name, key) for key in ("peak_gib", "peak_reserved_gib")),
                dry if plan is None else f"{plan:.2f}", "–" if ratio is None else f"{ratio:.2f}",
                *("–" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1])),
            ]
        )  # fmt: skip
    return _table(header, rows)


def _share(of: _Of, workload: Workload, found: Mapping[str, Any]) -> str:
    """Of the rate of plain products; only of the rows that these were counted for."""
    first = of.scale.workloads[0]
    rate = of.found(2, f"{first.shape}: matrix products")
    if not (rate and found) or (workload.shape, workload.tokens) != (first.shape, first.tokens):
        return "–"
    return f"{found['tokens_per_second'] * rate['gflop_per_token'] / rate['gflops_per_second']:.0%}"


def _capped(of: _Of) -> list[str]:
    scale, first = of.scale, of.scale.workloads[0]
    rows, steps = [], f"{first.batch_size} x {first.tokens:,}"
    ladder = f"{scale.ladder[0]} x {scale.ladder[1]:,}"
    for cap in scale.caps:
        preset, tried = f"{cap} GiB: preset, {steps}", f"{cap} GiB: ladder, {ladder}"
        rows.append(
            [
                f"{cap} GiB", _fits(of, preset), of.figure(3, preset, "tokens_per_second", "{:,.0f}"),
                of.figure(3, preset, "peak_reserved_gib"),
                *(_longest(of, f"{cap} GiB: longest row{how}") for how in ("", " offloaded")),
                _fits(of, tried), _merged(of, f"{cap} GiB: merge"),
            ]
        )  # fmt: skip
    header = [
        f"cap ({scale.main})", f"its preset, {steps}: fits", "tokens/s", "reserved", "longest row", "longest row, offloaded",
        f"{ladder} by the ladder", "merge, s (allocated)",
    ]  # fmt: skip
    whole = f"{scale.caps[0]} GiB: merge, unquantized base"
    lines = [*_table(header, rows), "", f"Merge into the unquantized base, {scale.caps[0]} GiB: {_merged(of, whole)}."]
    for cap in scale.caps:
        name = f"{cap} GiB: ladder, {ladder}"
        lines += [f"- {cap} GiB: {line}" for line in of.found(3, name).get("ladder", [])]
    return lines


def _fits(of: _Of, name: str) -> str:
    found = of.found(3, name)
    if not found:
        return of.why(3, name)
    return "yes" if found["fits"] else "no"


def _longest(of: _Of, name: str) -> str:
    found = of.found(3, name)
    if not found:
        return of.why(3, name)
    more = "" if found["too_many_tokens"] else " or more"
    return f"{found['fits_tokens']:,}{more}"


def _merged(of: _Of, name: str) -> str:
    found = of.found(3, name)
    if not found:
        return of.why(3, name)
    return f"{found['merge_seconds']:.0f} ({found['peak_gib']:.2f})" if "merge_seconds" in found else "no"


def _joint(of: _Of) -> list[str]:
    rows = []
    for tokens in of.scale.member_tokens:
        single = of.found(4, f"{tokens:,} tokens: one run").get("tokens_per_second")
        for members in of.scale.members:
            joint, turns = (f"{tokens:,} tokens: {members} {how}" for how in ("joint", "in turns"))
            speed, other = (of.found(4, name).get("tokens_per_second") for name in (joint, turns))
            rows.append(
                [
                    f"{members} x {tokens:,}", of.figure(4, joint, "tokens_per_second", "{:,.0f}"),
                    of.figure(4, turns, "tokens_per_second", "{:,.0f}"),
                    of.figure(4, f"{tokens:,} tokens: one run", "tokens_per_second", "{:,.0f}"),
                    f"{speed / other:.2f}" if speed and other else "–",
                    f"{speed / single:.2f}" if speed and single else "–",
                    *(of.figure(4, joint, key) for key in ("peak_gib", "peak_reserved_gib")),
                    "–" if (plan := of.plan(joint)[0]) is None else f"{plan:.2f}",
                ]
            )  # fmt: skip
    header = [f"members x tokens of a row ({of.scale.main})", "joint, tokens/s", "in turns", "one run", "joint / turns", "joint / one run", "allocated", "reserved", "dry run"]  # fmt: skip
    return _table(header, rows)


def _more(of: _Of) -> list[str]:
    cells = slices.of(5, of.scale)
    trained = [cell for cell in cells if cell.kind == "train"]
    lines = []
    for title in dict.fromkeys(cell.name.partition(": ")[0] for cell in trained):
        own = [cell for cell in trained if cell.name.startswith(f"{title}: ")]
        given = own[0].given
        workload = Workload(given["shape"], given["batch_size"], given["tokens"], given["checkpointing"])
        lines += [f"### {title}", "", *_training_table(of, workload, own), ""]
    rows = [
        [
            cell.name.partition(": ")[2], of.figure(5, cell.name, "new_tokens_per_second", "{:,.0f}"),
            of.figure(5, cell.name, "peak_gib"),
        ]
        for cell in cells
        if cell.kind == "generation"
    ]  # fmt: skip
    return [*lines, "### Generation", "", *_table([of.scale.main, "new tokens/s", "allocated"], rows)]


_SECTIONS: dict[int, Callable[[_Of], list[str]]] = {1: _correct, 2: _beside, 3: _capped, 4: _joint, 5: _more}
