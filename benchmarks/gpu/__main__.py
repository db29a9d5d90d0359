"""Measure lora_lab on a card, beside other tools: python -m benchmarks.gpu [--check] [--slices 1,2] [--seconds 460] [--shapes tiny]

Runs on a machine without a network whose Python has a torch for its card. What else is needed travels as wheels: make them on a machine
with a network (--wheels), bring this repository and the folder of wheels, look what is missing (--check), and measure. Bases are made on
the spot, of true shape with random weights.

Slices, in this order, so that a run that is cut off has answered the first questions:
1 tests on the card   2 8B in 4 bits beside TRL + peft and Unsloth, each acceleration left out   3 less memory: what fits, the longest row,
failed allocations, merging   4 joint sweeps   5 other sizes, short rows, generation

Each cell is measured in a process of its own and written at once (OUT/slice_N.json), with card, driver, versions and commit. The same
command again goes on where it stopped. At the end docs/gpu.md is made. Without a card, --shapes tiny runs all of it on the CPU, to try it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import cells, report, runner, shapes, slices, wheels
from benchmarks.gpu.runner import say
from benchmarks.sources import ROOT, commit, now

_OUT = ROOT / "benchmarks" / "results" / "gpu"
_WORK = ROOT / ".bench-gpu"
_TORCH = """
import json, torch
name = why = None
try:
    torch.cuda.init()
    name = torch.cuda.get_device_name(0)
except (AssertionError, RuntimeError) as error:
    why = str(error).partition("\\n")[0]
