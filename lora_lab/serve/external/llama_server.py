"""llama.cpp's server as xllamacpp brings it, with the arguments of `llama-server` that `dialects.Llama` gives:

    python -P llama_server.py --model FILE [--lora FILE]... --host HOST --port PORT [--ctx-size N] [--parallel N] [--threads N]

The key that requests need is in LLAMA_API_KEY. It runs until it is killed.
"""

import argparse
import csv
import os
import signal


def main() -> None:
    import xllamacpp

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    told = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = told.model, [told.host], told.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_ctx, params.n_parallel, params.kv_unified, params.endpoint_props = told.ctx_size, told.parallel, True, True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in _paths(told.lora)]
    if told.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = told.threads
    server = xllamacpp.Server(params)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # taking the server down now and then waits for ever
    while server is not None:
        signal.pause()


def _paths(fields: list[str]) -> list[str]:
    return [path for line in csv.reader(fields) for path in line]


if __name__ == "__main__":
    main()
