"""Setups are made here, of a configuration (`prepare`) or of a trained run (`Trained`): everything that can be checked is checked before
any weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_lab.adapters import files
from lora_lab.adapters.attach import fresh_settings
from lora_lab.adapters.layers import bypassed, expert_weights, layer_number, tied, towers
from lora_lab.base import embeddings, load, published
from lora_lab.base.fingerprint import companions
from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.base.overruled import shown
from lora_lab.base.positions import check_lengths, embedded, usable_positions
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, READER, TOKENS_AS_WRITTEN, load_tokenizer, pad_within
from lora_lab.config.run import RunConfig
from lora_lab.data import build, check
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoder
from lora_lab.errors import BaseModelError, ConfigError, DataError
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import ADAPTER, Live, Setup, Stages
from lora_lab.run.takes import Takes
from lora_lab.run.teacher import KEY, Teacher
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, tracking
from lora_lab.tasks.base import AnyTask
from lora_lab.training.batches import plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class ResolvedBase:
    """The base model as far as it is known without its weights, and what encodes rows for it."""

    base: BaseFiles
    kind: ModelKind
    model: PreTrainedModel  # on the meta device: shapes only
    targets: list[str]  # layers that will be adapted
    encoder: Encoder


def find_base(config: RunConfig, recorded: dict[str, Any] | None = None, weights: bool = True) -> ResolvedBase:
    """Find the base, check its files and the adapter's target names, and load its tokenizer.

    Args:
        recorded: what a run recorded of its base when it was begun: it keeps the tokens that it was trained with.
        weights: False: they need not be there, and are not downloaded.
    """
    reader = READER if recorded is None else load.reader_of(recorded)
    base = load.find(config.model, reader, weights)
    published.check(config, base.published, base.name)
    task = config.task.load()
    own = load.model_config(base.folder, load.ModelKind())
    task.check_base(own)
    check_lengths(own)
    tokenizer = load_tokenizer(base.folder, task.encoder_class.chat, reader)
    if recorded is not None and reader < TOKENS_AS_WRITTEN:
        _say_older_tokens(config, base, tokenizer)
    pad_within(tokenizer, getattr(own.get_text_config(), "vocab_size", None), base.folder)
    kind = task.kind(config, tokenizer, {})
    model = load.skeleton(base.folder, kind)
    new = load.new_modules(model, base.folder, kind.head)
    unused = tuple(name for name in task.unread if getattr(model, name, None) is not None)
    kind = dataclasses.replace(kind, new_modules=new, retrained=config.adapter.retrained(model), unread=unused)
    targets = check_adapter(config, base, model, kind)
    for title, sentence in config.adapter.warnings(model, targets).items():
        console.say(title, sentence)
    load.check_storage(base.stored(config.quant), model)
    _say_experts(model, config, base)
    if unread := set(bypassed(model)) - set(targets):
        console.say(
            "layers", f"{len(unread)} x out_proj: not adapted, because Mamba's kernels read its weight past the module"
        )
    if shared := set(tied(model)) - set(targets):
        console.say(
            "layers",
            f"{', '.join(sorted(shared)[:3])}: not adapted, because their weights are shared ({len(shared)} layers)",
        )
    if unseen := towers(model):
        console.say("towers", f"{', '.join(unseen)}: not adapted, because texts never reach them")
    vocab_size = embedded(model)
    pad_within(tokenizer, vocab_size, base.folder)
    encoder = task.encoder_class(config.data, config.task, tokenizer, vocab_size)
    if encoder.augmenter is not None:
        encoder.augmenter.device = load.torch_device(config.hardware)
    rendering = _rendering(encoder)
    if rendering is not None:
        rendering.template.check_variables()
    base = dataclasses.replace(base, companions=companions(base.folder, tokenizer, encoder.chat or encoder.templated))
    return ResolvedBase(base, kind, model, targets, encoder)


def check_adapter(config: RunConfig, base: BaseFiles, model: PreTrainedModel, kind: ModelKind) -> list[str]:
    """The layers that a run's adapter will sit on.

    Args:
        model: the base without weights.

    Raises:
        AdapterError: it does not fit these layers.
        ConfigError: it cannot be trained on a base that is stored so, or with what else the run is told.
    """
    targets = config.adapter.targets(model, kind.unadapted)
    _check_quant(config, base)
    settings = fresh_settings(model, config.adapter, kind)
    if config.hardware.offload_embeddings:
        embeddings.check(model, {*targets, *kind.whole}, settings)
    if config.speed.prefix_cache and min((layer_number(name) or 0 for name in targets), default=0) == 0:
        raise ConfigError(
            "speed.prefix_cache=true: the first layer is adapted, so there is nothing before it to keep. Adapt upper layers "
            "only (adapter.layers_to_transform), or drop it."
        )
    _check_dropout(model, config)
    return targets


def _say_older_tokens(config: RunConfig, base: BaseFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell of a run whose text becomes other tokens than it would in one that is begun today."""
    try:
        other = load.tokenized_otherwise(config.model, base, tokenizer)
    except BaseModelError as error:  # it could not be begun today at all
        console.say(
            "tokenizer", f"this run keeps the tokens that it was trained with; a new one would be refused: {error}"
        )
        return
    if other:
        console.say(
            "tokenizer",
            f"this run keeps the old tokens that it was trained with: an earlier version read this base's tokenizer wrongly, and {shown(other)} "
            f"({len(other)} of {len(HARD_TEXTS)} texts) would be other tokens in a run that is begun now",
        )


