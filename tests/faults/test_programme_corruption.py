"""Every kind of file that lora_lab reads, damaged: one bit flipped, cut, zeroed, emptied, overwritten with another file, removed.

A try: one file is damaged and the verb that reads it is run. It may refuse in a sentence that names the file; notice and go on to
the same result; or end with the same result because the damage does not matter. Another result without a word is `silent`.
What can be made anew (older checkpoints, caches, logs) must not stop anything.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.programme import (
    CORRUPTIONS,
    Done,
    Tally,
    World,
    differences,
    folder_digests,
    newest_step,
    run_digests,
    sha,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

DAMAGES = ("flip", "cut", "zero", "empty", "swap", "gone")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files, who reads them, and what that must come to.

    Attributes:
        make: builds what will be damaged.
        files: patterns below the world's root.
        argv: the command line that reads them, `{root}` stands for the world's root.
        result: what counts as the result.
        weight: its share of all tries.
        remade: whether everything that these files hold can be had elsewhere, so that nothing may stop at them.
        plan: what else happens in the process, see `tests.faults.launcher`.
        code: what it exits with when all is well.
    """

    make: Callable[[World], None]
    files: tuple[str, ...]
    argv: tuple[str, ...]
    result: Callable[[World, Done], dict[str, str]]
    weight: int = 3
    remade: bool = False
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: int = 0


# -- what is made ---------------------------------------------------------------------------------------------------


def _finished(world: World, *more: str) -> None:
    world.must("train", *world.settings("run", *more))


def _stopped(world: World) -> None:
    done = world.run("train", *world.settings("run"), stage="forward", signal=15, nth=13)
    assert done.rc == 143, done.said
    assert newest_step(world.root / "run") == 6


def _merged(world: World) -> None:
    _finished(world)
    world.must("merge", f"run={world.root}/run")


def _exported(world: World) -> None:
    _finished(world)
    world.must("export", f"run={world.root}/run", "export.targets=[adapter]")


def _quantized(world: World) -> None:
    _finished(world, "quant=nf4", "quant.cache=true")
    assert list(world.cache.glob("quantized/*/model.safetensors"))


def _taught(world: World) -> None:
    _finished(world, "task=distillation", "task.teacher=base", "task.top_k=8")
    assert list(world.cache.glob("soft_targets/*/targets.arrow"))


def _of_gguf(world: World) -> None:
    make_gguf(world.base, world.root / "base.gguf")
    _finished(world, f"model.path={world.root}/base.gguf")


def _points(world: World, *more: str) -> list[str]:
    settings = world.settings("x", "adapter.r=2,4", "optim.lr=0.01,0.02", "sweep.execution=interleaved", *more)[:-1]
    return ["train", "-m", *settings, f"hydra.sweep.dir={world.root}/sweep"]


def _swept(world: World) -> None:
    world.must(*_points(world))


def _half_swept(world: World) -> None:
    """One member is finished, the others were stopped in the middle."""
    _swept(world)
    for name in ("1", "2", "3"):
        (world.root / f"sweep/{name}/result.json").unlink()
        shutil.rmtree(world.root / f"sweep/{name}/adapter")
        shutil.rmtree(world.root / f"sweep/{name}/checkpoints/step-8")


_SEARCH = [
    "hydra/sweeper=optuna_cohort",
    "hydra.sweeper.trials=4",
    "hydra.sweeper.batch=2",
    "hydra.sweeper.sampler=random",
]


def _search(root: str) -> tuple[str, ...]:
    """A search; `{root}` as in `Kind.argv`."""
    world = [
        "model=hub",
        f"model.path={root}/base",
        f"data.train={root}/rows.jsonl",
        f"data.eval={root}/held_out.jsonl",
    ]
    from tests.faults.programme import SETTINGS

    space = ["optim.lr=tag(log,interval(1e-4,1e-2))", "adapter.r=2,4"]
    return (
        "train",
        "-m",
        *world,
        *SETTINGS,
        "sweep.execution=interleaved",
        *_SEARCH,
        *space,
        f"hydra.sweep.dir={root}/sweep",
    )


def _searched(world: World) -> None:
    world.must(*_search(str(world.root)))


