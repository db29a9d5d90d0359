"""Load the frozen base: find its folder, read its tokenizer, load and quantize its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_lab.base import cache, gguf, inspect, overruled, published, quantized
from lora_lab.base.fingerprint import fingerprint
from lora_lab.base.resolve import download, is_hub_id, local_path
from lora_lab.base.tokenizer import READER, read_tokenizer
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.config.train import HardwareConfig
from lora_lab.errors import BaseModelError, ConfigError, LoraLabError
from lora_lab.runtime import busy, cards, console, ranks

if TYPE_CHECKING:
    import torch
    from transformers import (
        BitsAndBytesConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TorchAoConfig,
    )


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """What a task makes of a base: which transformers class, and what of it is new and so trained whole."""

    auto_class: str = "AutoModelForCausalLM"
    peft_task_type: str | None = "CAUSAL_LM"
    head: Literal["none", "always", "missing"] = (
        "none"  # trained: never, always, or where the base has no weights for it
    )
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of config.json, such as id2label
    new_modules: tuple[str, ...] = ()  # found by `new_modules`: trained whole, in float32, beside the adapter
    retrained: tuple[str, ...] = ()  # modules of the base itself that are trained so, by the adapter's section
    # modules that the task does not read: they get no adapter, and zeros where the base has no weights for them
    unread: tuple[str, ...] = ()

    @property
    def whole(self) -> tuple[str, ...]:
        """All that is trained whole."""
        return (*self.new_modules, *self.retrained)

    @property
    def unadapted(self) -> tuple[str, ...]:
        """All that gets no adapter."""
        return (*self.whole, *self.unread)


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, before any weight is loaded."""

    name: str  # as the user named it
    folder: Path
    fingerprint: str  # see `fingerprint.py`
    companions: dict[str, str] = dataclasses.field(default_factory=dict)  # digests of its tokenizer and so on, by name
    published: QuantConfig | None = None  # how its weights were quantized by whoever published them
    reader: int = READER  # how its files are read, see `tokenizer.READER`

    def recorded(self) -> dict[str, Any]:
        """What runs and adapters remember of it."""
        found = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "companions": self.companions,
            "tokenizer_reader": self.reader,
        }
        return found if self.published is None else {**found, "published_in": self.published.method}

    def stored(self, quant: QuantConfig) -> QuantConfig:
        """How its weights are stored in a run that says `quant`: as they were published, where they were quantized then."""
        return self.published or quant

    def changed(self, recorded: dict[str, Any]) -> list[str]:
        """What of it differs from what was recorded; earlier versions of lora_lab recorded the weights alone."""
        found = ["weights"] if recorded.get("fingerprint") != self.fingerprint else []
        then, now = recorded.get("companions") or {}, self.companions
        if then and now:  # else nobody has looked
            found += [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return found


def reader_of(recorded: dict[str, Any]) -> int:
    """How the tokenizer was read for a run or adapter that recorded this of its base; the first versions recorded nothing."""
    reader = recorded.get("tokenizer_reader", 1)
    return reader if isinstance(reader, int) and 1 <= reader <= READER else READER


def find(model: ModelConfig, reader: int = READER, weights: bool = True, key: str = "model.path") -> BaseFiles:
    """Find the base model, downloading or converting it when needed, and check its files.

    Args:
        reader: how its files are read, see `tokenizer.READER`.
        weights: False: they need not be there, and are not downloaded.
        key: of the configuration, which names the model.

    Raises:
        BaseModelError: not found, not reachable, damaged, asking for code to be run, or quantized in a way that nobody trains on.
    """
    if is_hub_id(model.path):
        folder = download(f"{key}={model.path}", model.path, model.revision, weights)
    else:
        folder = local_path(model.path, key, BaseModelError)
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise BaseModelError(f"{key}={model.path}: a file must be .gguf; name the folder of a transformers model.")
        folder = gguf.to_safetensors(folder, reader, model.dtype)
    absent = not weights and inspect.without_weights(folder)
    files = [] if absent else inspect.weight_files(folder)
    as_published = published.read(folder)
    return BaseFiles(model.path, folder, fingerprint(folder, files), published=as_published, reader=reader)


def tokenizer_now(model: ModelConfig, folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer as a run that is begun now would read it, without converting its weights again.

    Args:
        folder: where the base lies, by whichever reader.

    Raises:
        BaseModelError: it would be refused.
    """
    source = folder if is_hub_id(model.path) else local_path(model.path, "model.path", BaseModelError)
    if source.is_file():
        return gguf.tokenizer_of(source)
    return overruled.as_written(folder, read_tokenizer(folder, reader=1))[0]


def tokenized_otherwise(model: ModelConfig, base: BaseFiles, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hard texts of which a run that is begun now would make other tokens than `tokenizer`.

    Raises:
        BaseModelError: it could not be begun now.
    """
    now = tokenizer_now(model, base.folder)
    return overruled.differing(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda text: now(text, add_special_tokens=False)["input_ids"],
    )


def torch_device(hardware: HardwareConfig, number: int | None = None) -> torch.device:
    """The device that `hardware.device` names.

    Args:
        number: of this process among those of the machine that train together; each has the card of its number, or the only one
            that it sees.

    Raises:
        ConfigError: CUDA is asked for and torch has none, or torch cannot use a card that is there.
    """
    import torch

    name, key = hardware.device, f"hardware.device={hardware.device}"
    if name == "auto":
        if not torch.cuda.is_available():
            _refuse_idle_card(key)
            return torch.device("cpu")
        name = "cuda"
    if not name.startswith("cuda"):
        return torch.device(name)
    count = torch.cuda.device_count()
    named = name.partition(":")[2]
    number = ranks.local() if number is None else number
    index = int(named) if named else number if count > 1 else 0
    if count == 0:
        raise ConfigError(
            f"{key}: no CUDA device can be used ({cards.why_unusable()}). Use hardware=cpu, or install a CUDA build of torch and a "
            "driver that fits it."
        )
    if index >= count and not named:
        raise ConfigError(
            f"hardware.processes: process {index} of this machine has no card, because there are {count}. Start at most {count} processes "
            "here."
        )
    if index >= count:
        raise ConfigError(
            f"{key}: torch {torch.__version__} sees {count} CUDA devices, numbered from 0. Use hardware.device=cuda:{count - 1}."
        )
    cards.check_architecture(key, index)
    return torch.device(f"cuda:{index}")


def _refuse_idle_card(key: str) -> None:
    """A card that is there and is not used would make a run slower by orders of magnitude, without a word."""
    sign = cards.sign()
    if sign is None:
        return
    raise ConfigError(
        f"{key}: {sign}, but no card can be used ({cards.why_unusable()}). Install a torch and a driver that fit each other, or set "
        "hardware=cpu to train on the CPU."
    )


def _refuse_for_cards(hardware: HardwareConfig) -> None:
    """What is told of a card has no effect on the CPU, which `auto` has chosen."""
    if hardware.memory_gib is not None:
        raise ConfigError(
            f"hardware.memory_gib={hardware.memory_gib:g}: no effect on the CPU. Set hardware.memory_gib=null."
        )
    if hardware.offload_embeddings:
        raise ConfigError(
            "hardware.offload_embeddings=true: no effect on the CPU. Set hardware.offload_embeddings=false."
        )


def start_device(hardware: HardwareConfig, dtype: str, trains: bool) -> torch.device:
    """Make the device ready for a run: threads, kernels that repeat exactly, and how much of a card is taken.

    Args:
        dtype: that the run computes in.
        trains: whether it is a run that begins or goes on; a trained one is what it is.

    Raises:
        ConfigError: as `torch_device`; also what is asked of a device that cannot give it.
    """
    import torch

    device = torch_device(hardware)
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    if device.type == "cpu":
        _refuse_for_cards(hardware)
        sleeping = busy.chosen()
        if sleeping is not None:
            console.say("threads", sleeping)
        return device
    if dtype == "bfloat16":
        cards.check_bfloat16(device.index, trains)
    if hardware.deterministic:
        cards.repeat_exactly()
    capped = cards.cap_memory(device.index, hardware.memory_gib)
    if capped is not None:
        console.say("memory", f"at most {capped:.1f} GiB of the card are taken")
    return device


def skeleton(folder: Path, kind: ModelKind, dtype: str | None = None) -> PreTrainedModel:
    """The model without its weights, on the meta device.

    Raises:
        BaseModelError: transformers does not know the architecture as this kind of model.
    """
    import torch
    import transformers

    settings = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    config = model_config(folder, kind)
    with _building(folder, kind), torch.device("meta"):
        return getattr(transformers, kind.auto_class).from_config(config, **settings)


@contextlib.contextmanager
def _building(folder: Path, kind: ModelKind) -> Iterator[None]:
    """Whatever transformers raises of a configuration becomes a BaseModelError."""
    from transformers import __version__

    try:
        yield
    except (LoraLabError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        raise BaseModelError(
            f"{folder}/config.json: transformers {__version__} cannot build {AS[kind.auto_class]} from it ({reason}). Choose "
            "another base or task."
        ) from error


_MOST_PER_BYTE, _SMALL_MODEL = 8, 2**28  # parameters: of one bit each, and a head that is new
_said: set[tuple[str, str]] = set()  # configurations are read several times, and told of once

AS = {
    "AutoModel": "a model that gives hidden states",
    "AutoModelForCausalLM": "a causal language model",
    "AutoModelForMaskedLM": "a masked language model",
    "AutoModelForSequenceClassification": "a classifier of texts",
    "AutoModelForTokenClassification": "a classifier of tokens",
    "AutoModelForQuestionAnswering": "a model that finds answers in a context",
    "AutoModelForSeq2SeqLM": "an encoder-decoder",
}


def model_config(folder: Path, kind: ModelKind) -> PretrainedConfig:
    """The base's configuration with what the task decides of it.

    Raises:
        BaseModelError: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    inspect.require_config(folder)
    inspect.check_files(folder)
    with _building(folder, kind):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _choose_attention(folder, config)
        for name, value in kind.settings.items():
            setattr(config, name, value)
    return config


def _choose_attention(folder: Path, config: PretrainedConfig) -> None:
    """Take back a choice of native code (FlashAttention and its like) that a `config.json` made: it is ours, and changes no
    result."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is None:
            continue
        chosen = getattr(part, "_attn_implementation", None)
        if chosen in inspect.KNOWN_ATTENTION:
            continue
        part._attn_implementation_internal = None
        if (str(folder), chosen) not in _said:
            _said.add((str(folder), chosen))
            console.say(
                "base", f"config.json asks for {chosen}; attention is computed by torch instead, and nothing is lost"
            )


def new_modules(model: PreTrainedModel, folder: Path, head: str) -> tuple[str, ...]:
    """Names of the modules that are trained whole: the task's head, and parts that the base has no weights for. Of a base whose weights
    are not there it is not known which these are.

    Args:
        model: see `skeleton`.
        head: as in `ModelKind`.

    Raises:
        BaseModelError: the configuration describes a far larger model than the files hold.
    """
    from lora_lab.base.weights import Weights

    prefix = model.base_model_prefix
    if inspect.without_weights(folder):
        return tuple(_heads(model)) if head == "always" else ()
    _refuse_larger(model, folder)
    there = {name.removeprefix(f"{prefix}.") for name in Weights(folder)}
    found = []
    if head == "always":
        found = _heads(model)
    for name, parameter in model.named_parameters():
        if name in model.all_tied_weights_keys:  # on the meta device a tied weight has a parameter of its own
            continue
        module, _, own = name.rpartition(".")
        known = name.removeprefix(f"{prefix}.")
        legacy = known.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if known in there or legacy in there or any(name.startswith(f"{top}.") for top in found):
            continue
        if (head == "missing" and not any(True for _ in model.get_submodule(module).children())) or (
            ".pooler." in f".{name}" and head == "always"
        ):
            found += [module] if module not in found else []
        elif not (
            head == "missing" and own == "bias" and parameter.dim() == 1
        ):  # a bias alone begins, and stays, at zero
            return tuple(found)  # loading will say what is missing
    return tuple(found)


def _heads(model: PreTrainedModel) -> list[str]:
    """What stands beside the base itself and has parameters."""
    tops = {name: module for name, module in model.named_children() if name != model.base_model_prefix}
    return [name for name, module in tops.items() if any(True for _ in module.parameters())]


def _refuse_larger(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a configuration whose model would fill the machine with numbers that the files do not hold."""
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in inspect.weight_files(folder))
    if described > _MOST_PER_BYTE * stored + _SMALL_MODEL:
        raise BaseModelError(
            f"{folder}/config.json: describes a {type(model).__name__} of {described:,} parameters, and the weights have "
            f"{stored:,} bytes. They do not belong together: copy or download the folder again."
        )


def check_storage(quant: QuantConfig, model: PreTrainedModel) -> None:
    """Refuse a format that is not there, or that would leave a base's layers as they are.

    Args:
        model: see `skeleton`.

    Raises:
        ConfigError: torchao is missing, or the layers are of a kind that it does not quantize.
    """
    from transformers.pytorch_utils import Conv1D

    if quant.method != "torchao_int8":
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "quant.method=torchao_int8 needs torchao. pip install 'lora-lab[torchao]', or set quant=int8."
        )
    others = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    if others:
        raise ConfigError(
            f"quant.method=torchao_int8: torchao quantizes Linear layers alone, and {len(others)} layers of {type(model).__name__} are "
            f"Conv1D (the first: {others[0]}). Set quant=int8 or quant=nf4, which do."
        )


def load_model(
    files: BaseFiles, kind: ModelKind, dtype: str, quant: QuantConfig, device: torch.device, seed: int
) -> PreTrainedModel:
    """The base model on its device: quantized if asked, in evaluation mode, every parameter frozen.

    Args:
        dtype: torch type of everything that is not quantized; also the type that quantized layers compute in.
        quant: without effect on a base that was published quantized.
        seed: of the weights of new modules.
    """
    from lora_lab.base import weight_only
    from lora_lab.runtime import pages

    kept = quantized.folder_of(files, kind, dtype, quant, device.type)
    again = kept is not None and cache.usable(kept)
    model = _read(files, kind, dtype, quant, device, seed, kept if again else None)
    if kept is not None and not again:
        quantized.keep(model, kept)
        if device.type == "cpu" and cache.usable(kept):
            del model
            gc.collect()  # modules refer to each other
            pages.trim()
            # mapped from there, as in later loads, its weights need no memory of their own
            model = _read(files, kind, dtype, quant, device, seed, kept)
    module: Any
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in place at the first evaluation, and gradients are lost after
        # that. A frozen base stays as it is.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    weight_only.own_products(model)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_in_one_piece)
    if dtype == "float16":
        _refuse_infinite(files, model)
    return model.requires_grad_(False).eval()


def _in_one_piece(_: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an output layer is called with, in memory of its own. Where answers begin it is the last place of each row, a view: of such a one
    and of a frozen weight torch makes a product for each row, and a copy of the weight for each of them, 1.8 GB for 32 rows and a
    vocabulary of 49,152."""
    return tuple(one.contiguous() if hasattr(one, "contiguous") else one for one in given)


def _read(
    files: BaseFiles,
    kind: ModelKind,
    dtype: str,
    quant: QuantConfig,
    device: torch.device,
    seed: int,
    kept: Path | None,
) -> PreTrainedModel:
    """As `load_model`, as transformers loads it.

    Args:
        kept: a folder with the weights as they were quantized before, which says itself how; None: they are quantized now.
    """
    import torch
    import transformers
    from transformers.utils import logging

    from lora_lab.runtime.memory import is_out_of_memory
    from lora_lab.runtime.pages import Reading

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is missing or new is said below
    torch.manual_seed(seed)
    how: dict[str, Any] = {"config": model_config(files.folder, kind)}
    quant = files.stored(quant)
    quantization = quantization_config(quant, dtype, kind)
    if files.published is not None:
        assert quantization is not None
        _describe_published(how["config"], quantization)
    else:
        how["quantization_config"] = quantization
    folder = kept or files.folder
    reading = Reading(inspect.weight_files(folder))
    try:
        with reading:
            model, report = getattr(transformers, kind.auto_class).from_pretrained(
                folder,
                **({} if kept else how),
                dtype=getattr(torch, dtype),
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=kind.head == "always",
            )
    except LoraLabError:
        raise
    except Exception as error:  # of transformers, safetensors, the quantizer and torch
        if is_out_of_memory(error):
            raise
        if reading.lacked is not None:
            raise reading.lacked from error
        raise BaseModelError(
            f"model.path={files.name}: cannot be loaded with quant.method={quant.method} ({error})."
        ) from error
    absent = sorted(report["missing_keys"]) + sorted(
        key if isinstance(key, str) else str(key[0]) for key in report["mismatched_keys"]
    )
    absent = [name for name in absent if not _is_new(name, kind, model) and not _blank(name, kind, model)]
    if absent:
        raise BaseModelError(
            f"model.path={files.name}: no weights for {absent[0]} ({len(absent)} tensors): transformers would fill them "
            f"with random numbers. The folder does not hold a whole {type(model).__name__}."
        )
    return model


def _refuse_infinite(files: BaseFiles, model: PreTrainedModel) -> None:
    """float16 ends at 65504, far below the other types: a weight beyond it has become infinite."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise BaseModelError(
                f"model.path={files.name}: {name} holds numbers beyond what float16 can (65504). Use bfloat16, or float32."
            )


def _describe_published(config: PretrainedConfig, quantization: BitsAndBytesConfig | TorchAoConfig) -> None:
    """Let transformers read weights that were published quantized: computed in our type, and without what is trained whole."""
    own = dict(config.quantization_config)
    for name in ("bnb_4bit_compute_dtype", "llm_int8_skip_modules"):
        own[name] = quantization.to_dict()[name]
    config.quantization_config = own


def _is_new(name: str, kind: ModelKind, model: PreTrainedModel) -> bool:
    """Whether a tensor that the checkpoint lacks is trained, or is a bias of the head that stays at zero."""
    if any(name.startswith(f"{module}.") for module in kind.new_modules):
        return True
    return kind.head == "missing" and name.endswith(".bias") and not model.get_parameter(name).any()


def _blank(name: str, kind: ModelKind, model: PreTrainedModel) -> bool:
    """Whether a tensor that the checkpoint lacks is one that the task does not read; then it is zeros, whatever the seed."""
    if not any(name.startswith(f"{module}.") for module in kind.unread):
        return False
    model.get_parameter(name).data.zero_()
    return True


def quantization_config(quant: QuantConfig, dtype: str, kind: ModelKind) -> BitsAndBytesConfig | TorchAoConfig | None:
    """transformers' description of a quantization, which leaves what is trained whole or never read alone; None for none."""
    import torch
    from transformers import BitsAndBytesConfig

    if quant.method == "none":
        return None
    skipped = quant.skip_modules
    if kind.unadapted:  # given a list, transformers no longer leaves the output layer alone of itself
        skipped = [*(["lm_head", "decoder"] if skipped is None else skipped), *kind.unadapted]
    if quant.method == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    if quant.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.method,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=skipped,
    )
