"""One system trains some steps on given rows: python -m benchmarks.speed_worker SYSTEM SPEC.json OUT.json

The part of benchmarks/speed.py that runs in a process of its own. Every system starts from the same adapter and takes the same
rows in the same order; what is measured is written as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

BEGAN = float(os.environ.get("BENCHMARK_BEGAN", time.time()))  # when the process was started


class Watch:
    """Times of the end of each step, and the memory that they took at most."""

    def __init__(self, device: str = "cpu") -> None:
        self.loaded = 0.0
        self.begun = 0.0
        self.steps: list[float] = []
        self._card = device != "cpu"

    def begin(self) -> None:
        """The first step begins now; on a card what loading took is forgotten."""
        if self._card:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.begun = time.time()

    def result(self, losses: list[float]) -> dict[str, Any]:
        ends = [self.begun, *self.steps]
        return {
            "load_seconds": self.loaded - BEGAN,
            "first_step_seconds": self.steps[0] - BEGAN,
            "step_seconds": [later - earlier for earlier, later in itertools.pairwise(ends)],
            "losses": losses,
            **self._peaks(),
        }

    def _peaks(self) -> dict[str, float]:
        """Of a CPU the process, from its start; of a card its tensors, and what torch held for them."""
        if not self._card:
            return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        import torch

        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": most[0] / 2**30, "peak_reserved_gib": most[1] / 2**30}


def lora_lab(spec: dict[str, Any]) -> dict[str, Any]:
    """`lora-lab train` up to its last step, without evaluation."""
    from safetensors.torch import load_file, save_file

    from lora_lab.adapters.attach import trainable
    from lora_lab.config import compose
    from lora_lab.run import prepared, run_dir
    from lora_lab.training import loop
    from lora_lab.training.cohort import Member

    watch = Watch(_device(spec))
    config = compose.compose(spec["overrides"])
    ready = prepared.prepare(config)
    model = ready.loaded().model
    watch.loaded = time.time()
    parameters = trainable(model)
    if Path(spec["adapter"]).exists():
        for name, tensor in load_file(spec["adapter"]).items():
            parameters[name].data.copy_(tensor)
    else:
        save_file({name: parameter.data for name, parameter in parameters.items()}, spec["adapter"])
    member = Member("default", config, run_dir.create(config), ready.base, model, ready.train, ready.task)
    plain = loop._log

    def timed(*given: Any) -> None:
        plain(*given)
        watch.steps.append(time.time())

    if spec.get("rows") is None:  # only asked what the rows are
        order = [int(i) for step in range(member.total_steps) for part in member.plan.step(step) for i in part]
        rows = [ready.train[i][0] for i in order]
        return {
            "rows": [
                {
                    "input_ids": row.input_ids.tolist(),
                    "labels": [int(t) if w else -100 for t, w in zip(row.input_ids, row.weights, strict=True)],
                }
                for row in rows
            ],
            "model": str(ready.base.folder),
        }
    loop._log = timed
    watch.begin()
    try:
        loop.fit([member], ready.train, None, ready.accelerator)
    finally:
        loop._log = plain
    return watch.result([line["loss"] for line in member.log.read() if "loss" in line])


def _device(spec: dict[str, Any]) -> str:
    return spec.get("device", "cpu")


def _callback(watch: Watch) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.steps.append(time.time())

    return Callback()


def _arguments(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": "unused",
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["batch_size"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": spec["weight_decay"],
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": _device(spec) == "cpu",
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }


def _model(spec: dict[str, Any], dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    own: dict[str, Any] = {}  # None would hide what a published base says of itself
    if spec["quant"] == "nf4":
        own["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if spec["quant"] == "int8":
        own["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, dtype), device_map={"": _device(spec)}, **own
    )


def _start_alike(model: Any, adapter: str) -> None:
    """Start from a saved adapter, if there is one."""
    from safetensors.torch import load_file

    if not Path(adapter).exists():
        return

    parameters = dict(model.named_parameters())
    for name, tensor in load_file(adapter).items():
        parameters[name].data.copy_(tensor)


def _trl(spec: dict[str, Any], dtype: str, **settings: Any) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = Watch(_device(spec))
    model = _model(spec, dtype)
    watch.loaded = time.time()
    arguments = SFTConfig(**_arguments(spec), max_length=max(len(row["input_ids"]) for row in spec["rows"]), **settings)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(spec["rows"]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec["r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear"
        ),
        callbacks=[_callback(watch)],
    )
    _start_alike(trainer.model, spec["adapter"])
    trainer.train()
    return watch.result([line["loss"] for line in trainer.state.log_history if "loss" in line])


def trl(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with its own defaults: weights in float32 under bfloat16 autocast, checkpointing, padding."""
    return _trl(spec, "float32")


