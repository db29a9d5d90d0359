"""A full disk: real file systems of every size in between, and at the opening of every single file.

A try: a process meets the full disk, says so in a sentence and leaves what was there before; after room was made, it goes on to
the same bytes, without litter.

`mount` needs rights; where it is not permitted, the tries on real file systems are skipped and a limit on the size of files
(RLIMIT_FSIZE), which needs none, remains.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.launcher import stripped
from tests.faults.programme import (
    FULL_DISKS,
    Done,
    Tally,
    World,
    differences,
    folder_digests,
    litter,
    run_digests,
    share,
    spread,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

TRAIN_AT, TRAIN_SIZES, CACHE_SIZES, MERGE_AT, EXPORT_AT, SWEEP_SIZES = (
    max(3, FULL_DISKS * part // 110) for part in (34, 20, 10, 20, 14, 12)
)  # tries of each kind
_ROOMY = "64M"
_TOLD = ("No space left", "too large", "cannot be written", "disk")


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own at `folder`; yields a function that changes its size."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here ({done.stderr.strip()})")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used(folder: Path) -> int:
    """KiB that a file system of pages of 4 KiB needs for this."""
    return sum(4 + 4 * (-(-file.stat().st_size // 4096)) for file in folder.rglob("*") if not file.is_symlink())


def told(tally: Tally, done: Done, what: str) -> bool:
    """Whether the full disk was told in a sentence; counts it if not."""
    if done.trace or done.hang:
        tally.add("traces", f"{what}: {done.last_line}")
        return False
    if done.rc and not any(word in done.said for word in _TOLD):
        tally.add("lost", f"{what}: refused for another reason: {done.last_line}")
        return False
    return True


def judge(
    tally: Tally, done: Done, found: dict[str, str], expected: dict[str, str], places: Sequence[Path], what: str
) -> None:
    """Count a try by how it went on after room was made."""
    left = [name for place in places for name in litter(place)]
    if done.trace or done.hang:
        tally.add("traces", f"{what}: then: {done.last_line}")
    elif done.rc:
        tally.add("lost", f"{what}: then: {done.last_line}")
    elif other := differences(found, expected):
        tally.add("silent", f"{what}: then other bytes in {other}")
    elif left:
        tally.add("lost", f"{what}: litter {left}")
    else:
        tally.add("recovered")


def go_on(world: World, run: Path, settings: list[str]) -> Done:
    return world.run("resume", f"run={run}") if (run / "config.yaml").is_file() else world.run("train", *settings)


def openings(events: Sequence[tuple[str, str, str]]) -> list[int]:
    """Numbers of the events before which files are opened or written: the first and the last of each name."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, (event, phase, path) in enumerate(events, start=1):
        if event in ("open", "write") and phase == "before" and not path.endswith(".lock"):
            first.setdefault(stripped(path), number)
            last[stripped(path)] = number
    return sorted({*first.values(), *last.values()})


@pytest.mark.parametrize("part", range(2))
def test_full_at_every_file_of_a_run(part, world, tally):
    counted, settings, run = tally("R3"), world.settings("run"), world.root / "run"
    world.keep()
    done, events = world.zygote.events(
        "train", *settings, roots=[world.root], cwd=str(world.root), env=world.environment()
    )
    assert done.rc == 0, done.said
    expected = run_digests(run)
    for number in share(spread(openings(events), TRAIN_AT), part, 2):
        world.restore()
        what = f"full at {events[number - 1][2]} (event {number})"
        if told(counted, world.run("train", *settings, roots=[str(world.root)], limit_at=number), what):
            done = go_on(world, run, settings)
            judge(counted, done, run_digests(run), expected, [world.root], what)
    assert not counted.problems, "\n".join(counted.problems)


