"""Export every causal family that transformers and llama.cpp's conversion share: python -m benchmarks.exports [--only FAMILY,...]

Each is built tiny with random weights and the default base's tokenizer (tests/families.py), trained three steps, exported as a merged
folder and as GGUF, and proved as any export is. Results are kept in benchmarks/results/exports.json as they come, each with a digest of the
code that it was made with: those of another state are made anew, after those that are missing, and docs/exports.md, which is written from
them, names them until then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.sources import ROOT, sources
from lora_lab.base import gguf, gguf_tokens
from lora_lab.config import compose
from lora_lab.errors import LoraLabError
from lora_lab.export import convert, llama
from lora_lab.run import pipeline
from lora_lab.runtime import children, storage
from lora_lab.verify import reload
from tests import families
from tests.conftest import CHATML, make_rows, write_jsonl
from tests.export.test_export import letters_with_a_beginning, smollm2_tokenizer

_RESULTS = ROOT / "benchmarks" / "results" / "exports.json"
_DOCUMENT = ROOT / "docs" / "exports.md"
_PACKAGES = ("torch", "transformers", "peft", "auto-round", "gguf", "xllamacpp")
_SECONDS = 240  # for one family
_CONVERSION = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conversion
print("FOUND", json.dumps(sorted(conversion.TEXT_MODEL_MAP)))
"""
_SCRIPTS = {"reload.py": reload.main, "convert.py": convert.main, "llama.py": llama.main}
# llama.cpp has the places of windowed layers of each published model built in, or has none; a window beyond the rows makes them alike
families._SIZES["sliding_window"] = 4096
_LINEAR = {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]}
_LINEAR_WITH_PARTS = {  # of what turns, a quarter of each head: three parts, as for pictures
    **_LINEAR, "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
_WINDOWED = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
_AS_PUBLISHED: dict[str, dict[str, Any]] = {  # what llama.cpp has built in of a family, as its published models are made
    "bamba": {"attn_rotary_emb": 8},
    "dots1": {"num_key_value_heads": 4},
    "gemma3_text": _WINDOWED, "gemma4_text": {**_WINDOWED, "num_experts": None},
    "gemma3n_text": {
        "num_hidden_layers": 5, "layer_types": [*["sliding_attention"] * 4, "full_attention"], "activation_sparsity_pattern": [0.95] * 5,
        "altup_num_inputs": 4, "hidden_size_per_layer_input": 256, "laurel_rank": 64, "num_kv_shared_layers": 0,
    },
    "gpt2": {"n_inner": None}, "gpt-sw3": {"n_inner": None}, "gpt_bigcode": {"n_inner": 256},
    "granitemoehybrid": {"num_experts_per_tok": 0},
    "ministral3": _YARN,
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": _LINEAR, "qwen3_5": _LINEAR, "qwen3_5_moe": _LINEAR,
    "qwen3_5_text": _LINEAR_WITH_PARTS, "qwen3_5_moe_text": _LINEAR_WITH_PARTS,
}  # fmt: skip
for _family, _settings in _AS_PUBLISHED.items():
    families._OWN[_family] = {**families._OWN.get(_family, {}), **_settings}
_PUBLISHED: dict[str, dict[str, Any]] = {  # settings that published models have in config.json and transformers does not write
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "dots1": {"scoring_func": "noaux_tc"},
    "falcon_h1": {"head_dim": 16},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid"},
    "hunyuan_v1_moe": {"moe_intermediate_size": [128, 128], "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "kimi_linear": {
        "first_k_dense_replace": 1, "moe_router_activation_func": "sigmoid", "num_shared_experts": 1,
        "linear_attn_config": {
            "full_attn_layers": [2], "kda_layers": [1], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4,
        },
    },
}  # fmt: skip
_SENTENCEPIECE = (  # have no other tokenizer
    "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma3n_text", "jamba", "minicpm3", "nemotron", "phi3",
)  # fmt: skip
# transformers has a tokenizer class of its own for these, and llama.cpp knows their published vocabulary alone
_OWN_VOCABULARY = {"qwen2": "qwen2", "qwen3_5_moe": "qwen35", "qwen3_5_moe_text": "qwen35"}
_VOCABULARIES = os.environ.get("LORA_LAB_VOCABULARIES")  # a folder with llama.cpp's models/ggml-vocab-*.gguf
_NAMED_TOKENS = {  # that the conversion looks for
    "glm": ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>"],
}
_HEAD = """# Exports by family

Every causal family that transformers {transformers} and llama.cpp's conversion (auto-round {auto_round}, gguf {gguf}) share, built tiny
with random weights and the default base's tokenizer (byte-level, digits apart, a chat template), trained three steps in float32,
and exported with `export.targets=[hf,gguf]` at f16. `make exports` makes this page anew.

- **tokens**: conversations that went as messages through llama.cpp's own template engine and tokenizer, and through a fresh
  `AutoTokenizer` and `tokenizers` alone, and gave the run's ids.
- **KL**, **same token**: llama.cpp beside plain transformers on held-out positions.
- **answers**: greedy answers of {new_tokens} tokens that are the same; *near ties* part where two tokens are as likely, within rounding.
- What llama.cpp has built in of a family (which layers are windowed or linear, widths that follow from others) is as in its published
  models, and windows go beyond the rows. Settings that transformers does not write again are in the base's `config.json`.
- A family that knows SentencePiece alone gets such a tokenizer, of letters and bytes, without a chat template. One for which
  transformers has a tokenizer class of its own (Qwen 2 and 3.5) gets its published vocabulary.

Made with {versions}; code {digest}. {count} families exported and proved, {refused} refused before training, {after} refused after it,
{not_built} that transformers does not build tiny from these settings; {left} of {shared} have not been run.{earlier}
"""


@dataclasses.dataclass
class Outcome:
    """What came of one family."""

    family: str
    model: str
    code: str  # digest of the sources
    report: dict[str, Any] = dataclasses.field(default_factory=dict)  # of gguf
    merged: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: str = ""  # the sentence, before training
    refused_after: str = ""  # the sentence, after training; nothing was kept
    not_built: str = ""
    fault: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="FAMILY,...; these are repeated")
    parser.add_argument("--write", action="store_true", help="only write the page from the results that there are")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    code = sources("benchmarks/exports.py")
    state: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in _PACKAGES}}
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    if told.write:
        _DOCUMENT.write_text(page(known), encoding="utf-8")
        return
    kept = known.get("families", {}) if known.get("versions") == state["versions"] else {}
    results = {family: one for family, one in kept.items() if "code" in one}
    only = set(filter(None, told.only.split(",")))
    shared = _shared()
    state |= {"digest": code, "shared": len(shared)}
    wanted = only or {family for family in shared if results.get(family, {}).get("code") != code}
    for family in sorted(wanted & shared.keys(), key=lambda family: (family in results, family)):
        results[family] = dataclasses.asdict(_attempted(family, shared[family], code))
        storage.write_text(_RESULTS, storage.dump_json({**state, "families": dict(sorted(results.items()))}))
        print(family, {name: value for name, value in results[family].items() if value}, flush=True)
    _DOCUMENT.write_text(page({**state, "families": dict(sorted(results.items()))}), encoding="utf-8")
    faults = [name for name, one in results.items() if one["fault"]]
    if faults:
        sys.exit(f"faults: {', '.join(faults)}")