def _two_runs(world: World) -> None:
    _finished(world)
    world.must("train", *world.settings("other", "seed=7"))


def _shrunk(world: World) -> None:
    _finished(world)
    world.must("shrink", f"run={world.root}/run", "shrink.ranks=[2]", "shrink.tolerance=9")
    assert (world.root / "run/shrunk/adapter").is_dir()


# -- what it comes to -----------------------------------------------------------------------------------------------


def _of_run(world: World, _: Done) -> dict[str, str]:
    return run_digests(world.root / "run")


def _but_metrics(world: World, _: Done) -> dict[str, str]:
    """Without the logged lines, which are what was damaged; every line must be whole nevertheless."""
    found = run_digests(world.root / "run")
    del found["metrics.jsonl"]
    for line in (world.root / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)
    return found


def _of_evaluation(folder: str) -> Callable[[World, Done], dict[str, str]]:
    def result(world: World, _: Done) -> dict[str, str]:
        file = world.root / folder / "evaluation.json"
        return {"evaluation.json": sha(file) if file.exists() else "missing"}

    return result


def _of_chat(_: World, done: Done) -> dict[str, str]:
    return {"answer": done.out}


def _of_server(_: World, done: Done) -> dict[str, str]:
    """What the adapter said again when it was loaded."""
    return {"adapter": next((line for line in done.out.splitlines() if "probes: " in line), "")}


def _of_folder(folder: str) -> Callable[[World, Done], dict[str, str]]:
    def result(world: World, _: Done) -> dict[str, str]:
        """What a loader reads; the reports beside it name times and versions."""
        return folder_digests(world.root / folder)

    return result


def _of_sweep(world: World, _: Done) -> dict[str, str]:
    sweep, found = world.root / "sweep", {}
    for run in sorted(one.parent for one in sweep.glob("*/adapter")):
        found |= {f"{run.name}/{name}": digest for name, digest in folder_digests(run / "adapter").items()}
    ranking = json.loads((sweep / "ranking.json").read_text(encoding="utf-8"))
    return found | {"take": str(ranking["take"]), "order": " ".join(place["name"] for place in ranking["ranking"])}


def _of_search(world: World, _: Done) -> dict[str, str]:
    found = _of_sweep(world, _)
    return {name: digest for name, digest in found.items() if name in ("take", "order")}


def _of_merged_member(world: World, _: Done) -> dict[str, str]:
    return {
        f"{folder.parent.name}/{name}": digest
        for folder in sorted(world.root.glob("sweep/*/merged"))
        for name, digest in folder_digests(folder).items()
    }


