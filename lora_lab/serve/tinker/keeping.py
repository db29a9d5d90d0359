"""What a training server keeps on disk, below `serve.root`: sessions, models and checkpoints. Live weights are in memory alone.

tinker/SESSION/session.json
tinker/SESSION/train-N/model.json
tinker/SESSION/train-N/weights/NAME/           an ordinary run folder, with the optimizer's state beside it
tinker/SESSION/train-N/sampler_weights/NAME/   the same without it
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load_file, save_file

from lora_lab.adapters import files
from lora_lab.adapters.attach import coverage
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.errors import CheckpointError, RunError
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import read_json, reading
from lora_lab.serve.config import ServeConfig
from lora_lab.serve.wishes import RequestError

if TYPE_CHECKING:
    import torch

    from lora_lab.serve.shelf import Opened
    from lora_lab.serve.tinker.workshop import Learner, Workshop

KINDS = {"weights": "training", "sampler_weights": "sampler"}
_SESSION, _NAME = re.compile(r"[0-9a-f]{32}"), re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_MODEL = re.compile(r"([0-9a-f]{32}):train:(\d{1,18})")
_FACTS, _STATE, _UNFINISHED = "checkpoint.json", "state", ".new-"
_OPTIMIZER = "optimizer.safetensors"


def now() -> str:
    """The time, as it is written down."""
    return datetime.datetime.now(datetime.UTC).isoformat()


@dataclasses.dataclass
class Session:
    """A client's stay."""

    session_id: str
    owner: str  # the key's name
    created: str
    user_metadata: dict[str, Any] | None = None
    samplers: dict[str, str | None] = dataclasses.field(default_factory=dict)  # id -> path; None: the base


