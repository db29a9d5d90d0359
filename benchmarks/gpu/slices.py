"""What is measured, in which order: the first answers first, so that a run that is cut off has given them. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Any

TITLES = {
    1: "Correct on a card",
    2: "Speed and memory beside other tools, and what each acceleration is worth",
    3: "Less memory: what fits, the longest row, failed allocations, merging",
    4: "Joint sweeps",
    5: "Other sizes, short rows, generation",
}
LEAST = "least memory"
PROFILE = "profile"
AIMED_ROW = 60000  # tokens
PEERS = ("trl", "trl_liger", "unsloth")  # each also with checkpointing, see speed_worker.py
_LEFT_OUT = {  # each acceleration of a card, switched off alone
    "without fused projections": ["speed.fused_projections=false"],
    "without fused MLP": ["speed.fused_mlp=false"],
    "without fused norms": ["speed.fused_norms=false"],
    "without Liger's kernels": ["speed.liger_kernels=false"],
    "without varlen attention": ["speed.varlen_attention=false"],
    "without chunked loss": ["speed.chunked_loss=false"],
    "without last layer's rows": ["speed.last_layer_rows=false"],
    "dequantized in every pass": ["speed.dequantize=always"],
    "without deterministic kernels": ["hardware.deterministic=false"],
    "without any (speed=plain)": ["speed=plain"],
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows of one length on one base."""

    shape: str
    batch_size: int
    tokens: int
    checkpointing: bool = False

    def __str__(self) -> str:
        how = " checkpointed" if self.checkpointing else ""
        return f"{self.shape} {self.batch_size} x {self.tokens:,}{how}"

    @property
    def base(self) -> str:
        """Where its base lies, in the folder of work."""
        return f"bases/{self.shape}-nf4"

    @property
    def rows(self) -> str:
        """Where its rows lie, which no checkpointing changes."""
        return f"rows/{self.shape}-{self.batch_size}x{self.tokens}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement, in a process of its own."""

    slice: int
    name: str  # no other cell of its slice has it
    kind: str  # what measures it, see `cells.KINDS`
    given: dict[str, Any]
    seconds: int  # that it may take, at most
    needs: tuple[str, ...] = ()  # what must have been prepared, see `prepared`
    group: str = "own"  # whose libraries it runs with


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is."""

    main: str  # shape of the model that most is measured on
    others: tuple[str, ...]
    workloads: tuple[Workload, ...]
    steps: int
    caps: tuple[int, ...]  # GiB
    ladder: tuple[int, int]  # rows and tokens of a step that must be made again with less
    longest: int  # tokens of a row, at most
    members: tuple[int, ...]
    member_tokens: tuple[int, ...]
    short: tuple[int, int]  # rows, tokens
    generation: tuple[int, int, tuple[int, ...]]  # tokens of a prompt, tokens of an answer, rows together
    tests: tuple[str, ...]
    least: tuple[str, ...]  # overrides with which a row takes the least memory
    left_out: tuple[str, ...] = tuple(_LEFT_OUT)


def _workloads(shape: str, *sizes: tuple[int, int]) -> tuple[Workload, ...]:
    return tuple(Workload(shape, *size, checkpointing) for size in sizes for checkpointing in (True, False))


SCALES = {
    "full": Scale(
        main="llama-3.1-8b", others=("qwen3-4b", "qwen3-14b", "qwen3-32b"), workloads=_workloads("llama-3.1-8b", (2, 2048), (8, 512)),
        steps=6, caps=(8, 12, 16, 24), ladder=(8, 2048), longest=131072, members=(2, 4, 8, 16), member_tokens=(64, 256, 1024),
        short=(64, 64), generation=(256, 64, (1, 8, 32)), tests=("tests",),
        least=("speed.dequantize=always", "optim=adamw_8bit", "hardware.offload_embeddings=true"),
    ),
    "tiny": Scale(
        main="tiny", others=("tiny",), workloads=_workloads("tiny", (2, 48)), steps=3, caps=(1,), ladder=(4, 48), longest=256,
        members=(2,), member_tokens=(32,), short=(4, 32), generation=(16, 4, (2,)), tests=("tests/fast/test_on_a_card.py",),
        least=("speed.dequantize=always", "optim=adamw_8bit"), left_out=("without fused MLP",),
    ),
}  # fmt: skip


def of(number: int, scale: Scale) -> list[Cell]:
    """The cells of a slice, in order."""
    return {1: _correct, 2: _beside, 3: _capped, 4: _joint, 5: _more}[number](scale)


def prepared(path: str, scale: Scale) -> Cell:
    """The cell that makes what others need: a base, or rows with the adapter that every system begins with."""
    kind, _, name = path.partition("/")
    if kind == "bases":
        shape, _, quant = name.rpartition("-")
        return Cell(0, path, "base", {"path": path, "shape": shape, "quant": quant}, 150)
    every = (*scale.workloads, _single(scale), *_other_workloads(scale), _short(scale))
    workload = next(one for one in every if one.rows == path)
    return Cell(
        0, path, "rows", {"path": path, **_about(workload), "steps": scale.steps}, 120, (workload.base,)
    )  # fmt: skip


def _about(workload: Workload) -> dict[str, Any]:
    return {**dataclasses.asdict(workload), "base": workload.base}


def _of_rows(workload: Workload) -> dict[str, Any]:
    return {"rows": workload.rows, **_about(workload)}


def _correct(scale: Scale) -> list[Cell]:
    return [Cell(1, "tests", "tests", {"paths": list(scale.tests)}, 440)]


def _trained(number: int, workload: Workload, title: str = "lora_lab", more: tuple[str, ...] = ()) -> Cell:
    given = {"system": "lora_lab", **_of_rows(workload), "more": list(more)}
    return Cell(number, f"{workload}: {title}", "train", given, 120, (workload.rows,))


def _peer(number: int, workload: Workload, peer: str) -> Cell:
    system = {"trl": "trl_bf16"}.get(peer, peer) + ("_checkpointed" if workload.checkpointing else "")
    given = {"system": system, **_of_rows(workload)}
    return Cell(
        number, f"{workload}: {peer}", "train", given, 150, (workload.rows,), "unsloth" if peer == "unsloth" else "trl"
    )  # fmt: skip


def _beside(scale: Scale) -> list[Cell]:
    first = scale.workloads[0]
    cells = [Cell(2, f"{first.shape}: matrix products", "products", {"rows": first.rows}, 60, (first.rows,))]
    for workload in scale.workloads:
        cells += [_trained(2, workload), *(_peer(2, workload, peer) for peer in PEERS)]
    for workload in _compared(scale):
        cells.append(Cell(2, f"{workload}: {PROFILE}", "profile", _of_rows(workload), 120, (workload.rows,)))
    for workload in _compared(scale):
        cells += [_trained(2, workload, title, tuple(_LEFT_OUT[title])) for title in scale.left_out]
    single = _single(scale)
    return [*cells, _trained(2, single), _trained(2, single, LEAST, scale.least)]


def _compared(scale: Scale) -> tuple[Workload, ...]:
    """Of each size one: with which accelerations are left out, and a profile is made."""
    return scale.workloads[::3] if len(scale.workloads) > 2 else scale.workloads[:1]


def _single(scale: Scale) -> Workload:
    """One row of a step's, checkpointed."""
    return dataclasses.replace(scale.workloads[0], batch_size=1)