_RUN, _SWEEP = "run={root}/run", "sweep={root}/sweep"
_CACHED = ("evaluate", _RUN)
KINDS = {
    "checkpoints, resume": Kind(
        _stopped, ("run/checkpoints/*/*",), ("resume", _RUN), _of_run, weight=10, remade=True
    ),
    "logs, resume": Kind(
        _stopped, ("run/metrics.jsonl", "run/log.txt", "run/.lock"), ("resume", _RUN), _but_metrics, weight=3, remade=True
    ),
    "settings, resume": Kind(_stopped, ("run/config.yaml", "run/manifest.json"), ("resume", _RUN), _of_run, weight=7),
    "data, resume": Kind(_stopped, ("rows.jsonl", "held_out.jsonl"), ("resume", _RUN), _of_run, weight=3),
    "base, resume": Kind(_stopped, ("base/*",), ("resume", _RUN), _of_run, weight=5),
    "run, evaluate": Kind(
        _finished, ("run/config.yaml", "run/manifest.json", "run/result.json", "run/metrics.jsonl", "run/adapter/*"),
        ("evaluate", _RUN), _of_evaluation("run"), weight=10,
    ),
    "base, evaluate": Kind(_finished, ("base/*",), ("evaluate", _RUN), _of_evaluation("run"), weight=7),
    "run and base, chat": Kind(
        _finished, ("run/config.yaml", "run/adapter/*", "run/manifest.json", "base/*"),
        ("chat", _RUN, "prompt=red green", "task.max_new_tokens=4"), _of_chat, weight=6,
    ),
    "run and base, merge": Kind(
        _finished, ("run/config.yaml", "run/manifest.json", "run/adapter/*", "base/*"), ("merge", _RUN),
        _of_folder("run/merged"), weight=7,
    ),
    "merged, export": Kind(
        _merged, ("run/merged/*", "run/merge_report.json"),
        ("export", _RUN, "export.targets=[quantized]", "export.quantization=int8", "merge.max_loss_increase=9"),
        _of_folder("run/export/quantized"), weight=5,
    ),
    "exported, export": Kind(
        _exported, ("run/export/adapter/*", "run/export_report.json", "run/adapter/*"),
        ("export", _RUN, "export.targets=[adapter]"), _of_folder("run/export/adapter"), weight=5,
    ),
    "token cache, evaluate": Kind(
        _finished, ("cache/tokens/*/*", "cache/tokens/*.lock"), _CACHED, _of_evaluation("run"), weight=5, remade=True
    ),
    "hash cache, merge": Kind(
        _finished, ("cache/sha256/*",), ("merge", _RUN), _of_folder("run/merged"), weight=3, remade=True
    ),
    "scores of the base, evaluate": Kind(
        _finished, ("cache/scores/*/*",), _CACHED, _of_evaluation("run"), weight=3, remade=True
    ),
    "nf4 cache, evaluate": Kind(
        _quantized, ("cache/quantized/*/*",), _CACHED, _of_evaluation("run"), weight=5, remade=True
    ),
    "soft target cache, evaluate": Kind(
        _taught, ("cache/soft_targets/*/*", "cache/soft_targets/*.lock"), _CACHED, _of_evaluation("run"), weight=3, remade=True
    ),
    "gguf cache, evaluate": Kind(_of_gguf, ("cache/gguf/*/*",), _CACHED, _of_evaluation("run"), weight=5, remade=True),
    "gguf file, evaluate": Kind(_of_gguf, ("base.gguf",), _CACHED, _of_evaluation("run"), weight=3),
    "half a sweep, resume": Kind(
        _half_swept,
        ("sweep/*/config.yaml", "sweep/*/manifest.json", "sweep/*/result.json", "sweep/*/metrics.jsonl",
         "sweep/*/adapter/*", "sweep/*/checkpoints/step-6/*"),
        ("resume", _SWEEP), _of_sweep, weight=6,
    ),
    "sweep reports, resume": Kind(
        _swept, ("sweep/ranking.json", "sweep/ranking.csv", "sweep/report.html", "sweep/*/log.txt"),
        ("resume", _SWEEP), _of_sweep, weight=2, remade=True,
    ),
    "sweep, merge": Kind(
        _swept, ("sweep/ranking.json", "sweep/*/config.yaml", "sweep/*/manifest.json", "sweep/*/adapter/*"),
        ("merge", _SWEEP), _of_merged_member, weight=4,
    ),
    "probes and adapter, serve": Kind(
        _finished, ("run/probes.json", "run/adapter/*"), ("serve", _RUN, "serve.port=0"), _of_server, weight=3,
        plan={"stage": "serve", "signal": 15}, code=143,
    ),
    "search journal, train": Kind(_searched, ("sweep/optuna.journal",), _search("{root}"), _of_search, weight=2),
    "runs, merge.adapters": Kind(
        _two_runs, ("run/adapter/*", "run/config.yaml", "other/adapter/*"),
        ("merge", "merge.adapters=[{root}/run,{root}/other]", "run_dir={root}/both"), _of_folder("both/merged"), weight=4,
    ),
    "shrunk, evaluate": Kind(
        _shrunk, ("run/shrunk/*", "run/shrunk/adapter/*"), ("evaluate", "run={root}/run/shrunk"),
        _of_evaluation("run/shrunk"), weight=3,
    ),
}  # fmt: skip


# -- damage ------------------------------------------------------------------------------------------------------------