print(json.dumps([torch.__version__, torch.version.cuda, name, why]))
"""
_CHECKING = 120  # seconds to import libraries on a machine that has just started
_BESIDE = 2 * 2**30  # bytes of disk for runs, beside bases


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    args = _parser().parse_args(argv)
    if args.wheels:
        return _collect(args)
    if args.plans:
        return _plans(args)
    if args.report:
        return _report(args)
    missing = check(args)
    if not missing:
        bench = _bench(args)
        missing = _stopping(args, bench.launch)
    if args.check or missing:
        say(f"{len(missing)} missing: {'; '.join(missing)}" if missing else "nothing is missing")
        return 1 if missing else 0
    later = []
    for place, number in enumerate(args.slices):
        say(f"slice {number}: {slices.TITLES[number]}")
        later += bench.run(number)
        _report(args)
        bench.clean([*args.slices[place:], *(() if not later else args.slices)])
    if later:
        say(f"{len(later)} cells are left; the same command goes on with them")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say what is here and what is missing; 1: something is")
    parser.add_argument("--slices", type=_numbers, default=list(slices.TITLES), help="of 1 to 5; all")
    parser.add_argument("--seconds", type=_seconds, default=460.0, help="for each slice, below 480 (460)")
    parser.add_argument("--shapes", choices=list(slices.SCALES), default="full", help="tiny: on the CPU (full)")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cells with it in their name; several: any of them"
    )
    parser.add_argument("--retry", action="store_true", help="measure cells that failed again")
    parser.add_argument("--out", type=Path, help="folder of what is measured (benchmarks/results/gpu; tiny: in --work)")
    parser.add_argument("--work", type=Path, default=_WORK, help="folder of wheels, bases and rows (.bench-gpu)")
    parser.add_argument("--report", action="store_true", help="only make the page of what is measured")
    parser.add_argument("--plans", action="store_true", help="only dry runs, on any machine, into OUT/plans.json")
    collecting = parser.add_argument_group("collecting wheels, where there is a network")
    collecting.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="download into FOLDER; bring it as WORK/wheels"
    )
    collecting.add_argument("--python", default=wheels.Target.python, help="version of the other machine's Python")
    collecting.add_argument("--cuda", default=wheels.Target.cuda, help="bitsandbytes' library that is kept (130)")
    collecting.add_argument(
        "--there", type=_versions, default={"torch": "2.11.0", "triton": "3.6.0"},
        help="what the other machine has and keeps: NAME==VERSION,... or a file of such lines, as pip freeze writes it",
    )  # fmt: skip
    return parser


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if unknown := [number for number in found if number not in slices.TITLES]:
        raise argparse.ArgumentTypeError(f"no slice {unknown[0]}; there are {', '.join(map(str, slices.TITLES))}")
    return found


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 480:
        raise argparse.ArgumentTypeError("a slice stays below 8 minutes (480 s)")
    return seconds


def _versions(text: str) -> dict[str, str]:
    lines = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    pairs = [line.partition("==") for line in lines if "==" in line]
    return {name.strip(): version.partition("+")[0].strip() for name, _, version in pairs}


def _device(args: argparse.Namespace) -> str:
    return "cpu" if args.shapes == "tiny" else "cuda"


def _out(args: argparse.Namespace) -> Path:
    out: Path = args.out or (_OUT if args.shapes == "full" else args.work / "tiny")
    return out


def _bench(args: argparse.Namespace) -> runner.Bench:
    work = args.work / args.shapes
    paths = wheels.unpack(args.work / "wheels", args.work / "site", _device(args) != "cpu")
    launch = runner.by_process(work.absolute(), _device(args), sys.executable, paths)
    scale = slices.SCALES[args.shapes]
    return runner.Bench(_out(args), work.absolute(), scale, launch, args.seconds, args.retry, args.only)


def _report(args: argparse.Namespace) -> int:
    out = _out(args)
    page = ROOT / "docs" / "gpu.md" if out == _OUT else out / "gpu.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report.page(out, slices.SCALES[args.shapes]))
    say(f"{page}: made")
    return 0


# -- before a minute is spent -------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> list[str]:
    """Print what is here, and give what is missing."""
    folder = args.work / "wheels"
    own = wheels.own(folder, _device(args) != "cpu")
    missing = [str(one) for one in own if not one.fits]
    for one in own:
        say(f"{'ok     ' if one.fits else 'MISSING'} {one}")
    for name in wheels.PEERS:
        lacking = [str(one) for one in wheels.peer(name, folder) if not one.fits]
        say(f"{'absent ' if lacking else 'ok     '} {name}{': ' + '; '.join(lacking[:3]) if lacking else ''}")
    return missing + wheels.misfits(folder) + _card(_device(args)) + _room(args)


def _stopping(args: argparse.Namespace, launch: runner.Launch) -> list[str]:
    """What would stop every cell although everything is here, asked in a process that has the libraries; what it takes of the other
    tools is only told, and only where nothing is measured afterwards."""
    told = launch("ready", {"shape": slices.SCALES[args.shapes].main}, _CHECKING, wheels.OWN)
    problems: list[str] = told["found"]["problems"] if "found" in told else [told["error"]]
    for line in problems:
        say(f"MISSING {line}")
    for name in wheels.PEERS if args.check else ():
        if all(one.fits for one in wheels.peer(name, args.work / "wheels")):
            error = launch("imported", {"modules": [name]}, _CHECKING, name).get("error")
            say(f"BROKEN  {name}: {error}" if error else f"ok      {name} can be imported")
    return problems


def _card(device: str) -> list[str]:
    """What is wrong with torch and the card."""
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"torch: cannot be imported ({' '.join(done.stderr.strip().splitlines()[-1:])})"]
    version, cuda, name, why = json.loads(done.stdout)
    driver = cells.driver()
    say(f"ok      torch {version}, CUDA {cuda}, card {name}, driver {driver}")
    if device == "cuda" and name is None:
        reason = f"torch {version} sees none ({why}; driver {driver or 'not found'})"
        return [f"a card: {reason}; --shapes tiny runs everything on the CPU"]
    return []


def _room(args: argparse.Namespace) -> list[str]:
    """Disk that the largest of the slices takes at once, beside what is there."""
    args.work.mkdir(parents=True, exist_ok=True)
    scale, free = slices.SCALES[args.shapes], shutil.disk_usage(args.work).free
    needed = max(_bytes(number, scale, args.work / args.shapes) for number in args.slices) + _BESIDE
    text = f"disk: {needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free in {args.work}"
    say(f"{'ok     ' if needed <= free else 'MISSING'} {text}")
    return [] if needed <= free else [text]


def _bytes(number: int, scale: slices.Scale, work: Path) -> int:
    """Of the bases of a slice that are not there yet; merging writes a base in bfloat16 beside them."""
    own, total = slices.of(number, scale), 0
    paths = {path for cell in own for path in cell.needs}
    bases = {path if path.startswith("bases/") else slices.prepared(path, scale).needs[0] for path in paths}
    for base in bases:
        shape, _, quant = base.removeprefix("bases/").rpartition("-")
        if not (work / base).exists():
            total += shapes.weights_of(shape, quant)
    return total + (shapes.weights_of(scale.main, "none") if any(cell.kind == "merge" for cell in own) else 0)


# -- elsewhere ----------------------------------------------------------------------------------------------------------


def _collect(args: argparse.Namespace) -> int:
    args.wheels.mkdir(parents=True, exist_ok=True)
    try:
        manifest = wheels.collect(args.wheels, wheels.Target(args.python, args.cuda, args.there))
    except RuntimeError as error:
        print(f"the wheels cannot be collected: {error}", file=sys.stderr)
        return 1
    for group, files in manifest["groups"].items():
        for one in files:
            say(f"{group:8} {one['name']} {one['version']}  {one['mib']:.2f} MiB  (needed by {one['needed_by']})")
    say(", ".join(f"{group} {size:.1f} MiB" for group, size in wheels.sizes(manifest).items()))
    return 0


def _plans(args: argparse.Namespace) -> int:
    """Dry runs of everything that lora_lab trains in slices 2 and 5, of no card and of each that was measured; of no card also the row and
    the members that are aimed at."""
    out, work = _out(args), (args.work / "plans").absolute()
    launch = runner.by_process(work, "cpu", sys.executable, {})
    file, scale = out / "plans.json", slices.SCALES[args.shapes]
    known = {(one["name"], one["card"]): one for one in runner.read(file)}
    versions: dict[str, Any] = {}
    for name, card, given in _foreseen(out, scale):
        if (name, card) in known:
            continue
        versions = versions or launch("stamp", {}, 60, "own")["found"]["versions"]
        told = launch("plan", given, 600, "own")
        one = {"name": name, "card": card, "commit": commit(), "when": now(), "versions": versions, **told}
        known[name, card] = one
        runner.write(file, list(known.values()))
        say(f"{name}, {card or 'no card'}: {told}")
    return _report(args)


def _foreseen(out: Path, scale: slices.Scale) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Name, card, and what is planned."""
    ours = [cell for number in (2, 5) for cell in slices.of(number, scale) if cell.given.get("system") == "lora_lab"]
    measured = [one for number in (2, 5) for one in runner.read(out / f"slice_{number}.json") if "found" in one]
    for cell in sorted(ours, key=lambda cell: bool(cell.given["more"])):  # the main ones first
        yield cell.name, None, {**cell.given, "free": 0}
    for offload in (False, True):
        name, given = slices.aimed_row(scale, offload)
        yield name, None, {**given, "free": 0}
    for name, given in slices.joint_steps(scale):
        yield name, None, {**given, "free": 0}
    for one in measured:
        if one["given"].get("system") == "lora_lab":
            yield one["name"], one["card"], {**one["given"], "free": one["found"]["free"]}


if __name__ == "__main__":
    sys.exit(main())
