"""Checks of a whole data set: what would train a model on something else than the user believes."""

from __future__ import annotations

import collections
import dataclasses
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from lora_lab.config.data import DataConfig
from lora_lab.data import clean, hints, personal, readable, sources
from lora_lab.data.build import Data
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.chunks import Report
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoder
from lora_lab.data.formats import FORMATS
from lora_lab.data.formats import counts as is_count
from lora_lab.data.store import is_error, label_counts

_LOOK = 64  # examples whose prompts are rendered and tokenized once more
_NAMED = 3  # rows named for each finding
_LOST_ERROR, _LOST_WARNING = 0.2, 0.05  # shares of the characters that the tokenizer loses
_SPELLED_WARNING = 0.3  # share of the characters that are spelled in bytes
# Bases that this project has recipes for, by what they read.
_READERS = {
    ("Chinese", True): "model=bert_tiny_zh reads it",
    ("Chinese", False): "model=gemma3_270m reads it",
    ("Latin", True): "model=minilm reads English",
    ("Latin", False): "model=smollm2_135m reads English, model=gemma3_270m other languages too",
}
_NO_LABELS = (
    "nan",
    "NaN",
    "null",
    "NULL",
    "None",
    "n/a",
    "N/A",
    "NA",
    "#N/A",
    "<NA>",
    "undefined",
)  # what tables write where there is no value
_OF_CLASSES = ("text_label", "pair_label", "token_labels")


