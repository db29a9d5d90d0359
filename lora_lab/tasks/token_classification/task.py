"""Give each word a tag, such as the kind of entity that it belongs to."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.config.run import RunConfig
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TEXTS, TOKENS
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.data.values import decoded
from lora_lab.errors import DataError
from lora_lab.tasks import metrics
from lora_lab.tasks.base import EvalResult, Predictions
from lora_lab.tasks.classification.task import ClassTask
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.token_classification.config import TokenClassificationConfig

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")
_ENTITY = re.compile(r"[BIESM](-.+)?")  # begin, inside, end, single, middle (as inside)


class TagEncoder(Encoder):
    """Words with blanks between them; the first token of each word has its tag."""

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """`kept`: which of the words have a token; `labels`: their tags."""
        return {"words": TEXTS, "tags": TEXTS, "kept": TOKENS, "labels": TEXTS}

    def shown(self, example: Example) -> str:
        pairs = zip(example["words"], example["tags"], strict=True)
        return " ".join(f"{word}/{tag}" for word, tag in pairs if tag != "O") or "no tag but O"

    def bare(self, record: Record) -> Record:
        """The words without the tokenizer's own marks around them, and the tags of these words alone."""
        kept, words = self.marks.of_words(promised(record.tokens))
        if not words:
            raise RowError("empty", "the words are nothing but the tokenizer's own marks. Remove the row.")
        return dataclasses.replace(record, tokens=words, label=record.label[kept])

    def example(self, record: Record, origin: str) -> Encoded:
        text, starts, words = "", [], promised(record.tokens)
        for word in words:
            starts.append(len(text))
            text += f"{word} "
        found = self.tokenizer(text.rstrip(), return_offsets_mapping=True, verbose=False)
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        if len(ids) > self.config.max_tokens:
            raise self.too_long(len(ids), "Raise data.max_tokens, split the sentence, or choose data.too_long=drop.")
        ends = [start + len(word) for start, word in zip(starts, words, strict=True)]
        firsts = _first_tokens(np.asarray(found["offset_mapping"]), starts, ends)
        # the tokenizer may drop a word that is nothing but, say, a control character: it is counted as O when measuring
        kept = [place for place, token in enumerate(firsts) if token is not None]
        if not kept:
            raise RowError("empty", "the tokenizer leaves nothing of the words. Remove the row.")
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[[token for token in firsts if token is not None]] = 1
        labels = [record.label[place] for place in kept]
        own = {"words": words, "tags": record.label, "kept": kept, "labels": labels}
        return Encoded([Example(ids, weights, origin, own)])


def _first_tokens(offsets: np.ndarray, starts: list[int], ends: list[int]) -> list[int | None]:
    """The first token that holds a character of each word; a token counts for the first of its words only."""
    found: list[int | None] = []
    token = 0
    for start, end in zip(starts, ends, strict=True):
        while token < len(offsets) and (offsets[token, 1] <= start or offsets[token, 0] == offsets[token, 1]):
            token += 1
        inside = token < len(offsets) and offsets[token, 0] < end
        found.append(token if inside else None)
        token += inside
    return found


