"""What travels to a machine without a network: which wheels, for whom, how large; and there, which of them are missing.

Three groups, each a folder of wheels that becomes a folder of modules: `own` (lora_lab and its tests), `trl` and `unsloth`. TRL runs with
lora_lab's libraries. Unsloth wants others, which lie before them on its path. torch and triton are the machine's own. Python's own modules
and pip are all that is needed here.
"""

from __future__ import annotations

import base64
import dataclasses
import email.parser
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.sources import ROOT, now

try:
    from packaging.requirements import Requirement
    from packaging.tags import parse_tag, sys_tags
except ImportError:  # a bare machine has pip's
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.tags import parse_tag, sys_tags  # type: ignore[assignment]

OWN = "own"
PEERS = {"trl": "trl>=1.16", "unsloth": "unsloth>=2026.10"}
GROUPS = (OWN, *PEERS)
MANIFEST = "wheels.json"
_EXTRAS = {"liger": None, "slurm": None, "dev": ("pytest", "pytest-timeout")}  # None: all that it names
_SOURCES_ONLY = ("antlr4-python3-runtime", "rouge_score", "seqeval")  # the index has no wheels of these
_OF_A_CARD = ("torch", "triton")  # never replaced: they are what fits the machine's card
_THERE = "+there"  # marks versions that the other machine has
_LIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches each by itself
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(?:cuda(\d+)|rocm\d+|xpu\d+)\.so")
_INTERFACE = "studio/"  # unsloth's pages for a browser, most of its wheel; training imports nothing of them


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine that wheels are collected for."""

    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    cuda: str = "130"  # bitsandbytes' library for it
    there: Mapping[str, str] = dataclasses.field(default_factory=dict)  # versions of what it has, torch among them


@dataclasses.dataclass(frozen=True)
class Found:
    """A library that is needed: where it is, or what is wrong."""

    name: str
    bounds: str
    needed_by: str
    version: str | None = None  # None: it is missing
    wheel: Path | None = None  # None: it is installed
    fits: bool = False

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.name}{self.bounds}: missing (needed by {self.needed_by})"
        where = f"wheel {self.wheel.name}" if self.wheel else "installed"
        wrong = "" if self.fits else f", but {self.needed_by} needs {self.bounds}"
        return f"{self.name} {self.version}: {where}{wrong}"


def plain(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(card: bool = True) -> list[Requirement]:
    """What lora_lab and the tests on a card ask for, by pyproject.toml.

    Args:
        card: there is one, for which kernels are wanted too.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    for extra, names in _EXTRAS.items():
        own = project["optional-dependencies"][extra] if card or extra != "liger" else []
        texts += [text for text in own if names is None or plain(Requirement(text).name) in names]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, str]:
    """The versions that the tests pass with, by plain name."""
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {plain(name): version for name, _, version in lines}


# -- what is here -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Distribution:
    version: str
    requires: tuple[str, ...]
    wheel: Path | None = None


@functools.cache
def _installed(*sites: Path) -> Mapping[str, _Distribution]:
    """By plain name; of several the first on the path, as Python imports it."""
    found: dict[str, _Distribution] = {}
    for one in importlib.metadata.distributions(path=[*map(str, sites), *sys.path]):
        if one.metadata["Name"]:
            found.setdefault(plain(one.metadata["Name"]), _Distribution(one.version, tuple(one.requires or ())))
    return found


def _wheels(folder: Path) -> dict[str, _Distribution]:
    found = {}
    for file in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(file) as archive:
            [name] = [one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)]
            said = email.parser.HeaderParser().parsestr(archive.read(name).decode())
        found[plain(said["Name"])] = _Distribution(said["Version"], tuple(said.get_all("Requires-Dist") or ()), file)
    return found


def resolve(
    wanted: Iterable[Requirement], have: Mapping[str, _Distribution], by: str = "lora_lab", python: str | None = None
) -> list[Found]:
    """Everything that some requirements ask for, and what that asks for in turn, without a network.

    Args:
        have: by plain name. What is not there cannot be asked what it needs.
        python: version of the Python that they are asked for; None: of this one.
    """
    own = _python(python)
    found: dict[str, Found] = {}
    queue = [(one, by, {""}) for one in wanted]  # a requirement, whose it is, and which extras of that are asked for
    asked: dict[str, set[str]] = {}
    for one, needed_by, extras in queue:
        if one.marker is not None and not any(one.marker.evaluate({**own, "extra": extra}) for extra in extras):
            continue
        name, there = plain(one.name), have.get(plain(one.name))
        fits = there is not None and one.specifier.contains(there.version, prereleases=True)
        known = found.get(name)
        if known is None or (known.fits and not fits):
            version, wheel = (None, None) if there is None else (there.version, there.wheel)
            found[name] = Found(one.name, str(one.specifier), needed_by, version, wheel, fits)
        new = {"", *one.extras} - asked.setdefault(name, set())
        if there is not None and new:
            asked[name] |= new
            queue += [(Requirement(text), one.name, new) for text in there.requires]
    return list(found.values())