@dataclasses.dataclass
class Model:
    """An adapter that a client trains, or trained."""

    model_id: str
    owner: str
    created: str
    rank: int
    train_attn: bool
    train_mlp: bool
    user_metadata: dict[str, Any] | None = None
    last_request: str = dataclasses.field(default_factory=now)
    train_unembed: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A saved adapter."""

    model_id: str
    kind: str  # of KINDS
    name: str
    folder: Path
    facts: dict[str, Any]

    @property
    def path(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @property
    def expired(self) -> bool:
        told = self.facts.get("expires_at")
        return isinstance(told, str) and told <= now()

    def described(self) -> dict[str, Any]:
        """As the SDK reads it."""
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": KINDS[self.kind],
            "time": self.facts["time"],
            "tinker_path": self.path,
            "size_bytes": size,
            "public": False,
            "user_metadata": self.facts.get("user_metadata"),
            "expires_at": self.facts.get("expires_at"),
        }


class Keeping:
    """See above. One server at a time works in it."""

    def __init__(self, root: Path, base: Opened):
        """
        Raises:
            RunError: another server works in it, or it cannot be written.
        """
        self._root, self._base = root / "tinker", base
        self._held = contextlib.ExitStack()
        self._lock = threading.Lock()  # of what sessions note
        try:
            storage.make_folders(self._root)
        except OSError as error:
            raise storage.cannot_be_written(self._root, error) from error
        self._held.enter_context(storage.locked(self._root))
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, Model] = {}
        self._read()

    def close(self) -> None:
        """Let another server work in it."""
        self._held.close()

    def _read(self) -> None:
        for folder in sorted(one for one in self._root.iterdir() if _SESSION.fullmatch(one.name)):
            session = self._entry(folder / "session.json", Session)
            if session is None:
                continue
            self.sessions[session.session_id] = session
            for inner in sorted(folder.glob("train-*")):
                model = self._entry(inner / "model.json", Model)
                if model is not None:
                    self.models[model.model_id] = model
                for kind in KINDS:
                    for left in (inner / kind).glob(f"{_UNFINISHED}*"):
                        storage.remove(left)

    @staticmethod
    def _entry(file: Path, kind: type[Any]) -> Any:
        """What a file says; None, aloud, if it cannot be used."""
        try:
            told = read_json(file, RunError)
            with reading(file, RunError):
                return kind(**told)
        except RunError as error:
            console.say("skipped", error)
            return None

    # -- sessions and models --------------------------------------------------------------------------------------------

    def put_session(self, owner: str, user_metadata: dict[str, Any] | None) -> Session:
        """A new session."""
        session = Session(secrets.token_hex(16), owner, now(), user_metadata)
        self._save_session(session)
        self.sessions[session.session_id] = session
        return session

    def put_sampler(self, session: Session, sampler: str, path: str | None) -> None:
        """Note what a sampling session asks; None: the base."""
        with self._lock:
            session.samplers[sampler] = path
            self._save_session(session)

    def _save_session(self, session: Session) -> None:
        folder = self._root / session.session_id
        storage.make_folders(folder)
        storage.write_text(folder / "session.json", storage.dump_json(dataclasses.asdict(session)))

    def put_model(self, model: Model) -> None:
        """Write down a model, anew."""
        folder = self._folder(model.model_id)
        storage.make_folders(folder)
        storage.write_text(folder / "model.json", storage.dump_json(dataclasses.asdict(model)))
        self.models[model.model_id] = model

    def session(self, session_id: str, owner: str) -> Session:
        """
        Raises:
            RequestError: this key has no such session.
        """
        return _owned(self.sessions, session_id, owner, "session")

    def model(self, model_id: str, owner: str) -> Model:
        """
        Raises:
            RequestError: this key has no such model.
        """
        return _owned(self.models, model_id, owner, "model")

    def _folder(self, model_id: str) -> Path:
        match = _MODEL.fullmatch(model_id)
        if match is None:
            raise RequestError(404, f"model_id={model_id[:100]!r}: there is no such model.")
        return self._root / match[1] / f"train-{int(match[2])}"

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def check_name(self, model_id: str, kind: str, name: str | None, overwrite: bool) -> str:
        """The name of a checkpoint to come; of none, a new one.

        Raises:
            RequestError: it cannot be a name, or is there already.
        """
        if name is None:
            return f"snapshot-{secrets.token_hex(6)}"
        if not _NAME.fullmatch(name):
            raise RequestError(
                400, f"path={name[:100]!r}: a checkpoint is named by letters, digits, dots, lines and underscores."
            )
        if not overwrite and (self._folder(model_id) / kind / name).exists():
            raise RequestError(
                400, f"path={name}: there is a checkpoint of this name. Choose another, or overwrite it."
            )
        return name

    def find(self, path: str, owner: str) -> Checkpoint:
        """The checkpoint that a path names.

        Raises:
            RequestError: this key has no such one.
        """
        parts = path.removeprefix("tinker://").split("/") if path.startswith("tinker://") else []
        if len(parts) != 3 or parts[1] not in KINDS or not _NAME.fullmatch(parts[2]):
            raise RequestError(
                404, f"{path[:200]!r}: must be tinker://MODEL/weights/NAME or tinker://MODEL/sampler_weights/NAME."
            )
        self.model(parts[0], owner)
        found = self._checkpoint(parts[0], parts[1], parts[2])
        if found is None:
            raise RequestError(404, f"{path}: there is no such checkpoint.")
        return found

    def _checkpoint(self, model_id: str, kind: str, name: str) -> Checkpoint | None:
        folder = self._folder(model_id) / kind / name
        if not (folder / _FACTS).is_file():
            return None
        facts = self._entry(folder / _FACTS, dict)
        if facts is None or not isinstance(facts.get("time"), str):
            return None
        found = Checkpoint(model_id, kind, name, folder, facts)
        if found.expired:
            storage.remove(folder)
            return None
        return found

    def checkpoints(self, model_id: str) -> list[Checkpoint]:
        """Those of a model that have a name, oldest first."""
        found = []
        for kind in KINDS:
            place = self._folder(model_id) / kind
            names = sorted(one.name for one in place.iterdir()) if place.is_dir() else []
            found += [self._checkpoint(model_id, kind, name) for name in names if _NAME.fullmatch(name)]
        named = [one for one in found if one is not None and one.facts.get("named", True)]
        return sorted(named, key=lambda one: str(one.facts["time"]))

    def remove(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            RunError: it cannot be removed.
        """
        storage.remove(checkpoint.folder)

    def expire(self, checkpoint: Checkpoint, seconds: int | None) -> None:
        """Let a checkpoint be removed after so long; None: never."""
        facts = checkpoint.facts | {"expires_at": _after(seconds)}
        storage.write_text(checkpoint.folder / _FACTS, storage.dump_json(facts))

    def drop_unnamed(self, model_id: str, kept: int = 0) -> list[Path]:
        """Remove what was saved for sampling without a name, but for the last ones; which folders they were."""
        place = self._folder(model_id) / "sampler_weights"
        names = [one.name for one in place.glob("snapshot-*")] if place.is_dir() else []
        found = [self._checkpoint(model_id, place.name, name) for name in names]
        unnamed = [one for one in found if one is not None and one.facts.get("named") is False]
        unnamed.sort(key=lambda one: str(one.facts["time"]))
        gone = unnamed[: max(0, len(unnamed) - kept)]
        for one in gone:
            storage.remove(one.folder)
        return [one.folder for one in gone]

    def write(
        self,
        workshop: Workshop,
        learner: Learner,
        model: Model,
        kind: str,
        name: str,
        named: bool = True,
        seconds: int | None = None,
        user_metadata: dict[str, Any] | None = None,
    ) -> Checkpoint:
        """Save an adapter as a run folder; what had the name before is replaced once the new one is whole. By the thread that answers.

        Args:
            named: whether lists show it.
            seconds: until it is removed; None: it stays.

        Raises:
            RunError: it cannot be written; nothing is left of it then.
        """
        folder = self._folder(model.model_id) / kind / name
        temporary = RunDir(folder.parent / f"{_UNFINISHED}{secrets.token_hex(6)}")
        facts = {"time": now(), "named": named, "expires_at": _after(seconds), "user_metadata": user_metadata}
        facts |= {
            "seed": learner.seed,
            "steps": learner.steps,
            "train_attn": model.train_attn,
            "train_mlp": model.train_mlp,
            "train_unembed": model.train_unembed,
        }
        try:
            storage.make_folders(temporary.path)
            self._write(workshop, learner, folder, temporary, kind == "weights")
            if named or kind == "weights":  # others are for this server alone
                workshop.keep_probes(temporary.adapter, learner)
            storage.write_text(temporary.path / _FACTS, storage.dump_json(facts))
            if folder.exists():
                storage.remove(folder)
            os.rename(temporary.path, folder)
        except OSError as error:
            raise storage.cannot_be_written(folder, error) from error
        finally:
            if temporary.path.exists():
                with contextlib.suppress(RunError):
                    storage.remove(temporary.path)
        return Checkpoint(model.model_id, kind, name, folder, facts)

    def _write(self, workshop: Workshop, learner: Learner, folder: Path, run: RunDir, optimizer: bool) -> None:
        setup = self._base.setup
        config = self._config(learner.section, learner.seed, folder)
        storage.write_text(run.config, compose.to_yaml(config))
        run_dir.write_manifest(run, config, setup.base, {})
        with storage.new_folder(run.adapter, {"step": learner.steps}) as temporary:
            files.write(temporary, workshop.model, learner.key, config, setup.base, setup.task.learned)
        if optimizer:
            with storage.new_folder(run.path / _STATE, {"step": learner.steps}) as temporary:
                save_file(_state(learner), temporary / _OPTIMIZER)
        workshop.model.set_adapter(learner.key)
        result = {
            "steps": learner.steps,
            "tokens": learner.tokens,
            "by_client": {"losses": learner.losses},
            "tuned": None,
            "base": None,
            "coverage": dataclasses.asdict(coverage(workshop.model, learner.key)),
            "versions": run_dir.versions(),
        }
        storage.write_text(run.result, storage.dump_json(result))

    def _config(self, section: LoraAdapter, seed: int, folder: Path) -> RunConfig:
        """What `config.yaml` says: the base as it is served, and the client's adapter."""
        return dataclasses.replace(
            self._base.config, adapter=section, seed=seed, run_dir=str(folder), name=folder.name, serve=ServeConfig()
        )

    def section(self, checkpoint: Checkpoint) -> tuple[LoraAdapter, int]:
        """The adapter's section and seed that a checkpoint was written with.

        Raises:
            LoraLabError: its files are damaged.
        """
        run = RunDir(checkpoint.folder)
        config = compose.load(run.config)
        run_dir.check_config(run, config)
        if not isinstance(config.adapter, LoraAdapter):
            raise CheckpointError(f"{run.config}: adapter.method={config.adapter.method}: a client's adapter is LoRA.")
        return config.adapter, config.seed

    def restore_optimizer(self, checkpoint: Checkpoint, learner: Learner) -> None:
        """Give a learner the optimizer's state of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = checkpoint.folder / _STATE
        if not folder.is_dir():
            raise CheckpointError(f"{checkpoint.path}: was saved without the optimizer's state. Load it without.")
        manifest = storage.verify(folder)
        with reading(folder / _OPTIMIZER, CheckpointError):
            found = load_file(folder / _OPTIMIZER)
        _restore(learner, found, folder)
        learner.steps = int(manifest["step"])


Owned = TypeVar("Owned", Session, Model)


def _owned(there: Mapping[str, Owned], name: str, owner: str, kind: str) -> Owned:
    """
    Raises:
        RequestError: this key has none of this name.
    """
    found = there.get(name)
    if found is None or found.owner != owner:
        raise RequestError(404, f"{kind}_id={name[:100]!r}: there is no such {kind}.")
    return found


def _after(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=min(seconds, 10**10))).isoformat()


def _names(learner: Learner) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Its parameters by names that do not depend on where it lies among others."""
    for name, one in learner.parameters.items():
        yield name.replace(f".{learner.key}.", "."), one


def _state(learner: Learner) -> dict[str, torch.Tensor]:
    """The optimizer's state; empty before the first step."""
    return {
        f"{name}:{part}": value.detach().cpu().contiguous().clone()
        for name, one in _names(learner)
        for part, value in learner.optimizer.state.get(one, {}).items()
    }


def _restore(learner: Learner, found: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = dict(_names(learner))
    learner.optimizer.state.clear()
    for key, value in found.items():
        name, _, part = key.rpartition(":")
        one = parameters.get(name)
        if one is None or (value.ndim and value.shape != one.shape):
            learner.optimizer.state.clear()
            raise CheckpointError(f"{folder / _OPTIMIZER}: does not fit the adapter, first at {key}.")
        learner.optimizer.state[one][part] = value.to(one.device)