@pytest.mark.parametrize("where", ["run", "cache"])
def test_file_systems_of_every_size(where, world, tally):
    """The run, or the cache, lies on a file system that is too small."""
    counted, mount = tally("R3"), world.root / "mount"
    cache = mount / "cache" if where == "cache" else world.cache
    settings = world.settings("mount/run" if where == "run" else "run")
    run = Path(settings[-1].removeprefix("run_dir="))
    environment = {"LORA_LAB_CACHE": str(cache)}

    def start(*argv: str) -> Done:
        return world.zygote.run(*argv, cwd="/", env=environment)

    with file_system(mount, _ROOMY):
        assert start("train", *settings).rc == 0
        expected, whole = run_digests(run), used(mount)
    wanted = {"run": TRAIN_SIZES, "cache": CACHE_SIZES}[where]
    for size in spread(range(4, whole + 4, 4), wanted):
        shutil.rmtree(run, ignore_errors=True)
        what = f"{where} on {size} KiB"
        with file_system(mount, f"{size}k") as resize:
            if told(counted, start("train", *settings), what):
                resize(_ROOMY)
                begun = (run / "config.yaml").is_file()
                done = start("resume", f"run={run}") if begun else start("train", *settings)
                judge(counted, done, run_digests(run), expected, [run, mount], what)
    assert not counted.problems, "\n".join(counted.problems)


_MERGE = ("merge", ["export.dtype=bfloat16"], ["export.dtype=float32"], "merged", MERGE_AT)
_EXPORT = ("export", ["export.targets=[adapter]"], ["export.targets=[adapter]"], "export/adapter", EXPORT_AT)


@pytest.mark.parametrize(("verb", "first", "then", "made", "wanted"), [_MERGE, _EXPORT], ids=["merge", "export"])
def test_full_at_every_file_of_what_is_made_of_a_run(verb, first, then, made, wanted, world, tally):
    """What was made before stays whole."""
    counted, run = tally("R3"), world.root / "run"
    world.must("train", *world.settings("run"))
    world.must(verb, f"run={run}", *first)
    world.keep()
    before, argv = folder_digests(run / made), [verb, f"run={run}", *then]
    done, events = world.zygote.events(*argv, roots=[run], cwd=str(world.root), env=world.environment())
    assert done.rc == 0, done.said
    expected = folder_digests(run / made)
    for number in spread(openings(events), wanted):
        world.restore()
        what = f"{verb}: full at {events[number - 1][2]} (event {number})"
        if not told(counted, world.run(*argv, roots=[str(run)], limit_at=number), what):
            continue
        if folder_digests(run / made) not in (before, expected):
            counted.add("lost", f"{what}: what was there is gone")
            continue
        judge(counted, world.run(*argv), folder_digests(run / made), expected, [run], what)
    assert not counted.problems, "\n".join(counted.problems)


def test_a_sweep_on_file_systems_of_every_size(world, tally):
    counted, mount = tally("R3"), world.root / "mount"
    folder = mount / "sweep"
    argv = [
        "train",
        "-m",
        *world.settings("x")[:-1],
        "adapter.r=2,4",
        "sweep.execution=interleaved",
        f"hydra.sweep.dir={folder}",
    ]

    def found() -> dict[str, str]:
        runs = sorted(one.parent for one in folder.glob("*/config.yaml"))
        return {f"{run.name}/{name}": digest for run in runs for name, digest in run_digests(run).items()}

    with file_system(mount, _ROOMY):
        world.must(*argv)
        expected, whole = found(), used(mount)
    for size in spread(range(8, whole + 4, 4), SWEEP_SIZES):
        what = f"sweep on {size} KiB"
        with file_system(mount, f"{size}k") as resize:
            if told(counted, world.run(*argv), what):
                resize(_ROOMY)
                judge(counted, world.run(*argv), found(), expected, [mount], what)
    assert not counted.problems, "\n".join(counted.problems)


def test_a_full_disk_is_really_full(tmp_path):
    """The file system that the programme makes says ENOSPC."""
    from tests.faults import launcher

    with file_system(tmp_path / "small", "64k"):
        launcher.fill(str(tmp_path / "small"))
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "small/a").write_bytes(bytes(8192))
        assert os.statvfs(tmp_path / "small").f_bfree == 0
