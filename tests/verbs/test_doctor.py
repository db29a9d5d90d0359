"""`lora-lab doctor`: what is there, what is missing, and what would mend it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_lab import cli
from lora_lab.plan import bases, doctor
from tests.conftest import fails


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Where bases lie is found out by Hydra; one is enough here."""
    monkeypatch.setattr(bases, "shipped", lambda: [bases.of("minilm"), bases.of("bert_tiny_zh")])


def lines(capsys, code: int = 0) -> dict[str, list[dict[str, str]]]:
    capsys.readouterr()
    assert cli.main(["doctor", "--json"]) == code
    found: dict[str, list[dict[str, str]]] = {}
    for line in json.loads(capsys.readouterr().out):
        found.setdefault(line["topic"], []).append(line)
    return found


def test_every_line_says_what_is_there_and_a_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = lines(capsys)
    assert {"python", "lora_lab", "cpu", "card", "memory", "runs", "cache", "hub", "bases", "extra", "terminal"} <= set(
        found
    )
    every = [line for several in found.values() for line in several]
    assert all(line["remedy"] or line["topic"] == "card" for line in every if line["state"] != "ok")
    assert all(len(line["topic"]) <= 9 for line in every)
    assert "HF_HUB_OFFLINE" in found["hub"][0]["says"]  # nothing is asked then
    assert "LORA_LAB_MODELS" in found["bases"][1]["remedy"]
    assert cli.main(["doctor"]) == 0
    assert "note: model=bert_tiny_zh is not here" in capsys.readouterr().out


def test_every_extra_is_explained():
    project = tomllib.loads(Path(doctor.lora_lab.__file__).parents[1].joinpath("pyproject.toml").read_text())
    assert set(doctor.EXTRAS) | {"dev", "docs"} == set(project["project"]["optional-dependencies"])


def test_what_is_missing_or_too_old_is_a_problem(capsys, monkeypatch):
    asked = [
        (Requirement("torch>=99"), ""),
        (Requirement("no-such-thing>=1"), ""),
        (Requirement("other-thing"), "serve"),
    ]
    monkeypatch.setattr(doctor, "requirements", lambda: iter(asked))
    found = lines(capsys, code=1)
    assert [line["remedy"] for line in found["libraries"]] == [
        "pip install 'torch>=99'",
        "pip install 'no-such-thing>=1'",
    ]
    serve = next(line for line in found["extra"] if line["says"].startswith("serve"))
    assert (serve["state"], serve["remedy"]) == ("note", "pip install 'lora-lab[serve]'")


def test_what_is_broken_keeps_nothing_else_from_being_looked_at(capsys, monkeypatch):
    def devices():
        raise OSError("libcuda.so.1: cannot open")
        yield

    monkeypatch.setattr(doctor, "_LOOKS", (devices, doctor._memory))
    found = lines(capsys, code=1)
    assert "libcuda.so.1: cannot open" in found["devices"][0]["says"]
    assert "memory" in found


def test_the_hub_is_not_waited_for(capsys, monkeypatch):
    from huggingface_hub import constants

    seen = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def refuse(address, timeout):
        seen.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(doctor.socket, "create_connection", refuse)
    [line] = doctor._hub()
    assert (line.state, seen) == ("note", [(("huggingface.co", 443), 3.0)])
    assert "does not answer (timed out)" in line.says
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    [line] = doctor._hub()
    assert seen[1][0] == ("proxy.example", 3128)
    assert "through the proxy proxy.example" in line.says


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert {line.state for line in doctor._disk()} == {"problem"}


def test_settings_have_no_effect(capsys):
    assert "optim.lr=1: no effect here" in fails(["doctor", "optim.lr=1"], capsys)
