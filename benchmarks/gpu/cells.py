"""Measure one cell in a process of its own: python -m benchmarks.gpu.cells GIVEN.json OUT.json

The part of `python -m benchmarks.gpu` that needs torch and lora_lab. What is measured is written as JSON; what fails is written as a
line that says how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import shapes
from benchmarks.sources import ROOT

Found = dict[str, Any]
_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "liger-kernel", "trl", "unsloth", "xformers",
)  # fmt: skip
_CLOSE = 32  # a row that fits and one that does not are no further apart than a part of so many
_TESTED = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_PROFILED = 2  # steps, after the first
_LARGEST = 25  # kernels that are named
_PARTS = {  # names of CUDA's, Triton's and bitsandbytes' kernels; of a CPU torch's operations
    "attention": re.compile(r"flash|fmha|attention|varlen", re.I),
    "dequantizing": re.compile(r"dequantize|gemm_4bit", re.I),
    "matrix products": re.compile(r"gemm|cutlass|cublas|nvjet|xmma|splitK|aten::(mm|addmm|bmm|baddbmm)\b", re.I),
    "loss": re.compile(r"softmax|nll_loss|cross_entropy|logsumexp", re.I),
    "norms, SwiGLU, RoPE": re.compile(r"rms_?norm|swiglu|silu|rope|rotary", re.I),
    "optimizer": re.compile(r"adam|multi_tensor|foreach", re.I),
    "copies": re.compile(r"memcpy|memset|copy_?|cat_?", re.I),
}
_REST = "other"
_LOOSE = (
    "merge.max_kl=9",
    "merge.max_loss_increase=9",
    "merge.min_top1_agreement=0.01",
)  # of random weights, not of the merge


@dataclasses.dataclass(frozen=True)
class Place:
    """Where it is measured."""

    work: Path  # what was prepared
    device: str  # cpu or cuda
    seconds: float  # that are left

    def hardware(self, cap: float | None = None) -> list[str]:
        """Overrides."""
        if self.device == "cpu" or cap is None:
            return [f"hardware={self.device}"]
        return [f"hardware={self.device}", f"hardware.memory_gib={cap}"]

    @contextlib.contextmanager
    def folder(self, name: str) -> Any:
        """An empty folder that is gone afterwards."""
        path = self.work / "now" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _run(base: str, rows: Path, folder: Path, place: Place, *more: str) -> list[str]:
    """Overrides of a training run; later ones hold."""
    return [
        "model=hub", f"model.path={place.work / base}", "quant=none", "tracker=none", "export=adapter", f"data.train={rows}",
        "data.check=off", "data.max_tokens=131072", "adapter.r=16", "adapter.lora_alpha=32", "optim.lr=2e-4",
        "optim.schedule=constant", "optim.warmup_steps=0", "train.epochs=100", "train.save_steps=1000000", f"run_dir={folder}/run",
        *place.hardware(), *more,
    ]  # fmt: skip


# -- preparing ----------------------------------------------------------------------------------------------------------


def base(given: Found, place: Place) -> Found:
    """A base, written as a whole or not at all."""
    folder, new = place.work / given["path"], place.work / f"{given['path']}.new"
    shutil.rmtree(new, ignore_errors=True)
    started = time.perf_counter()
    size = shapes.write_base(given["shape"], new, given["quant"], place.device)
    new.rename(folder)
    return {"gib": size / 2**30, "write_seconds": time.perf_counter() - started}


def rows(given: Found, place: Place) -> Found:
    """Rows, which tokens lora_lab makes of them, and the adapter that every system begins with."""
    from benchmarks import speed_worker

    folder, new = place.work / given["path"], place.work / f"{given['path']}.new"
    shutil.rmtree(new, ignore_errors=True)
    steps, size = given["steps"], given["batch_size"]
    shapes.write_rows(new / "rows.jsonl", given["tokens"], steps * size)
    more = [f"train.max_steps={steps}", f"train.batch_size={size}", f"train.micro_batch_size={size}"]
    spec = {
        "rows": None, "adapter": str(new / "adapter.safetensors"), "steps": steps, "batch_size": size, "quant": "published",
        "overrides": _run(given["base"], new / "rows.jsonl", new, place, *more), "lr": 2e-4, "weight_decay": 0.0, "r": 16,
        "lora_alpha": 32, "tokens": given["tokens"] * size, "device": place.device,
    }  # fmt: skip
    spec |= speed_worker.lora_lab(spec)
    shutil.rmtree(new / "run")
    lengths = {len(row["input_ids"]) for row in spec["rows"]}
    if lengths != {given["tokens"]}:
        raise ValueError(f"rows of {sorted(lengths)} tokens, not of {given['tokens']}")
    supervised = sum(label != -100 for row in spec["rows"] for label in row["labels"])
    spec["supervised_share"] = supervised / (given["tokens"] * len(spec["rows"]))
    spec["overrides"] = [text.replace(str(new), str(folder)) for text in spec["overrides"]]
    spec["adapter"] = str(folder / "adapter.safetensors")
    (new / "spec.json").write_text(json.dumps(spec))
    new.rename(folder)
    return {"rows": len(spec["rows"]), "supervised_share": spec["supervised_share"]}


# -- slices -------------------------------------------------------------------------------------------------------------


def tests(given: Found, place: Place) -> Found:
    """The tests marked `gpu`: how many pass, and which do not. What is not finished in time is not counted as passed."""
    log = place.work / "tests.log"
    # the others' files need more libraries, and time to be read
    files = [str(file) for path in given["paths"] for file in _tests_in(ROOT / path) if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *files]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout=max(place.seconds - 15, 5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    return told_by_pytest(log.read_text(errors="replace"), code)


def _tests_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("test_*.py"))


def told_by_pytest(said: str, code: int | None) -> Found:
    """What a log of pytest says.

    Args:
        code: pytest's exit code; None: it was stopped.

    Raises:
        RuntimeError: pytest did not run the tests.
    """
    by_end: dict[str, list[str]] = {}
    for name, end in _TESTED.findall(said):
        by_end.setdefault(end, []).append(name)
    if code not in (0, 1, None) or not by_end:
        raise RuntimeError(f"pytest ended with {code}: {' '.join(said.strip().splitlines()[-1:])}")
    bad = [*by_end.get("FAILED", []), *by_end.get("ERROR", [])]
    counts = {name: len(by_end.get(name.upper(), [])) for name in ("passed", "skipped")}
    return {**counts, "failed": sorted(set(bad)), "finished": code is not None}


def products(given: Found, place: Place) -> Found:
    """The rate of plain bfloat16 products at the model's shapes."""
    from benchmarks import speed_worker

    return speed_worker.matrix_products(_spec(given, place))