Level = Literal["error", "warning", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know about the data. An error means that training would go wrong."""

    level: Level
    key: str  # data.train or data.eval
    sentence: str

    def __str__(self) -> str:
        return f"{self.level}: {self.key}: {self.sentence}"


def check(data: Data, config: DataConfig, encoder: Encoder) -> list[Finding]:
    """Everything that is wrong or noteworthy, errors first."""
    findings: list[Finding] = []
    for part in (data.train, data.held_out):
        if isinstance(part, Dataset):
            findings += _rows(part, config)
            if not len(part):
                findings.append(Finding("error", part.key, f"none of the {part.rows_read} rows is left to train on."))
            else:
                for one in (_repeated, _labels):
                    findings += one(part, encoder)
                if isinstance(encoder, ChatEncoder):
                    for look in (_ends, _prompts, _special_texts, _tools):
                        findings += look(part, encoder)
        elif isinstance(part, Stream):
            for report in part.first_reports():
                seen = f" (of the first {report.rows} rows, which were looked at)"
                findings += _how_read(report, part.key, config, seen)
    for part, names in ((data.train, config.train), (data.held_out, config.eval)):
        if part is not None and names is not None:
            findings += _readable(part.key, names, encoder)
    if isinstance(data.train, Dataset) and data.held_out is not None:
        findings += _shared(data.train, data.held_out)
    known = [part if isinstance(part, Dataset) and len(part) else None for part in (data.train, data.held_out)]
    findings += [Finding(*told) for told in encoder.findings(*known)]
    if isinstance(encoder, ChatEncoder):
        findings += _template(encoder, config)
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.level))


def personal_data(config: DataConfig, encoder: Encoder) -> list[Finding]:
    """How much personal data the rows hold, by kind; it takes longer than the other checks, and stops no training."""
    if personal.missing():
        needed = " and ".join(personal.missing())
        sentence = f"personal data is not counted, which needs {needed}. pip install 'lora-lab[text]'"
        return [Finding("note", "data", sentence)]
    pairs = (("data.train", config.train), ("data.eval", config.eval))
    return [_personal(key, names, encoder) for key, names in pairs if names is not None]


def _personal(key: str, names: Any, encoder: Encoder) -> Finding:
    rows = holding = 0
    counts: collections.Counter[str] = collections.Counter()
    for file in sources.find(key, names, encoder.config.sample_by, encoder.config.field):
        for record in readable.records(file, encoder):
            own = personal.masked_within(readable.texts_of(record))[1]
            rows, holding, counts = rows + 1, holding + bool(own), counts + own
    if not holding:
        return Finding("note", key, f"no personal data seen in {rows} rows (names and addresses are not looked for).")
    listed = ", ".join(f"{counts[kind]} {personal.NAMES[kind]}" for kind in personal.KINDS if counts[kind])
    sentence = f"personal data in {holding} of {rows} rows: {listed}."
    if clean.MASKS in encoder.config.clean:
        return Finding("note", key, f"{sentence} data.clean masks them.")
    return Finding("warning", key, f"{sentence} data.clean=[{clean.MASKS}] masks them.")


def _rows(data: Dataset, config: DataConfig) -> list[Finding]:
    """Rows that are not used, by kind."""
    found = []
    for report in data.reports:
        for kind, count in report.dropped.items():
            first, *others = report.sentences[kind][:_NAMED]
            more = ", ".join(sentence.partition(": ")[0] for sentence in others)
            named = first + (f" Also {more}" + (" ..." if count > _NAMED else ".") if more else "")
            level: Level = "error" if is_error(config, kind) else "note"
            found.append(Finding(level, data.key, f"{count} of {report.rows} rows of {report.name}: {kind}. {named}"))
        found += _how_read(report, data.key, config)
    found += [Finding("note", data.key, f"{count} rows dropped: {why}.") for why, count in data.dropped.items()]
    for attribute, meaning in {
        "truncated": "prompts cut to data.max_tokens (data.too_long=truncate_prompt)",
        "split": "rows become several examples: conversations whose template rewrites earlier turns or ends no answer, long "
        "texts in pieces, pairs that are judged apart",
        "bordered": "rows whose prompt and answer are tokenized apart, as inference sees them",
    }.items():
        count = sum(getattr(report, attribute) for report in data.reports)
        if count:
            found.append(Finding("note", data.key, f"{count} {meaning}."))
    return found


def _how_read(report: Report, key: str, config: DataConfig, seen: str = "") -> list[Finding]:
    """What is worth saying of how a file's rows are read; `seen`: of which rows that is known."""
    notes = [
        Finding("note", key, f"{count} rows of {report.name}: {note}{seen}.") for note, count in report.notes.items()
    ]
    return _unread(report, key, config, seen) + notes


def _unread(report: Report, key: str, config: DataConfig, seen: str) -> list[Finding]:
    """Columns of a file that nothing reads; a warning for one that may be meant as a column of ours."""
    if not report.unread:
        return []
    found = []
    for column in report.unread:
        ours = hints.ours_for(column, FORMATS[report.format].optional)
        if ours is not None:
            option = hints.option({**(config.columns or {}), ours: column})
            sentence = f"{report.name}: column '{column}' is not read. If it is our '{ours}', map it: {option}."
            found.append(Finding("warning", key, sentence))
    listed = ", ".join(
        f"{column or '(without a name)'} ({count} rows)" for column, count in list(report.unread.items())[:20]
    )
    more = " ..." if len(report.unread) > 20 else ""
    return [*found, Finding("note", key, f"{report.name}: columns that are not read: {listed}{more}{seen}.")]


def _readable(key: str, names: Any, encoder: Encoder) -> list[Finding]:
    """Whether the base's tokenizer knows what the rows are written with."""
    tokenizer = encoder.tokenizer
    found = readable.measure(readable.sample(key, names, encoder), tokenizer)
    lost, spelled = found.share(found.lost), found.share(found.spelled)
    which = f"{found.script} characters" if found.script else "characters"
    if lost >= _LOST_WARNING:
        unknown = found.unknown / max(1, found.tokens)
        sentence = (
            f"this base cannot read {lost:.0%} of the characters (mostly {which}): its tokenizer loses them, and {unknown:.0%} of the "
            f"tokens are {tokenizer.unk_token or 'unknown'}. {_reader(found.script, encoder)}"
        )
        return [Finding("error" if lost >= _LOST_ERROR else "warning", key, sentence)]
    if spelled >= _SPELLED_WARNING:
        sentence = (
            f"this base spells {spelled:.0%} of the characters (mostly {which}) in bytes, several tokens each "
            f"({found.tokens / max(1, found.characters):.1f} tokens for a character): it can read them, but knows little of them, and "
            f"rows become long. {_reader(found.script, encoder)}"
        )
        return [Finding("warning", key, sentence)]
    return []


def _reader(script: str, encoder: Encoder) -> str:
    """A base that knows the script."""
    other = f"a base for {script} from the hub (model=hub model.path=OWNER/NAME)" if script else "another base"
    masked = encoder.tokenizer.mask_token is not None and not encoder.chat
    known = None if encoder.task.encoder_decoder else _READERS.get((script, masked))
    return f"{known}; or take {other}." if known else f"Take {other}."


def _named(data: Dataset, which: np.ndarray) -> str:
    """The rows of some examples, as text."""
    places = np.flatnonzero(which)
    origins = data.table.column("origin").take(data.chosen[places[:_NAMED]]).to_pylist()
    return ", ".join(dict.fromkeys(origins)) + (" ..." if len(places) > _NAMED else "")


def _ends(data: Dataset, encoder: Encoder) -> list[Finding]:
    """The last token of every trained answer must end it, or the model never learns to stop."""
    ends = {encoder.tokenizer.eos_token_id} | {
        number for number, token in encoder.tokenizer.added_tokens_decoder.items() if token.special
    }
    table = data.table
    lengths = pc.list_value_length(table.column("input_ids")).to_numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    runs = pc.list_value_length(table.column("spans")).to_numpy() // 3
    spans = pc.list_flatten(table.column("spans")).to_numpy().reshape(-1, 3)
    owner = np.repeat(np.arange(len(table)), runs)
    last = pc.list_flatten(table.column("input_ids")).to_numpy()[starts[owner] + spans[:, 1].astype(np.int64) - 1]
    open_ended = np.zeros(len(table), dtype=bool)
    open_ended[owner[~np.isin(last, list(ends))]] = True
    which = open_ended[data.chosen]
    if not which.any():
        return []
    sentence = (
        f"{which.sum()} examples hold an answer whose end token is not trained on, so the model would not learn to stop "
        f"({_named(data, which)}). The template must close the assistant's turns with a special token."
    )
    return [Finding("error", data.key, sentence)]


def _prompts(data: Dataset, encoder: ChatEncoder) -> list[Finding]:
    """Render and tokenize some prompts once more as chat does, and compare with what would be trained on."""
    places = np.unique(np.linspace(0, len(data) - 1, num=min(_LOOK, len(data))).astype(int))
    wrong = np.zeros(len(data), dtype=bool)
    for place in places:
        [example] = data[int(place)]
        messages = example.messages
        if encoder.config.supervise == "all" or not messages or messages[-1]["role"] != "assistant":
            continue
        prompt = encoder.template.text(messages[:-1], example.tools, add_generation_prompt=True)
        ids = encoder.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        wrong[place] = example.input_ids[: len(ids)].tolist() != ids or not example.weights[len(ids) :].any()
    if not wrong.any():
        return []
    sentence = (
        f"{wrong.sum()} of {len(places)} prompts differ between training and inference ({_named(data, wrong)}): the template "
        "renders them differently when an answer is generated."
    )
    return [Finding("error", data.key, sentence)]


def _repeated(data: Dataset, _: Encoder) -> list[Finding]:
    which = data.repeated
    if not which.any():
        return []
    count = len(np.unique(data.rows[which]))
    hint = "data.duplicates=drop leaves them out"
    return [Finding("warning", data.key, f"{count} rows equal an earlier row ({_named(data, which)}); {hint}.")]


def _shared(train: Dataset, held_out: Dataset) -> list[Finding]:
    which = np.isin(train.digests, held_out.digests)
    if not which.any():
        return []
    count = len(np.unique(train.rows[which]))
    sentence = (
        f"{count} rows are held-out rows as well ({_named(train, which)}), so the held-out figures would be too good; "
        "data.shared=drop leaves them out of training."
    )
    return [Finding("warning", train.key, sentence)]


def _labels(data: Dataset, encoder: Encoder) -> list[Finding]:
    if encoder.task.numbers or not all(report.format in _OF_CLASSES for report in data.reports):
        return []
    counts = label_counts(data.reports)
    found = []
    if len(counts) == 1:
        found.append(
            Finding("error", data.key, f"all labels are {next(iter(counts))}: there is nothing to tell apart.")
        )
    found += _alike(data.key, list(counts))
    names = encoder.config.label_names
    absent = [name for name in names or [] if name not in counts]
    if absent:
        found.append(Finding("warning", data.key, f"no row has the label {', '.join(absent)} of data.label_names."))
    numbers = sorted(int(label) for label in counts if is_count(label))
    few = len(numbers) == len(counts) > 0 and numbers[-1] < 1000
    gaps = [n for n in range(numbers[0], numbers[-1]) if n not in numbers] if few else []
    if gaps and names is None:
        listed = ", ".join(map(str, gaps[:10]))
        sentence = f"no row has the label {listed}; labels go from {numbers[0]} to {numbers[-1]}. It will be no class."
        found.append(Finding("warning", data.key, sentence))
    return found


def _alike(key: str, labels: list[str]) -> list[Finding]:
    """Labels that look alike, of which each is a class of its own, and labels that stand for none."""
    found = []
    ways: tuple[tuple[Callable[[str], str], Level, str], ...] = (
        (_as_seen, "error", "look the same and differ in invisible signs or in how accents are stored"),
        (_roughly, "warning", "differ in capitals, width or blanks only"),
    )
    for plain, level, how in ways:
        groups: dict[str, list[str]] = {}
        for label in labels:
            groups.setdefault(plain(label), []).append(label)
        for group in groups.values():
            if len({one if plain is _as_seen else _as_seen(one) for one in group}) > 1:
                listed = " and ".join(map(ascii if plain is _as_seen else repr, group[:_NAMED]))
                found.append(Finding(level, key, f"labels {listed} {how}; each is a class of its own. Make them one."))
    for label in labels:
        if label in _NO_LABELS:
            sentence = (
                f"label {label!r} is a class like any other. If it stands for a row without a label, remove these rows."
            )
            found.append(Finding("warning", key, sentence))
    return found


def _as_seen(label: str) -> str:
    """A label as the eye sees it: accents in one form, without invisible characters."""
    return "".join(one for one in unicodedata.normalize("NFC", label) if unicodedata.category(one) != "Cf")


def _roughly(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", _as_seen(label)).casefold().split())


def _special_texts(data: Dataset, encoder: ChatEncoder) -> list[Finding]:
    """Special tokens written out in a message become real ones, and end turns that the row did not end."""
    which = np.zeros(len(data.table), dtype=bool)
    for token in [token for token in encoder.template.special_tokens if len(token) > 3][:300]:
        which |= _holds(data, token)
    which = which[data.chosen]
    if not which.any():
        return []
    sentence = f"{which.sum()} examples hold a special token in a message ({_named(data, which)}); it would count as the real one."
    return [Finding("warning", data.key, sentence)]


def _holds(data: Dataset, text: str) -> np.ndarray:
    """[lines of the table] bool: the conversation holds the text somewhere."""
    found = (pc.match_substring(data.table.column(name).cast("string"), text) for name in ("messages", "tools"))
    return np.logical_or(*(column.fill_null(False).to_numpy() for column in found))


def _tools(data: Dataset, encoder: ChatEncoder) -> list[Finding]:
    listed = data.table.column("tools").is_valid().to_numpy()
    which = (listed | _holds(data, '"tool_calls": ['))[data.chosen]
    if not which.any() or encoder.template.native_tools:
        return []
    sentence = (
        f"{which.sum()} examples use tools, which the model's chat template leaves out: they are written as text "
        "(<tools>, <tool_call>, <tool_response>), in chat too."
    )
    return [Finding("note", data.key, sentence)]


def _template(encoder: ChatEncoder, config: DataConfig) -> list[Finding]:
    found: list[tuple[Level, str]] = []
    if encoder.template.dated:
        found.append(
            (
                "warning",
                "the chat template writes today's date, so training and use would differ. Fix it: "
                "'data.chat_template_kwargs={date_string: 26 Jul 2024}'.",
            )
        )
    if config.chat_template_kwargs:
        names = ", ".join(config.chat_template_kwargs)
        found.append(("note", f"whoever serves the model must give the chat template the same variables: {names}."))
    return [Finding(level, "data", sentence) for level, sentence in found]
