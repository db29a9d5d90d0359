"""What clients train over HTTP is what torch and `lora-lab train` make of the same rows, alone or beside others."""

from __future__ import annotations

import json
import resource

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.base.load import ModelKind
from lora_lab.config import compose
from lora_lab.errors import LoraLabError
from lora_lab.run import takes
from lora_lab.run.prepared import Trained, prepare
from lora_lab.runtime import storage
from lora_lab.serve.tinker import wire
from lora_lab.serve.tinker.keeping import Keeping
from lora_lab.verify import probes
from tests.serve.conftest import at_once, halted
from tests.serve.test_shelf import resealed
from tests.serve_training.asking import (
    ADAM,
    ROW,
    Failed,
    Model,
    Tinker,
    client_of,
    datum,
    decoded,
    encoded,
    end,
    next_tokens,
    serving,
    tokens_of,
)

ROWS = [ROW, ROW[::-1], [*ROW[2:], 50, 61], [3, 4, 8]]
DATA = [next_tokens(row, np.linspace(-0.5, 1.5, len(row) - 1)) for row in ROWS]
TAKEN = -5.0  # about what the tiny model gives: q


class Reference:
    """peft's model and torch's optimizer."""

    def __init__(self, base, rank: int, seed: int, layers="all-linear", eps: float = 1e-8):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        section = LoraAdapter(r=rank, lora_alpha=32.0, target_modules=layers)
        self.model = attach(model, section, "default", ModelKind("AutoModelForCausalLM", "CAUSAL_LM"), seed).eval()
        own = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(own, lr=ADAM["learning_rate"], betas=(0.9, 0.95), eps=eps, weight_decay=0.1)
        self.own = own

    def logprobs(self, data) -> list[torch.Tensor]:
        found = []
        for tokens, inputs in data:
            scores = self.model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            targets = torch.from_numpy(inputs["target_tokens"])
            found.append(scores.gather(1, targets.view(len(tokens), -1)).view(targets.shape))
        return found

    def learn(self, data, loss) -> float:
        total = sum(loss(p, {name: torch.from_numpy(one) for name, one in inputs.items()})
                    for p, (_, inputs) in zip(self.logprobs(data), data, strict=True))  # fmt: skip
        total.backward()
        return total.item()

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.own, ADAM["grad_clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)


def cross_entropy(p, given):
    return -(given["weights"] * p).sum()


def weights_of(service, path: str) -> dict[str, torch.Tensor]:
    folder = service.training.keeping.find(path, "local").folder
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(found: dict, expected: dict, limit: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) <= limit


HEAD = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("unembed", [False, True])
def test_steps_are_those_of_peft_and_torch(service, base, client, unembed):
    # an output layer's gradients of tokens that do not occur are rounding alone, of which a small eps makes whole steps
    eps, rounding = (1e-3, 1e-4) if unembed else (1e-8, 1e-5)  # its loss has terms of 100 that cancel
    reference = Reference(base, 4, 7, HEAD if unembed else "all-linear", eps)
    model = client.model(4, 7, train_unembed=unembed)
    for number in range(10):
        learned = model.learn(DATA)
        expected = reference.learn(DATA, cross_entropy)
        assert learned.loss == pytest.approx(expected, rel=1e-5, abs=rounding)
        sums = -sum(
            (one.astype(np.float64) * row[1]["weights"]).sum() for one, row in zip(learned.logprobs, DATA, strict=True)
        )
        assert learned.loss == pytest.approx(sums, rel=1e-4, abs=1e-4)
        assert model.step(eps=eps) == {"grad_norm": pytest.approx(reference.step(), rel=1e-4), "step": number + 1}
    assert_same(weights_of(service, model.save(None)), reference.tensors)


A = [np.sin(np.arange(len(row) - 1)) for row in ROWS]
OFF = [
    datum(row[:-1], row[1:], logprobs=TAKEN + 2 * np.cos(np.arange(len(row) - 1)), advantages=a,
          sequence_ratio_mask=np.arange(len(row) - 1) > 0)
    for row, a in zip(ROWS, A, strict=True)
]  # fmt: skip


def ratio(p, given):
    return (p - given["logprobs"]).exp()


def ppo(p, given):
    r, a = ratio(p, given), given["advantages"]
    return -torch.minimum(r * a, r.clamp(0.5, 2.0) * a).sum()


def cispo(p, given):
    return -(ratio(p, given).clamp(0.5, 2.0).detach() * p * given["advantages"]).sum()


def dro(p, given):
    apart = p - given["logprobs"]
    return -(p * given["advantages"] - 0.05 * apart**2).sum()


def gspo(p, given):
    mask = given["sequence_ratio_mask"] > 0
    r = (p - given["logprobs"])[mask].mean().detach().exp() * (p - p.detach()).exp()
    return -torch.minimum(r * given["advantages"], r.clamp(0.5, 2.0) * given["advantages"]).sum()


CLIP = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}