def harm(file: Path, damage: str, other: Path, draw: random.Random) -> str:
    """Damage a file; where.

    Args:
        other: whose bytes it gets by `swap`.
    """
    whole = file.read_bytes()
    place = draw.randrange(len(whole)) if whole else 0
    if damage == "gone":
        file.unlink()
    elif damage == "flip" and whole:
        bit = draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        return f"bit {bit} of byte {place}"
    elif damage == "cut":
        file.write_bytes(whole[:place])
        return f"at {place}"
    elif damage == "zero" and whole:
        length = min(len(whole) - place, draw.choice([1, 64, len(whole)]))
        file.write_bytes(whole[:place] + bytes(length) + whole[place + length :])
        return f"{length} bytes from {place}"
    else:
        file.write_bytes(other.read_bytes() if damage == "swap" else b"")
    return other.name if damage == "swap" else ""


def named(file: Path, root: Path, said: str, usual: str) -> bool:
    """Whether something was said that is not always said, and names the file, its folder, or what it holds."""
    known = set(usual.splitlines())
    words = {file.name, file.stem, str(file.parent.relative_to(root)), *_HOLDS.get(file.name, ())}
    new = " ".join(line for line in said.splitlines() if line not in known).lower()
    return any(word.lower() in new for word in words if word not in (".", ""))


_HOLDS = {
    "config.yaml": ("settings", "configuration"),
    "chat_template.jinja": ("template",),
    "rows.jsonl": ("data.train",),
    "held_out.jsonl": ("data.eval",),
    "base.gguf": ("gguf",),
    "model.safetensors": ("weights", "fingerprint"),
    "config.json": ("weights", "model.path"),
    "tokenizer.json": ("tokenizer",),
}


def _apart_from(file: Path, digests: dict[str, str]) -> dict[str, str]:
    """Without the damaged file itself: left as it is by a verb that does not read it, it is no result."""
    return {name: digest for name, digest in digests.items() if not set(name.split("/")) <= set(file.parts)}


def judge(tally: Tally, kind: Kind, world: World, file: Path, done: Done, clean: tuple[Done, dict], what: str) -> None:
    """Count a try."""
    usual, expected = clean
    if done.hang:
        return tally.add("traces", f"{what}: hangs")
    if done.trace:
        return tally.add("traces", f"{what}: {done.last_line}")
    if done.rc != kind.code:
        if not named(file, world.root, done.said, usual.said):
            tally.note(f"refused without naming the file: {file.name}: {done.last_line[:160]}")
        if kind.remade:
            return tally.add("lost", f"{what}: can be had elsewhere, but: {done.last_line}")
        tally.note("refused")
        return tally.add("recovered")
    try:
        other = differences(_apart_from(file, kind.result(world, done)), _apart_from(file, expected))
    except (OSError, ValueError, KeyError) as error:
        return tally.add("silent", f"{what}: no result ({type(error).__name__}: {error})")
    told = named(file, world.root, done.said, usual.said)
    if other and not told:
        return tally.add("silent", f"{what}: another result ({other})")
    tally.note("told, another result" if other else "noticed, same result" if told else "harmless, same result")
    return tally.add("recovered")


@pytest.mark.parametrize("name", KINDS)
def test_damage(name, world, tally):
    kind, counted = KINDS[name], tally("R4")
    kind.make(world)
    world.keep()
    argv = [word.replace("{root}", str(world.root)) for word in kind.argv]
    usual = world.run(*argv, **kind.plan)
    assert usual.rc == kind.code, usual.said
    clean = usual, kind.result(world, usual)
    world.restore()
    files = sorted({file for pattern in kind.files for file in world.root.glob(pattern) if file.is_file()})
    assert files, kind.files
    draw = random.Random(name)
    weights = sum(one.weight for one in KINDS.values())
    tries = max(len(DAMAGES), -(-CORRUPTIONS * kind.weight // weights))
    for number in range(tries):
        file, damage = draw.choice(files), DAMAGES[number % len(DAMAGES)]
        where = harm(file, damage, draw.choice(files), draw)
        what = f"{name}: {damage} {file.relative_to(world.root)} {where}"
        judge(counted, kind, world, file, world.run(*argv, **kind.plan), clean, what)
        world.restore()
    assert not counted.problems, "\n".join(counted.problems)


# -- a small GGUF base ---------------------------------------------------------------------------------------------


def make_gguf(base: Path, file: Path) -> None:
    """The base as a GGUF file, as llama.cpp's converter would write it."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    core = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    special = {token["content"] for token in core["added_tokens"]}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in core["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((base / "chat_template.jinja").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(base / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
