"""What each piece of work may be told about a trained run: keys and whole sections. Imports nothing.

Everything else is what the run's folder says, see `trained.py`.
"""

from __future__ import annotations

import dataclasses

_HARDWARE = (
    "hardware.device",
    "hardware.threads",
    "hardware.deterministic",
    "hardware.memory_gib",
    "hardware.offload_embeddings",
)
_PLACE = (  # found to be the same base, wherever it lies and however it is computed
    "model.path", "model.revision", *_HARDWARE, "quant.cache", "speed.fused_projections", "speed.fused_mlp", "speed.fused_dense", "speed.fused_norms",
    "speed.liger_kernels", "speed.block_attention", "speed.varlen_attention", "speed.short_rows", "speed.unpadded",
    "speed.chunked_loss", "speed.last_layer_rows", "speed.fused_4bit", "speed.dequantize",
)  # fmt: skip
_ROWS = (  # to measure on
    "data.eval", "data.format", "data.columns", "data.label_names", "data.field", "data.sample_by", "data.max_tokens", "data.too_long",
    "data.unusable", "data.duplicates", "data.check", "data.max_eval_rows",
)  # fmt: skip
_GENERATION = ("task.max_new_tokens", "task.num_beams")
_ANSWERS = (*_GENERATION, "task.generate_rows", "task.answer_format", "task.language", "task.pseudo_perplexity_rows",
            "task.max_answer_tokens")  # fmt: skip
_TEACHER = ("task.teacher",)  # where it lies now; it is found to be the same
_MERGE = ("export.dtype", "export.max_shard_size", "merge")


@dataclasses.dataclass(frozen=True)
class Takes:
    """The keys that have an effect on a trained run, and how a refusal of any other key names the command."""

    command: str  # as it is typed: 'evaluate', 'merge merge.adapters=...'
    keys: tuple[str, ...]  # keys and sections
    because: str = ""  # what to say instead of "no effect on a trained run"

    def covers(self, key: str) -> bool:
        """Whether a key, or the section that it is in, is taken."""
        return any(f"{key}.".startswith(f"{taken}.") for taken in self.keys)


RESUME = Takes(
    "resume",
    ("tracker", "hardware.processes", "hardware.shard", "hardware.timeout"),
    "resume takes no overrides but tracker, hardware.processes, hardware.shard and hardware.timeout, because it would not be the same run any more.",
)
EVALUATE = Takes("evaluate", (*_PLACE, *_ROWS, *_ANSWERS, *_TEACHER, "task.few_shot", "task.corpus", "evaluate"))
MERGE = Takes("merge", (*_PLACE, *_ROWS, *_MERGE))
COMBINE = Takes("merge merge.adapters=...", ("name", "run_dir", "seed", *_HARDWARE, *_MERGE))
SHRINK = Takes("shrink", ("name", "run_dir", *_PLACE, *_ROWS, *_ANSWERS, *_TEACHER, "shrink"))
EXPORT = Takes("export", (*_PLACE, *_ROWS, *_MERGE, "export"))
PREDICT = Takes(
    "predict",
    (*_PLACE, *_GENERATION, "data.columns", "data.field", "data.sample_by", "data.max_tokens", "data.too_long"),
)
INSPECT = Takes("inspect", (*_PLACE, *_ROWS))
LABEL = Takes("label", (*_PLACE, *_ROWS))
MINE = Takes("mine", (*_PLACE, "data.columns", "data.max_tokens", "data.too_long"))
CHAT = Takes("chat", (*_PLACE, *_GENERATION))
SERVE = Takes("serve", (*_PLACE, *_GENERATION, "serve"))