@pytest.mark.parametrize(
    ("name", "settings", "loss"),
    [
        ("importance_sampling", None, lambda p, given: -(ratio(p, given) * given["advantages"]).sum()),
        ("ppo", CLIP, ppo),
        ("cispo", CLIP, cispo),
        ("dro", {"beta": 0.1}, dro),
        ("gspo", CLIP, gspo),
    ],
)
def test_losses_are_plain_sums(base, client, name, settings, loss):
    reference, model = Reference(base, 4, 7), client.model(4, 7)
    for _ in range(2):
        assert model.learn(OFF, name, settings).loss == pytest.approx(reference.learn(OFF, loss), rel=1e-4)
        assert model.step()["grad_norm"] == pytest.approx(reference.step(), rel=1e-4)


def test_a_place_may_have_several_targets(base, client):
    """Such as the likeliest tokens of a teacher, as dense and as sparse tensors."""
    tokens, targets = ROW[:3], np.array([[5, 0], [9, 17], [12, 2]])
    wide = datum(tokens, targets, weights=[[0.5, 0.0], [0.25, 0.25], [1, 0.5]])
    reference, model = Reference(base, 4, 7), client.model(4, 7)
    learned = model.learn([wide, DATA[0]])
    assert learned.loss == pytest.approx(reference.learn([wide, DATA[0]], cross_entropy), rel=1e-5)
    assert [one.shape for one in learned.logprobs] == [(3, 2), (7,)]
    assert model.step()["grad_norm"] == pytest.approx(reference.step(), rel=1e-4)
    expected = model.learn([wide]).loss
    told = wire.MESSAGES["Request"].FromString(encoded(model.model_id, model.next_number, [wide], "cross_entropy"))
    for one in told.data[0].loss_fn_inputs:
        whole = np.frombuffer(one.value.dense, np.int64 if one.value.dtype == 2 else np.float32).reshape(3, 2)
        rows, columns = whole.nonzero()
        one.value.sparse_csr.values = whole[rows, columns].tobytes()
        one.value.sparse_csr.crow_indices = np.cumsum([0, *(whole != 0).sum(1)]).astype(np.int64).tobytes()
        one.value.sparse_csr.col_indices = columns.astype(np.int64).tobytes()
        one.value.ClearField("dense")
    sparse = client.result(client.ask("forward_backward", told.SerializeToString()).json())
    assert decoded(sparse).loss == expected


def test_gradients_add_up_until_a_step(service, client):
    one, two = client.model(4, 3), client.model(4, 3)
    one.learn(DATA)
    two.learn(DATA[:1])
    two.learn(DATA, forward_only=True)
    two.learn(DATA[1:])
    assert one.step()["grad_norm"] == pytest.approx(two.step()["grad_norm"], rel=1e-5)
    assert_same(weights_of(service, one.save(None)), weights_of(service, two.save(None)), 1e-6)
    with pytest.raises(Failed, match="no gradient"):
        one.step()


def test_a_repeated_request_counts_once(client):
    one, two = client.model(4, 3), client.model(4, 3)
    one.learn(DATA)
    body = encoded(two.model_id, two.next_number, DATA, "cross_entropy")
    found = [client.ask("forward_backward", body).json() for _ in range(3)]
    assert found[0] == found[1] == found[2]
    two.client.result(found[0])
    assert one.step() == two.step()


def test_requests_run_by_number(service, client):
    """Parts of a large request come in any order; what follows waits for all of them."""
    one, two = client.model(4, 3), client.model(4, 3)
    one.learn(DATA)
    bodies = [encoded(two.model_id, number, [row], "cross_entropy") for number, row in enumerate(DATA, start=1)]
    step = {"model_id": two.model_id, "seq_id": 5, "adam_params": ADAM}
    late = [client.ask("forward_backward", body).json() for body in bodies[1:]]
    late.append(client.post("optim_step", **step))
    client.ask("forward_backward", bodies[0])
    assert client.result(late[-1])["metrics"]["grad_norm"] == pytest.approx(one.step()["grad_norm"], rel=1e-5)


