"""A process that listens: it starts, answers clients of other processes, and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from lora_lab.serve import server
from tests.serve.conftest import said, until

pytestmark = pytest.mark.long

ASK = """
import http.client, json, sys, time
port, body, slow = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
answer = connection.getresponse()
if slow:
    answer.read(100)
    print("begun", flush=True)
    time.sleep(slow)
print(answer.status, answer.read().decode(), flush=True)
"""


class Process:
    """`lora-lab serve` in a process of its own."""

    def __init__(self, *words: str):
        self.lines: list[str] = []
        command = [sys.executable, "-m", "lora_lab", "serve", *words, "serve.port=0"]
        self.own = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        until(lambda: self.said("http://") or self.own.poll() is not None, 120)
        assert self.own.poll() is None, self.lines
        self.port = self.said("http://").rpartition(":")[2].strip()

    def _read(self) -> None:
        for line in self.own.stdout:
            self.lines.append(line)

    def said(self, text: str) -> str:
        return next((line for line in self.lines if text in line), "")

    def ask(self, body: dict, slow: float = 0) -> subprocess.Popen:
        command = [sys.executable, "-c", ASK, self.port, json.dumps(body), str(slow)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.own.send_signal(number)
        code = self.own.wait(60)
        self._reader.join()
        self.own.stdout.close()
        return code


def body(name: str = "0", **more) -> dict:
    return {"model": name, "messages": said("red cat"), **more}


def answered(client: subprocess.Popen) -> tuple[int, dict]:
    status, _, text = client.communicate(timeout=120)[0].splitlines()[-1].partition(" ")
    return int(status), json.loads(text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_answers_and_ends_by_a_signal(sweep, number, code):
    process = Process(f"sweep={sweep}")
    try:
        status, found = answered(process.ask(body("5", max_tokens=4)))
        assert (status, found["lora_lab"]["model"]) == (200, "5")
        client = process.ask(body("3", stream=True, max_tokens=300, temperature=1.5, seed=1), slow=0.01)
        assert client.stdout.readline() == "begun\n"
    finally:
        ended = process.end(number)
    assert client.communicate(timeout=60)[0].rstrip().endswith("[DONE]")  # an open answer goes on to its end
    assert ended == code, process.lines
    assert not process.said("Traceback"), process.lines
    assert "red cat" not in "".join(process.lines)


def test_an_open_answer_is_told_when_time_is_up(sweep):
    process = Process(f"run={sweep}/0", "serve.stop_seconds=0")
    try:
        client = process.ask(body(stream=True, max_tokens=2000, temperature=1.5, seed=1), slow=0.01)
        assert client.stdout.readline() == "begun\n"
    finally:
        code = process.end()
    rest = client.communicate(timeout=60)[0]
    assert code == 143
    assert "The server is stopping." in rest or "[DONE]" in rest


def test_a_slow_reader_keeps_nobody_waiting(sweep):
    process = Process(f"run={sweep}/0")
    try:
        slow = process.ask(body(stream=True, max_tokens=1500, temperature=1.5, seed=1), slow=600)
        assert slow.stdout.readline() == "begun\n"
        for _ in range(3):
            assert answered(process.ask(body(max_tokens=4)))[0] == 200
        slow.kill()
        slow.communicate()
    finally:
        assert process.end() == 143


def test_a_port_that_is_taken_is_told(sweep):
    process = Process(f"run={sweep}/0")
    try:
        words = [sys.executable, "-m", "lora_lab", "serve", f"run={sweep}/0", f"serve.port={process.port}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=dict(os.environ))
        assert done.returncode == 2
        assert "cannot be listened on" in done.stderr
    finally:
        process.end()


def test_names_of_runs():
    assert server.names(["a/x", "b/y"]) == ["x", "y"]
    assert server.names(["a/x", "b/x", "c/base"]) == ["a-x", "b-x", "c-base"]
