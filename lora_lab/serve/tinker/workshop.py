"""Adapters that learn over the served base, and snapshots of them that are sampled from. Only the thread that answers touches them.

All lie on the same modules. Clients' rows go through the base together, each adapter sees its own: `fast/routing.py` tells layers whose
rows they see, as in a sweep. A client's numbers are those that it gets alone; in float32 up to 1e-5.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, attach_trained, trainable
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.base.positions import usable_positions
from lora_lab.config.train import SpeedConfig
from lora_lab.data.collate import PackedBatch, join
from lora_lab.data.encode import Example
from lora_lab.errors import AdapterError, LoraLabError, TrainingError
from lora_lab.fast.isolation import check_isolation
from lora_lab.fast.routing import Route
from lora_lab.runtime.memory import is_out_of_memory
from lora_lab.serve.tinker import losses
from lora_lab.serve.tinker.told import Adam
from lora_lab.serve.tinker.wire import Learn
from lora_lab.serve.wishes import RequestError
from lora_lab.tasks.base import Pass
from lora_lab.verify import probes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.serve.group import Group
    from lora_lab.serve.shelf import Opened
    from lora_lab.serve.words import Row

PASS_TOKENS = 2048  # of one client's rows in a pass, about
_SHARED_TOKENS = 2 * PASS_TOKENS  # of all rows in a pass
_KEPT_SNAPSHOTS, _MOST_SNAPSHOTS = 4, 16  # in memory: kept for whoever asks again; at most, if all are being asked


@dataclasses.dataclass(eq=False)
class Learner:
    """One client's adapter with everything that is its own."""

    key: str  # its adapter's name among the modules
    section: LoraAdapter
    seed: int
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    steps: int = 0
    tokens: int = 0  # that it learned from
    losses: list[str] = dataclasses.field(default_factory=list)  # by which
    gathered: list[torch.Tensor] | None = None  # gradients of all requests since the last step

    def add(self, gradients: Sequence[torch.Tensor], asked: Learn) -> None:
        """Add a request's gradients to what the next step is made of."""
        self.tokens += sum(len(one.tokens) for one in asked.data)
        if asked.loss not in self.losses:
            self.losses.append(asked.loss)
        if self.gathered is None:
            self.gathered = list(gradients)
        else:
            torch._foreach_add_(self.gathered, list(gradients))

    def step(self, told: Adam) -> dict[str, float]:
        """The optimizer's step over what was gathered, which is gone then; its metrics.

        Raises:
            RequestError: nothing was gathered, or the gradient is not finite; nothing has changed but that it is gone.
        """
        gathered, self.gathered = self.gathered, None
        if gathered is None:
            raise RequestError(
                400, "optim_step: there is no gradient. Call forward_backward first, and look at its error."
            )
        norm = get_total_norm(gathered)
        if not math.isfinite(norm.item()):
            raise RequestError(400, f"optim_step: the gradient's norm is {norm.item()}, so no step was made.")
        for parameter, gradient in zip(self.parameters.values(), gathered, strict=True):
            parameter.grad = gradient
        if told.grad_clip_norm > 0:
            clip_grads_with_norm_(self.parameters.values(), told.grad_clip_norm, norm)
        for group in self.optimizer.param_groups:
            group |= {
                "lr": told.learning_rate,
                "betas": (told.beta1, told.beta2),
                "eps": told.eps,
                "weight_decay": told.weight_decay,
            }
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return {"grad_norm": norm.item(), "step": float(self.steps)}