def _shared() -> dict[str, str]:
    """Model types that both know, and transformers' class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    [package] = importlib.util.find_spec("auto_round").submodule_search_locations
    words = [sys.executable, "-c", _CONVERSION, f"{package}/export/export_to_gguf"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    known = set(json.loads(told.partition("FOUND")[2]))
    return {family: name for family, name in CLASSES.items() if isinstance(name, str) and name in known}


def _attempted(family: str, model: str, code: str) -> Outcome:
    def late(*_: Any) -> None:
        raise RuntimeError(f"more than {_SECONDS} seconds")  # no OSError: lora_lab would take it for a full disk

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(prefix="exports_") as place:
        os.environ["LORA_LAB_CACHE"] = f"{place}/cache"
        found = Outcome(family, model, code)
        signal.alarm(_SECONDS)
        try:
            _attempt(found, Path(place))
        except Exception as error:
            print("".join(traceback.format_exc()[-1500:]), file=sys.stderr)
            found.fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            signal.alarm(0)
    for name in ("refused", "refused_after", "not_built", "fault"):
        told = re.sub(r"\S*/lora_lab_\w+/", "", getattr(found, name).replace(place, ""))
        setattr(found, name, " ".join(told.split()))
    return found


def _attempt(found: Outcome, place: Path) -> None:
    base, run_dir = place / "base", place / "run"
    base.mkdir()
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    try:
        with quiet[0], quiet[1]:
            found.model = families.make("completion", found.family, base, _tokenizer(found.family, base))
            config = json.loads((base / "config.json").read_text()) | _PUBLISHED.get(found.family, {})
            (base / "config.json").write_text(json.dumps(config))
    except Exception as error:
        found.not_built = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    files = (write_jsonl(place / "train.jsonl", make_rows(12)), write_jsonl(place / "eval.jsonl", make_rows(4, seed=1)))
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={files[0]}", f"data.eval={files[1]}", "data.check=warn", "optim.lr=0.01", "adapter.r=4", "task.generate_rows=0",
        "train.batch_size=2", "train.max_steps=3", "export.targets=[hf,gguf]", "export.dtype=float32", f"run_dir={run_dir}",
    ]  # fmt: skip
    try:
        with _forked(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pipeline.train(compose.compose(told))
    except LoraLabError as error:
        if not run_dir.exists():
            found.refused = str(error)
            return
        found.refused_after = str(error)
    merged, report = run_dir / "merge_report.json", run_dir / "export_report.json"
    found.merged = json.loads(merged.read_text()) if merged.exists() else {}
    found.report = json.loads(report.read_text()).get("gguf", {}) if report.exists() else {}
    if not found.refused_after and not found.report.get("loader"):
        found.fault = "neither exported nor refused"


def _tokenizer(family: str, base: Path) -> Any:
    if family in _SENTENCEPIECE:
        return letters_with_a_beginning(base, blank=not family.startswith("gemma"))
    tokenizer = smollm2_tokenizer()
    if _VOCABULARIES and family in _OWN_VOCABULARY:
        vocabulary = Path(_VOCABULARIES) / f"ggml-vocab-{_OWN_VOCABULARY[family]}.gguf"
        tokenizer, _ = gguf_tokens.build(vocabulary, gguf.read_head(vocabulary))
    tokenizer.chat_template = CHATML
    named = next((tokens for name, tokens in _NAMED_TOKENS.items() if family.startswith(name)), [])
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    return tokenizer


@contextlib.contextmanager
def _forked() -> Any:
    """Scripts run in copies of this process, which has loaded torch already; what goes wrong in one still ends that one alone."""
    started = children.run

    def forked(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        script = Path(command[2]).name if len(command) > 2 else ""
        if script not in _SCRIPTS:
            return started(command, **options)
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                _become(_SCRIPTS[script], command[3:], said.fileno())
            _, status = os.waitpid(child, 0)
            said.seek(0)
            text = said.read()
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(command, code, "", text or f"Error: ended with {code}")

    children.run = forked
    try:
        yield
    finally:
        children.run = started


def _become(script: Any, arguments: list[str], output: int) -> None:
    code = 1
    try:
        signal.alarm(0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        script(*arguments)
        code = 0
    except SystemExit as error:
        print(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def page(known: dict[str, Any]) -> str:
    """The document."""
    from lora_lab.export.text import NEW_TOKENS

    every, versions = known["families"].values(), known["versions"]
    good = [one for one in every if one["report"].get("loader")]
    before, after = ([one for one in every if one[name]] for name in ("refused", "refused_after"))
    not_built = [one for one in every if one["not_built"]]
    lines = [
        _HEAD.format(
            transformers=versions["transformers"], auto_round=versions["auto-round"], gguf=versions["gguf"], new_tokens=NEW_TOKENS,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()), digest=known["digest"],
            count=len(good), refused=len(before), after=len(after), not_built=len(not_built),
            shared=known["shared"], left=known["shared"] - len(every), earlier=_earlier(known),
        ),
        "| family | class | tokens | KL | same token | answers | near ties |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in good:
        gap = one["report"]
        lines.append(
            f"| {one['family']} | {one['model']} | {gap['texts']} of {gap['texts']} | {gap['kl']:.1e} | {gap['top1_agreement']:.1%} | "
            f"{gap['equal_answers']:.0%} of {gap['answers']} | {gap['near_ties']} |"
        )
    for title, name, part in (
        ("Refused before training", "refused", before),
        ("Refused after training: nothing was published", "refused_after", after),
        ("Not built tiny", "not_built", not_built),
        ("Faults", "fault", [one for one in every if one["fault"]]),
    ):
        if part:
            lines += ["", f"## {title}", "", "| family | reason |", "|---|---|"]
            lines += [f"| {one['family']} | {_cell(one[name])} |" for one in part]
    return "\n".join(lines) + "\n"


def _earlier(known: dict[str, Any]) -> str:
    """Which results are of another state of the code than the page's."""
    of: dict[str, list[str]] = {}
    for family, one in known["families"].items():
        of.setdefault(one["code"], []).append(family)
    of.pop(known["digest"], None)
    return "".join(f"\n\nRun with code {code}: {', '.join(families)}." for code, families in of.items())


def _cell(text: str) -> str:
    return re.sub(r"([|_*])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    main()
