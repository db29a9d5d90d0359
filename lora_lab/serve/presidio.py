"""What presidio finds in texts beside what has a form of its own (`data/personal.py`): names and places by a spaCy model, and further patterns.

Nothing is downloaded: the model is a package that is installed, and presidio's recognizers that ask the network are left out.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_lab.data import personal
from lora_lab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

_LEAST_SCORE = (
    0.4  # presidio's own for a weak pattern beside a word that says what it is; without such a word it is below
)
_ASK_NETWORK = ("EmailRecognizer", "UrlRecognizer")  # for the list of domains; addresses of e-mail are `personal`'s
_OF_NO_MODEL = "en"  # language of the patterns where there is no model


def finders(names: Sequence[str], model: str | None) -> Mapping[str, personal.Finder]:
    """What finds each of presidio's entities, for `personal.spans`.

    Args:
        names: such as PERSON, LOCATION, IP_ADDRESS.
        model: an installed package of spaCy's; None: no names and places, patterns alone.

    Raises:
        ConfigError: presidio or the model is not installed, or an entity is not found with it.
    """
    if importlib.util.find_spec("presidio_analyzer") is None:
        raise ConfigError("serve.presidio needs presidio-analyzer. pip install 'lora-lab[presidio]'")
    analyzer, language = _analyzer(model)
    known = sorted(analyzer.get_supported_entities(language))
    for name in names:
        if name not in known:
            way = "" if model else " Names and places need a model (serve.presidio_model)."
            raise ConfigError(
                f"serve.presidio={name}: not found by presidio here.{nearest(name, known)}{way} There are {', '.join(known)}."
            )
    lock = threading.Lock()  # requests are masked in threads of their own

    def find(name: str, text: str) -> Iterator[tuple[int, int]]:
        with lock:
            found = analyzer.analyze(text, language, entities=[name], score_threshold=_LEAST_SCORE)
        yield from sorted((one.start, one.end) for one in found)

    return {name: functools.partial(find, name) for name in names}


def _analyzer(model: str | None) -> tuple[AnalyzerEngine, str]:
    """presidio's, and the language of its texts."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    installed = spacy.util.get_installed_models()
    if model is not None and model not in installed:
        there = f"There are {', '.join(installed)}." if installed else "There is none."
        raise ConfigError(
            f"serve.presidio_model={model}: no model of spaCy's that is installed. {there} Install it: python -m spacy download {model}"
        )
    pipeline: Any = spacy.blank(_OF_NO_MODEL) if model is None else spacy.load(model)
    language = str(pipeline.lang)
    engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model or "blank"}])
    engine.nlp = {language: pipeline}  # its own `load` would download what is missing
    registry = RecognizerRegistry(supported_languages=[language])
    registry.load_predefined_recognizers(languages=[language], nlp_engine=engine)
    for name in _ASK_NETWORK + (("SpacyRecognizer",) if model is None else ()):
        registry.remove_recognizer(name)
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language]), language