def with_task(config: RunConfig, found: ResolvedBase, learned: dict[str, Any]) -> tuple[ResolvedBase, AnyTask]:
    """The base as the task needs it, now that it is known what the training rows hold."""
    kind = config.task.load().kind(config, found.encoder.tokenizer, learned)
    known = found.kind
    kind = dataclasses.replace(kind, new_modules=known.new_modules, retrained=known.retrained, unread=known.unread)
    model = load.skeleton(found.base.folder, kind)
    task = config.task.load()(config, found.encoder, learned, model.config)
    return dataclasses.replace(found, kind=kind, model=model), task


def _check_quant(config: RunConfig, base: BaseFiles) -> None:
    """Refuse a method that cannot be trained on the base as it is stored."""
    method = base.stored(config.quant).method
    against = "" if method == "none" else config.adapter.against_quant(method)
    if against:
        how = "Take another base" if base.published else "Set quant=none"
        raise ConfigError(
            f"quant.method={method}: {config.adapter.label} is not trained on it, because {against}. {how}, or adapter=lora; lora-lab methods "
            "says what trains on what."
        )


def _say_experts(model: PreTrainedModel, config: RunConfig, base: BaseFiles) -> None:
    """Linear layers are quantized, and a mixture's experts are none: most of the base stays as it is."""
    experts = {name: one for name, one in expert_weights(model).items() if one.dim() == 3}
    if not experts or base.stored(config.quant).method == "none":
        return
    count = sum(one.numel() for one in experts.values())
    share = count / sum(one.numel() for one in model.parameters())
    size = count * getattr(torch, config.model.dtype).itemsize / 2**30
    console.say(
        "experts",
        f"{len(experts)} weights of experts ({share:.0%} of the base) stay unquantized: {size:.2f} GiB in {config.model.dtype}",
    )


def build_data(
    config: RunConfig, found: ResolvedBase, need_train: bool = True, learned: dict[str, Any] | None = None
) -> tuple[build.Data, ResolvedBase, AnyTask]:
    """Read, encode and check the rows of a run, and make the task of what they hold.

    Args:
        learned: what an adapter remembers of the rows that it was trained on; None: the training rows are looked at.

    Raises:
        DataError: rows that cannot be used, a failed check (`data.check=error`), or rows beyond the model's positions.
    """
    data = build.build(config.data, found.encoder, need_train)
    for part in (data.train, data.held_out):
        if part is not None:
            console.say(part.key.removeprefix("data."), part)
            _check_positions(part, found.model, config.adapter.virtual_tokens)
    if learned is None:
        assert data.train is not None, "a fresh run is made with need_train"
        learned = config.task.load().learn(config, data.train)
    found, task = with_task(config, found, learned)
    for part in (data.train, data.held_out):
        if isinstance(part, Dataset):
            task.check(part)
    if config.data.check != "off":
        _check(data, config, found.encoder)
    if found.encoder.blocks:
        data = build.in_blocks(data, config.data.max_tokens)
    return data, found, task


