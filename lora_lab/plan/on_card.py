"""Predict the peak memory of a run on a card: the run's own code, one pass of each of its phases, on a card that does not exist."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_lab.adapters import prompts
from lora_lab.adapters.attach import attach, trainable
from lora_lab.adapters.base import Step
from lora_lab.base import embeddings, load
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.config.run import RunConfig
from lora_lab.data.collate import Batch
from lora_lab.export import targets
from lora_lab.fast import apply
from lora_lab.merge.merge import judged_on
from lora_lab.plan import card, memory, skeletons
from lora_lab.plan.card import CARD, Precision
from lora_lab.plan.memory import Memory, Shards
from lora_lab.run.setup import ADAPTER, Live, Setup
from lora_lab.tasks import generation
from lora_lab.tasks.base import StepBatches
from lora_lab.training import oom
from lora_lab.training.cohort import Share, learn, learning
from lora_lab.verify import layers, parity

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.tasks.base import AnyTask

_STEPS = 1000  # of a run, for methods whose updates depend on it


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """What a run does with its own rows, beside the passes that all runs have."""

    trial: Callable[
        [PeftModel, Precision], None
    ]  # what it makes sure of before it trains; it replaces the model's modules
    prompts: list[int]  # tokens of each that the model answers
    judged: parity.Probe  # that a merge is judged on


def of_setup(setup: Setup, train: Batch, evaluation: Batch | None, size: int, members: int = 1) -> Memory:
    """`estimate`, of a run that is made ready: with the trial of packing and of the accelerations on its own rows."""
    own = setup.for_other(setup.config)  # the task remembers what was found out of its model

    def trial(model: PeftModel, precision: Precision) -> None:
        live = Live(dataclasses.replace(own, device=CARD, accelerator=precision), model)
        with contextlib.redirect_stdout(io.StringIO()):  # the run itself will say it
            together = own.task.forward.together
            live.decide_packing()
            if not own.task.config.packed:  # what padding changes is said by numbers, and there are none
                own.task.forward.together = together
            live.accelerate()

    asks: Any = own.task  # only some tasks let a decoder answer
    answered = setup.held_out is not None and hasattr(asks, "prompt_tokens")
    rows = OwnRows(trial, asks.prompt_tokens(setup.held_out) if answered else [], judged_on(own))
    return estimate(setup.config, setup.base, setup.kind, own.task, train, evaluation, size, rows, members)


def estimate(
    config: RunConfig,
    base: BaseFiles,
    kind: ModelKind,
    task: AnyTask,
    train: Batch,
    evaluation: Batch | None,
    size: int = 0,
    rows: OwnRows | None = None,
    members: int = 1,
) -> Memory:
    """Predict the peak memory of a training run in tensors on a card, as torch's allocator counts them.

    Only `config.json` is read from the base's folder.

    Args:
        train: the largest batch of a forward pass; what it holds does not matter, see `memory.blank`.
        evaluation: the same in evaluation; None without held-out rows.
        size: bytes that are free on the card, a share of which is used to keep dequantized weights; 0: of no card that is known.
        rows: see `of_setup`; None: the accelerations are taken without trying them, nothing is generated, and a merge is its weights alone.
        members: of a sweep, that share the pass of a step with such a batch each.
    """
    stored, unquantized = skeletons.stored(config, base, kind)
    shards = Shards.of(config.hardware, stored)
    precision = Precision(config.model.dtype)
    with card.pretended(size) as there:
        skeletons.give_storage(stored, there.mode, CARD)
        there.hold(skeletons.tensors(stored))
        with there.phase("load"):  # layer by layer: each is there whole until it is quantized
            largest = skeletons.largest_layer(stored, Linear4bit, Linear8bitLt)
            torch.empty(largest, dtype=getattr(torch, config.model.dtype), device=CARD)
            if config.hardware.offload_embeddings:
                embeddings.offload(stored)
        more = [f"{ADAPTER}{place}" for place in range(1, members)]
        model = attach(stored, config.adapter, ADAPTER, kind, config.seed)
        for name in more:
            model = attach(model, config.adapter, name, kind, config.seed)
        if config.train.gradient_checkpointing:
            oom.recompute(model, config.train.recompute_every, config.train.offload_activations)
        trained = _trained(model, [ADAPTER, *more])
        parameters = [one for own in trained.values() for one in own.values()]
        learned = set(map(id, parameters))
        frozen = sum(skeletons.nbytes(tensor) for tensor in skeletons.tensors(model) if id(tensor) not in learned)
        gradients = sum(map(skeletons.nbytes, parameters))
        adapter = gradients + sum(memory.remembered(config, model, name) for name in trained)
        optimizer = sum(memory.optimizer_bytes(config.optim.name, one.numel()) for one in parameters)
        before = there.allocated
        with there.phase("trial"):
            _try(model, config, task, train, rows, precision)
        learners = [_learner(model, config, task, name, own) for name, own in trained.items()]
        with there.phase("train"):
            resting = there.allocated
            _learn(learners, train, precision)
            activations = there.peak - resting
        if evaluation is not None:
            with there.phase("evaluation"), torch.no_grad(), precision.autocast():
                batch = evaluation.to(CARD)
                found = task.loss(model.eval(), batch)
                task.observed([], found.logits, batch)
                del found
        if rows is not None and rows.prompts:
            prompt, new = max(rows.prompts), config.task.max_new_tokens
            free, _ = torch.cuda.mem_get_info()
            most = generation.room(model, free, config.task.num_beams) // (prompt + new)
            together = max(1, min(len(rows.prompts), generation.ROWS, most))
            with there.phase("generation"), precision.autocast():
                _generate(model.eval(), task, together, prompt, new)
        merged = targets.needs_merged(config.export.targets)
        if merged and rows is not None and not config.hardware.shard:  # the others' parts have gone with them
            with there.phase("merge"):  # first what the trained model says
                parity.logits(model.eval(), _longest(rows.judged), CARD, precision.autocast)
        kept = max(there.allocated - before - optimizer, 0)
    phases = {name: peak - shards.elsewhere + shards.gathered for name, peak in there.peaks.items()}
    whole, layered = skeletons.for_merging(stored, unquantized, getattr(torch, config.export.dtype).itemsize)
    fits = layers.fits(whole, size)
    if merged:
        merging = (whole if fits else layered) if rows is None else _merge(config, base, kind, rows.judged, size, fits)
        phases["merge"] = max(phases.get("merge", 0), merging)
    own = frozen - shards.elsewhere
    return Memory(own, kept, 0, adapter, gradients, optimizer, activations, 0, 0, 0, shards.gathered, phases)


def _try(
    model: PeftModel, config: RunConfig, task: AnyTask, batch: Batch, rows: OwnRows | None, precision: Precision
) -> None:
    if rows is not None:
        rows.trial(model, precision)
        return
    batch = batch.to(CARD)
    with precision.autocast():
        free, _ = torch.cuda.mem_get_info()
        apply.accelerate(model.eval(), task.forward, config.speed, lambda: task.logits(model, batch), free, prove=False)
        task.accelerate(model, batch, prove=False)


def _trained(model: PeftModel, names: Sequence[str]) -> dict[str, dict[str, torch.nn.Parameter]]:
    """What each adapter learns; the last one is active."""
    found = {}
    for name in names:
        if len(names) > 1:
            model.set_adapter(name)
        found[name] = trainable(model)
    return found


def _learner(
    model: PeftModel, config: RunConfig, task: AnyTask, name: str, parameters: dict[str, torch.nn.Parameter]
) -> Any:
    """What stands for a member of a cohort in the middle of its training: its optimizer has its moments, and the gradients of earlier
    micro-batches are there."""
    moments = [
        torch.empty(memory.optimizer_bytes(config.optim.name, one.numel()), dtype=torch.uint8, device=CARD)
        for one in parameters.values()
    ]
    if memory.several_passes(config, task):
        for one in parameters.values():
            one.grad = torch.zeros_like(one)
    return SimpleNamespace(
        name=name,
        config=config,
        model=model,
        task=task,
        parameters=parameters,
        moments=moments,
        active=contextlib.nullcontext,
    )


def _learn(learners: Sequence[Any], batch: Batch, precision: Precision) -> None:
    """A forward and a backward pass that all of them share, and what the adapter's method does about an update."""
    model, task = learners[0].model, learners[0].task
    model.train()
    generator = torch.Generator() if len(learners) > 1 else None
    shares = [Share(one, [], StepBatches([batch], batch.weight), batch.weight, generator) for one in learners]
    with task.forward.segments(model), learning(learners):
        learn(shares, 0, precision)
    for one in learners:
        step = Step(model, one.name, one.parameters, 1, _STEPS)
        one.config.adapter.before_update(step)
        one.config.adapter.after_update(step)
    model.zero_grad()


