"""One fine-tuning run as the documentation of transformers, peft and TRL shows it: python -m benchmarks.plain_task CONFIG.yaml --model FOLDER --out RESULT.json

The other side of benchmarks/tasks.py. CONFIG.yaml is a resolved configuration of lora_lab, of which hyperparameters and
the two files of rows are read; the rows have lora_lab's own column names. Nothing of lora_lab is used but its metric
functions, so that both sides are measured alike. What is usual decides, also where lora_lab does otherwise:

- Documents (task=completion) are put end to end and cut into blocks for training, as in run_clm.py, and see each other
  there. They are measured one by one, so that the loss means the same on both sides.
- Masks of a masked language model are drawn by the collator, in the evaluation too: other tokens than lora_lab's. The
  pseudo-perplexity needs no draw.
- peft's class for task_type QUESTION_ANS does not hand token types on to the model.
- DPOTrainer and RewardTrainer keep the adapter of a quantized base in bfloat16; RewardTrainer's collator knows no token
  types. Their dropout is left as the model has it, as everywhere else here.
- peft's prepare_model_for_kbit_training is left out: it would keep in float32 what is not quantized, and lora_lab keeps it in
  model.dtype.
- On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for a kernel that computes in bfloat16 whatever was
  asked for. That is switched off, as in lora_lab, or both sides would not measure the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from transformers import (
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lora_lab.tasks import metrics

_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_EVAL_ROWS, _COPIES = 4, 64  # rows, or copies of a row with one masked token each, of one forward pass in evaluation
_N_BEST = 20
_GENERATED = 32  # answers generated together
_IGNORED = -100

Row = dict[str, Any]
Metrics = dict[str, float]


class Script:
    """What every task shares: the configuration, the rows, the tokenizer, loading, training, evaluation."""

    def __init__(self, config: types.SimpleNamespace, folder: str):
        self.config, self.folder = config, folder
        self.train_rows, self.eval_rows = (_read(path) for path in (config.data.train, config.data.eval))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.on_gpu = torch.cuda.is_available() and config.hardware.device != "cpu"
        self.device = "cuda" if self.on_gpu else "cpu"
        self.bf16 = config.model.dtype == "bfloat16"
        self.told: dict[str, Any] = {}  # of the training itself

    def model(self, auto_class: type, **settings: Any) -> transformers.PreTrainedModel:
        """The base, quantized if the configuration says so, with a new head if the class has one."""
        quant = self.config.quant
        quantization = None
        if quant.method == "int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True)
        elif quant.method != "none":
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant.method,
                bnb_4bit_use_double_quant=quant.double_quant,
                bnb_4bit_compute_dtype=getattr(torch, self.config.model.dtype),
            )
        model = auto_class.from_pretrained(
            self.folder,
            dtype=getattr(torch, self.config.model.dtype),
            quantization_config=quantization,
            device_map={"": self.device},
            **settings,
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def lora(self, task_type: str | None) -> LoraConfig:
        adapter = self.config.adapter
        # peft trains these heads whole, and refuses them where all-linear takes them in
        heads = {"TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
        return LoraConfig(
            task_type=task_type,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules,
            exclude_modules=heads.get(task_type),
            use_rslora=adapter.use_rslora,
            use_dora=adapter.use_dora,
        )

    def adapted(self, auto_class: type, task_type: str | None, **settings: Any) -> torch.nn.Module:
        """The base with a fresh adapter."""
        return get_peft_model(self.model(auto_class, **settings), self.lora(task_type))

    def arguments(self, num_examples: int) -> dict[str, Any]:
        """Of `TrainingArguments` or a subclass."""
        optim, train = self.config.optim, self.config.train
        steps = train.epochs * math.ceil(num_examples / train.batch_size)
        steps = min(steps, train.max_steps or steps)
        warmup = int(optim.warmup_steps) if optim.warmup_steps >= 1 else round(optim.warmup_steps * steps)
        micro = train.micro_batch_size or train.batch_size
        return {
            "output_dir": tempfile.gettempdir(),  # nothing is written there
            "seed": self.config.seed,
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": train.batch_size // micro,
            "gradient_checkpointing": train.gradient_checkpointing,
            "learning_rate": optim.lr,
            "weight_decay": optim.weight_decay,
            "adam_beta1": optim.betas[0],
            "adam_beta2": optim.betas[1],
            "adam_epsilon": optim.eps,
            "max_grad_norm": optim.max_grad_norm or 0.0,
            "optim": _OPTIMIZERS[optim.name],
            "lr_scheduler_type": _SCHEDULES[optim.schedule],
            "warmup_steps": warmup,
            "bf16": self.bf16,
            "use_cpu": not self.on_gpu,
            "dataloader_pin_memory": self.on_gpu,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }

    def train(
        self, model: torch.nn.Module, features: list[Row], collator: Callable, loss: Callable | None = None
    ) -> None:
        """With the model's own loss, or with one that is called with the model and a batch."""
        arguments = TrainingArguments(
            **self.arguments(len(features)),
            label_smoothing_factor=getattr(self.config.task, "label_smoothing", 0.0),
            remove_unused_columns=False,
        )
        trainer = _OwnLoss if loss is not None else Trainer
        made = trainer(model=model, args=arguments, train_dataset=features, data_collator=collator)
        if loss is not None:
            made.own_loss = loss
            made.model_accepts_loss_kwargs = False  # it is a mean over the batch
        self.run(made)

    def run(self, trainer: Trainer) -> None:
        """Train, and remember what there is to tell of it."""
        own = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
        done = trainer.train()
        self.told = {
            "steps": done.global_step,
            "train_seconds": done.metrics["train_runtime"],
            "trainable_parameters": sum(own),
        }

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, features: list[Row], collator: Callable) -> Iterator[tuple[Row, Any]]:
        """Each batch of held-out features with the model's outputs."""
        model.eval()
        for start in range(0, len(features), _EVAL_ROWS):
            batch = collator(features[start : start + _EVAL_ROWS])
            with self.autocast():
                yield batch, model(**{name: tensor.to(model.device) for name, tensor in batch.items()})

    def token_metrics(
        self, model: torch.nn.Module, features: list[Row], collator: Callable, shift: int
    ) -> tuple[float, float]:
        """Mean loss and accuracy over all tokens with a label; `shift`: places between a label and its prediction."""
        loss, correct, count = 0.0, 0, 0
        for batch, out in self.outputs(model, features, collator):
            logits = out.logits[:, : out.logits.shape[1] - shift].float().cpu()
            labels = batch["labels"][:, shift:]
            kept = labels != _IGNORED
            loss += cross_entropy(logits[kept], labels[kept], reduction="sum").item()
            correct, count = correct + int((logits[kept].argmax(-1) == labels[kept]).sum()), count + int(kept.sum())
        return loss / count, correct / count

    @torch.no_grad()
    def generate(self, model: torch.nn.Module, prompts: list[str], special_tokens: bool) -> list[str]:
        """Answers to texts."""
        model.eval()
        self.tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
        texts = []
        for start in range(0, len(prompts), _GENERATED):
            batch = self.tokenizer(
                prompts[start : start + _GENERATED],
                padding=True,
                add_special_tokens=special_tokens,
                return_tensors="pt",
            ).to(model.device)
            batch.pop("token_type_ids", None)
            with self.autocast():
                done = model.generate(
                    **batch,
                    do_sample=False,
                    num_beams=self.config.task.num_beams,
                    max_new_tokens=self.config.task.max_new_tokens,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                )
            answers = done if model.config.is_encoder_decoder else done[:, batch["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts


class _OwnLoss(Trainer):
    """A trainer that is given the loss."""

    own_loss: Callable

    def compute_loss(self, model: torch.nn.Module, inputs: Row, *_: Any, **__: Any) -> torch.Tensor:
        return self.own_loss(model, inputs)


def _read(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# -- texts with labels ------------------------------------------------------------------------------------------------


def _texts(script: Script, row: Row) -> Row:
    texts = [row["text"], row["text_pair"]] if "text_pair" in row else [row["text"]]
    return dict(script.tokenizer(*texts, truncation=True, max_length=script.config.data.max_tokens))


def classification(script: Script) -> Metrics:
    labels = sorted({row["label"] for row in script.train_rows})
    model = script.adapted(transformers.AutoModelForSequenceClassification, "SEQ_CLS", num_labels=len(labels))
    train, held_out = (
        [{**_texts(script, row), "labels": labels.index(row["label"])} for row in rows]
        for rows in (script.train_rows, script.eval_rows)
    )
    collator = DataCollatorWithPadding(script.tokenizer)
    script.train(model, train, collator)
    logits = torch.cat([out.logits.float().cpu() for _, out in script.outputs(model, held_out, collator)])
    targets = torch.tensor([row["labels"] for row in held_out])
    found, _ = metrics.classification(targets.tolist(), logits.argmax(-1).tolist(), labels)
    return {"loss": cross_entropy(logits, targets).item(), **found}


def regression(script: Script) -> Metrics:
    model = script.adapted(
        transformers.AutoModelForSequenceClassification, "SEQ_CLS", num_labels=1, problem_type="regression"
    )
    train, held_out = (
        [{**_texts(script, row), "labels": float(row["label"])} for row in rows]
        for rows in (script.train_rows, script.eval_rows)
    )
    collator = DataCollatorWithPadding(script.tokenizer)
    script.train(model, train, collator)
    numbers = torch.cat([out.logits[:, 0].float().cpu() for _, out in script.outputs(model, held_out, collator)])
    found = metrics.regression([row["labels"] for row in held_out], numbers.tolist())
    return {"loss": found["mse"], **found}


def token_classification(script: Script) -> Metrics:
    """The first token of each word has the word's label."""
    labels = sorted({tag for row in script.train_rows for tag in row["tags"]})
    labels.sort(key=lambda label: label != "O")
    model = script.adapted(
        transformers.AutoModelForTokenClassification,
        "TOKEN_CLS",
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    words: list[list[int | None]] = []

    def encoded(row: Row) -> Row:
        found = script.tokenizer(
            row["tokens"], is_split_into_words=True, truncation=True, max_length=script.config.data.max_tokens
        )
        firsts = [
            word if word is not None and word not in found.word_ids()[:place] else None
            for place, word in enumerate(found.word_ids())
        ]
        words.append(firsts)
        numbers = [_IGNORED if word is None else labels.index(row["tags"][word]) for word in firsts]
        return {**found, "labels": numbers}

    train = [encoded(row) for row in script.train_rows]
    words.clear()
    held_out = [encoded(row) for row in script.eval_rows]
    collator = DataCollatorForTokenClassification(script.tokenizer)
    script.train(model, train, collator)
    loss, _ = script.token_metrics(model, held_out, collator, shift=0)
    predicted = [row for _, out in script.outputs(model, held_out, collator) for row in out.logits.argmax(-1).tolist()]
    tags = []
    for row, firsts, numbers in zip(script.eval_rows, words, predicted, strict=True):
        found = ["O"] * len(row["tags"])
        for word, number in zip(firsts, numbers, strict=False):
            if word is not None:
                found[word] = labels[number]
        tags.append(found)
    return {"loss": loss, **metrics.entities([row["tags"] for row in script.eval_rows], tags)[0]}


# -- answers in a context -----------------------------------------------------------------------------------------------


def question_answering(script: Script) -> Metrics:
    model = script.adapted(transformers.AutoModelForQuestionAnswering, "QUESTION_ANS")
    train = [window for row in script.train_rows for window, _ in _windows(script, row)]
    marked = [(place, *found) for place, row in enumerate(script.eval_rows) for found in _windows(script, row)]
    collator = DataCollatorWithPadding(script.tokenizer)
    script.train(model, train, collator)

    loss, starts, ends = 0.0, [], []
    for batch, out in script.outputs(model, [window for _, window, _ in marked], collator):
        for side, logits, kept in (("start", out.start_logits, starts), ("end", out.end_logits, ends)):
            logits = logits.float().cpu()
            loss += cross_entropy(logits, batch[f"{side}_positions"], reduction="sum").item()
            kept += list(logits)
    candidates: list[list[tuple[float, str]]] = [[] for _ in script.eval_rows]
    for (place, _, offsets), start, end in zip(marked, starts, ends, strict=True):
        context = script.eval_rows[place]["context"]
        candidates[place] += _candidates(start, end, offsets, context, script.config.task.max_answer_tokens)
    texts = [max(found)[1] if found else "" for found in candidates]
    answers = [_answers(row)[0] for row in script.eval_rows]
    return {"loss": loss / len(marked) / 2, **metrics.squad(texts, answers, script.config.task.language)}


def _answers(row: Row) -> tuple[list[str], int]:
    """All answers, and where the first begins."""
    texts, starts = row["answers"]["text"], row["answers"].get("answer_start")
    return texts, starts[0] if starts else row["context"].find(texts[0])


def _windows(script: Script, row: Row) -> list[tuple[Row, list[tuple[int, int] | None]]]:
    """Windows over the context with the places of the answer, and characters of each token of the context."""
    config = script.config
    found = script.tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=config.data.max_tokens,
        stride=config.task.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    texts, begin = _answers(row)
    end = begin + len(texts[0])
    windows = []
    for number, ids in enumerate(found["input_ids"]):
        parts = found.sequence_ids(number)
        offsets = [o if part == 1 else None for o, part in zip(found["offset_mapping"][number], parts, strict=True)]
        inside = [place for place, part in enumerate(parts) if part == 1]
        first, last = 0, 0
        if inside and offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end:
            first = max(place for place in inside if offsets[place][0] <= begin)
            last = min(place for place in inside if offsets[place][1] >= end)
        window = {"input_ids": ids, "start_positions": first, "end_positions": last}
        for name in ("attention_mask", "token_type_ids"):
            if name in found:
                window[name] = found[name][number]
        windows.append((window, offsets))
    return windows


def _candidates(
    start: torch.Tensor, end: torch.Tensor, offsets: list[tuple[int, int] | None], context: str, longest: int
) -> Iterator[tuple[float, str]]:
    """Scores and texts of the likely spans of a window."""
    count = min(_N_BEST, len(offsets))
    for i in start[: len(offsets)].topk(count).indices.tolist():
        for j in end[: len(offsets)].topk(count).indices.tolist():
            if offsets[i] is not None and offsets[j] is not None and i <= j < i + longest:
                yield (start[i] + end[j]).item(), context[offsets[i][0] : offsets[j][1]]


# -- language models ------------------------------------------------------------------------------------------------------


def causal_lm(script: Script, own_loss: Callable | None = None) -> Metrics:
    """Chats, of which the answers are learned: labels before the answer are ignored."""
    model = script.adapted(transformers.AutoModelForCausalLM, "CAUSAL_LM")
    tokenizer = script.tokenizer

    def encoded(row: Row) -> Row:
        prompt, answer = _turns(row)
        start = _prompt(script, prompt)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        # the template's line end behind the last turn is no part of the answer
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        masked = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [_IGNORED] * masked + ids[masked:],
        }

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED)
    script.train(model, [encoded(row) for row in script.train_rows], collator, own_loss)
    loss, accuracy = script.token_metrics(model, [encoded(row) for row in script.eval_rows], collator, shift=1)
    found = {"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": accuracy}
    turns = [_turns(row) for row in script.eval_rows[: script.config.task.generate_rows]]
    if turns:
        texts = script.generate(model, [_prompt(script, prompt) for prompt, _ in turns], special_tokens=False)
        found |= metrics.overlap(texts, [answer for _, answer in turns], script.config.task.language)
    return found


def _turns(row: Row) -> tuple[str, str]:
    """A row's question and answer."""
    if "instruction" in row:
        given = row.get("input")
        return f"{row['instruction']}\n\n{given}" if given else row["instruction"], row["output"]
    question, answer = ("source", "target") if "source" in row else ("prompt", "completion")
    return row[question], row[answer]


def _prompt(script: Script, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return script.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def distillation(script: Script) -> Metrics:
    """Of the base itself, whose logits are computed anew in every step: the KL divergence of the whole distribution and the usual loss."""
    task = script.config.task
    if (task.teacher, task.divergence) != ("base", "forward_kl"):
        raise SystemExit("task=distillation: only the forward divergence from the base itself is written here.")

    def loss(model: torch.nn.Module, batch: Row) -> torch.Tensor:
        labels = batch.pop("labels")[:, 1:]
        kept = labels != _IGNORED
        own = model(**batch).logits[:, :-1][kept].float()
        with torch.no_grad(), model.disable_adapter():
            said = model(**batch).logits[:, :-1][kept].float()
        said, mine = (log_softmax(one / task.temperature, -1) for one in (said, own))
        apart = kl_div(mine, said, reduction="batchmean", log_target=True) * task.temperature**2
        return task.kd_ratio * apart + (1 - task.kd_ratio) * cross_entropy(own, labels[kept])

    return causal_lm(script, loss)


def completion(script: Script) -> Metrics:
    model = script.adapted(transformers.AutoModelForCausalLM, "CAUSAL_LM")
    size = script.config.data.max_tokens

    def encoded(row: Row) -> list[int]:
        return [*script.tokenizer(row["text"])["input_ids"], script.tokenizer.eos_token_id]

    def feature(ids: list[int]) -> Row:
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    every = [token for row in script.train_rows for token in encoded(row)]
    blocks = [feature(every[start : start + size]) for start in range(0, len(every) - size + 1, size)]
    # a piece begins with the last token of the one before it, so that each token is predicted once
    pieces = [
        feature(ids[start : start + size])
        for ids in map(encoded, script.eval_rows)
        for start in range(0, len(ids) - 1, size - 1)
    ]
    collator = DataCollatorForSeq2Seq(script.tokenizer, label_pad_token_id=_IGNORED)
    script.train(model, blocks, collator)
    loss, accuracy = script.token_metrics(model, pieces, collator, shift=1)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": accuracy}


def masked_lm(script: Script) -> Metrics:
    model = script.adapted(transformers.AutoModelForMaskedLM, None)
    train, held_out = (
        [piece for row in rows for piece in _pieces(script, row)] for rows in (script.train_rows, script.eval_rows)
    )
    collator = DataCollatorForLanguageModeling(script.tokenizer, mlm_probability=script.config.task.mask_probability)
    script.train(model, train, collator)
    torch.manual_seed(0)
    loss, accuracy = script.token_metrics(model, held_out, collator, shift=0)
    found = {"loss": loss, "masked_accuracy": accuracy}
    chosen = held_out[: script.config.task.pseudo_perplexity_rows]
    return found | ({"pseudo_perplexity": _pseudo_perplexity(script, model, chosen)} if chosen else {})


def _pieces(script: Script, row: Row) -> list[Row]:
    found = script.tokenizer(
        row["text"],
        truncation=True,
        max_length=script.config.data.max_tokens,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    names = ("input_ids", "attention_mask", "special_tokens_mask")
    return [{name: found[name][piece] for name in names} for piece in range(len(found["input_ids"]))]


@torch.no_grad()
def _pseudo_perplexity(script: Script, model: torch.nn.Module, pieces: list[Row]) -> float:
    """exp of the mean loss of each token masked alone (arXiv:1910.14659)."""
    loss, count = 0.0, 0
    for piece in pieces:
        ids = torch.tensor(piece["input_ids"])
        places = torch.tensor(piece["special_tokens_mask"]).eq(0).nonzero()[:, 0]
        for part in places.split(_COPIES):
            rows = torch.arange(len(part))
            copies = ids.repeat(len(part), 1)
            copies[rows, part] = script.tokenizer.mask_token_id
            with script.autocast():
                logits = model(input_ids=copies.to(model.device)).logits[rows, part].float().cpu()
            loss += cross_entropy(logits, ids[part], reduction="sum").item()
        count += len(places)
    return math.exp(loss / count)


def seq2seq(script: Script) -> Metrics:
    model = script.adapted(transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM")
    limit, task = script.config.data.max_tokens, script.config.task

    def encoded(row: Row) -> Row:
        source = script.tokenizer(task.prefix + row["source"], truncation=True, max_length=limit)
        target = script.tokenizer(text_target=row["target"], truncation=True, max_length=limit)
        return {**source, "labels": target["input_ids"]}

    collator = DataCollatorForSeq2Seq(script.tokenizer, model=model, label_pad_token_id=_IGNORED)
    script.train(model, [encoded(row) for row in script.train_rows], collator)
    loss, accuracy = script.token_metrics(model, [encoded(row) for row in script.eval_rows], collator, shift=0)
    found = {"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": accuracy}
    rows = script.eval_rows[: task.generate_rows]
    if rows:
        texts = script.generate(model, [task.prefix + row["source"] for row in rows], special_tokens=True)
        found |= metrics.overlap(texts, [row["target"] for row in rows], task.language)
    return found


# -- queries and documents ----------------------------------------------------------------------------------------------


def embedding(script: Script) -> Metrics:
    """In-batch negatives in both directions on mean-pooled states. Equal documents of a batch are taken for negatives, as nothing masks
    them."""
    model = script.adapted(transformers.AutoModel, "FEATURE_EXTRACTION")
    limit, temperature = script.config.data.max_tokens, script.config.task.temperature

    def vectors(texts: list[str]) -> torch.Tensor:
        batch = script.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        batch = batch.to(script.device)
        states, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"][..., None]
        return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(_: torch.nn.Module, batch: Row) -> torch.Tensor:
        scores = vectors(batch["query"]) @ vectors(batch["positive"]).T / temperature
        right = torch.arange(len(scores), device=scores.device)
        return (cross_entropy(scores, right) + cross_entropy(scores.T, right)) / 2

    def collated(rows: list[Row]) -> Row:
        return {name: [row[name] for row in rows] for name in ("query", "positive")}

    script.train(model, script.train_rows, collated, loss)
    model.eval()
    right: dict[str, set[str]] = {}
    for row in script.eval_rows:
        right.setdefault(row["query"], set()).add(row["positive"])
    documents = sorted({text for texts in right.values() for text in texts})
    with torch.no_grad(), script.autocast():
        there = torch.cat([vectors([text]) for text in documents])
        scores = torch.cat([vectors([query]) for query in right]) @ there.T
    ranks = []
    for own, texts in zip(scores, right.values(), strict=True):
        order = [documents[place] for place in own.argsort(descending=True).tolist()]
        ranks.append([order.index(text) + 1 for text in texts])
    return metrics.retrieval(ranks)


def reranker(script: Script) -> Metrics:
    """Each document of a row beside the query; the first is told from the others."""
    model = script.adapted(transformers.AutoModelForSequenceClassification, "SEQ_CLS", num_labels=1)
    limit = script.config.data.max_tokens

    def encoded(row: Row) -> Row:
        others = row["negatives"] if "negatives" in row else [row["negative"]]
        pairs = [(row["query"], document) for document in (row["positive"], *others)]
        return {"pairs": [script.tokenizer(*pair, truncation="only_second", max_length=limit) for pair in pairs]}

    padded = DataCollatorWithPadding(script.tokenizer)

    def collated(features: list[Row]) -> Row:
        flat = [pair for feature in features for pair in feature["pairs"]]
        return {**padded(flat), "counts": torch.tensor([len(feature["pairs"]) for feature in features])}

    def scores(model: torch.nn.Module, batch: Row) -> tuple[torch.Tensor, ...]:
        counts = batch.pop("counts").tolist()
        return model(**batch).logits[:, 0].float().split(counts)

    def listwise(found: tuple[torch.Tensor, ...]) -> torch.Tensor:
        first = torch.zeros(1, dtype=torch.int64, device=found[0].device)
        return torch.stack([cross_entropy(own[None], first) for own in found]).mean()

    script.train(model, [encoded(row) for row in script.train_rows], collated, lambda *given: listwise(scores(*given)))
    model.eval()
    with torch.no_grad(), script.autocast():
        found = tuple(own.cpu() for row in script.eval_rows for own in scores(model, collated([encoded(row)]).copy()))
    ranks = [[1 + int((own[1:] >= own[0]).sum())] for own in found]
    return {"loss": listwise(found).item(), **metrics.retrieval(ranks)}


# -- judgements -----------------------------------------------------------------------------------------------------------


def preference(script: Script) -> Metrics:
    """DPO. The prompt is given as rendered by the chat template; DPOTrainer adds the end of turn to the answers."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    task = script.config.task
    if task.loss != "dpo":
        raise SystemExit(f"task.loss={task.loss}: only dpo is written here.")
    train, held_out = (
        Dataset.from_list(
            [
                {"prompt": _prompt(script, row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]}
                for row in rows
            ]
        )
        for rows in (script.train_rows, script.eval_rows)
    )
    arguments = DPOConfig(
        **script.arguments(len(train)),
        loss_type=["sigmoid"],
        beta=task.beta,
        max_length=None,  # no row is too long
        disable_dropout=False,
    )
    model = script.model(transformers.AutoModelForCausalLM)
    found = _by_trl(script, DPOTrainer, model, arguments, (train, held_out), "CAUSAL_LM")
    return {
        "loss": found["eval_loss"],
        "reward_accuracy": found["eval_rewards/accuracies"],
        "reward_margin": found["eval_rewards/margins"],
        "reward_chosen": found["eval_rewards/chosen"],
        "reward_rejected": found["eval_rewards/rejected"],
    }


def reward(script: Script) -> Metrics:
    """Prompt and answer as a pair of texts, for a tokenizer without chat template."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    if script.tokenizer.chat_template:
        raise SystemExit("task=reward: only a tokenizer without chat template is written here.")
    train, held_out = (
        Dataset.from_list(
            [
                {
                    f"{side}_ids": script.tokenizer(row["prompt"], row[side])["input_ids"]
                    for side in ("chosen", "rejected")
                }
                for row in rows
            ]
        )
        for rows in (script.train_rows, script.eval_rows)
    )
    arguments = RewardConfig(**script.arguments(len(train)), max_length=None, disable_dropout=False)
    model = script.model(transformers.AutoModelForSequenceClassification, num_labels=1)
    found = _by_trl(script, RewardTrainer, model, arguments, (train, held_out), "SEQ_CLS")
    return {
        "loss": found["eval_loss"],
        "accuracy": found["eval_accuracy"],
        "reward_margin": found["eval_margin"],
    }


def _by_trl(
    script: Script, trainer_class: type, model: torch.nn.Module, arguments: Any, rows: tuple, task_type: str
) -> Metrics:
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=script.tokenizer,
        peft_config=script.lora(task_type),
    )
    script.run(trainer)
    return trainer.evaluate()


_TASKS = {
    function.__name__: function
    for function in (
        classification, regression, token_classification, question_answering, causal_lm, completion, masked_lm, seq2seq,
        preference, reward, embedding, reranker, distillation,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tree = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    config = json.loads(json.dumps(tree), object_hook=lambda values: types.SimpleNamespace(**values))
    transformers.set_seed(config.seed)
    script = Script(config, args.model)
    found = _TASKS[config.task.name](script)
    args.out.write_text(json.dumps({"metrics": found, **script.told}, indent=1))


if __name__ == "__main__":
    main()