def train_beside(service, models: list[Model], data: list, steps: int) -> None:
    """Train several models whose requests always wait together."""
    for _ in range(steps):
        with halted(service):
            futures = [model.send(own) for model, own in zip(models, data, strict=True)]
        for model, future in zip(models, futures, strict=True):
            model.client.result(future)
        for model in models:
            model.step()


def test_clients_of_unlike_rank_get_what_they_get_alone(service, client):
    """Two ranks, two sets of layers, the output layer among one, and two data sets, in passes that they share."""
    data = [DATA, [next_tokens(row) for row in ROWS[1:]]]
    told = ((2, 5, {"train_unembed": True}), (8, 6, {"train_mlp": False}))
    alone, together = ([client.model(rank, seed, **flags) for rank, seed, flags in told] for _ in range(2))
    for model, own in zip(alone, data, strict=True):
        train_beside(service, [model], [own], 5)
    before = service.training.trainer.shared
    train_beside(service, together, data, 5)
    assert service.training.trainer.shared == before + 5
    for one, other in zip(alone, together, strict=True):
        assert_same(weights_of(service, one.save(None)), weights_of(service, other.save(None)))


def test_a_step_that_is_not_finite_harms_nobody_else(service, client):
    well, ill, solo = client.model(4, 3), client.model(4, 4), client.model(4, 3)
    broken = service.training.trainer._lines[ill.model_id].learner
    service.engine.do(lambda: [one.data.fill_(float("inf")) for one in broken.parameters.values()]).result()
    with halted(service):
        futures = [well.send(DATA), ill.send(DATA)]
    solo.learn(DATA)
    client.result(futures[0])
    with pytest.raises(Failed, match="not finite"):
        client.result(futures[1])
    with pytest.raises(Failed, match="no gradient"):
        ill.step()
    assert well.step()["grad_norm"] == pytest.approx(solo.step()["grad_norm"], rel=1e-5)
    assert_same(weights_of(service, well.save(None)), weights_of(service, solo.save(None)))


