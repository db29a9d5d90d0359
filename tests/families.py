"""Every family of models that transformers can build tiny from a configuration, and what comes of training it.

A family is a task and a model type of transformers' own tables. Its configuration gets small values for whatever it knows of
`_SIZES`, and `_OWN` where a family needs others. Used by tests/base/test_architectures.py and benchmarks/architectures.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_lab.config import compose
from lora_lab.errors import LoraLabError
from lora_lab.run import pipeline
from lora_lab.runtime import children
from lora_lab.verify import reload
from tests.conftest import WORDS, make_tokenizer, write_jsonl

TASKS = {  # task -> transformers' table of model types, its Auto class, what the run is told
    "completion": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", []),
    "masked_lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", ["task.pseudo_perplexity_rows=4"]),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM", []),
    "classification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
        [],
    ),
}
MOST_PARAMETERS = 8_000_000  # above, something has kept its full size
_LABELS = ("cat", "dog", "bird")

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "model_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "ff_dim"), 128
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
            "num_encoder_layers", "depth",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
            "num_encoder_attention_heads", "num_decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_encoder_position_embeddings"), 128),
    "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "initializer_range": 0.1, "init_std": 0.1, "type_vocab_size": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "intermediate_size_mlp": 128,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "qk_head_dim": 16, "qk_rope_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 128, "mamba_expand": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8, "time_step_rank": 4,
    "shared_intermediate_size": 128, "sliding_window": 32, "attention_window": 16, "attention_chunk_size": 64,
    "rotary_dim": 8, "attn_rotary_emb": 8,
}  # fmt: skip
_TOWER = {  # a part that sees pictures or hears
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "depth": 1, "num_heads": 2, "out_hidden_size": 64, "embed_dim": 32, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "num_channels": 3, "text_hidden_size": 64, "text_config": None, "num_global_layers": 1,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {  # by model type; what a family needs beside or instead of the sizes above
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "adapter_rank": 8},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "attention_head_dim": 32, "n_mamba_heads": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "qwen3_5": _HYBRID, "qwen3_5_text": _HYBRID, "qwen3_5_moe": _HYBRID, "qwen3_5_moe_text": _HYBRID, "qwen3_next": _HYBRID,
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": "vocab_size",
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "gemma2": {"query_pre_attn_scalar": 16}, "vaultgemma": {"query_pre_attn_scalar": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": "vocab_size", "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0, "global_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}, "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "xlnet": {"d_head": 16}, "longformer": {"attention_window": [16, 16]}, "led": {"attention_window": [16, 16], "max_decoder_position_embeddings": 128},
    "deberta": {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 16},
    "minimax": _HYBRID, "qwen4_exp_text": {**_HYBRID, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "kimi_linear": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 16, "linear_num_heads": 4},
    "bailing_hybrid": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"]}, "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "attention_head_size": 16, "feed_forward_size": 128,
        "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "num_buckets": 2,
    },
    "mobilebert": {"true_hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 32}, "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "funnel": {"block_sizes": [1, 1], "d_head": 16, "d_inner": 128}, "big_bird": {"attention_type": "original_full"}, "bigbird_pegasus": {"attention_type": "original_full"},
    "esmc": {"num_key_value_heads": 4}, "dots3_note_text": {"num_key_value_heads": 4}, "zaya": {"num_experts_per_tok": 1},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16}, "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2}, "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "longcat_flash": {"head_dim": 8}, "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}},
    "fsmt": {"decoder_start_token_id": 3},
    "xlstm": {"num_blocks": 2, "chunk_size": 16, "embedding_dim": 64}, "blt": {}, "canine": {},
}  # fmt: skip
_NOT_SET = {  # what follows from other settings
    "funnel": "num_hidden_layers", "prophetnet": "num_hidden_layers", "xlnet": "max_position_embeddings",
}  # fmt: skip
_DECODERS = (
    "bert",
    "roberta",
    "electra",
    "camembert",
    "big_bird",
    "xlm-roberta",
    "bert-generation",
    "megatron-bert",
    "ernie",
    "reformer",
)


@dataclasses.dataclass
class Outcome:
    """What came of one family."""

    task: str
    family: str
    model: str = ""  # transformers' class
    trained: bool = False
    rows: str = ""  # packed, padded or one by one
    speed: str = ""
    adapted: str = ""
    merged_gap: float | None = None  # largest difference of a logit
    own_gap: float | None = None  # of the loss and plain transformers' on the merged checkpoint, relative
    refused: str = ""  # the sentence, before training
    not_built: str = ""  # why transformers builds none that is tiny
    fault: str = ""  # what must not be
    said: str = ""


def families() -> Iterator[tuple[str, str]]:
    """(task, model type) of everything that transformers lists."""
    from transformers.models.auto import modeling_auto

    for task, (table, _, _) in TASKS.items():
        yield from ((task, name) for name in getattr(modeling_auto, table))


def preload() -> None:
    """Import what an attempt will need, so that processes forked from this one have it."""
    import transformers
    import transformers.models.auto.modeling_auto
    from torch.utils import _pytree  # noqa: F401

    from tests.tasks import test_tasks  # noqa: F401

    for name in ("antlr4", "hydra", "pandas", "transformers.trainer_utils"):
        importlib.import_module(name)
    for name in ("PreTrainedModel", "AutoTokenizer", *(auto for _, auto, _ in TASKS.values())):
        getattr(transformers, name)


# -- tiny models ----------------------------------------------------------------------------------------------------------


def make(task: str, family: str, folder: Path, tokenizer: Any = None) -> str:
    """A tiny random model of a family with a tokenizer in `folder`; its class.

    Args:
        tokenizer: of a model that writes; None: one of about 300 tokens.

    Raises:
        Exception: whatever transformers raises where these settings are not enough.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    both = getattr(CONFIG_MAPPING[family], "is_encoder_decoder", False)
    bidirectional = task == "masked_lm" or (task == "classification" and (both or not _writes(family)))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        encodes = bidirectional or task == "seq2seq"
        tokenizer = _encoder_tokenizer(folder) if encodes else make_tokenizer(folder, None)
    ids = (2, 3, 0) if bidirectional or task == "seq2seq" else (1, 2, 0)
    marks = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True)) | {
        "decoder_start_token_id": ids[2]
    }
    more = {"is_decoder": True} if task == "completion" and family in _DECODERS else {}
    if task == "classification":
        more = {"num_labels": len(_LABELS)}
    sizes = _SIZES | {"vocab_size": len(tokenizer), **marks, **more}
    config = _configured(CONFIG_MAPPING[family], family, sizes)
    torch.manual_seed(0)
    with _quick():
        model = getattr(transformers, TASKS[task][1]).from_config(config)
    size = sum(
        one.numel() for one in model.parameters() if len(tokenizer) not in one.shape
    )  # a vocabulary may be large
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters: these settings do not make it tiny")
    model = model.float().eval()
    for one in model.parameters():  # experts would be chosen among equals, and parts that give nothing hide faults
        if one.dim() > 1 and not one.any():
            torch.nn.init.normal_(one, std=0.1)
    _call(model, task)
    model.save_pretrained(folder)
    return type(model).__name__