def _spec(given: Found, place: Place) -> Found:
    spec: Found = json.loads((place.work / given["rows"] / "spec.json").read_text())
    return spec


def train(given: Found, place: Place) -> Found:
    """A system trains some steps on given rows."""
    from benchmarks import speed_worker

    spec, free = _spec(given, place), _free(place)
    with place.folder("train") as folder:
        more = [f"train.gradient_checkpointing={str(given['checkpointing']).lower()}", *given.get("more", ())]
        spec["overrides"] += [*more, f"run_dir={folder}/run"]
        found = speed_worker.SYSTEMS[given["system"]](spec)
        seconds = found["step_seconds"][1:]
        tokens = given["tokens"] * given["batch_size"]
    found["tokens_per_second"] = tokens * len(seconds) / sum(seconds)
    return found | {"supervised_share": spec["supervised_share"], "free": free}  # the plan asks for it


def profile(given: Found, place: Place) -> Found:
    """Where lora_lab's steps spend their time: seconds of a step in kernels of each part, and in none."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    from lora_lab.training import loop

    card, plain = place.device != "cpu", loop._log
    watched = (ProfilerActivity.CPU, ProfilerActivity.CUDA) if card else (ProfilerActivity.CPU,)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=_PROFILED, repeat=1)
    with torch.profiler.profile(activities=watched, schedule=schedule, acc_events=True) as watch:

        def stepped(*told: Any) -> None:
            plain(*told)
            watch.step()

        loop._log = stepped
        try:
            found = train({**given, "system": "lora_lab"}, place)
        finally:
            loop._log = plain
    kind, timed = (DeviceType.CUDA, "self_device_time_total") if card else (DeviceType.CPU, "self_cpu_time_total")
    kernels = [one for one in watch.key_averages() if one.device_type == kind and not one.is_user_annotation]
    spent = {one.key: getattr(one, timed) / 1e6 for one in kernels}
    return parts(spent, _PROFILED, statistics.median(found["step_seconds"][1:]))


def parts(spent: dict[str, float], steps: int, step_seconds: float) -> Found:
    """Seconds of a step by part.

    Args:
        spent: seconds of each kernel in all steps together.
    """
    seconds = dict.fromkeys([*_PARTS, _REST], 0.0)
    for name, own in spent.items():
        part = next((title for title, known in _PARTS.items() if known.search(name)), _REST)
        seconds[part] += own / steps
    most = sorted(spent.items(), key=lambda one: -one[1])[:_LARGEST]
    return {
        "step_seconds": step_seconds, "parts": seconds, "no_kernel": max(step_seconds - sum(seconds.values()), 0.0),
        "largest": {name[:120]: own / steps for name, own in most},
    }  # fmt: skip


def _free(place: Place) -> int:
    """Bytes of the card."""
    import torch

    from lora_lab.runtime import memory

    return 0 if place.device == "cpu" else memory.free_bytes(torch.device("cuda", 0))


def plan(given: Found, place: Place) -> Found:
    """GiB of each phase as `lora-lab plan` foresees them on a card: a dry run on any machine, of a base without weights.

    Args:
        given: `free`: bytes on the card before the run; 0: of no card that is known. `members`: of a sweep that share the pass, each with
            such rows.
    """
    from lora_lab.config import compose
    from lora_lab.plan import on_card
    from lora_lab.plan.plan import foresee
    from lora_lab.run import prepared

    size = given["batch_size"]
    with place.folder("plan") as folder:
        shapes.write_base(given["shape"], folder / "base", "nf4", weights=False)
        file = shapes.write_rows(folder / "rows.jsonl", given["tokens"], size)
        more = [
            f"model.path={folder}/base", "hardware=auto", f"train.batch_size={size}", f"train.micro_batch_size={size}", "train.max_steps=3",
            f"train.gradient_checkpointing={str(given['checkpointing']).lower()}", *given.get("more", ()),
        ]  # fmt: skip
        config = compose.compose(_run("base", file, folder, place, *more))
        data, found, task = prepared.build_data(config, prepared.find_base(config, weights=False))
        device = prepared.load.torch_device(config.hardware)
        setup = prepared.assemble(config, found, data, task, device, prepared.Stages())
        work = foresee(config, task, data.train, data.held_out)
        members = given.get("members", 1)
        phases = on_card.of_setup(setup, work.largest, work.evaluation, given["free"], members).phases
    return {name: size / 2**30 for name, size in phases.items()}


def run(given: Found, place: Place) -> Found:
    """A whole training run under a memory cap: whether it fits, and what was done so that it does."""
    from lora_lab.config import compose
    from lora_lab.errors import NoRoomError
    from lora_lab.run import pipeline

    size = given["batch_size"]
    with place.folder("run") as folder:
        file = shapes.write_rows(folder / "rows.jsonl", given["tokens"], given["steps"] * size)
        preset = [] if given["preset"] is None or place.device == "cpu" else [f"hardware={given['preset']}"]
        more = [*place.hardware(given["cap"]), *preset, f"train.batch_size={size}", f"train.max_steps={given['steps']}"]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                done = pipeline.train(compose.compose(_run(given["base"], file, folder, place, *more)))
        except NoRoomError as error:
            return {"fits": False, "said": str(error), "ladder": _ladder(said.getvalue())}
        result = json.loads(done.result.read_text())
    return {"fits": True, "ladder": _ladder(said.getvalue()), **_training(result)}


def _training(result: Found) -> Found:
    return {
        "tokens_per_second": result["tokens_per_second"],
        "peak_gib": result["peak_memory_gib"],
        "peak_reserved_gib": result["peak_memory_reserved_gib"],
    }


def _ladder(said: str) -> list[str]:
    """What a run said of a lack of memory."""
    lines = [line.strip().partition(" ") for line in said.splitlines()]
    told = [text.strip() for title, _, text in lines if title == "memory"]
    return [text for text in told if not text.startswith("at most")]  # which is the cap


def context(given: Found, place: Place) -> Found:
    """The longest row that a training step takes, checkpointed, under a memory cap: by doubling, then by halving the gap."""
    from lora_lab.config import compose
    from lora_lab.run import prepared

    ended = time.perf_counter() + place.seconds - 20
    with place.folder("context") as folder:
        file = shapes.write_rows(folder / "rows.jsonl", 64, 4)
        more = [
            *place.hardware(given["cap"]), "train.gradient_checkpointing=true", "train.batch_size=1", "speed.dequantize=always",
            f"train.offload_activations={str(given['offload']).lower()}",
        ]  # fmt: skip
        ready = prepared.prepare(compose.compose(_run(given["base"], file, folder, place, *more)))
        with ready.loaded() as live:
            return _longest_row(live, given["longest"], ended)


def _longest_row(live: Any, most: int, ended: float) -> Found:
    """In a function of its own, so that everything that holds the model ends before the model is let go."""
    from lora_lab.run import run_dir
    from lora_lab.run.setup import ADAPTER
    from lora_lab.runtime import memory
    from lora_lab.training import oom
    from lora_lab.training.cohort import Member

    setup, device = live.setup, live.model.device
    folder = run_dir.create(setup.config)
    member = Member(ADAPTER, setup.config, folder, setup.base, live.model, setup.training_rows(), setup.task)
    oom.apply(member)
    peaks: dict[int, Found] = {}

    def fits(tokens: int) -> bool:
        memory.forget_peaks(device)
        attempt = memory.Attempt()
        with attempt:
            _step(member, tokens, setup.accelerator)
        member.optimizer.zero_grad()
        if attempt.fitted:
            peaks[tokens] = {"peak_gib": memory.peak_gib(device), "peak_reserved_gib": memory.peak_reserved_gib(device)}
        if device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        return attempt.fitted

    low, high = bisect(fits, min(1024, most), most, lambda: time.perf_counter() < ended)
    member.log.close()
    return {"fits_tokens": low, "too_many_tokens": high, "most_tried": most, **peaks.get(low, {})}


def bisect(fits: Callable[[int], bool], first: int, most: int, go_on: Callable[[], bool]) -> tuple[int, int | None]:
    """The largest size that fitted, 0 for none, and the smallest that did not, None for none: no more than a 32nd apart, unless the
    time is over before.

    Args:
        first: size to begin with.
        most: no larger one is tried.
    """
    low, high, size = 0, None, first
    while go_on():
        if fits(size):
            low = size
            if size == most:
                break
        else:
            high = size
        size = min(2 * low, most) if high is None else (low + high) // 2
        if high is not None and high - low <= max(high // _CLOSE, 1):
            break
    return low, high


def _step(member: Any, tokens: int, accelerator: Any) -> None:
    """A training step on one row, half of which is learned, with everything that a run holds at that time."""
    from lora_lab.plan import memory
    from lora_lab.tasks.base import StepBatches
    from lora_lab.training.cohort import Share, learn, learning

    batch = memory.blank(memory.Shape((tokens,), tokens // 2))
    share = Share(member, [], StepBatches([batch], batch.weight), batch.weight, None)
    member.model.train()
    with member.task.forward.segments(member.model), learning([member]):
        learn([share], 0, accelerator)
    member.optimizer.step()


def merge(given: Found, place: Place) -> Found:
    """A merge under a memory cap: seconds and peaks, or the reason why there is none."""
    import torch

    from lora_lab.config import compose
    from lora_lab.errors import MergeError, NoRoomError
    from lora_lab.run import pipeline
    from lora_lab.runtime import memory

    with place.folder("merge") as folder:
        file = shapes.write_rows(folder / "rows.jsonl", 64, 8)
        hardware = place.hardware(given["cap"])
        quant = ["quant=nf4", "quant.cache=false"] if given["base"].endswith("-none") else []  # as published
        more = [*hardware, "train.batch_size=1", "train.max_steps=1", *quant]
        pipeline.train(compose.compose(_run(given["base"], file, folder, place, *more)))
        device = torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu")
        memory.forget_peaks(device)
        started = time.perf_counter()
        try:
            report = pipeline.merge(f"{folder}/run", [*_LOOSE, *(text for text in hardware if "memory" in text)])
        except (MergeError, NoRoomError) as error:
            return {"fits": not isinstance(error, NoRoomError), "said": str(error)}
        return {
            "fits": True, "merge_seconds": time.perf_counter() - started, "peak_gib": memory.peak_gib(device),
            "peak_reserved_gib": memory.peak_reserved_gib(device), "merged_into": report.get("base"),
        }  # fmt: skip


def sweep(given: Found, place: Place) -> Found:
    """Some members of a sweep, a row of each in a step: joint, in turns, or a run by itself."""
    from lora_lab import cli

    members, tokens = given["members"], given["tokens"]
    with place.folder("sweep") as folder:
        file = shapes.write_rows(folder / "rows.jsonl", tokens, given["steps"])
        more = ["train.batch_size=1", f"train.max_steps={given['steps']}"]
        words = [text for text in _run(given["base"], file, folder, place, *more) if not text.startswith("run_dir=")]
        if given["how"] == "single":
            code = _quietly(cli.main, ["train", *words, f"run_dir={folder}/runs/0"])
        else:
            rates = ",".join(f"{1e-4 * (place + 1):.1e}" for place in range(members))
            words = [text for text in words if not text.startswith("optim.lr=")]
            points = [f"optim.lr={rates}", f"sweep.execution={given['how']}", f"hydra.sweep.dir={folder}/runs"]
            code = _quietly(cli.main, ["train", "-m", *words, *points])
        results = [json.loads(file.read_text()) for file in sorted(folder.glob("runs/*/result.json"))]
    if code or len(results) != members:
        raise RuntimeError(f"{len(results)} of {members} members were trained; exit code {code}")
    speeds = [result["tokens_per_second"] for result in results]
    found = _training(results[0])
    return found | {
        "tokens_per_second": max(speeds),  # of all members together: each result has the whole cohort's
        "peak_gib": max(result["peak_memory_gib"] for result in results),
        "step_seconds": members * tokens / max(speeds),
        "losses": [result["train_loss"] for result in results],
    }


def _quietly(call: Callable[[list[str]], int], words: list[str]) -> int:
    """Call with what it prints put where errors go, so that it stands before a traceback."""
    with contextlib.redirect_stdout(sys.stderr):
        return call(words)


def generation(given: Found, place: Place) -> Found:
    """New tokens a second of answers that are generated together."""
    from lora_lab.config import compose
    from lora_lab.run import prepared

    with place.folder("generation") as folder:
        file = shapes.write_rows(folder / "rows.jsonl", 64, 4)
        ready = prepared.prepare(
            compose.compose(_run(given["base"], file, folder, place, "train.batch_size=1", *given["more"]))
        )
        with ready.loaded() as live:
            return _generated(live, given)


def _generated(live: Any, given: Found) -> Found:
    import torch

    from lora_lab.runtime import memory

    model, device = live.model.eval(), live.model.device
    ids = torch.randint(3, 250, (given["rows"], given["prompt"]), generator=torch.Generator().manual_seed(0)).to(device)
    options = {"do_sample": False, "min_new_tokens": given["new"], "max_new_tokens": given["new"], "pad_token_id": 0}
    seconds = []
    for _ in range(3):
        memory.forget_peaks(device)
        started = time.perf_counter()
        with live.setup.task.forward.generating(model), live.autocast(), torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "new_tokens_per_second": given["rows"] * given["new"] / statistics.median(seconds[1:]),
        "peak_gib": memory.peak_gib(device), "peak_reserved_gib": memory.peak_reserved_gib(device),
    }  # fmt: skip


# -- the machine --------------------------------------------------------------------------------------------------------


def ready(given: Found, place: Place) -> Found:
    """What would stop every cell here, a line for each problem: the card, bitsandbytes' library for it, room for a base.

    Args:
        given: `shape`: of the base that most is measured on.
    """
    import bitsandbytes.functional as four_bits
    import psutil
    import torch

    from lora_lab.errors import ConfigError
    from lora_lab.runtime import cards

    problems, weight = [], torch.eye(64, dtype=torch.bfloat16)
    if place.device != "cpu":
        try:
            cards.check_architecture("the card", 0)
            cards.check_bfloat16(0, trains=True)
        except ConfigError as error:
            return {"problems": [str(error)]}
        free, needed = torch.cuda.mem_get_info(0)[0], shapes.weights_of(given["shape"], "nf4")
        if free < needed:
            problems.append(f"card: {free / 2**30:.1f} GiB free, {given['shape']} in 4 bits takes {needed / 2**30:.1f}")
        weight = weight.cuda()
    try:
        packed, state = four_bits.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        if not torch.equal(four_bits.dequantize_4bit(packed, state), weight):
            problems.append(f"bitsandbytes: zeros and ones come back from 4 bits as others on {place.device}")
    except RuntimeError as error:  # no library for torch's CUDA
        problems.append(f"bitsandbytes on {place.device}: {' '.join(str(error).split())[:300]}")
    free, needed = psutil.virtual_memory().available, shapes.written_in(given["shape"])
    if free < needed:
        problems.append(f"memory: {free / 2**30:.1f} GiB free, a base is written in {needed / 2**30:.1f}")
    return {"problems": problems}


def imported(given: Found, place: Place) -> Found:
    """Another tool's modules, which are there or fail."""
    for name in given["modules"]:
        importlib.import_module(name)
    return {}


