"""Words of other tools, and what says the same here. Literal tables; imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Word -> our key, or lines that work (with `=`; {} is the value), or a sentence (with a blank and no `=`).
KEYS: dict[str, str] = {
    # learning rate and optimizer
    "learning_rate": "optim.lr", "lr": "optim.lr", "learningrate": "optim.lr", "max_lr": "optim.lr", "wd": "optim.weight_decay",
    "weight_decay": "optim.weight_decay", "warmup": "optim.warmup_steps", "warmup_ratio": "optim.warmup_steps",
    "warmup_steps": "optim.warmup_steps", "num_warmup_steps": "optim.warmup_steps", "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule", "scheduler": "optim.schedule", "scheduler_type": "optim.schedule", "adam_epsilon": "optim.eps",
    "adam_beta1": "optim.betas=[{},0.999]", "adam_beta2": "optim.betas=[0.9,{}]", "max_grad_norm": "optim.max_grad_norm",
    "gradient_clipping": "optim.max_grad_norm", "clip_grad": "optim.max_grad_norm", "optimizer": "optim", "optim_name": "optim",
    # adapter
    "lora_r": "adapter.r", "r": "adapter.r", "rank": "adapter.r", "lora_rank": "adapter.r", "lora_dim": "adapter.r",
    "lora_alpha": "adapter.lora_alpha", "alpha": "adapter.lora_alpha", "lora_dropout": "adapter.lora_dropout",
    "dropout": "adapter.lora_dropout", "target_modules": "adapter.target_modules", "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules", "target": "adapter.target_modules", "modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules=all-linear", "use_dora": "adapter.use_dora", "dora": "adapter.use_dora",
    "use_rslora": "adapter.use_rslora", "rslora": "adapter.use_rslora", "init_lora_weights": "adapter.init_lora_weights",
    "layers_to_transform": "adapter.layers_to_transform", "peft_type": "adapter", "finetuning_type": "adapter",
    "bias": "Biases stay frozen here.", "modules_to_save": "A task's new head is trained automatically; nothing else is trained whole.",
    # quantization
    "load_in_4bit": "quant=nf4", "load_in_8bit": "quant=int8", "quantization_bit": "quant=nf4 or quant=int8", "bits": "quant=nf4 or quant=int8",
    "quantization": "quant", "quantize": "quant", "qlora": "quant=nf4", "bnb_4bit_quant_type": "quant", "quant_type": "quant",
    "bnb_4bit_use_double_quant": "quant.double_quant", "use_double_quant": "quant.double_quant",
    "bnb_4bit_compute_dtype": "model.dtype",
    # lengths and batches
    "max_seq_length": "data.max_tokens", "max_seq_len": "data.max_tokens", "max_length": "data.max_tokens", "cutoff_len": "data.max_tokens",
    "sequence_len": "data.max_tokens", "model_max_length": "data.max_tokens", "block_size": "data.max_tokens", "seq_length": "data.max_tokens",
    "max_source_length": "data.max_tokens", "max_target_length": "data.max_tokens", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "epochs": "train.epochs", "epoch": "train.epochs", "n_epochs": "train.epochs",
    "max_steps": "train.max_steps", "num_steps": "train.max_steps", "steps": "train.max_steps", "iters": "train.max_steps",
    "max_train_steps": "train.max_steps", "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_batch_size": "train.micro_batch_size", "micro_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "Held-out rows are measured in batches of their own; nothing is to be set.",
    "gradient_accumulation_steps": "train.micro_batch_size=M train.batch_size={}*M, which counts the sequences of a whole step",
    "gradient_accumulation": "train.micro_batch_size=M train.batch_size={}*M, which counts the sequences of a whole step",
    "grad_accum": "train.micro_batch_size=M train.batch_size={}*M, which counts the sequences of a whole step",
    "batch_size": "train.batch_size", "train_batch_size": "train.batch_size", "global_batch_size": "train.batch_size", "bs": "train.batch_size",
    # numbers and memory
    "bf16": "model.dtype=bfloat16", "fp16": "model.dtype=float16", "fp32": "model.dtype=float32", "torch_dtype": "model.dtype",
    "dtype": "model.dtype", "precision": "model.dtype", "mixed_precision": "model.dtype", "tf32": "model.dtype",
    "gradient_checkpointing": "train.gradient_checkpointing", "use_gradient_checkpointing": "train.gradient_checkpointing",
    "packing": "train.packing", "sample_packing": "train.packing", "neftune_noise_alpha": "train.neftune_alpha",
    "neftune_alpha": "train.neftune_alpha", "flash_attention": "Attention is chosen automatically (speed=fast).",
    "flash_attn": "Attention is chosen automatically (speed=fast).", "attn_implementation": "Attention is chosen automatically (speed=fast).",
    "device": "hardware.device", "device_map": "hardware.device; hardware.shard=true with hardware.processes=N spreads a base over cards", "num_workers": "Rows are read and tokenized by themselves; nothing is to be set.",
    "dataloader_num_workers": "Rows are read and tokenized by themselves; nothing is to be set.",
    "deepspeed": "hardware.processes=N: several processes share each step.", "fsdp": "hardware.shard=true, with hardware.processes=N: each process holds a part of the base.",
    "num_processes": "hardware.processes", "nproc_per_node": "hardware.processes", "nproc": "hardware.processes", "num_gpus": "hardware.processes",
    "n_gpus": "hardware.processes", "gpus": "hardware.processes", "world_size": "hardware.processes", "ddp_timeout": "hardware.timeout",
    # outputs
    "output_dir": "run_dir", "out_dir": "run_dir", "output": "run_dir", "save_dir": "run_dir", "run_name": "name", "experiment_name": "name",
    "save_steps": "train.save_steps", "eval_steps": "train.eval_steps", "save_total_limit": "train.keep_checkpoints",
    "evaluation_strategy": "train.eval_steps=N, or leave it out: each epoch is measured", "eval_strategy": "train.eval_steps=N, or leave it out: each epoch is measured",
    "save_strategy": "train.save_steps=N, or leave it out: each epoch is saved", "load_best_model_at_end": "train.keep_best",
    "early_stopping_patience": "train.early_stopping_patience",
    "logging_steps": "There is none to set: every step is in metrics.jsonl.", "log_steps": "There is none to set: every step is in metrics.jsonl.",
    "logging_dir": "There is none to set: curves are in the run's folder.", "overwrite_output_dir": "A run folder is never overwritten; name another run_dir.",
    "resume_from_checkpoint": "Another verb resumes an interrupted run: lora-lab resume run=DIR (DIR is the run's folder).",
    "resume": "Another verb resumes an interrupted run: lora-lab resume run=DIR (DIR is the run's folder).",
    "push_to_hub": "export.push_to_hub=OWNER/NAME", "hub_model_id": "export.push_to_hub", "report_to": "tracker", "logger": "tracker",
    "wandb_project": "tracker=wandb tracker.project={}", "use_wandb": "tracker=wandb", "merge_lora": "export=merged",
    "metric_for_best_model": "The held-out loss decides (train.keep_best).", "seed": "seed", "random_seed": "seed", "data_seed": "seed",
    # data
    "dataset": "data.train", "datasets": "data.train", "train_file": "data.train", "train_data": "data.train", "data_path": "data.train",
    "train_files": "data.train", "train_path": "data.train", "dataset_name": "data.train=hub:{}", "dataset_path": "data.train",
    "data_file": "data.train", "data_files": "data.train", "dataset_dir": "data.train", "validation_file": "data.eval",
    "eval_file": "data.eval", "eval_dataset": "data.eval", "val_file": "data.eval", "test_file": "data.eval", "valid_file": "data.eval",
    "val_size": "data.eval_ratio", "val_set_size": "data.eval_ratio", "test_size": "data.eval_ratio", "validation_split": "data.eval_ratio",
    "eval_split": "data.eval_ratio", "val_ratio": "data.eval_ratio", "max_samples": "data.max_train_rows",
    "max_train_samples": "data.max_train_rows", "max_eval_samples": "data.max_eval_rows", "limit": "data.max_train_rows",
    "text_column": "data.columns={{text: {}}}", "dataset_text_field": "data.columns={{text: {}}}", "label_column": "data.columns={{label: {}}}",
    "template": "The base's own chat template is used.", "chat_template": "The base's own chat template is used.",
    "train_on_inputs": "data.supervise=all (with false: data.supervise=answers)", "mask_prompt": "data.supervise=answers (with false: data.supervise=all)",
    "id2label": "data.label_names=[NAME,NAME]", "class_names": "data.label_names", "labels": "data.label_names", "streaming": "data.streaming",
    "shuffle": "Rows are shuffled by themselves, by seed.",
    # base and task
    "model_name_or_path": "model=hub model.path={}", "base_model": "model=hub model.path={}", "model_name": "model=hub model.path={}",
    "model_path": "model=hub model.path={}", "model_id": "model=hub model.path={}", "pretrained_model_name_or_path": "model=hub model.path={}",
    "model.name": "model.path", "tokenizer": "The tokenizer is the base's own.", "tokenizer_name": "The tokenizer is the base's own.",
    "tokenizer_name_or_path": "The tokenizer is the base's own.", "trust_remote_code": "Code of a model's folder is never run.",
    "model_revision": "model.revision", "task_type": "task", "stage": "task", "objective": "task", "loss_type": "task.loss",
    "dpo_beta": "task.beta", "num_labels": "Classes are counted in the rows.", "label_smoothing_factor": "task.label_smoothing",
    "teacher": "task.teacher", "teacher_model": "task.teacher", "teacher_model_name_or_path": "task.teacher", "kd_alpha": "task.kd_ratio",
    "kd_ratio": "task.kd_ratio", "kd_temperature": "task.temperature", "kd_top_k": "task.top_k",
    "do_train": "Verbs say that: lora-lab train and lora-lab evaluate.", "do_eval": "Verbs say that: lora-lab train and lora-lab evaluate.",
    "config": "A recipe is chosen by recipe=NAME (yours: --config-dir DIR).", "config_file": "A recipe is chosen by recipe=NAME (yours: --config-dir DIR).",
    "checkpoint": "run", "adapter_path": "run", "adapter_name_or_path": "run", "max_new_tokens": "task.max_new_tokens",
    "num_beams": "task.num_beams", "prompt": "lora-lab chat takes it: lora-lab chat run=DIR prompt=TEXT",
}  # fmt: skip

# Group -> word -> choice of it, or lines that work (with `=`), or a sentence (with a full stop).
CHOICES: dict[str, dict[str, str]] = {
    "quant": {
        "4bit": "nf4", "4": "nf4", "4-bit": "nf4", "int4": "nf4", "qlora": "nf4", "bnb": "nf4", "bitsandbytes": "nf4", "true": "nf4",
        "8bit": "int8", "8": "int8", "8-bit": "int8", "llm_int8": "int8", "false": "none", "16": "none", "16bit": "none", "fp16": "none",
        "bf16": "none", "no": "none", "off": "none",
        "torchao": "torchao_int8", "int8_weight_only": "torchao_int8", "int8wo": "torchao_int8", "ao": "torchao_int8",
        **dict.fromkeys(("torchao_int4", "int4_weight_only", "int4wo"), "torchao's int4 needs a GPU, and peft puts LoRA on its int8 alone. Set quant=nf4."),
        **dict.fromkeys(("gptq", "awq"), "Bases are quantized while they load, without data. Name the unquantized model, and set quant=nf4."),
        **dict.fromkeys(("hqq", "hqq4", "hqq8"), "transformers has no code at present that loads HQQ. Set quant=nf4, or quant=torchao_int8."),
        "gguf": "A GGUF file is a base of its own: set model.path to it, and quant=none.",
    },
    "task": {
        "sft": "causal_lm", "chat": "causal_lm", "instruction": "causal_lm", "instruct": "causal_lm", "clm": "causal_lm", "text_generation": "causal_lm",
        "pretrain": "completion", "pt": "completion", "cpt": "completion", "pretraining": "completion", "mlm": "masked_lm",
        "fill_mask": "masked_lm", "text_classification": "classification", "sequence_classification": "classification", "cls": "classification",
        "seq_cls": "classification", "sentiment": "classification", "ner": "token_classification", "token_cls": "token_classification",
        "tagging": "token_classification", "qa": "question_answering", "squad": "question_answering", "summarization": "seq2seq",
        "translation": "seq2seq", "text2text": "seq2seq", "rm": "reward", "reward_model": "reward", "reward_modeling": "reward",
        "dpo": "task=preference task.loss=dpo", "ipo": "task=preference task.loss=ipo", "simpo": "task=preference task.loss=simpo",
        "orpo": "task=preference task.loss=orpo", "kto": "task=preference task.loss=kto", "rlhf": "task=preference task.loss=dpo",
        "similarity": "regression", "embeddings": "embedding", "retrieval": "embedding", "sentence_transformer": "embedding",
        "sentence_embedding": "embedding", "contrastive": "embedding", "cross_encoder": "reranker", "rerank": "reranker",
        "distill": "distillation", "kd": "distillation", "knowledge_distillation": "distillation", "gkd": "distillation", "ppo": "There is no reinforcement learning; task=preference learns from pairs.",
        "grpo": "There is no reinforcement learning; task=preference learns from pairs.",
    },
    "optim": {
        "adam": "adamw", "adamw_torch": "adamw", "adamw_hf": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit",
        "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "paged_adamw": "paged_adamw_8bit", "paged_adamw_32bit": "paged_adamw_8bit",
        "paged": "paged_adamw_8bit", "sgd": "There is AdamW alone.", "adafactor": "There is AdamW alone.", "lion": "There is AdamW alone.",
        "muon": "There is AdamW alone.",
    },
    "adapter": {
        "qlora": "adapter=lora quant=nf4", "full": "The base stays frozen here; only adapters are trained.", "pissa": "lora",
        "freeze": "The base stays frozen here; only adapters are trained.", "none": "Only adapters are trained.",
        "prompt": "prompt_tuning", "soft_prompt": "prompt_tuning", "prefix": "prefix_tuning", "ptuning": "p_tuning", "p-tuning": "p_tuning",
        "prompt_encoder": "p_tuning", "p_tuning_v2": "prefix_tuning", "ptuning_v2": "prefix_tuning", "adapter": "bottleneck",
        "adapters": "bottleneck", "pfeiffer": "bottleneck", "adapterp": "bottleneck", "seq_bn": "bottleneck", "adapterh": "houlsby",
        "double_seq_bn": "houlsby", "par_bn": "parallel",
    },
    "hardware": {"gpu": "cuda", "cuda:0": "hardware.device=cuda:0", "nvidia": "cuda", "mps": "cpu"},
    "tracker": {"all": "auto", "wandb.ai": "wandb", "tb": "tensorboard", "weights_and_biases": "wandb", "false": "none", "null": "none", "off": "none"},
    "export": {"merge": "merged", "hf": "merged", "llama.cpp": "gguf", "llamacpp": "gguf", "lora": "adapter"},
    "sweep": {"random": "hydra/sweeper=optuna_cohort hydra.sweeper.sampler=random", "optuna": "hydra/sweeper=optuna_cohort",
              "bayes": "hydra/sweeper=optuna_cohort", "hyperband": "halving", "asha": "halving"},
}  # fmt: skip
_GROUP_OF = {"quant.method": "quant", "task.name": "task", "optim.name": "optim", "tracker.name": "tracker"}


def of_key(key: str, value: str = "VALUE") -> str:
    """' Did you mean ...?' with the line that works, for a key of another tool, whatever section stands before it; '' if it is none."""
    word = key.lower().replace("-", "_")
    found = KEYS.get(word) or KEYS.get(word.rpartition(".")[2])
    if found is None:
        return ""
    if "=" in found:
        return f" Write {found.format(value)}."
    if " " in found:
        return f" {found}"
    return f" Did you mean '{found}'? Write {found}={value}."


def near(key: str, within: Iterable[str], cutoff: float) -> str:
    """Our key for a word that is nearly one of another tool's, if it is one of these keys."""
    there = set(within)
    words = {word: ours for word, ours in KEYS.items() if ours in there}
    match = difflib.get_close_matches(key.lower(), words, n=1, cutoff=cutoff)
    return words[match[0]] if match else ""


# Values that had another name in the version before.
RENAMED = {"sweep.execution": {"joint": "batched", "turns": "interleaved"}}


def of_choice(group: str, value: object) -> str:
    """' Did you mean ...?' for another tool's name of a choice; a group's name or the key that says the same; '' if it is none."""
    known = CHOICES.get(_GROUP_OF.get(group, group), {})
    found = known.get(str(value).lower().replace(" ", "_"))
    if found is None:
        return ""
    if found.endswith("."):
        return f" {found}"
    if "=" in found:
        return f" Write {found}."
    return f" Did you mean '{found}'? Write {group}={found}."