@dataclasses.dataclass(eq=False)
class Task:
    """A training request under way: its data in parts, of which each goes through one pass."""

    learner: Learner
    asked: Learn
    parts: list[list[int]]  # places of data
    done: int = 0  # parts
    seconds: float = 0.0  # of the passes that it had a part in
    loss: float = 0.0
    logprobs: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by place
    gradients: list[torch.Tensor] | None = None

    @property
    def finished(self) -> bool:
        return self.done == len(self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of the next part."""
        return sum(len(self.asked.data[place].tokens) for place in self.parts[self.done])

    def batch(self) -> PackedBatch:
        """The next part end to end; each token is read for what follows it."""
        data = [self.asked.data[place] for place in self.parts[self.done]]
        lengths = [len(one.tokens) for one in data]
        positions = np.concatenate([np.arange(length) for length in lengths])
        targets = np.concatenate([one.inputs[losses.TARGETS].reshape(len(one.tokens), -1)[:, 0] for one in data])
        return PackedBatch(
            input_ids=torch.from_numpy(np.concatenate([one.tokens for one in data]))[None],
            position_ids=torch.from_numpy(positions)[None],
            lengths=lengths,
            logit_positions=torch.arange(sum(lengths)),
            targets=torch.from_numpy(targets),
            weights=None,
            origins=[],
        )

    @property
    def wide(self) -> bool:
        """Whether a place has several targets."""
        return any(self.asked.data[place].inputs[losses.TARGETS].ndim > 1 for place in self.parts[self.done])

    def loss_of(self, p: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The loss of the next part, and the log-probabilities of each datum.

        Args:
            p: of its targets [S], or of all tokens [S, V] where `wide`.
        """
        total, found, places = p.new_zeros(()), {}, self.parts[self.done]
        for place, own in zip(places, p.split([len(self.asked.data[place].tokens) for place in places]), strict=True):
            inputs = {name: torch.from_numpy(one).to(p.device) for name, one in self.asked.data[place].inputs.items()}
            targets = inputs.pop(losses.TARGETS)
            if own.ndim > 1:
                own = own.gather(1, targets.view(len(targets), -1)).view(targets.shape)
            settings = cast("dict[str, float]", self.asked.settings)
            total = total + losses.of_datum(self.asked.loss, own, inputs, settings)
            found[place] = own
        return total, found

    def result(self) -> tuple[list[np.ndarray], dict[str, float]]:
        """Log-probabilities of all data in order, and the metrics."""
        return [self.logprobs[place] for place in range(len(self.asked.data))], {"loss:sum": self.loss}


@dataclasses.dataclass(eq=False)
class Snapshot:
    """A place among the modules for weights that are sampled from."""

    key: str
    settings: str  # of what adapters can be put there
    folder: Path | None = None  # whose weights are in it
    rows: list[Row] = dataclasses.field(default_factory=list)  # that are answered by them

    @property
    def busy(self) -> bool:
        self.rows = [row for row in self.rows if not (row.done or row.cancelled)]
        return bool(self.rows)


class Workshop:
    """See above."""

    def __init__(self, base: Opened, group: Group, inside: Callable[[], contextlib.AbstractContextManager[Any]]):
        """
        Args:
            base: as it is asked without adapters.
            group: modules of its own over the base's weights.
            inside: the precision of a pass.
        """
        self._base, self._group, self._inside = base, group, inside
        self._speed = SpeedConfig()
        self._count = 0
        self._snapshots: list[Snapshot] = []
        self._pass_tokens = PASS_TOKENS
        self._together: bool | None = None  # whether rows may lie end to end; None: not tried yet
        self._tried: set[str] = set()  # places of adapters, on the modules as they are
        model = group.base
        self.positions = usable_positions(model)
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary = int(embeddings.weight.shape[0])

    @property
    def group(self) -> Group:
        return self._group

    @property
    def shares(self) -> str:
        """How clients' rows go through the base."""
        if not self._group.shares:
            return f"client by client: {self._group.against_sharing or self._group.against_beside}"
        return "shares passes" if self._together else "client by client: rows do not lie end to end"

    # -- learners -------------------------------------------------------------------------------------------------------

    def begin(self, section: LoraAdapter, seed: int) -> Learner:
        """A fresh adapter.

        Raises:
            AdapterError: it does not fit the base.
        """
        kind = self._base.setup.kind
        key = self._put(lambda model, name: attach(model, section, name, kind, seed), section.target_modules)
        return self._learner(key, section, seed)

    def load(self, folder: Path, section: LoraAdapter, seed: int) -> Learner:
        """An adapter of a folder that learns on.

        Raises:
            LoraLabError: it is damaged, or does not fit the base.
        """
        self._check(folder)
        learner = self._learner(self._loaded(folder), section, seed)
        try:
            self._probe(folder, learner.key)
        except LoraLabError:
            self.drop(learner)
            raise
        return learner

    def keep_probes(self, folder: Path, learner: Learner) -> None:
        """Keep what a learner's adapter, which was written to this folder, says of texts that are nobody's."""
        with self._group.inside(learner.key):
            probes.keep(
                folder.parent,
                folder,
                self.model,
                [Pass({"input_ids": torch.tensor([ids])}, None) for ids in self._group.trial],
            )

    def _probe(self, folder: Path, key: str) -> None:
        """
        Raises:
            AdapterError: the adapter of this name does not say what the one in the folder said when it was written.
        """
        with self._group.inside(key):
            probes.check(folder.parent, folder, self.model)

    def _loaded(self, folder: Path) -> str:
        where = getattr(files.settings(folder), "target_modules", None)
        return self._put(lambda model, name: attach_trained(model, folder, name), where)

    def read_into(self, folder: Path, learner: Learner) -> None:
        """Give a learner the weights of a folder; its optimizer begins anew.

        Raises:
            LoraLabError: they do not fit it.
        """
        self._check(folder)
        files.check_settings(folder, self.model.peft_config[learner.key])
        before = [one.detach().clone() for one in learner.parameters.values()]
        try:
            files.read_into(folder, self.model, learner.key)
            self._probe(folder, learner.key)
        except LoraLabError:
            with torch.no_grad():
                for one, value in zip(learner.parameters.values(), before, strict=True):
                    one.copy_(value)
            raise
        learner.optimizer, learner.gathered, learner.steps = _optimizer(learner.parameters), None, 0

    def _check(self, folder: Path) -> None:
        files.check_base(folder, self._base.setup.base)
        files.check_quant(folder, self._base.setup.base.stored(self._base.config.quant))

    def _learner(self, key: str, section: LoraAdapter, seed: int) -> Learner:
        self.model.set_adapter(key)
        parameters = trainable(self.model)
        return Learner(key, section, seed, parameters, _optimizer(parameters))

    @property
    def model(self) -> PeftModel:
        return cast("PeftModel", self._group.model)

    def _put(self, attached: Callable[[PreTrainedModel | PeftModel, str], PeftModel], where: Any) -> str:
        """Put an adapter on the model; its name there.

        Args:
            where: the layers that it sits on, as it names them.
        """
        key, told = f"tinker{self._count}", repr(sorted(where) if isinstance(where, set) else where)
        self._count += 1
        self._group.add(lambda model: attached(model, key), key, "", self._speed, told in self._tried)
        if told not in self._tried:
            self._renew()
            self._tried.add(told)
        return key

    def _take(self, key: str) -> None:
        self._group.take(key)
        if not self._group.names:
            self._tried.clear()

    def _renew(self) -> None:
        """Find out again how rows can go through the modules, which were replaced."""
        if self._together is None:
            self._together = self._lie_together()
        forward, model = self._group.forward, self.model
        batch = _packed([self._group.trial[0]])
        with torch.no_grad(), self._inside():
            forward.chunked_head = False
            forward.try_chunks(model, lambda: -self._logprobs(batch.to(model.device), wide=False), prove=True)

    def _lie_together(self) -> bool:
        examples = [
            Example(np.array(ids), np.array([0.0, *[1.0] * (len(ids) - 1)], np.float32), "trial")
            for ids in self._group.trial[:2]
        ]
        try:
            with self._inside():
                check_isolation(self.model.eval(), examples)
        except (TrainingError, TypeError):
            return False
        return True

    def drop(self, learner: Learner) -> None:
        """Let an adapter go."""
        self._take(learner.key)

    # -- passes ---------------------------------------------------------------------------------------------------------

    def task(self, learner: Learner, asked: Learn) -> Task:
        """A request, cut into parts."""
        return Task(learner, asked, self._parts([len(one.tokens) for one in asked.data]))

    def _parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of data that go through one pass: in order, so many tokens at most."""
        parts: list[list[int]] = []
        tokens = 0
        for place, length in enumerate(lengths):
            if not parts or not self._together or tokens + length > self._pass_tokens:
                parts.append([])
                tokens = 0
            parts[-1].append(place)
            tokens += length
        return parts

    def chosen(self, waiting: Sequence[Task]) -> list[Task]:
        """The requests whose next parts go through one pass, the first among them."""
        if not (self._group.shares and self._together):
            return list(waiting[:1])
        found: list[Task] = []
        tokens = 0
        for one in waiting:
            if not found or tokens + one.tokens <= _SHARED_TOKENS:
                found.append(one)
                tokens += one.tokens
        return found

    def run(self, tasks: Sequence[Task]) -> dict[int, Exception]:
        """The next part of each of these requests, of unlike learners, in one pass; what failed, by the place among them. The others
        have learned as they would alone."""
        try:
            return self._run(tasks)
        except Exception as error:
            _forget(tasks)
            if len(tasks) > 1:
                failed = [self.run([one]) for one in tasks]
                return {place: one[0] for place, one in enumerate(failed) if one}
            if is_out_of_memory(error) and self._need_less(tasks[0]):
                return self.run(tasks)
            return {0: error}

    def _need_less(self, task: Task) -> bool:
        """After a failed allocation: smaller parts; whether there are any."""
        rest = [place for part in task.parts[task.done :] for place in part]
        if len(task.parts[task.done]) == 1:
            return False
        self._pass_tokens = max(1, task.tokens // 2)
        cut = self._parts([len(task.asked.data[place].tokens) for place in rest])
        task.parts[task.done :] = [[rest[number] for number in part] for part in cut]
        return True

    def _run(self, tasks: Sequence[Task]) -> dict[int, Exception]:
        device = self.model.device
        batches = [task.batch() for task in tasks]
        backward, wide = any(task.asked.backward for task in tasks), any(task.wide for task in tasks)
        with torch.set_grad_enabled(backward), self._learning(tasks, batches):
            p = self._logprobs(join(batches).to(device), wide)
            parts = p.split([batch.num_tokens for batch in batches])
            found = [task.loss_of(own) for task, own in zip(tasks, parts, strict=True)]
            failed: dict[int, Exception] = {
                place: _not_finite(loss) for place, (loss, _) in enumerate(found) if not loss.isfinite().all()
            }
            learned = [
                loss for place, (loss, _) in enumerate(found) if tasks[place].asked.backward and place not in failed
            ]
            if learned:
                torch.stack(learned).sum().backward()
        for place, (task, (loss, logprobs)) in enumerate(zip(tasks, found, strict=True)):
            if place not in failed:
                self._count_in(task, loss, logprobs)
        _forget(tasks)
        return failed

    @staticmethod
    def _count_in(task: Task, loss: torch.Tensor, logprobs: dict[int, torch.Tensor]) -> None:
        task.loss += loss.item()
        task.logprobs |= {place: one.detach().float().cpu().numpy() for place, one in logprobs.items()}
        task.done += 1
        if not task.asked.backward:
            return
        own = [torch.zeros_like(one) if one.grad is None else one.grad for one in task.learner.parameters.values()]
        if task.gradients is None:
            task.gradients = own
        else:
            torch._foreach_add_(task.gradients, own)

    @contextlib.contextmanager
    def _learning(self, tasks: Sequence[Task], batches: Sequence[PackedBatch]) -> Iterator[None]:
        """Inside the block the adapters of these requests learn, each from its own rows."""
        for task in tasks:
            for parameter in task.learner.parameters.values():
                parameter.requires_grad_()
        if not self._group.shares:
            with self._group.inside(tasks[0].learner.key):
                for parameter in tasks[0].learner.parameters.values():
                    parameter.requires_grad_()
                yield
            return
        routes = [
            Route(task.learner.key, batch.num_tokens, batch.num_tokens, None)
            for task, batch in zip(tasks, batches, strict=True)
        ]
        with self._inside(), self._group.forward.routing.routed(routes):
            yield

    def _logprobs(self, batch: PackedBatch, wide: bool) -> torch.Tensor:
        """Log-probabilities of the targets [S] float32; of all tokens [S, V] where a place has several targets."""
        forward, model = self._group.forward, self.model
        if forward.chunked_head and not wide:
            return -forward.losses_in_chunks(model, batch, 0.0)[0]
        scores = forward.logits(model, batch).float().log_softmax(-1)
        return scores if wide else scores.gather(1, batch.targets[:, None])[:, 0]

    # -- snapshots ------------------------------------------------------------------------------------------------------

    def snapshot(self, folder: Path) -> Snapshot:
        """The weights of a verified folder, as they are sampled from.

        Raises:
            LoraLabError: they do not fit the base.
            RequestError: too many others are being sampled from.
        """
        found = next((one for one in self._snapshots if one.folder == folder), None)
        if found is not None:
            self._snapshots.remove(found)
            self._snapshots.append(found)  # the last to be taken for others
            return found
        self._check(folder)
        settings = repr(sorted(files.settings(folder).to_dict().items(), key=str))
        for one in self._snapshots:
            if (
                one.settings == settings
                and not one.busy
                and (one.folder is None or len(self._snapshots) >= _KEPT_SNAPSHOTS)
            ):
                one.folder = None
                files.read_into(folder, self.model, one.key)
                self._probe(folder, one.key)
                one.folder = folder
                self._snapshots.remove(one)
                self._snapshots.append(one)
                return one
        if len(self._snapshots) >= _MOST_SNAPSHOTS:
            self._drop_one()
        found = Snapshot(self._loaded(folder), settings, folder)
        try:
            self._probe(folder, found.key)
        except LoraLabError:
            self._take(found.key)
            raise
        self._snapshots.append(found)
        return found

    def _drop_one(self) -> None:
        idle = next((one for one in self._snapshots if not one.busy), None)
        if idle is None:
            raise RequestError(429, f"{len(self._snapshots)} snapshots are being sampled from. Try again later.")
        self._snapshots.remove(idle)
        self._take(idle.key)

    def forget(self, folder: Path) -> None:
        """Weights of a folder that is removed are not sampled from any more."""
        for one in self._snapshots:
            if one.folder == folder:
                one.folder = None


def _optimizer(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters.values()), fused=True)  # what a step says comes with it


def _forget(tasks: Sequence[Task]) -> None:
    for task in tasks:
        for parameter in task.learner.parameters.values():
            parameter.grad = None


def _not_finite(loss: torch.Tensor) -> RequestError:
    return RequestError(400, f"The loss is {loss.item()}: not finite, so nothing was learned from this request.")


def _packed(rows: Sequence[Sequence[int]]) -> PackedBatch:
    """Rows end to end; each token is read for the one behind it, the last for itself."""
    lengths = [len(row) for row in rows]
    ids = torch.tensor([token for row in rows for token in row])
    targets = torch.tensor([token for row in rows for token in (*row[1:], row[-1])])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(ids[None], positions[None], lengths, torch.arange(len(ids)), targets, None, [])


def section_of(model: PreTrainedModel, rank: int, attention: bool, mlp: bool, unembed: bool) -> LoraAdapter:
    """LoRA of a rank on the layers that a client wants; scale 32 / rank, as the Tinker service's clients expect it.

    Args:
        model: the base without weights.
        unembed: the output layer too, where it has weights of its own: where they are the input embeddings' too, what is learned of one
            could not be merged without the other.

    Raises:
        AdapterError: there is no such layer.
    """
    plain = LoraAdapter(r=rank, lora_alpha=32.0)
    head = own_head(model) if unembed else None
    if attention and mlp and head is None:
        return plain
    names = {name: "attn" in name or "attention" in name for name in plain.targets(model)}
    chosen = {True: attention, False: mlp}
    wanted = {name.rpartition(".")[2] for name, attends in names.items() if chosen[attends]}
    other = {name.rpartition(".")[2] for name, attends in names.items() if not chosen[attends]}
    wanted |= {head} if head is not None else set()
    if not wanted or other & wanted:
        raise AdapterError(
            "lora_config: this base has no layers that are adapted so. Set train_attn and train_mlp; an output layer that shares its "
            "weights with the input embeddings is never adapted."
        )
    return dataclasses.replace(plain, target_modules=sorted(wanted))


def own_head(model: PreTrainedModel) -> str | None:
    """The last part of the name of a base's output layer, if its weights are its alone."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.config.get_text_config().tie_word_embeddings:
        return None
    return next(name.rpartition(".")[2] for name, module in model.named_modules() if module is head)