def test_a_checkpoint_goes_on_exactly_also_in_another_server(base, tmp_path):
    def steps(model: Model, count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(model.learn(DATA).loss)
            model.step()
        return found

    first = serving(base, tmp_path)
    with client_of(first) as http:
        client = Tinker(http)
        model = client.model(4, 3, train_attn=False)
        steps(model, 3)
        path = model.save("here", user_metadata={"why": "test"})
        sampler = client.sampler(model_path=path)
        expected = steps(model, 3)
        session = client.session
        with pytest.raises(LoraLabError, match="another lora-lab process"):
            Keeping(tmp_path, first.training._opened)
    end(first)
    second = serving(base, tmp_path)
    with client_of(second) as http:
        client = Tinker(http)
        assert steps(client.load(path, optimizer=True), 3) == expected
        fresh = steps(client.load(path, optimizer=False), 3)
        assert fresh[0] == expected[0]
        assert fresh[2] != expected[2]
        answer = client.ask("optim_step", {"model_id": model.model_id, "seq_id": 20, "adam_params": ADAM})
        assert answer.status_code == 404
        assert "Load a checkpoint" in answer.json()["detail"]
        assert [client.ask("retrieve_future", {"request_id": one}).status_code for one in ("train-x", "sample-x")] == [
            404,
            410,
        ]
        assert tokens_of(client.sample(sampler, ROW[:3], max_tokens=3, temperature=0).sequences[0])
        assert session in http.get("/api/v1/sessions").json()["sessions"]
        run = http.get(f"/api/v1/training_runs/{model.model_id}").json()
        assert run["last_checkpoint"]["tinker_path"] == path
        info = client.post("weights_info", tinker_path=path)
        assert (info["lora_rank"], info["train_attn"], info["train_mlp"]) == (4, False, True)
    end(second)


def test_a_checkpoint_is_verified(service, client):
    model = client.model(4, 3)
    model.learn(DATA)
    model.step()
    path = model.save("run")
    folder = service.training.keeping.find(path, "local").folder
    with Trained.open(str(folder), takes.CHAT).loaded() as live:
        assert_same(files.tensors_of(live.model, "default"), weights_of(service, path), 0)
    assert "3 rows as at the end" in probes.check(folder, folder / "adapter", other_of(service, path))
    again = client.load(path, optimizer=True)
    client.sampler(model_path=path)
    assert again.learn(DATA).loss == model.learn(DATA).loss


def other_of(service, path: str):
    """The modules, with a checkpoint's adapter loaded and active."""
    workshop = service.training.workshop
    return service.engine.do(lambda: _active(workshop, service.training.keeping.find(path, "local"))).result()


def _active(workshop, checkpoint):
    key = workshop._loaded(checkpoint.folder / "adapter")
    workshop.model.set_adapter(key)
    return workshop.model


def _cut(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _flipped(folder):
    [file] = folder.glob("state/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _exchanged(folder):
    """Weights of another adapter, with checksums that fit."""
    resealed(folder / "adapter", lambda tensors: [one.add_(0.05) for one in tensors.values()])
    kept = json.loads((folder / probes.FILE).read_text())
    del kept["sha256"]
    kept["adapter"] = probes.adapter_digest(folder / "adapter")
    (folder / probes.FILE).write_text(storage.dump_json({**kept, "sha256": storage.digest(kept)}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [(_cut, "truncated"), (_flipped, "SHA-256 differs"), (_exchanged, "does not say what it said")],
)
def test_a_damaged_checkpoint_is_refused_and_harms_nobody(service, client, damage, why):
    model = client.model(4, 3)
    model.learn(DATA)
    model.step()
    path = model.save("run")
    before = model.learn(DATA, forward_only=True).loss
    damage(service.training.keeping.find(path, "local").folder)
    with pytest.raises(Failed, match=why):
        client.load(path, optimizer=True)
    with pytest.raises(Failed, match=why):
        client.result(model.later("load_weights", path=path, optimizer=True))
    if damage is not _flipped:  # whose weights are whole
        with pytest.raises(Failed, match=why):
            client.sample(client.sampler(model_path=path), ROW[:3], max_tokens=2)
        assert model.learn(DATA, forward_only=True).loss == before


def test_a_full_disk_at_a_save_harms_nobody(service, client):
    model, other = client.model(32, 3), client.model(4, 5)
    model.learn(DATA)
    model.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))  # no file of this process grows beyond it
    try:
        with pytest.raises(Failed, match="cannot be written"):
            model.save("run")
        assert other.learn(DATA).loss
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = service.training.keeping._folder(model.model_id) / "weights"
    assert list(place.iterdir()) == []
    path = model.save("run")
    assert client.load(path, optimizer=True).learn(DATA).loss == model.learn(DATA).loss


@pytest.mark.long
def test_a_checkpoint_is_an_ordinary_run(service, client, rows_file):
    """It is evaluated and merged like any other."""
    model = client.model(4, 3, train_unembed=True)
    model.learn(DATA)
    model.step(learning_rate=0.001)
    folder = service.training.keeping.find(model.save("run"), "local").folder
    told = [f"run={folder}", f"data.eval={rows_file}"]
    assert cli.main(["evaluate", *told, "task.generate_rows=0"]) == 0
    assert (folder / "evaluation.json").is_file()
    assert cli.main(["merge", *told, "export.dtype=float32"]) == 0
    card = (folder / "merged" / "README.md").read_text(encoding="utf-8")
    assert "trained by a client of lora-lab serve: 1 steps, 23 tokens, cross_entropy" in card


def test_a_loop_is_what_lora_lab_train_makes(service, base, client, rows_file, tmp_path):
    """The same rows, seed and optimizer: the same adapter."""
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", "train.batch_size=20", "train.epochs=4", "adapter.r=4", "adapter.lora_alpha=32",
        "optim.lr=0.001", "optim.schedule=constant", "optim.warmup_steps=0", "seed=5", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert cli.main(["train", *told]) == 0
    config = compose.compose(told)
    rows = prepare(config).training_rows()
    examples = [example for place in range(len(rows)) for example in rows[place]]
    total = sum(example.weights.sum() for example in examples)
    data = [next_tokens(one.input_ids, one.weights[1:] / total) for one in examples]
    model, optim = client.model(4, 5), config.optim
    adam = {
        "learning_rate": optim.lr, "beta1": optim.betas[0], "beta2": optim.betas[1], "eps": optim.eps,
        "weight_decay": optim.weight_decay, "grad_clip_norm": optim.max_grad_norm or 0,
    }  # fmt: skip
    losses = []
    for _ in range(4):
        losses.append(model.learn(data).loss)
        model.step(**adam)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss"] for line in lines if "lr" in line], rel=1e-5)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert_same(weights_of(service, model.save(None)), trained)


@pytest.mark.long
def test_clients_come_as_they_come(http):
    """Clients at once, each with its own loop."""
    losses: dict[int, float] = {}

    def run(place: int) -> None:
        with Tinker(http) as client:
            model = client.model(2 + place % 2, place % 2)
            for _ in range(4):
                model.learn(DATA)
                model.step()
            losses[place] = model.learn(DATA, forward_only=True).loss

    at_once([lambda place=place: run(place) for place in range(4)])
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[3], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