def _check(data: build.Data, config: RunConfig, encoder: Encoder) -> None:
    findings = check.check(data, config.data, encoder)
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in findings:
        if finding.level != "error" or config.data.check == "warn":
            console.say("check", finding)
    if errors and config.data.check == "error":
        more = f" ({len(errors) - 1} more errors: lora-lab data shows all.)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0].key}: {errors[0].sentence}{more} To train anyway: data.check=warn.")


def _check_dropout(model: PreTrainedModel, config: RunConfig) -> None:
    """R-Drop compares what different dropout makes of a row."""
    if config.train.rdrop_alpha is None or config.adapter.dropout:
        return
    settings = model.config.get_text_config().to_dict()
    rates = [value for name, value in settings.items() if "drop" in name and isinstance(value, float)]
    if not any(rates):
        key = config.adapter.dropout_key
        way_out = f"Set adapter.{key}=0.1." if key else f"Drop it: {config.adapter.label} has no dropout."
        raise ConfigError(
            f"train.rdrop_alpha={config.train.rdrop_alpha:g}: nothing is dropped, so both passes are equal. {way_out}"
        )


def _check_positions(data: Dataset | Stream, model: PreTrainedModel, virtual: int) -> None:
    positions = usable_positions(model)
    longest = data.longest if isinstance(data, Dataset) else data.encoder.config.max_tokens
    if positions is not None and virtual >= positions:
        raise ConfigError(
            f"adapter.num_virtual_tokens={virtual}: the model has {positions} positions, so none is left for rows. Lower it."
        )
    if positions is not None and longest + virtual > positions:
        more = f" and {virtual} virtual ones before it" if virtual else ""
        raise DataError(
            f"{data.key}: a row has {longest} tokens{more}, and the model has {positions} positions. Set data.max_tokens="
            f"{positions - virtual} or less, and data.too_long."
        )


def prepare(
    config: RunConfig, need_train: bool = True, trained: RunDir | None = None, begun: RunDir | None = None
) -> Setup:
    """Find the base, read and encode the data, and check all of it against the configuration; loads no weights.

    Args:
        begun: the run that is resumed, which keeps its tokens; `trained` does so too.
        trained: the run whose adapter will be loaded; it remembers what the task learned of its rows.
    """
    stages = Stages()
    tracking.tracker_name(config.tracker)
    device = load.start_device(config.hardware, config.model.dtype, trains=trained is None)
    learned = None if trained is None else files.learned(trained.adapter)
    with stages("find_base"):
        found = find_base(config, recorded_base(trained or begun))
    if trained is not None:
        check_trained(trained, config, found)
    say_base(config, found.base, device)
    say_template(found.encoder)
    with stages("data"):
        data, found, task = build_data(config, found, need_train, learned)
    if need_train and data.train is not None:
        config.adapter.check_length(
            plan_of(config, data.train).total_steps(config.train.epochs, config.train.max_steps)
        )
    return assemble(config, found, data, task, device, stages, trained)


def recorded_base(run: RunDir | None) -> dict[str, Any] | None:
    """What a run recorded of its base when it was begun."""
    saved = None if run is None else run_dir.read_manifest(run)
    return None if saved is None else saved["base"]


def say_base(config: RunConfig, base: BaseFiles, device: torch.device) -> None:
    """Which base it is, and how its weights are stored."""
    how = base.stored(config.quant).method + (" as published" if base.published else "")
    console.say("base", f"{base.name}, {config.model.dtype}, quant {how}, on {device}")