def _capped(scale: Scale) -> list[Cell]:
    base = (scale.workloads[0].base,)
    rows, tokens = scale.ladder
    cells = []
    for cap in scale.caps:
        about = {"cap": cap, "shape": scale.main, "base": base[0]}
        step = scale.workloads[0]
        preset = {**about, "preset": f"gpu_{cap}gb", "batch_size": step.batch_size, "tokens": step.tokens, "steps": 3}
        cells.append(Cell(3, f"{cap} GiB: preset, {step.batch_size} x {step.tokens:,}", "run", preset, 90, base))
        for offload in (False, True):
            how = " offloaded" if offload else ""
            given = {**about, "offload": offload, "longest": scale.longest}
            cells.append(Cell(3, f"{cap} GiB: longest row{how}", "context", given, 150, base))
    for cap in scale.caps:
        about = {"cap": cap, "shape": scale.main, "base": base[0]}
        given = {**about, "preset": None, "batch_size": rows, "tokens": tokens, "steps": 2}
        cells.append(Cell(3, f"{cap} GiB: ladder, {rows} x {tokens:,}", "run", given, 150, base))
    cells += [
        Cell(3, f"{cap} GiB: merge", "merge", {"cap": cap, "shape": scale.main, "base": base[0]}, 240, base)
        for cap in scale.caps
    ]
    plain = f"bases/{scale.main}-none"  # last: 16 GB for 8B
    given = {"cap": scale.caps[0], "shape": scale.main, "base": plain}
    return [*cells, Cell(3, f"{scale.caps[0]} GiB: merge, unquantized base", "merge", given, 300, (plain,))]