def stamp(given: Found, place: Place) -> Found:
    """What every cell carries: card, driver and versions."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if place.device == "cpu":
        return {"card": None, "card_gib": None, "driver": None, "versions": versions}
    import torch

    size = torch.cuda.get_device_properties(0).total_memory
    versions["cuda"] = str(torch.version.cuda)
    return {
        "card": torch.cuda.get_device_name(0), "card_gib": round(size / 2**30, 1), "driver": driver(), "versions": versions,
    }  # fmt: skip


def driver() -> str | None:
    """Version of NVIDIA's driver; None: there is none."""
    file = Path("/proc/driver/nvidia/version")
    if file.is_file():
        found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text())
        if found:
            return found[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.partition("\n")[0].strip() or None


KINDS: dict[str, Callable[[Found, Place], Found]] = {
    "base": base, "rows": rows, "tests": tests, "products": products, "train": train, "profile": profile, "plan": plan, "run": run, "context": context,
    "merge": merge, "sweep": sweep, "generation": generation, "stamp": stamp, "ready": ready,
    "imported": imported,
}  # fmt: skip


def measured(kind: str, given: Found, place: Place) -> Found:
    """What a cell finds, or `error`: a line that says why it found nothing."""
    try:
        return {"found": KINDS[kind](given, place)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text[:400]}"}


def main(given: Path, out: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spec = json.loads(given.read_text())
    if spec["group"] != "unsloth":  # unsloth sets what it wants
        from lora_lab.runtime import environment

        environment.before_torch()
    place = Place(Path(spec["work"]), spec["device"], spec["seconds"])
    out.write_text(json.dumps(measured(spec["kind"], spec["given"], place)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
