"""The base and the adapters that are served: each is verified when it comes, and lies where its rows can be answered as they are alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_lab.adapters import ADAPTERS
from lora_lab.adapters.attach import beside
from lora_lab.base import load
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.base.pooling import Pooling
from lora_lab.base.positions import usable_positions
from lora_lab.config.data import DataConfig
from lora_lab.config.run import RunConfig
from lora_lab.errors import AdapterError, BaseModelError, ConfigError
from lora_lab.run import takes
from lora_lab.run.answering import without_rows
from lora_lab.run.prepared import assemble, build_data, find_base, prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Setup, Stages
from lora_lab.run.trained import open_trained
from lora_lab.serve.embeddings import Embedder
from lora_lab.serve.group import BASE, Apart, Group
from lora_lab.serve.words import generation_settings
from lora_lab.tasks import TASKS
from lora_lab.verify import probes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel

BASE_NAME = "base"  # what clients call the base
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TRIAL = ("A red cat.", "Three blue birds are sitting on a table in Oslo, and one dog.", "Yes: 1, 2 and 3.")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that can be served, before anything is loaded of it."""

    name: str
    run: RunDir | None  # None: the base alone
    setup: Setup
    digest: str | None  # of its adapter

    @property
    def config(self) -> RunConfig:
        return self.setup.config


@dataclasses.dataclass(eq=False)
class Served:
    """Something that answers: the base, or an adapter on it."""

    opened: Opened
    key: str  # the adapter's name among the modules; '': the base
    group: Group | None  # None: it answers nothing by itself
    probes: str = ""  # what its probe rows said
    open: int = 0  # requests that it is answering
    leaving: bool = False  # it takes no further ones

    @property
    def name(self) -> str:
        return self.opened.name

    @property
    def setup(self) -> Setup:
        return self.opened.setup

    @property
    def completes(self) -> bool:
        """Whether it writes texts."""
        return self.group is not None and (self.group.writes or self.setup.config.task.generates)

    @property
    def chats(self) -> bool:
        """Whether it answers messages."""
        return self.completes and self.setup.config.task.answers

    @property
    def predicts(self) -> str:
        """The route under /v1 where it says something of rows; '': none."""
        return "" if self.key == BASE else self.setup.config.task.asked_at

    @property
    def routes(self) -> list[str]:
        """Where it can be asked."""
        found = ["chat/completions"] * self.chats + ["completions"] * self.completes
        return found + ([self.predicts] if self.predicts else [])

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer."""
        encoder: Any = self.setup.encoder
        if encoder.chat and hasattr(encoder, "end_tokens"):
            return list(encoder.end_tokens())
        return [token for token in (self.setup.encoder.tokenizer.eos_token_id,) if token is not None]

    @functools.cached_property
    def settings(self) -> GenerationConfig:
        """What the base's own settings make of an answer."""
        assert self.group is not None, "nobody asks it"
        return generation_settings(self.group.base, self.end_tokens, self.setup.encoder.tokenizer.pad_token_id)

    @functools.cached_property
    def positions(self) -> int | None:
        """Tokens that a prompt and its answer may have together."""
        assert self.group is not None, "nobody asks it"
        found = usable_positions(self.group.base)
        return None if found is None else found - self.setup.config.adapter.virtual_tokens * (self.key != BASE)

    @property
    def most_new(self) -> int:
        """Tokens of an answer if nothing is said of them."""
        return int(getattr(self.setup.config.task, "max_new_tokens", 128))

    @property
    def exactness(self) -> str:
        """How its rows are answered beside others."""
        group = self.group
        if group is None:
            return "answers nothing by itself"
        if not group.writes:
            return "rows of this adapter share passes, adapter by adapter"
        if group.against_steps:
            return f"one answer after another: {group.against_steps}"
        if group.against_beside:
            return f"each answer has passes of its own: {group.against_beside}"
        if group.against_sharing:
            return f"adapter by adapter: {group.against_sharing}"
        return "shares passes with rows of other adapters"

    def described(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        config = self.setup.config
        own = self.key != BASE
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "lora_lab",
            "routes": self.routes,
            "task": config.task.name if own else None,
            "method": config.adapter.label if own else None,
            "adapter": self.opened.digest,
            "base": self.setup.base.fingerprint,
            "passes": self.exactness,
            "probes": self.probes or None,
        }


