"""Ask an engine that is not ours: python engines.py ENGINE ASKED TOLD, by the Python of the environment that has the engine.

ENGINE: llama_cpp or vllm. ASKED: JSON {model, adapter, tokenizer, conversations: [{messages, tools}], new_tokens}; `model` is a GGUF file for
llama_cpp, a folder for vllm. TOLD: where to write the greedy answers, as JSON.
"""

import json
import sys
from pathlib import Path


def main(engine: str, asked_file: str, told_file: str) -> None:
    asked = json.loads(Path(asked_file).read_text(encoding="utf-8"))
    answers = {"llama_cpp": llama_cpp, "vllm": vllm}[engine](asked)
    Path(told_file).write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")


def llama_cpp(asked: dict) -> list:
    from llama_cpp import Llama

    model = Llama(asked["model"], n_ctx=2048, n_threads=asked["threads"], verbose=False)
    found = []
    for one in asked["conversations"]:
        settings = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": asked["new_tokens"]}
        model.reset()
        answer = model.create_chat_completion(one["messages"], tools=one["tools"] or None, **settings)
        found.append(answer["choices"][0]["message"]["content"])
    return found


def vllm(asked: dict) -> list:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = asked["adapter"] and LoRARequest("adapter", 1, asked["adapter"])
    more = {"enable_lora": True, "max_lora_rank": 16} if adapter else {}
    if asked["tokenizer"]:
        more |= {"tokenizer": asked["tokenizer"], "generation_config": asked["tokenizer"]}
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.4,
    }  # of the machine's memory
    model = LLM(asked["model"], **settings, **more)
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"])
    found = []
    for one in asked["conversations"]:
        tools = one["tools"] or None
        [answer] = model.chat(one["messages"], sampling, tools=tools, lora_request=adapter or None, use_tqdm=False)
        found.append(answer.outputs[0].text)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
