"""What `lora-lab` can do: a line for each verb, examples, and the keys that it takes on a trained run. Imports nothing heavy."""

from __future__ import annotations

_TRAIN = """\
A run is composed from groups (GROUP=CHOICE) and single values (SECTION.KEY=VALUE):

  lora-lab train recipe=demo                              a shipped recipe, as it stands
  lora-lab train recipe=demo adapter.r=4 optim.lr=1e-4    the same with other values
  lora-lab train recipe=demo data.train=my.jsonl          on your rows (JSONL, JSON, CSV, Parquet)
  lora-lab train model=hub model.path=Qwen/Qwen3-8B data.train=my.jsonl quant=nf4
  lora-lab train -m recipe=demo adapter.r=4,8,16          one run for each value, together on one base; sweep=halving,
                                                          sweep.seeds=3, sweep.budget=30minutes: docs/sweeps.md
  lora-lab train --config-dir mine recipe=own             a recipe of yours: mine/recipe/own.yaml

groups:  model quant adapter task data optim train hardware tracker export recipe
keys:    lora-lab config --keys lists every key with its meaning; lora-lab config recipe=demo shows values and origins
"""

EXAMPLES = {
    "train": _TRAIN,
    "config": """\
  lora-lab config recipe=demo adapter.r=4     resolved values, each with the file or override that set it
  lora-lab config --keys                      every key: type and limits, default, meaning
""",
    "data": """\
  lora-lab data recipe=demo                       rows as the model sees them, lengths, labels, checks; and as a page
  lora-lab data recipe=demo data.train=my.jsonl   the same for your rows
  lora-lab data recipe=demo --rows 10 --html look.html

Trained-on text is green (between brackets when piped). Exit code 1 if a check finds an error: rows that cannot be used,
answers that do not end, prompts that differ between training and inference. lora-lab train makes the same checks first
(data.check=error, warn or off).
""",
    "plan": """\
  lora-lab plan recipe=demo                             modules, steps, memory, disk: nothing is loaded
  lora-lab plan recipe=demo train.batch_size=32 quant=none
  lora-lab plan recipe=demo probe=true                  also loads the model, trains six steps, and says how long it takes
""",
    "resume": """\
  lora-lab resume run=runs/demo/2026-01-31_12-00-00
  lora-lab resume sweep=runs/demo/sweep_2026-01-31_12-00-00

Goes on from the newest valid checkpoint and ends with the same bytes as a run that was never interrupted. The run's own
configuration holds; base and data must be unchanged.
""",
    "evaluate": """\
  lora-lab evaluate run=DIR
  lora-lab evaluate run=DIR data.eval=other.jsonl task.generate_rows=100
""",
    "merge": """\
  lora-lab merge run=DIR
  lora-lab merge run=DIR export.dtype=float32
  lora-lab merge sweep=DIR                                the run that the ranking says to take; or member=3
  lora-lab merge 'merge.adapters=[A,B,C]'                   one adapter of several, in a run folder of its own, and that merged
  lora-lab merge 'merge.adapters=[A,B]' 'merge.weights=[0.7,0.3]' merge.method=ties run_dir=DIR

Adds the adapter to the base, saves DIR/merged, loads that in a fresh process with plain transformers, compares it with the
trained model on held-out rows, and keeps it only if it agrees (limits: the merge section). After training on a quantized
base, what to merge into is measured (merge.base).
""",
    "shrink": """\
  lora-lab shrink run=DIR                                  ranks 1, 2, 4, ... below the adapter's, each measured
  lora-lab shrink run=DIR 'shrink.ranks=[8,4]' shrink.tolerance=0.02 run_dir=OUT

The lowest rank whose held-out loss rises by no more than shrink.tolerance, as sure as the rows allow (95 %), is saved as a run
folder (DIR/shrunk), which can be evaluated, merged and exported like any other.
""",
    "export": """\
  lora-lab export run=DIR export=gguf                      DIR/export/gguf: for llama.cpp, LM Studio and the like
  lora-lab export run=DIR 'export.targets=[ollama]' export.gguf_type=q8_0
  lora-lab export run=DIR 'export.targets=[vllm,gguf_lora]'  the adapter alone
  lora-lab export run=DIR export=quantized export.quantization=int8

Each is loaded where it is meant to be loaded and compared on held-out rows with what it was made of; what disagrees is not
kept. The same keys with lora-lab train are checked before training.
""",
    "chat": """\
  lora-lab chat run=DIR
  lora-lab chat run=DIR prompt="Extract the order as JSON with the keys customer, city, item, quantity, reference.

  Order R-2041 for Graz: two oak tables. Name on the invoice is Maria Keller."

The prompt is rendered by the chat template that the model was trained with; data.train shows how prompts were worded.
""",
}

VERBS = {
    "train": "train an adapter; evaluate; merge if the recipe says so",
    "data": "show rows as the model sees them, and check them",
    "plan": "what a run would train, and in how much memory, disk and time",
    "resume": "go on with an interrupted run",
    "evaluate": "measure base and adapter on held-out rows",
    "merge": "fold the adapter, or several, into the base, and prove it",
    "shrink": "lower the rank of a trained adapter as far as its quality holds",
    "export": "make what other programs load: GGUF, Ollama, vLLM, fewer bits",
    "chat": "talk to a trained model",
    "config": "show the resolved configuration and where each value comes from",
}

# -- what may be said of a run that is trained: each a key or a whole section --------------------------------------------

_PLACE = (  # found to be the same base, wherever it lies and however it is computed
    "model.path", "model.revision", "hardware", "quant.cache", "speed.fused_projections", "speed.fused_mlp", "speed.fused_norms",
    "speed.block_attention", "speed.chunked_loss", "speed.last_layer_rows", "speed.dequantize",
)  # fmt: skip
_ROWS = (  # to measure on
    "data.eval", "data.format", "data.columns", "data.label_names", "data.field", "data.sample_by", "data.max_tokens", "data.too_long",
    "data.unusable", "data.duplicates", "data.check", "data.max_eval_rows",
)  # fmt: skip
_GENERATION = ("task.max_new_tokens", "task.num_beams")
_ANSWERS = (*_GENERATION, "task.generate_rows", "task.answer_format", "task.language", "task.pseudo_perplexity_rows",
            "task.max_answer_tokens")  # fmt: skip
_MERGE = ("export.dtype", "export.max_shard_size", "merge")
TAKES: dict[str, tuple[str, ...]] = {
    "resume": ("tracker",),
    "evaluate": (*_PLACE, *_ROWS, *_ANSWERS, "task.few_shot"),
    "merge": (*_PLACE, *_ROWS, *_MERGE),
    "combine": ("name", "run_dir", "seed", "hardware", *_MERGE),  # `merge merge.adapters=[A,B]`
    "shrink": ("name", "run_dir", *_PLACE, *_ROWS, *_ANSWERS, "shrink"),
    "export": (*_PLACE, *_ROWS, *_MERGE, "export"),
    "chat": (*_PLACE, *_GENERATION),
}