def _joint(scale: Scale) -> list[Cell]:
    base = scale.workloads[0].base
    cells = []
    for tokens in scale.member_tokens:
        for members in (1, *scale.members):
            for how in ("single",) if members == 1 else ("batched", "interleaved"):
                given = {"base": base, "members": members, "tokens": tokens, "how": how, "steps": scale.steps}
                title = {"single": "one run", "batched": f"{members} joint", "interleaved": f"{members} in turns"}[how]
                cells.append(Cell(4, f"{tokens:,} tokens: {title}", "sweep", given, 120, (base,)))
    return cells


def aimed_row(scale: Scale, offload: bool) -> tuple[str, dict[str, Any]]:
    """Of the row that must fit in the largest cap: name, and what is planned."""
    row = dataclasses.replace(_single(scale), tokens=min(AIMED_ROW, scale.longest))
    more = ["speed.dequantize=always", f"train.offload_activations={str(offload).lower()}"]
    return f"{row}{' offloaded' if offload else ''}", {**_about(row), "more": more}


def joint_steps(scale: Scale) -> list[tuple[str, dict[str, Any]]]:
    """Of members who share a pass, rows of the length that is aimed at: the cell's name, and what is planned; the aim first."""
    tokens, aimed = joint_aim(scale)
    row = dataclasses.replace(_single(scale), tokens=tokens, checkpointing=False)
    counts = sorted(scale.members, key=lambda members: members != aimed)
    return [(f"{tokens:,} tokens: {members} joint", {**_about(row), "members": members}) for members in counts]


def joint_aim(scale: Scale) -> tuple[int, int]:
    """Tokens of a row, and members."""
    return (256, 8) if 8 in scale.members else (scale.member_tokens[-1], scale.members[-1])


def _other_workloads(scale: Scale) -> list[Workload]:
    first = scale.workloads[0]
    return [dataclasses.replace(first, shape=shape) for shape in scale.others]


def _short(scale: Scale) -> Workload:
    return Workload(scale.main, *scale.short)


def _more(scale: Scale) -> list[Cell]:
    cells = []
    for workload in _other_workloads(scale):
        cells += [_trained(5, workload), _peer(5, workload, "unsloth")]
    short = _short(scale)
    cells += [
        _trained(5, short),
        _trained(5, short, "without varlen attention", ("speed.varlen_attention=false",)),
        _peer(5, short, "trl"),
        _peer(5, short, "unsloth"),
    ]
    prompt, new, together = scale.generation
    for rows in together:
        for title, more in (("", []), (", without the fused product", ["speed.fused_4bit=false"])):
            given = {"base": short.base, "rows": rows, "prompt": prompt, "new": new, "more": more}
            name = f"generation: {rows} rows of {prompt} + {new}{title}"
            cells.append(Cell(5, name, "generation", given, 120, (short.base,)))
    return cells
