"""Ask llama.cpp what it says of given rows: python llama.py GGUF ROWS OUTPUTS [ADAPTER_GGUF]

Started in a process of its own: what goes wrong in llama.cpp ends the process.

ROWS: safetensors with `i.input_ids` [1, T] and `i.positions` [S] int64 for each row i, and `letter` [1] int64, a token that is a
whole letter. OUTPUTS: where to write, for the token that
follows each position, the most likely tokens `i.tokens` [S, K] int64 and their `i.logprobs` [S, K] float32, falling.
"""

import sys

TOP = 100


def main(gguf_file: str, rows_file: str, outputs_file: str, adapter: str | None = None) -> None:
    import torch
    import xllamacpp
    from safetensors.torch import load_file, save_file

    rows = load_file(rows_file)
    letter = int(rows.pop("letter"))
    longest = max(tensor.shape[1] for name, tensor in rows.items() if name.endswith(".input_ids"))
    server = xllamacpp.Server(_params(xllamacpp, gguf_file, longest + 8, adapter))
    found = {}
    for number in sorted({name.partition(".")[0] for name in rows}):
        ids = rows[f"{number}.input_ids"][0].tolist()
        every = [_most_likely(server, ids[: place + 1], letter) for place in rows[f"{number}.positions"].tolist()]
        found[f"{number}.tokens"] = torch.tensor([[token for token, _ in one] for one in every])
        found[f"{number}.logprobs"] = torch.tensor([[value for _, value in one] for one in every])
    save_file(found, outputs_file)


def _params(xllamacpp: object, gguf_file: str, context: int, adapter: str | None) -> object:
    params = xllamacpp.CommonParams()
    params.model.path = gguf_file
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
    params.hostnames, params.port = ["127.0.0.1"], 0
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return params


def _most_likely(server: object, ids: list[int], letter: int) -> list[tuple[int, float]]:
    """What would follow, by the model's own logits. What is drawn is always `letter`: of a token that ends within a character
    llama.cpp would tell nothing."""
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": TOP, "cache_prompt": True, "logit_bias": [[letter, 1e4]]}
    [first] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return [(one["id"], one["logprob"]) for one in first["top_logprobs"]]


if __name__ == "__main__":
    main(*sys.argv[1:])
