"""The groups of the configuration and the names that can be chosen in each; found without Hydra."""

from __future__ import annotations

from pathlib import Path

GROUPS = (
    "model quant adapter task data optim train hardware speed tracker export sweep serve recipe".split()
)  # folders of conf/, in the order of a run


def conf_dir() -> Path:
    """The folder of the shipped groups and recipes: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parents[1] / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def choices(group: str, config_dir: str | None = None) -> list[str]:
    """Names that `group=NAME` accepts, the user's own folder included."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
