"""Several processes at one address: what is refused, and what clients see of them while one is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from lora_lab import cli
from tests.serve.test_server import LOAD, Process, answered, body, told, until

LOADS = 600  # seconds until a process answers on a machine that does other work; it is a tenth of that alone
GET = """
import http.client, json, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=120)
connection.request("GET", sys.argv[2])
print(json.dumps(connection.getresponse().read().decode()), flush=True)
"""


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["serve.training=true", "serve.root=."], "serve.training: not beside serve.replicas=2: what clients train"),
        (["serve.root=."], "serve.root: not beside serve.replicas=2: an adapter that comes would come to one"),
        (["serve.engine=llama"], "serve.engine: not beside serve.replicas=2"),
        (["serve.requests_per_minute=60"], "serve.requests_per_minute: not beside serve.replicas=2"),
        (["serve.tokens_per_minute=60"], "serve.tokens_per_minute: not beside serve.replicas=2"),
        (["serve.concurrent_requests=6"], "serve.concurrent_requests: not beside serve.replicas=2"),
    ],
)
def test_what_one_process_alone_would_know_is_refused(sweep, capsys, more, why):
    assert cli.main(["serve", f"run={sweep}/0", "serve.replicas=2", *more]) == 2
    assert why in capsys.readouterr().err


def test_a_certificate_that_is_none_is_told_before_anything_loads(sweep, capsys, tmp_path):
    (tmp_path / "cert.pem").write_text("nothing")
    words = [f"serve.certificate={tmp_path}/cert.pem", f"serve.certificate_key={tmp_path}/cert.pem"]
    assert cli.main(["serve", f"run={sweep}/0", *words]) == 2
    assert "is not the PEM file of a certificate" in capsys.readouterr().err


class Together(Process):
    """`lora-lab serve serve.replicas=2`, once both processes answer."""

    def __init__(self, *words: str):
        super().__init__("serve.replicas=2", *words)
        self.wait(2)

    def wait(self, count: int) -> None:
        """Until so many processes have begun, all in all."""
        until(lambda: sum("http://" in line for line in self.lines) >= count, LOADS)

    def load(self, calls: int = 24) -> list:
        """The statuses and texts of so many calls by eight callers."""
        self.asked = getattr(self, "asked", 0) + calls
        found = told(
            self.tell(LOAD, json.dumps([["POST", "/v1/chat/completions", body("5", max_tokens=6)]] * calls), 8)
        )
        return [(status, text["choices"][0]["message"]["content"]) for status, text in found]

    def answering(self) -> set[int]:
        """Processes that have answered so far, by the log."""
        lines = [line.partition("{")[2] for line in self.lines if '"process"' in line]
        return {json.loads("{" + line)["process"] for line in lines}

    def metric(self, line: str) -> float:
        text = json.loads(self.tell(GET, "/metrics").communicate(timeout=120)[0])
        return float(next(one for one in text.splitlines() if one.startswith(line + " ")).rpartition(" ")[2])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_both_answer_alike_and_a_killed_one_is_replaced(sweep, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(sweep, runs)
    process = Together(f"sweep={runs}")
    try:
        answers = process.load()
        until(lambda: answers.extend(process.load()) or len(process.answering()) == 2)
        assert len(set(answers)) == 1
        assert answers[0][0] == 200
        assert process.metric("lora_lab_adapters") == 8
        requests = 'lora_lab_requests_total{route="/v1/chat/completions",status="200"}'
        assert process.metric(requests) == process.asked
        memory = process.metric("lora_lab_memory_bytes")
        killed, other = sorted(process.answering())
        assert memory > 1.5 * psutil.Process(other).memory_info().rss

        (runs / "5").rename(runs / "away")  # it cannot begin at once
        os.kill(killed, signal.SIGKILL)
        until(lambda: process.said("is replaced") and process.said(f"run={runs}/5: no run there"), LOADS)
        assert set(process.load()) == set(answers)
        (runs / "away").rename(runs / "5")
        process.wait(3)
        until(lambda: answers.extend(process.load()) or len(process.answering()) == 3)
        assert len(set(answers)) == 1
        assert process.metric(requests) == process.asked  # what the killed one counted among them
        assert process.metric("lora_lab_memory_bytes") < 1.5 * memory

        client = process.ask(body("3", stream=True, max_tokens=300, temperature=1.5, seed=1), slow=0.01)
        assert client.stdout.readline() == "begun\n"
        refused = told(process.tell(LOAD, json.dumps([["DELETE", "/v1/adapters/5", None]]), 1))[0]
        assert (refused[0], "neither come nor go" in refused[1]["error"]["message"]) == (400, True)
    finally:
        code = process.end()
    assert client.communicate(timeout=60)[0].rstrip().endswith("[DONE]")  # an open answer goes on to its end
    assert code == 143, process.lines
    assert not process.said("Traceback"), process.lines
    assert not psutil.pid_exists(other)


@pytest.mark.long
def test_a_second_signal_does_not_wait_and_none_outlives_the_first_process(sweep):
    process = Together(f"run={sweep}/0")
    client = process.ask(body("0", stream=True, max_tokens=2000, temperature=1.5, seed=1), slow=0.01)
    assert client.stdout.readline() == "begun\n"
    process.own.send_signal(signal.SIGTERM)
    until(lambda: process.said("stopping"))
    assert process.end() == 143
    rest = client.communicate(timeout=60)[0]
    assert "The server is stopping." in rest or "[DONE]" in rest
    process = Together(f"run={sweep}/0")
    every = psutil.Process(process.own.pid).children(recursive=True)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in every))


@pytest.mark.long
def test_where_none_can_begin_it_ends(sweep, tmp_path):
    shutil.copytree(sweep / "0", tmp_path / "run")
    weights = next((tmp_path / "run/adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    command = [sys.executable, "-m", "lora_lab", "serve", "serve.port=0", "serve.replicas=2", f"run={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOADS)
    assert done.returncode == 2, done.stderr
    assert weights.name in done.stderr
    assert "serve.replicas=2: a process could not begin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_one_answers_alone_as_two_do(sweep):
    own, two = Process(f"run={sweep}/0"), Together(f"run={sweep}/0")
    try:
        found = [answered(process.ask(body("0", max_tokens=12)))[1]["choices"] for process in (own, two)]
        assert found[0] == found[1]
    finally:
        assert [own.end(), two.end(signal.SIGINT)] == [143, 130]