def _longest(judged: parity.Probe) -> parity.Probe:
    """Of the rows the one that takes the most."""
    place = max(range(len(judged.examples)), key=lambda one: judged.examples[one].num_tokens)
    return dataclasses.replace(judged, examples=[judged.examples[place]], passes=[judged.passes[place]])


def _merge(config: RunConfig, base: BaseFiles, kind: ModelKind, judged: parity.Probe, size: int, whole: bool) -> int:
    """Bytes that the unquantized base with the adapter takes while rows go through it.

    Args:
        whole: it is on the card as a whole, and rows go through it one after another; else layer by layer, all rows at once.
    """
    dtype = getattr(torch, config.export.dtype)
    model = load.skeleton(base.folder, kind, config.export.dtype)
    if not whole:
        skeletons.on_host(model, dtype)
    with card.pretended(size) as there:
        if whole:
            skeletons.give_storage(model, there.mode, CARD)
            there.hold(skeletons.tensors(model))
        adapted = attach(model, config.adapter, ADAPTER, kind, config.seed).eval()
        waiting = sum(one.num_tokens for one in judged.examples) - _longest(judged).examples[0].num_tokens
        width = getattr(model.config.get_text_config(), "hidden_size", 0)
        with there.phase("merge"), contextlib.redirect_stdout(io.StringIO()):
            held = None if whole else torch.empty(waiting, width, dtype=dtype, device=CARD)
            parity.logits(adapted, _longest(judged), CARD)
            del held
    return there.peaks["merge"]


def _generate(model: PeftModel, task: AnyTask, rows: int, tokens: int, new: int) -> None:
    """The first and the last token of the longest answers.

    Args:
        rows: generated together.
        tokens: of each prompt.
        new: tokens of each answer.
    """
    options = {"do_sample": False, "max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True}
    with task.forward.generating(model), prompts.generating():
        done = model.generate(**_prompt(rows, tokens), **options)
        cache = done.past_key_values
        del done
        for layer in cache.layers if new > 1 else ():
            shape = (*layer.keys.shape[:2], tokens + new - 2, layer.keys.shape[3])
            layer.keys = layer.values = torch.empty(0, device=CARD)
            layer.keys, layer.values = (torch.empty(shape, dtype=model.dtype, device=CARD) for _ in range(2))
        if new > 1:
            model.generate(**_prompt(rows, tokens + new - 1), past_key_values=cache, **options)


def _prompt(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.ones(rows, tokens, dtype=torch.int64, device=CARD)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