def own(folder: Path, card: bool = True) -> list[Found]:
    """What lora_lab needs: as it is installed, where that is all of it; else as it would be with the wheels in the folder."""
    wanted, installed = requirements(card), _installed()
    found = resolve(wanted, installed)
    if all(one.fits for one in found):
        return found
    return resolve(wanted, {**installed, **_wheels(folder / OWN), **_own_torch(installed)})


def misfits(folder: Path) -> list[str]:
    """Wheels of another Python or another kind of machine."""
    python, own = ".".join(map(str, sys.version_info[:2])), set(sys_tags())
    return [
        f"{file.name}: not for this machine with Python {python}; collect with --python {python}"
        for file in sorted(folder.glob("*/*.whl"))
        if own.isdisjoint(parse_tag("-".join(file.stem.split("-")[-3:])))
    ]


def peer(name: str, folder: Path) -> list[Found]:
    """The same for another tool."""
    installed = _installed()
    have = {**installed, **_wheels(folder / OWN), **_wheels(folder / name), **_own_torch(installed)}
    return resolve([Requirement(PEERS[name])], have, "the comparison")


def _own_torch(installed: Mapping[str, _Distribution]) -> dict[str, _Distribution]:
    """Of these no wheel is ever taken."""
    return {name: installed[name] for name in _OF_A_CARD if name in installed}


# -- unpacking ----------------------------------------------------------------------------------------------------------


def unpack(folder: Path, sites: Path, card: bool = True) -> dict[str, list[Path]]:
    """Unpack each group's wheels that lie in `folder`, once; for each group the folders that come first on Python's path."""
    made = {name: _unpacked(folder / name, sites / name) for name in GROUPS}
    base = [] if all(one.fits for one in resolve(requirements(card), _installed())) else made[OWN]
    return {OWN: base} | {name: [*made[name], *base] for name in PEERS}


def _unpacked(wheels: Path, site: Path) -> list[Path]:
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return []
    stamp, names = site / "unpacked.json", [file.name for file in files]
    if stamp.is_file() and json.loads(stamp.read_text()) == names:
        return [site]
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for file in files:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(site)
    for kind in ("purelib", "platlib"):
        for part in site.glob(f"*.data/{kind}"):
            shutil.copytree(part, site, dirs_exist_ok=True)
    stamp.write_text(json.dumps(names))
    return [site]


# -- collecting ---------------------------------------------------------------------------------------------------------


def collect(folder: Path, target: Target) -> dict[str, Any]:
    """Download what another machine needs into `folder`, a folder for each group; what is there, as `wheels.json` says it.

    Raises:
        RuntimeError: pip finds no versions that fit together, or does not reach an index.
    """
    with tempfile.TemporaryDirectory(prefix="lora_lab_wheels_") as temporary:
        places = Path(temporary) / "built", Path(temporary) / "there"
        build = [f"{name}=={pins()[plain(name)]}" for name in _SOURCES_ONLY]
        _pip("wheel", "--no-deps", "--wheel-dir", str(places[0]), *build)
        places[1].mkdir()
        for name, version in target.there.items():
            _stub(places[1], name, version)
        groups: dict[str, dict[str, str]] = {}
        for group in GROUPS:
            groups[group] = _chosen(group, target, places, Path(temporary))
        for group, versions in groups.items():
            more = dict(versions.items() - groups[OWN].items()) if group != OWN else versions
            _download(more, folder / group, target, places)
    for file in folder.glob("*/bitsandbytes-*.whl"):
        keep_one_library(file, target.cuda)
    for file in folder.glob("*/unsloth-*.whl"):
        _rewrite(file, without_pages)
    manifest = {
        "python": target.python, "cuda": target.cuda, "there": dict(target.there), "when": now(),
        "groups": {group: _described(folder, group, target) for group in GROUPS},
    }  # fmt: skip
    lines = json.dumps(manifest, indent=1)
    (folder / MANIFEST).write_text(lines + "\n")
    return manifest


def _asked(group: str) -> list[str]:
    """What a group's wheels are for."""
    return [str(one) for one in requirements()] if group == OWN else [PEERS[group]]


def _chosen(group: str, target: Target, places: Iterable[Path], folder: Path) -> dict[str, str]:
    """The versions of a group for another machine; what is there, and is what all the others ask for, is left out."""
    wanted, tested = _asked(group), pins() if group in (OWN, "trl") else {}
    there = {plain(name): version for name, version in target.there.items()}
    own = {name: version for name, version in there.items() if name in _OF_A_CARD}
    first = _by_pip(wanted, {**tested, **_marked(own)}, target, places, folder)  # says what is asked for
    texts = [*wanted, *(text for one in first for text in one.get("requires_dist", ()))]
    kept = _marked(_as_asked(there, map(Requirement, texts), target.python) | own)
    found = _by_pip(wanted, {**tested, **kept}, target, places, folder)
    return {plain(one["name"]): one["version"] for one in found if not one["version"].endswith(_THERE)}