def trl_bf16(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with bfloat16 weights and without checkpointing."""
    return _trl(spec, "bfloat16", gradient_checkpointing=False)


def trl_packed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with packing, as many rows in a step."""
    return _trl(spec, "bfloat16", gradient_checkpointing=False, packing=True)


def trl_bf16_checkpointed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with checkpointing."""
    return _trl(spec, "bfloat16", gradient_checkpointing=True)


def trl_liger(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with bfloat16 weights and Liger's kernels, the output layer and its loss among them."""
    return _trl(spec, "bfloat16", gradient_checkpointing=False, use_liger_kernel=True)


def trl_liger_checkpointed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with checkpointing."""
    return _trl(spec, "bfloat16", gradient_checkpointing=True, use_liger_kernel=True)


def unsloth(spec: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's model and TRL's SFTTrainer, as its guide has it, without checkpointing."""
    return _unsloth(spec, checkpointing=False)


def unsloth_checkpointed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with Unsloth's own checkpointing."""
    return _unsloth(spec, checkpointing="unsloth")


def _unsloth(spec: dict[str, Any], checkpointing: str | bool) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # isort: skip  (before the libraries that it changes)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    watch = Watch(_device(spec))
    longest = max(len(row["input_ids"]) for row in spec["rows"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["model"], max_seq_length=longest, load_in_4bit=spec["quant"] != "none"
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = FastLanguageModel.get_peft_model(
        model, r=spec["r"], lora_alpha=spec["lora_alpha"], lora_dropout=0, bias="none", target_modules=list(names),
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    watch.loaded = time.time()
    _start_alike(model, spec["adapter"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_arguments(spec), max_length=longest),
        train_dataset=Dataset.from_list(spec["rows"]),
        processing_class=tokenizer,
        callbacks=[_callback(watch)],
    )
    trainer.train()
    return watch.result([line["loss"] for line in trainer.state.log_history if "loss" in line])


def transformers_peft(spec: dict[str, Any]) -> dict[str, Any]:
    """transformers' Trainer and peft, bfloat16 weights."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    watch = Watch(_device(spec))
    config = LoraConfig(task_type="CAUSAL_LM", r=spec["r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear")
    model = get_peft_model(_model(spec, "bfloat16"), config)
    watch.loaded = time.time()
    _start_alike(model, spec["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(spec), bf16=True),
        train_dataset=Dataset.from_list(spec["rows"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[_callback(watch)],
    )
    trainer.train()
    return watch.result([line["loss"] for line in trainer.state.log_history if "loss" in line])


def litgpt(spec: dict[str, Any]) -> dict[str, Any]:
    """LitGPT's LoRA model, padding and loss as in its `finetune_lora` (a row in each forward pass, bf16-true), each row's loss
    weighted by its tokens as the others weight it; its adapter starts from its own random numbers."""
    import torch
    from litgpt.config import Config as Names
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    watch = Watch()
    every = dict.fromkeys(("query", "key", "value", "projection", "mlp"), True)
    config = Config.from_name(
        "SmolLM2-135M-Instruct", lora_r=spec["r"], lora_alpha=spec["lora_alpha"], lora_dropout=0.0,
        **{f"lora_{name}": on for name, on in every.items()},
    )  # fmt: skip
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(
        Names.from_name("SmolLM2-135M-Instruct"), {}, weights, load_file(Path(spec["model"]) / "model.safetensors")
    )
    torch.manual_seed(0)
    model = GPT(config).bfloat16()
    lacking, unknown = model.load_state_dict(weights, strict=False)
    if unknown or any("lora_" not in name and "lm_head" not in name for name in lacking):
        raise ValueError(f"not the model's weights: {lacking} {unknown}")
    mark_only_lora_as_trainable(model)
    model.max_seq_length = max(len(row["input_ids"]) for row in spec["rows"])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=spec["lr"], weight_decay=spec["weight_decay"]
    )
    watch.loaded = watch.begun = time.time()
    losses = []
    for step in range(spec["steps"]):
        rows = spec["rows"][step * spec["batch_size"] : (step + 1) * spec["batch_size"]]
        total = sum(label != -100 for row in rows for label in row["labels"])
        losses.append(0.0)
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            logits = model(ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            share = (labels[:, 1:] != -100).sum() / total
            loss = chunked_cross_entropy(logits, labels[:, 1:], ignore_index=-100) * share
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.steps.append(time.time())
    return watch.result(losses)


def matrix_products(spec: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of plain bfloat16 products at the shapes of the model's own layers, weighted as a token uses them; and the GFLOP that
    a token of these rows needs: 4 for each weight of the body and, of supervised tokens, of the head; 6 r (in + out) for LoRA;
    6 s d in each layer for causal attention to s tokens (s: the rows' mean length, weighted by tokens)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["model"]))
    shapes: dict[tuple[int, int], int] = {}
    head, config = model.get_output_embeddings(), model.config
    lengths = [len(row["input_ids"]) for row in spec["rows"]]
    context = sum(length**2 for length in lengths) / sum(lengths)
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    needed = 4 * head.weight.numel() * spec["supervised_share"] + 6 * context * heads * config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            shapes[shape] = shapes.get(shape, 0) + 1
            if module is not head:
                needed += 4 * module.weight.numel() + 6 * spec["r"] * sum(shape)
    operands: dict[tuple[int, int], tuple[Any, ...]] = {
        (rows, columns): tuple(
            torch.randn(size, columns, device=_device(spec)).bfloat16() for size in (spec["tokens"], rows)
        )
        for rows, columns in shapes
    }
    wait = torch.cuda.synchronize if _device(spec) != "cpu" else lambda: None
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for _ in range(20):  # the shapes take turns too
        for shape, (x, weight) in operands.items():
            wait()
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            wait()
            times[shape].append(time.perf_counter() - started)
    seconds = sum(count * statistics.median(times[shape][2:]) for shape, count in shapes.items())
    flops = sum(count * 2 * spec["tokens"] * rows * columns for (rows, columns), count in shapes.items())
    return {"gflops_per_second": flops / seconds / 1e9, "gflop_per_token": needed / 1e9}


SYSTEMS = {
    "lora_lab": lora_lab,
    "trl": trl,
    "trl_bf16": trl_bf16,
    "trl_packed": trl_packed,
    "trl_bf16_checkpointed": trl_bf16_checkpointed,
    "trl_liger": trl_liger,
    "trl_liger_checkpointed": trl_liger_checkpointed,
    "unsloth": unsloth,
    "unsloth_checkpointed": unsloth_checkpointed,
    "transformers_peft": transformers_peft,
    "litgpt": litgpt,
    "matrix_products": matrix_products,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=[*SYSTEMS, "rows"])
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    spec = json.loads(args.spec.read_text())
    system = SYSTEMS["lora_lab" if args.system == "rows" else args.system]
    args.out.write_text(json.dumps(system(spec)))


if __name__ == "__main__":
    main()