class TokenClassification(ClassTask[TokenClassificationConfig]):
    """`task=token_classification`."""

    encoder_class = TagEncoder
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"

    @classmethod
    def learn(cls, config: RunConfig, train: Dataset | Stream) -> dict[str, Any]:
        learned = super().learn(config, train)
        labels = learned["labels"]
        odd = [label for label in labels if label != "O" and not _ENTITY.fullmatch(label)]
        if odd and isinstance(train, Dataset) and any("-" in label for label in labels if label not in odd):
            raise DataError(
                f"{train.key}: {train.origin_of(odd[0])}: tag {odd[0]!r} is neither O nor begins with B-, I-, E-, S- or M-, as "
                "other tags do. Fix the row."
            )
        return learned

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        places = [np.flatnonzero(example.supervised) for example in examples]
        rows = np.repeat(np.arange(len(examples)), [len(columns) for columns in places])
        targets = torch.tensor([self.labels.index(label) for example in examples for label in example["labels"]])
        given = self.learned.get("class_weights")
        return PaddedBatch(
            inputs=self.inputs([e.input_ids for e in examples], [0] * len(examples)),
            lengths=[len(e.input_ids) for e in examples],
            places=(torch.from_numpy(rows), torch.from_numpy(np.concatenate(places))),
            targets=targets,
            weights=None if given is None else torch.tensor(given, dtype=torch.float32)[targets],
            origins=[e.origin for e in examples],
        )

    def shortened(self, example: Example) -> Example:
        short = super().shortened(example)
        count = int(short.supervised.sum())
        if not count:  # all that is left is of one word
            return example
        return dataclasses.replace(short, own={**short.own, "labels": example["labels"][-count:]})

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """`tokens`, or a `text`, whose words and signs are taken apart; each Chinese or Japanese sign is a word."""
        if "tokens" not in row and isinstance(row.get("text"), str):
            row = {**row, "tokens": _WORDS.findall(row["text"])}
        words = decoded(row.get("tokens"), "tokens")
        return {**row, "tokens": words, "tags": [self.labels[0]] * len(words) if isinstance(words, list) else []}

    def said(self, seen: Predictions) -> list[tuple[float, dict[str, Any]]]:
        """`words` and their `tags`; where tags mark entities, `entities`: `type`, and the places of the `first` and `last` word."""
        return [
            (1.0, {"words": list(example["words"]), "tags": tags} | self._entities(tags))
            for example, tags in zip(seen.examples, self._tags(seen), strict=True)
        ]

    def _entities(self, tags: list[str]) -> dict[str, Any]:
        return {"entities": metrics.entities_in(tags)} if self._marks_entities else {}

    @property
    def _marks_entities(self) -> bool:
        return all(label == "O" or _ENTITY.fullmatch(label) for label in self.labels)

    def as_said(self, example: Example, found: dict[str, Any]) -> Example:
        tags = found["tags"]
        own = {"tags": tags, "labels": [tags[place] for place in example["kept"]]}
        return dataclasses.replace(example, own={**example.own, **own})

    def off(self, found: dict[str, Any], example: Example) -> float:
        """The share of the words that have another tag."""
        pairs = list(zip(found["tags"], example["tags"], strict=True))
        return float(np.mean([said != tag for said, tag in pairs]))

    def of_row(self, found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """Entities with their `text` and the characters where it is: `start`, and `end` behind it."""
        if "entities" not in found or not isinstance(row.get("text"), str) or "tokens" in row:
            return found
        text, place, places = row["text"], 0, []
        for word in found["words"]:
            start = text.index(word, place)
            place = start + len(word)
            places.append((start, place))
        entities = [
            {**one, "text": text[places[one["first"]][0] : places[one["last"]][1]],
             "start": places[one["first"]][0], "end": places[one["last"]][1]}
            for one in found["entities"]
        ]  # fmt: skip
        return {**found, "entities": entities}

    def _tags(self, seen: Predictions) -> list[list[str]]:
        """The predicted tag of each word; a word without a token has none but O."""
        ends = np.cumsum([int(example.supervised.sum()) for example in seen.examples])
        rows = []
        for example, found in zip(seen.examples, np.split(seen.predicted, ends[:-1]), strict=True):
            tags = ["O" if "O" in self.labels else self.labels[0]] * len(example["tags"])
            for place, number in zip(example["kept"], found, strict=True):
                tags[place] = self.labels[number]
            rows.append(tags)
        return rows

    @reports(metrics.entities, metrics.classification, lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """By seqeval's definition of entities; without entities (parts of speech) by word."""
        targets = [example["tags"] for one in seen for example in one.examples]
        predicted = [tags for one in seen for tags in self._tags(one)]
        if self._marks_entities:
            scores, details = metrics.entities(targets, predicted)
        else:
            number = {label: place for place, label in enumerate(self.labels)}
            true, guessed = ([number[tag] for tags in side for tag in tags] for side in (targets, predicted))
            scores, details = metrics.classification(true, guessed, self.labels)
        return EvalResult({"loss": loss, **scores}, details=details)