def _rendering(encoder: Encoder) -> ChatEncoder | None:
    """What renders conversations, or texts that are put into some; None: nothing does."""
    return encoder if isinstance(encoder, ChatEncoder) else getattr(encoder, "rendering", None)


def say_template(encoder: Encoder) -> None:
    """Tell of a template that is not the base's own, or not as it was."""
    rendering = _rendering(encoder)
    if rendering is None:
        return
    put = rendering.template.put_before
    if (encoder.tokenizer.chat_template or "").endswith(PLAIN_TEMPLATE):
        after = f" after {put!r}, as the tokenizer begins every text" if put else ""
        console.say(
            "template", f"the tokenizer has no chat template; using '### role:' headings{after}, saved with the merge"
        )
    elif put:
        console.say(
            "template",
            f"the chat template does not begin with {put!r} (BOS), and the tokenizer begins every text so: it is put there, "
            "and saved with the merge",
        )


def check_trained(run: RunDir, config: RunConfig, found: ResolvedBase) -> None:
    """Refuse an adapter that was trained on another base, or has other settings than its run; tell other versions."""
    files.check_base(run.adapter, found.base)
    files.check_quant(run.adapter, found.base.stored(config.quant))
    files.check_settings(run.adapter, fresh_settings(found.model, config.adapter, found.kind))
    saved = run_dir.read_manifest(run)
    if saved is not None:
        run_dir.tell_versions(saved)


def assemble(
    config: RunConfig,
    found: ResolvedBase,
    data: build.Data,
    task: AnyTask,
    device: torch.device,
    stages: Stages,
    trained: RunDir | None = None,
) -> Setup:
    """Put together what was found; the teacher of a run that is not trained is looked for.

    Args:
        trained: as of `prepare`.
    """
    return Setup(
        config,
        found.base,
        found.kind,
        found.encoder,
        task,
        data,
        device,
        _accelerator(config.model.dtype, device),
        stages,
        _teacher(config, found, device, trained),
    )


def _teacher(config: RunConfig, found: ResolvedBase, device: torch.device, trained: RunDir | None) -> Teacher | None:
    """Who teaches the run, if anybody does. A trained run's is looked for when it is asked."""
    if config.task.taught_by is None:
        return None
    if trained is None:
        teacher = Teacher(config, found.base, found.kind, found.encoder, device)
        console.say("teacher", ", ".join(f"{name} ({digest[:12]})" for name, digest in teacher.hashes.items()))
        return teacher
    saved = run_dir.read_manifest(trained)
    hashes = [] if saved is None else list(saved["data"].get(KEY, {}).values())
    return Teacher(config, found.base, found.kind, found.encoder, device, next(iter(hashes), None))


def _accelerator(dtype: str, device: torch.device) -> Accelerator:
    """What computes in a run's precision on its device."""
    AcceleratorState._reset_state()  # accelerate keeps the first run's precision for the whole process otherwise
    precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}[dtype]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    if dtype == "float16":
        accelerator.native_amp = True  # accelerate knows float16 on cards only
        accelerator.scaler = None  # each member scales its own loss, see `cohort.Member`
    return accelerator


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run: its folder, and its setup as it is now."""

    run: RunDir
    setup: Setup

    @classmethod
    def open(cls, path: str, takes: Takes, overrides: Sequence[str] = (), need_train: bool = False) -> Self:
        """The run that `run=DIR` names, with what was told about it; see `open_trained` and `of`."""
        return cls.of(*open_trained(path, takes, overrides), need_train)

    @classmethod
    def of(cls, run: RunDir, config: RunConfig, need_train: bool = False) -> Self:
        """What `open_trained` opened, made ready.

        Args:
            need_train: the training rows are wanted too.

        Raises:
            AdapterError: the adapter was trained on another base, or has other settings than its run.
        """
        return cls(run, prepare(config, need_train, trained=run))

    def loaded(self) -> Live:
        """The base with the trained adapter, for a `with` block."""
        live = self.setup.loaded({ADAPTER: self.run.adapter})
        live.model.eval()
        return live