def open_run(path: str, overrides: Sequence[str], name: str | None = None) -> Opened:
    """The run of a folder, verified as far as that needs no weights: checksums, base, tokenizer, template, settings.

    Raises:
        LoraLabError: whatever is wrong with it.
    """
    run, config = open_trained(path, takes.SERVE, overrides)
    name = run.path.resolve().name if name is None else name
    if not NAME.fullmatch(name) or name == BASE_NAME:
        raise ConfigError(
            f"{name}: a served adapter is named by letters, digits, dots, lines and underscores, and not 'base'."
        )
    setup = prepare(without_rows(config), need_train=False, trained=run)
    return Opened(name, run, setup, probes.adapter_digest(run.adapter))


_BASE_TASKS = ("causal_lm", "seq2seq", "masked_lm")  # by the first that a base can be trained for it is asked


def open_base(config: RunConfig) -> Opened:
    """The base of a configuration, as it is asked without any adapter.

    Raises:
        LoraLabError: it cannot be found or read.
    """
    device = load.start_device(config.hardware, config.model.dtype, trains=False)
    own = load.model_config(load.find(config.model).folder, ModelKind())
    task = next(filter(None, (_task(name, own) for name in _BASE_TASKS)), None)
    if task is None:
        raise BaseModelError(f"model.path={config.model.path}: nothing is known to ask a {own.model_type} for.")
    config = dataclasses.replace(config, task=task, data=DataConfig(train="none"), adapter=ADAPTERS["lora"]())
    found = find_base(config)
    data, found, asked = build_data(config, found, need_train=False, learned={})
    return Opened(BASE_NAME, None, assemble(config, found, data, asked, device, Stages()), None)


def _task(name: str, own: Any) -> Any:
    """The section of a task if such a base can be trained for it."""
    section: Any = TASKS[name](name=name)
    try:
        section.load().check_base(own)
    except BaseModelError:
        return None
    return section


