"""Ask llama.cpp what it makes of texts, and says of given rows: python llama.py GGUF ASKED TOLD [ADAPTER_GGUF]

Started in a process of its own: what goes wrong in llama.cpp ends the process.

ASKED: JSON with
    context: tokens of the longest text; threads: to compute with
    template: a chat template instead of the file's own, or null; variables: of the template
    prompts: conversations {messages, tools}, or texts {text}
    ends: tokens that should end an answer; answers: ids [[...]] to be answered with at most `new_tokens` tokens
    rows: null, or safetensors with `i.input_ids` [1, T], `i.positions` [S] and `i.targets` [S] int64 for each row i;
        outputs: where to write what is said of them: for the token that follows each position, the most likely tokens
        `i.tokens` [S, K] int64 with their `i.logprobs` [S, K] float32, falling, and `i.truth` [S] float32, of the true token
    letter: a token that is a whole letter; vocabulary: how many tokens there are
TOLD: where to write JSON with
    prompts: of each its text, its ids, or why it is refused; counted: how many ids llama.cpp sees when it is asked in messages
    ends: how an answer that consists of each of `ends` is stopped; answers: ids
"""

import json
import os
import sys
import traceback
import urllib.error
import urllib.request
from pathlib import Path

TOP = 100
_SERVERS = []  # kept to the end: taking one down now and then waits for ever (xllamacpp 2026.10), so the process ends without
FORCED = 1e4  # added to the logit of a token that is to be drawn; what is told of probabilities is without it


def main(gguf_file: str, asked_file: str, told_file: str, adapter: str | None = None) -> None:
    import xllamacpp

    asked = json.loads(Path(asked_file).read_text(encoding="utf-8"))
    server = xllamacpp.Server(_params(xllamacpp, gguf_file, asked, adapter))
    _SERVERS.append(server)
    told = {"prompts": [_prompt(server, one, asked["variables"]) for one in asked["prompts"]]}
    told["ends"] = [_stopped(server, asked["letter"], end) for end in asked["ends"]]
    told["answers"] = [_answer(server, ids, asked["new_tokens"]) for ids in asked["answers"]]
    if asked["rows"] is not None:
        _rows(server, asked)
    Path(told_file).write_text(json.dumps(told), encoding="utf-8")


def _params(xllamacpp: object, gguf_file: str, asked: dict, adapter: str | None) -> object:
    params = xllamacpp.CommonParams()
    params.model.path = gguf_file
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = asked["context"], 1, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    params.hostnames, params.port, params.use_jinja = ["127.0.0.1"], 0, True
    if asked["template"] is not None:
        params.chat_template = asked["template"]
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return params


def _post(server: object, path: str, body: dict) -> dict:
    request = urllib.request.Request(  # noqa: S310
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return json.loads(opener.open(request).read())
    except urllib.error.HTTPError as error:
        try:
            return {"error": json.loads(error.read())["error"]["message"]}
        except (ValueError, KeyError, TypeError):
            return {"error": str(error)}


def _prompt(server: object, one: dict, variables: dict) -> dict:
    text, counted = one.get("text"), None
    if text is None:
        asked = {"messages": one["messages"], "chat_template_kwargs": variables}
        asked |= {"tools": one["tools"]} if one["tools"] else {}
        found = _post(server, "/apply-template", asked)
        if "error" in found:
            return found
        text = found["prompt"]
        if one.get("count"):
            answer = _post(server, "/v1/chat/completions", {**asked, "max_tokens": 1})
            counted = answer.get("usage", {}).get("prompt_tokens", answer.get("error"))
    found = _post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
    return found if "error" in found else {"text": text, "ids": found["tokens"], "counted": counted}


def _stopped(server: object, letter: int, end: int) -> str:
    """Why llama.cpp stops when it is made to say this token."""
    asked = {"prompt": [letter], "n_predict": 2, "logit_bias": [[end, FORCED]], "temperature": 0}
    found = _post(server, "/completion", asked)
    return found.get("stop_type", found.get("error", ""))


def _answer(server: object, ids: list, new_tokens: int) -> list:
    asked = {"prompt": ids, "n_predict": new_tokens, "temperature": 0, "return_tokens": True, "cache_prompt": True}
    found = _post(server, "/completion", asked)
    if "error" in found:
        sys.exit(f"Error: it does not answer: {found['error']}")
    return found["tokens"]


def _rows(server: object, asked: dict) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    rows, found = load_file(asked["rows"]), {}
    for number in sorted({name.partition(".")[0] for name in rows}):
        ids = rows[f"{number}.input_ids"][0].tolist()
        places, targets = (rows[f"{number}.{name}"].tolist() for name in ("positions", "targets"))
        every = [_said(server, ids[: p + 1], t, asked) for p, t in zip(places, targets, strict=True)]
        found[f"{number}.tokens"] = torch.tensor([[token for token, _ in top] for top, _ in every])
        found[f"{number}.logprobs"] = torch.tensor([[value for _, value in top] for top, _ in every])
        found[f"{number}.truth"] = torch.tensor([truth for _, truth in every])
    save_file(found, asked["outputs"])


def _said(server: object, ids: list, target: int, asked: dict) -> tuple:
    """The most likely tokens that would follow, and the log-probability of the true one, by the model's own logits.

    The true token is drawn, because llama.cpp tells what it thinks of the one that is. Of a token that ends within a character it
    tells nothing; then a letter is drawn, and the true one is looked up among the likeliest, or among all.
    """
    drawn = _drawn(server, ids, target, TOP)
    if drawn is not None and drawn["id"] == target:
        return _top(drawn), drawn["logprob"]
    drawn = _drawn(server, ids, asked["letter"], TOP)
    top = _top(drawn)
    if target not in dict(top):
        drawn = _drawn(server, ids, asked["letter"], asked["vocabulary"])
    return top, dict(_top(drawn)).get(target, float("nan"))


def _drawn(server: object, ids: list, token: int, top: int) -> dict | None:
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": top, "cache_prompt": True, "logit_bias": [[token, FORCED]]}
    told = server.handle_completions(asked)["choices"][0]["logprobs"]
    return told["content"][0] if told and told["content"] else None


def _top(drawn: dict) -> list:
    return [(one["id"], one["logprob"]) for one in drawn["top_logprobs"]]


def _run() -> int:
    try:
        main(*sys.argv[1:])
    except SystemExit as error:
        print(error.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = _run()
    sys.stderr.flush()
    os._exit(code)
