"""A training loop by the Tinker SDK, run as a program: python loop.py URL BASE RANK STEPS [FROM]; what it saw, as JSON.

FROM: a checkpoint that it goes on from, with its optimizer.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["TINKER_TELEMETRY"] = "0"
ROWS = [[5, 9, 12, 40, 41, 7, 33, 20], [20, 33, 7, 41, 40, 12, 9, 5], [3, 4, 8]]


def main() -> None:
    import tinker
    from tinker import types

    url, base, rank, steps, *origin = sys.argv[1:]
    service = tinker.ServiceClient(base_url=url, api_key="tml-none")
    if origin:
        client = service.create_training_client_from_state_with_optimizer(origin[0]).result()
    else:
        client = service.create_lora_training_client(base_model=base, rank=int(rank), seed=1).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)},
        )
        for row in ROWS
    ]
    adam = types.AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=0.5, eps=1e-8)
    print("begun", flush=True)
    losses, began = [], time.monotonic()
    for _ in range(int(steps)):
        learned, stepped = client.forward_backward(data, "cross_entropy"), client.optim_step(adam)
        losses.append(learned.result().metrics["loss:sum"])
        stepped.result()
    seconds = time.monotonic() - began
    logprobs = [list(one["logprobs"].data) for one in client.forward(data, "cross_entropy").result().loss_fn_outputs]
    path = client.save_state("end").result().path
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(ROWS[0][:3])
    told = [
        sampler.sample(prompt, 2, types.SamplingParams(max_tokens=5, seed=3, temperature=3.0)).result()
        for _ in range(2)
    ]
    seen = {
        "losses": losses,
        "seconds": seconds,
        "logprobs": [float(one) for row in logprobs for one in row],
        "path": path,
        "prompt": sampler.compute_logprobs(types.ModelInput.from_ints(ROWS[0])).result(),
        "drawn": [[list(map(int, one.tokens)) for one in answer.sequences] for answer in told],
    }
    custom = client.forward_backward_custom(
        data, lambda data, told: (sum(-one.sum() for one in told), {"own": 1.0})
    ).result()
    plain = client.forward(data, "cross_entropy").result()
    seen["custom"] = [custom.metrics["loss:sum"], plain.metrics["loss:sum"]]
    many = client.forward_backward(data * 700, "cross_entropy").result()
    seen["many"] = [many.metrics["loss:sum"] / 700, plain.metrics["loss:sum"], len(many.loss_fn_outputs)]
    seen["errors"] = []
    for wrong in (
        lambda: client.forward_backward(data, "nonsense").result(),  # type: ignore[arg-type]
        lambda: service.create_lora_training_client(base_model="other/base").result(),
        lambda: client.save_state("end").result(),
        lambda: client.save_state("a/../b").result(),
    ):
        started = time.monotonic()
        try:
            wrong()
        except Exception as error:
            seen["errors"].append([type(error).__name__, str(error), time.monotonic() - started])
    seen["after"] = client.forward(data, "cross_entropy").result().metrics["loss:sum"]
    service.close("success").result()
    print(json.dumps(seen), flush=True)
    # the SDK's event loop is a daemon thread that nothing stops: one that comes back from its HTTP client's threads while the interpreter
    # is taken down aborts the process
    os._exit(0)


if __name__ == "__main__":
    main()