class Shelf:
    """All that is served. `served` is read by any thread; the one that answers changes it."""

    def __init__(self, base: Opened):
        """
        Args:
            base: what the base is called with where no adapter is named.
        """
        self._base = base
        self._dtype, self._quant = base.config.model.dtype, base.setup.base.stored(base.config.quant)
        self._device = base.setup.device
        self._plain: dict[str, PreTrainedModel] = {}  # modules without adapters over the weights, by kind of model
        self._groups: list[
            tuple[str, str, Group]
        ] = []  # with the kind of model, and what adapters on it have in common
        self._count = 0
        self.served: dict[str, Served] = {}
        self._embedder: Embedder | None = None

    @property
    def base(self) -> BaseFiles:
        return self._base.setup.base

    @property
    def device(self) -> torch.device:
        return self._device

    def start(self) -> None:
        """Load the base, where it answers by itself."""
        kind = self._base.setup.kind
        group = None
        if _writes(kind) or self._base.config.task.generates:
            group = self._group_for(self._base, "", self._loaded(kind))
        self.served[BASE_NAME] = Served(self._base, BASE, group)

    def embedder(self) -> Embedder:
        """The base as it makes vectors; loaded when it is first asked.

        Raises:
            BaseModelError: it was not published for that.
        """
        if self._embedder is None:
            pooling = Pooling.read(self.base.folder)
            model = self._loaded(ModelKind("AutoModel", None))
            self._embedder = Embedder(
                model, self._base.setup.encoder.tokenizer, pooling, usable_positions(model), self.inside
            )
        return self._embedder

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the base computes in."""
        return _precision(self._device, self._dtype)

    # -- before an adapter is put on ------------------------------------------------------------------------------------

    def check(self, opened: Opened) -> None:
        """
        Raises:
            AdapterError: it belongs to another base, or to this one stored in another way.
        """
        own, base = opened.setup.base, self.base
        if own.fingerprint != base.fingerprint:
            raise AdapterError(
                f"{opened.name}: trained on {own.name} (weights {own.fingerprint[:12]}), and this server's base is {base.name} "
                f"({base.fingerprint[:12]}). Serve it with its own base."
            )
        stored = own.stored(opened.config.quant)
        pairs = {
            "model.dtype": (opened.config.model.dtype, self._dtype),
            "quant.method": (stored.method, self._quant.method),
            "quant.double_quant": (stored.double_quant, self._quant.double_quant),
            "quant.skip_modules": (stored.skip_modules, self._quant.skip_modules),
        }
        for key, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise AdapterError(f"{opened.name}: trained with {key}={theirs}, and this server's base has {ours}.")

    def ready(self, opened: Opened) -> Callable[[], Served]:
        """Do what takes long and touches nothing that is being asked; what is left is for the thread that answers."""
        self.check(opened)
        kind = opened.setup.kind
        plain = self._plain.get(_described(kind)) or self._loaded(kind)
        return functools.partial(self._put, opened, plain)

    def _loaded(self, kind: ModelKind) -> PreTrainedModel:
        """The base as this kind of model, with the weights that are there already."""
        base, config = self._base.setup.base, self._base.config
        model = load.load_model(base, kind, self._dtype, config.quant, self._device, config.seed)
        for other in self._plain.values():
            _share_weights(model, other)
        return self._plain.setdefault(_described(kind), model)

    # -- by the thread that answers -------------------------------------------------------------------------------------

    def _put(self, opened: Opened, plain: PreTrainedModel) -> Served:
        """
        Raises:
            LoraLabError: it does not fit, or does not say what it said at the end of its training. Nothing has changed then.
        """
        assert opened.run is not None, "the base is there from the start"
        if opened.name in self.served:
            raise ConfigError(f"{opened.name}: an adapter of this name is served already. Name it otherwise.")
        common = json.dumps(opened.config.adapter.on_same_modules(), sort_keys=True, default=str)
        key = f"served{self._count}"
        self._count += 1
        try:
            try:
                group = self._group_for(opened, common, plain)
                self._put_on(group, opened, key)
            except Apart:
                group = self._group_for(opened, f"{common} {key}", plain)
                self._put_on(group, opened, key)
            try:
                with group.inside(key):
                    said = probes.check(opened.run.path, opened.run.adapter, cast("PeftModel", group.model))
            except Exception:
                group.take(key)
                raise
        finally:
            self._tidy()
        found = Served(opened, key, group, said)
        self.served[opened.name] = found
        return found

    def _put_on(self, group: Group, opened: Opened, key: str) -> None:
        assert opened.run is not None, "the base has no adapter"
        adapter = opened.config.adapter
        shares = "" if adapter.shares_passes else f"{adapter.label} cannot be told apart by row"
        group.put(opened.run.adapter, key, shares or adapter.against_packing, opened.config.speed)

    def take(self, served: Served) -> None:
        """Remove an adapter that answers nothing any more."""
        assert served.group is not None, "adapters have one"
        self.served.pop(served.name, None)
        served.group.take(served.key)
        self._tidy()

    def _group_for(self, opened: Opened, common: str, plain: PreTrainedModel) -> Group:
        own = _described(opened.setup.kind)
        for place, (theirs, had, group) in enumerate(self._groups):
            if theirs == own and (had == common if group.names else opened.run is not None):
                self._groups[place] = own, common, group
                return group
        group = self._new_group(opened, plain)
        self._groups.append((own, common, group))
        return group

    def _new_group(self, opened: Opened, plain: PreTrainedModel) -> Group:
        tokenizer = opened.setup.encoder.tokenizer
        trial = [list(tokenizer(text)["input_ids"]) for text in _TRIAL]
        return Group(beside(plain), self.inside, _writes(opened.setup.kind), trial)

    def another_group(self) -> Group:
        """Modules of their own over the base's weights, for adapters that are not among the served."""
        return self._new_group(self._base, self._plain[_described(self._base.setup.kind)])

    def _tidy(self) -> None:
        """Let groups without adapters go, but for the one that answers for the base."""
        base = self.served.get(BASE_NAME)
        kept = base.group if base is not None else None
        self._groups = [one for one in self._groups if one[2].names or one[2] is kept]


def _writes(kind: ModelKind) -> bool:
    return kind.auto_class == "AutoModelForCausalLM"


def _described(kind: ModelKind) -> str:
    return json.dumps(dataclasses.asdict(kind), sort_keys=True)


@contextlib.contextmanager
def _precision(device: torch.device, dtype: str) -> Iterator[None]:
    """As accelerate has it for a run of this precision."""
    if dtype == "float32":
        yield
        return
    with torch.autocast(device.type, getattr(torch, dtype)):
        yield


def _share_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let a model use the frozen weights of another one that it has too, so that they are there once. What is quantized is left."""
    prefixes = {model.base_model_prefix: "", other.base_model_prefix: ""}

    def plain(name: str) -> str:
        head, _, rest = name.partition(".")
        return rest if head in prefixes else name

    known = {plain(name): one for name, one in other.named_parameters()}
    for name, one in list(model.named_parameters()):
        same = known.get(plain(name))
        if same is None or type(one) is not torch.nn.Parameter or type(same) is not torch.nn.Parameter:
            continue
        if one.shape == same.shape and one.dtype == same.dtype and torch.equal(one, same):
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, same)