def _marked(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{version}{_THERE}" for name, version in versions.items()}


def _as_asked(there: Mapping[str, str], asked: Iterable[Requirement], python: str) -> dict[str, str]:
    """Of what is there all that nobody asks for in another version."""
    wrong = {
        plain(one.name)
        for one in asked
        if plain(one.name) in there and not one.specifier.contains(there[plain(one.name)], prereleases=True)
        and (one.marker is None or one.marker.evaluate({**_python(python), "extra": ""}))
    }  # fmt: skip
    return {name: version for name, version in there.items() if name not in wrong}


def _python(version: str | None) -> dict[str, str]:
    """What markers say of a Python; None: of this one."""
    return {} if version is None else {"python_version": version, "python_full_version": f"{version}.0"}


def _by_pip(
    wanted: list[str], fixed: Mapping[str, str], target: Target, places: Iterable[Path], folder: Path
) -> list[dict[str, Any]]:
    """The metadata of what pip would install on another machine, with some versions given."""
    report, constraints = folder / "report.json", folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))
    _pip(
        "install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", str(folder / "nowhere"),
        *_for(target), *_found_in(places), "--constraint", str(constraints), *wanted,
    )  # fmt: skip
    return [one["metadata"] for one in json.loads(report.read_text())["install"]]


def _download(versions: Mapping[str, str], folder: Path, target: Target, places: Iterable[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    named = [f"{name}=={version}" for name, version in sorted(versions.items())]
    if named:
        _pip("download", "--no-deps", "--dest", str(folder), *_for(target), *_found_in(places), *named)


def _for(target: Target) -> list[str]:
    tags = [f"manylinux_2_{number}_x86_64" for number in _LIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.python, *platforms]


def _found_in(places: Iterable[Path]) -> Iterator[str]:
    for place in places:
        yield from ("--find-links", str(place))


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-500:]]
        raise RuntimeError(f"pip {words[0]}: {' '.join(said)}")


def _stub(folder: Path, name: str, version: str) -> None:
    """A wheel without content, so that pip takes what is there as it is, and nothing in its place."""
    own = f"{name.replace('-', '_')}-{version}{_THERE}"
    with zipfile.ZipFile(folder / f"{own}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{own}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}{_THERE}\n"
        )
        archive.writestr(f"{own}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{own}.dist-info/RECORD", "")


def keep_one_library(file: Path, cuda: str) -> None:
    """Make bitsandbytes' wheel smaller, in place: of its libraries those for a CPU and for one CUDA stay.

    Raises:
        RuntimeError: it has none for that CUDA.
    """
    with zipfile.ZipFile(file) as archive:
        known = [one[1] for name in archive.namelist() if (one := _LIBRARY.fullmatch(name)) and one[1]]
    if cuda not in known:
        raise RuntimeError(f"{file.name}: no library for CUDA {cuda}; there are {', '.join(known)}")
    _rewrite(file, lambda name: (one := _LIBRARY.fullmatch(name)) is None or one[1] == cuda)


def without_pages(name: str) -> bool:
    """Whether a file of unsloth's wheel goes along."""
    return not name.startswith(_INTERFACE)


def _rewrite(file: Path, stays: Callable[[str], bool]) -> None:
    """A wheel with some of its files, in place."""
    smaller = file.with_suffix(".smaller")
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as kept:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        lines = []
        for name in filter(stays, archive.namelist()):
            content = archive.read(name)
            if name != record:
                kept.writestr(name, content)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                lines.append(f"{name},sha256={digest},{len(content)}\n")
        kept.writestr(record, "".join([*lines, f"{record},,\n"]))
    smaller.replace(file)


def _described(folder: Path, group: str, target: Target) -> list[dict[str, Any]]:
    """Of a group each wheel, and what asked for it first."""
    files = _wheels(folder / group)
    there = {plain(name): _Distribution(version, ()) for name, version in target.there.items()}
    by = "lora_lab" if group == OWN else "the comparison"
    wanted = map(Requirement, _asked(group))
    found = resolve(wanted, {**there, **_wheels(folder / OWN), **files}, by, target.python)
    reasons = {plain(one.name): one.needed_by for one in found}
    return [
        {
            "name": name, "version": one.version, "needed_by": reasons.get(name), "file": one.wheel.name,
            "mib": round(one.wheel.stat().st_size / 2**20, 2),
        }
        for name, one in files.items()
        if one.wheel is not None
    ]  # fmt: skip


def sizes(manifest: Mapping[str, Any]) -> dict[str, float]:
    """MiB of each group's wheels."""
    return {group: round(sum(one["mib"] for one in files), 1) for group, files in manifest["groups"].items()}
