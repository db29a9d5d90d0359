"""Publish exported folders on a hub, when the user says where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_lab.base.resolve import is_hub_id
from lora_lab.config.merge import ExportConfig
from lora_lab.errors import ExportError
from lora_lab.runtime import console


def check(export: ExportConfig) -> Iterator[str]:
    """Why nothing could be uploaded."""
    if export.push_to_hub is None:
        return
    if not is_hub_id(export.push_to_hub):
        yield f"export.push_to_hub={export.push_to_hub}: must be owner/name."
    if not export.targets:
        yield f"export.push_to_hub={export.push_to_hub}: nothing is exported. Set export.targets."
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        yield f"export.push_to_hub={export.push_to_hub}: HF_HUB_OFFLINE is set. Unset it, or drop the key."


def push(folders: dict[str, Path], export: ExportConfig) -> None:
    """Upload each target's folder to a private repository, several as `owner/name-target`.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`; it is never read or written here.

    Raises:
        ExportError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for name, folder in folders.items():
        repository = export.push_to_hub if len(folders) == 1 else f"{export.push_to_hub}-{name}"
        try:
            HfApi().create_repo(repository, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["manifest.json"])
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"export.push_to_hub={repository}: {reason}. {folder} is kept.") from error
        console.say("hub", f"{folder} -> {repository} (private)")
