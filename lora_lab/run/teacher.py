"""The model that a student learns from: found and compared with the student before anything is loaded, in memory only until it has said
what it has to say of the rows, which is kept in the cache (`data/soft_targets.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from lora_lab.adapters import files
from lora_lab.adapters.attach import attach_trained
from lora_lab.base import load, overruled
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.base.positions import usable_positions
from lora_lab.base.tokenizer import load_tokenizer
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.data import soft_targets
from lora_lab.data.collate import pack
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Encoder, Example
from lora_lab.data.soft_targets import Part
from lora_lab.errors import BaseModelError, ConfigError, DataError, NoRoomError, RunError
from lora_lab.fast import isolation
from lora_lab.fast.forward import Forward
from lora_lab.run import takes
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, memory, pages, ranks, storage
from lora_lab.training.batches import filled

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_lab.tasks.base import AnyTask

KEY, BASE = "task.teacher", "base"
TOKENS, _ITEMS = 2048, 256  # of a pass, unless a row has more; of whose logits what is kept is chosen at a time
_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_FORMAT = 1  # raised when what is kept changes, so that older cache entries are not used


@dataclasses.dataclass(frozen=True)
class Found:
    """A teacher on disk, before its weights are loaded."""

    base: BaseFiles
    kind: ModelKind
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    quant: QuantConfig
    adapter: Path | None  # of a run, verified

    @functools.cached_property
    def recorded(self) -> dict[str, Any]:
        """What decides its word beside libraries: plain values."""
        stored = dataclasses.asdict(self.base.stored(self.quant))
        stored.pop("cache")
        adapter = None if self.adapter is None else storage.digest(storage.verify(self.adapter)["files"])
        return {"fingerprint": self.base.fingerprint, "dtype": self.dtype, "quant": stored, "adapter": adapter}

    @property
    def digest(self) -> str:
        return storage.digest(self.recorded)


class Teacher:
    """Who `task.teacher` names."""

    def __init__(
        self,
        config: RunConfig,
        base: BaseFiles,
        kind: ModelKind,
        encoder: Encoder,
        device: torch.device,
        recorded: str | None = None,
    ):
        """
        Args:
            config: the student's, and so are `base`, `kind` and `encoder`.
            recorded: the digest of the teacher that a trained student had.
        """
        assert config.task.taught_by is not None
        self.name = config.task.taught_by
        self._config, self._base, self._kind, self._encoder = config, base, kind, encoder
        self._device, self._recorded = device, recorded

    @functools.cached_property
    def found(self) -> Found:
        """It, on disk.

        Raises:
            BaseModelError: it is not there, cannot be loaded, or has other tokens than the student.
            RunError: it is not the one that the student had.
        """
        with _as_teacher():
            found = self._find()
        self._check_tokens(found)
        if self._recorded is not None and found.digest != self._recorded:
            raise RunError(
                f"{KEY}={self.name}: it is another one than in training (its weights, adapter or how it is stored changed), so the "
                f"student would be measured by another's word. Restore it, or name where it lies now: {KEY}=..."
            )
        return found

    def _find(self) -> Found:
        config = self._config
        if self.name == BASE:
            return Found(self._base, self._kind, self._encoder.tokenizer, config.model.dtype, config.quant, None)
        if (Path(self.name).expanduser() / "config.yaml").is_file():
            return self._of_run()
        base = load.find(ModelConfig(path=self.name, dtype=config.model.dtype), key=KEY)
        load.skeleton(base.folder, ModelKind())  # or it is no model that writes
        return Found(base, ModelKind(), load_tokenizer(base.folder), config.model.dtype, QuantConfig(), None)

    def _of_run(self) -> Found:
        from lora_lab.run import prepared  # which asks for teachers

        run, own = open_trained(self.name, takes.CHAT, [])
        console.say("teacher", f"{run.path}: a run of task={own.task.name}")
        own = dataclasses.replace(own, hardware=self._config.hardware)
        found = prepared.find_base(own, prepared.recorded_base(run))
        prepared.check_trained(run, own, found)
        found, _ = prepared.with_task(own, found, files.learned(run.adapter))
        if found.kind.auto_class != ModelKind().auto_class:
            raise ConfigError(
                f"{KEY}={self.name}: a run of task={own.task.name}, whose model says nothing of the next token. Name a run of a model "
                "that writes, such as task=causal_lm."
            )
        return Found(found.base, found.kind, found.encoder.tokenizer, own.model.dtype, own.quant, run.adapter)

    def _check_tokens(self, found: Found) -> None:
        """Refuse a teacher whose tokens are others: it would be told, and would tell, of other texts.

        Raises:
            BaseModelError: naming what differs.
        """
        own, other = self._encoder.tokenizer, found.tokenizer
        if own is other:
            return
        mine, theirs = own.get_vocab(), other.get_vocab()
        if differing := [token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)]:
            one = min(differing)
            raise BaseModelError(
                f"{KEY}={self.name}: its vocabulary is another than the student's ({len(theirs)} and {len(mine)} tokens, {len(differing)} "
                f"differ, such as {one!r}: {theirs.get(one, 'none')} and {mine.get(one, 'none')}), so their distributions cannot be compared. "
                "Name a teacher with the same tokenizer."
            )
        texts = overruled.differing(_encode(other), _encode(own))
        if texts:
            raise BaseModelError(
                f"{KEY}={self.name}: it splits texts into other tokens than the student ({overruled.shown(texts)}), so it would be asked of "
                "texts as it has never seen them. Name a teacher with the same tokenizer."
            )

    @property
    def hashes(self) -> dict[str, str]:
        """Who it is, as data files are recorded: name and digest."""
        return {self.name: self._recorded or self.found.digest}

    def teach(self, every: Sequence[Dataset], task: AnyTask) -> list[Dataset]:
        """The rows with what the teacher says of them, out of the cache as far as it is there.

        Raises:
            DataError: rows that it cannot read, or a cache that cannot be written.
            NoRoomError: it does not fit into memory.
        """
        found = self.found
        made_of = {
            **found.recorded,
            "task": {name: getattr(task.config, name) for name in task.teacher_options},
            "vocabulary": task.vocabulary,
            "versions": [importlib.metadata.version(name) for name in _LIBRARIES],
            "format": _FORMAT,
        }
        for data in every:
            self._check_length(data, found)
        parts = [soft_targets.parts(data, made_of, task.soft_numbers) for data in every]
        flat = [part for some in parts for part in some]
        ranks.on_main(lambda: self._make(flat, task))
        ranks.agreed(lambda: self._make(flat, task))  # on another machine, with a cache of its own
        taught = [
            soft_targets.added(data, [part.read() for part in some]) for data, some in zip(every, parts, strict=True)
        ]
        for data in taught:
            console.say("teacher", f"{data.key}: {', '.join(filter(None, [self.name, task.of_soft_targets(data)]))}")
        return taught

    def _check_length(self, data: Dataset, found: Found) -> None:
        positions = usable_positions(load.skeleton(found.base.folder, found.kind))
        if positions is not None and data.longest > positions:
            raise DataError(
                f"{data.key}: a row has {data.longest} tokens, and {KEY}={self.name} has {positions} positions. Set data.max_tokens="
                f"{positions} or less, and data.too_long."
            )

    def _make(self, parts: Sequence[Part], task: AnyTask) -> None:
        """Write the parts that are not there."""
        missing = [part for part in parts if not part.made]
        if not missing:
            return
        rows = sum(len(part.items) for part in missing)
        items = sum(int(part.data.supervised[part.items.start : part.items.stop].sum()) for part in missing)
        console.say(
            "teacher",
            f"{self.name} reads {rows:,} rows, once; {4 * task.soft_numbers * items / 2**20:,.1f} MiB of its word stay in the cache",
        )
        self._read(missing, rows, task)
        clear_device_cache(garbage_collection=True)  # modules refer to each other
        pages.trim()

    def _read(self, parts: Sequence[Part], rows: int, task: AnyTask) -> None:
        """Load it, and let it read; nothing of it is left when this returns."""
        model = self._loaded()
        reader = _Reader(model, task, self._isolated(model, parts[0].examples), self._autocast)
        with console.steps("teacher", rows) as progress:
            for part in parts:
                part.make(reader.says)
                progress.advance(len(part.items))

    def _loaded(self) -> PeftModel | PreTrainedModel:
        found = self.found
        with _as_teacher():
            base = load.load_model(found.base, found.kind, found.dtype, found.quant, self._device, self._config.seed)
        model = base if found.adapter is None else attach_trained(base, found.adapter, "teacher")
        console.say(
            "teacher", f"{model.get_memory_footprint() / 2**30:.2f} GiB of weights, let go before the student is loaded"
        )
        return model.eval()

    def _autocast(self) -> torch.autocast:
        dtype = self.found.dtype
        kind = torch.bfloat16 if dtype == "float32" else getattr(torch, dtype)
        return torch.autocast(self._device.type, kind, enabled=dtype != "float32")

    def _isolated(self, model: Any, examples: list[Example]) -> bool:
        """Whether rows can lie end to end in a pass of this model."""
        with self._autocast():
            reason = isolation.reason_against(lambda: isolation.check_isolation(model, examples))
        if reason:
            console.say("teacher", f"reads rows one by one: {reason}")
        return not reason


class _Reader:
    """Passes of a loaded teacher."""

    def __init__(self, model: Any, task: AnyTask, together: bool, autocast: Callable[[], torch.autocast]):
        self._model, self._task, self._autocast = model, task, autocast
        self._forward = Forward(packed=True, together=together)
        self._tokens = TOKENS if together else 1

    @torch.no_grad()
    def says(self, examples: list[Example]) -> dict[str, list[np.ndarray]]:
        """What is kept of some examples: by column an array for each."""
        for attempt in memory.attempts(self._need_less):
            with attempt:
                cuts = filled([one.num_tokens for one in examples], len(examples), self._tokens)
                passes = [self._pass(examples[cut]) for cut in cuts]
        return {name: [one for part in passes for one in part[name]] for name in passes[0]}

    def _need_less(self, lacked: str) -> None:
        if self._tokens == 1:
            raise NoRoomError(
                f"{KEY}: a row does not fit into memory beside the teacher, by itself ({lacked}). Set a smaller data.max_tokens, or name "
                "a smaller teacher; a run with quant=nf4 is held in 4 bits."
            )
        self._tokens = max(1, self._tokens // 2)
        console.say(
            "memory", f"the teacher's passes do not fit: {self._tokens} tokens in a pass; its word stays the same"
        )

    def _pass(self, examples: list[Example]) -> dict[str, list[np.ndarray]]:
        batch = pack(examples, self._model.device)
        with self._autocast():
            logits = self._forward.logits(self._model, batch)
        found = [
            self._task.soft_targets(*pair)
            for pair in zip(logits.split(_ITEMS), batch.targets.split(_ITEMS), strict=True)
        ]
        ends = np.cumsum([int(example.supervised.sum()) for example in examples])[:-1]
        return {name: np.split(np.concatenate([one[name] for one in found]), ends) for name in found[0]}


def _encode(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@contextlib.contextmanager
def _as_teacher() -> Iterator[None]:
    """What is wrong with the teacher is told by the key that names it."""
    try:
        yield
    except BaseModelError as error:
        raise BaseModelError(str(error).replace("model.path", KEY)) from error
