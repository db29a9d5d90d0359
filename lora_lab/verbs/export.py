"""`lora-lab export`: write formats for other runtimes."""

from __future__ import annotations

from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, run_folder

_EXAMPLES = """\
  lora-lab export run=DIR export=gguf                      DIR/export/gguf: for llama.cpp, LM Studio and the like
  lora-lab export run=DIR 'export.targets=[ollama]' export.gguf_type=q8_0
  lora-lab export run=DIR 'export.targets=[vllm,gguf_lora]'  the adapter alone
  lora-lab export run=DIR export=quantized export.quantization=int8

Each is loaded in its target runtime and compared with the source on held-out rows; one that disagrees is not
kept. The same keys with lora-lab train are checked before training.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    from lora_lab.run import pipeline

    pipeline.export(folder, told.overrides)
    return 0


VERB = Verb(
    summary="write formats for other runtimes: GGUF, Ollama, vLLM, fewer bits",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.EXPORT,
    arguments=(RUN,),
    others=("convert",),
)