@torch.no_grad()
def _call(model: Any, task: str) -> None:
    """Some settings make a model that cannot be called."""
    end = getattr(model.config, "eos_token_id", None)
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, end if isinstance(end, int) else 12]])
    model(input_ids=ids, **({"decoder_input_ids": ids} if task == "seq2seq" else {}))


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """A model that keeps some full size must not fill the machine: its parameters are counted as they are made."""
    from torch import nn

    count, register = 0, nn.Module.register_parameter

    def counted(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count > 10 * MOST_PARAMETERS:
            raise ValueError(f"more than {10 * MOST_PARAMETERS:,} parameters: these settings do not make it tiny")
        register(self, name, parameter)

    nn.Module.register_parameter = counted
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _configured(kind: type, family: str, sizes: dict[str, Any]) -> Any:
    """A configuration with small values for whatever it knows."""
    default = kind()
    own = {
        name: sizes["vocab_size"] if value == "vocab_size" else value for name, value in _OWN.get(family, {}).items()
    }
    known = {name: value for name, value in sizes.items() if _knows(default, name)} | own
    known.pop(_NOT_SET.get(family), None)
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # keys are made anew for each head
        known["num_key_value_heads"] = known.get("num_attention_heads", 4)
    if "qk_rope_head_dim" in known and "head_dim" not in own:  # the part that turns is what such families call head_dim
        known.pop("head_dim", None)
    for name, part in getattr(kind, "sub_configs", {}).items():
        if not hasattr(part, "model_type") or part.__name__ == "AutoConfig":
            part = type(getattr(default, name, None))
        if not hasattr(part, "model_type"):
            continue
        text = name in (
            "text_config",
            "decoder",
            "encoder",
            "decoder_config",
            "encoder_config",
            "text",
            "thinker_config",
        )
        chosen = sizes if text else sizes | _TOWER
        if family == "encoder-decoder" and name == "decoder":
            chosen = chosen | {"is_decoder": True, "add_cross_attention": True}
        known[name] = _configured(part, part.model_type, {key: one for key, one in chosen.items() if one is not None})
    config = kind(**known)
    for key in list(vars(config)):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    return config


def _knows(config: Any, name: str) -> bool:
    if name in ("bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "decoder_start_token_id"):
        return True
    if name in {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else ():
        return True
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        return hasattr(config, name)
    except Exception:  # of attributes that each layer has its own of
        return False


@functools.cache
def _writes(family: str) -> bool:
    """Whether a family is known as a model that writes, and not as one that fills masks."""
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in masked


def _encoder_tokenizer(folder: Path) -> Any:
    from tests.tasks.test_tasks import make_encoder_tokenizer

    tokenizer = make_encoder_tokenizer(folder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return tokenizer


# -- a run ----------------------------------------------------------------------------------------------------------------


def _rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    import random

    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    if task == "seq2seq":
        return [{"source": text(3, 9), "target": text(2, 5)} for _ in range(count)]
    if task == "classification":
        return [{"text": text(3, 9), "label": _LABELS[i % 3]} for i in range(count)]
    return [{"text": text(4, 12)} for _ in range(count)]


def attempt(task: str, family: str, folder: Path) -> Outcome:
    """Build, train three steps, merge, and compare with what plain transformers make of the merged checkpoint."""
    found = Outcome(task, family)
    base, run_dir = folder / "base", folder / "run"
    base.mkdir(parents=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found.model = make(task, family, base)
    except Exception as error:
        found.not_built = _short(error)
        return found
    rows = (
        write_jsonl(folder / "train.jsonl", _rows(task, 12, 0)),
        write_jsonl(folder / "eval.jsonl", _rows(task, 4, 1)),
    )
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", f"task={task}",
        f"data.train={rows[0]}", f"data.eval={rows[1]}", "data.max_tokens=64", "data.check=warn", "optim.lr=0.01", "adapter.r=4",
        "train.batch_size=2", "train.max_steps=3", "export=merged", "export.dtype=float32", f"run_dir={run_dir}", *TASKS[task][2],
    ]  # fmt: skip
    said = io.StringIO()
    try:
        with _reloaded_here(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            done = pipeline.train(compose.compose(told))
    except LoraLabError as error:
        found.said = said.getvalue()
        if run_dir.exists():
            found.fault = f"{type(error).__name__} after training began: {error}"
        else:
            found.refused = " ".join(str(error).replace(str(base), "BASE").split())
        return found
    except Exception as error:
        found.said, found.fault = said.getvalue(), f"{_short(error)}\n{''.join(traceback.format_exc()[-1500:])}"
        return found
    found.said = said.getvalue()
    _read(found, done.path)
    return found


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _read(found: Outcome, path: Path) -> None:
    """Take from a run what the table says of it, and compute its loss anew."""
    lines = dict(re.findall(r"^ *(speed|packing) +(.*)$", found.said, re.MULTILINE))
    adapted = re.search(r"^ *adapter +(.*) adapted,", found.said, re.MULTILINE)
    result = json.loads((path / "result.json").read_text())
    merge = result["merge"]
    found.trained = result["steps"] == 3
    found.speed, found.adapted = lines.get("speed", ""), adapted[1] if adapted else ""
    found.rows = "one by one" if "packing" in lines else "packed" if found.task == "completion" else "padded"
    found.merged_gap = merge["merged_vs_model_as_trained"]["max_logit_diff"]
    tuned = result["tuned"]
    ours = math.log(tuned["pseudo_perplexity"]) if found.task == "masked_lm" else tuned["loss"]
    plain = plain_loss(found.task, path / "merged", path.parent / "eval.jsonl")
    found.own_gap = abs(ours - plain) / abs(plain)
    if not found.own_gap <= 1e-5:
        found.fault = f"loss {ours:.7f}, and plain transformers compute {plain:.7f} of the merged checkpoint"


@contextlib.contextmanager
def _reloaded_here() -> Iterator[None]:
    """Checkpoints are reloaded in this process: a new one would take longer than all the rest."""
    started = children.run

    def here(command: list[str], **options: Any) -> Any:
        if not command[2:3] or not command[2].endswith("reload.py"):
            return started(command, **options)
        try:
            reload.main(*command[3:])
        except SystemExit as error:
            return subprocess.CompletedProcess(command, 1, "", str(error))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", _short(error))
        return subprocess.CompletedProcess(command, 0)

    children.run = here
    try:
        yield
    finally:
        children.run = started


@torch.no_grad()
def plain_loss(task: str, folder: Path, rows: Path) -> float:
    """Mean loss of a saved checkpoint on rows, by transformers alone, one text at a time."""
    import transformers

    model = getattr(transformers, TASKS[task][1]).from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        loss, items = _PLAIN[task](model, tokenizer, row)
        total, count = total + loss, count + items
    return total / count


def _plain_completion(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1


def _plain_masked(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
    loss, count = 0.0, 0
    for place in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, place] = tokenizer.mask_token_id
        logits = model(input_ids=masked, attention_mask=torch.ones_like(ids)).logits[0, place].float()
        loss, count = loss - logits.log_softmax(-1)[ids[0, place]].item(), count + 1
    return loss, count


def _plain_seq2seq(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    ids, labels = (torch.tensor([tokenizer(row[name])["input_ids"]]) for name in ("source", "target"))
    start = model.config.decoder_start_token_id
    before = torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=before).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum").item(), labels.shape[1]


def _plain_classification(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    return -logits.log_softmax(-1)[model.config.label2id[row["label"]]].item(), 1


_PLAIN = {
    "completion": _plain_completion,
    "masked_lm": _plain_masked,
    "seq2seq": _plain_seq2seq,
    "classification": _plain_classification,
}

if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="families_") as place:
        one = attempt(sys.argv[1], sys.argv[2], Path(place))
        print(one.said)
        print(json.dumps({k: v for k, v in dataclasses.asdict(one).items() if k != "said"}, indent=1))
        print(one.fault)
