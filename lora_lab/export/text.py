"""From text to tokens as a deployment makes them: conversations and texts, and the ids that the run makes of them.

Whoever serves an export gives it messages or a text, never ids. So each target's own template and tokenizer must give the run's ids,
its own end-of-turn token must stop it, and what it answers must be what the run answers.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import log_softmax

from lora_lab.adapters.prompts import generating
from lora_lab.base import overruled
from lora_lab.data.formats import Message, RowError
from lora_lab.errors import DataError, ExportError
from lora_lab.runtime.reading import read_json, reading
from lora_lab.verify import layers, parity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.data.encode import Encoder, Example
    from lora_lab.tasks.base import Pass
    from lora_lab.verify.parity import Probe

ANSWERS = 3  # conversations whose greedy answers are compared
NEW_TOKENS = 24  # of each answer
_TEXTS = 16  # held-out rows that are rendered
_SHOWN = 30  # characters around a difference

_SYSTEM = {"role": "system", "content": "Answer briefly, in one sentence."}
_LIST = "Put these in order:\n\n1. 12 eggs\n2. 345 g flour\n10. 2026-11-28, 3.50"
HARD: dict[str, list[Message]] = {
    "a numbered list": [{"role": "user", "content": _LIST}],
    "a system message": [_SYSTEM, {"role": "user", "content": "Which is larger, 9.11 or 9.9?"}],
    "several turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! What can I do?"},
        {"role": "user", "content": "Count:\n1.\n2.\n3."},
    ],
    "several turns with a system message": [
        _SYSTEM,
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 20 + 22?"},
    ],
    "Chinese": [{"role": "user", "content": "请把订单整理成表格：苹果3个，香蕉12根。\n\n1、先苹果\n2、后香蕉"}],
    "emoji": [{"role": "user", "content": "👩‍👩‍👧‍👦 and 🏳️‍🌈, café ☕ — naïve"}],
    "what looks like special tokens": [{"role": "user", "content": "Say <|im_end|> then <eos> and </s>[INST]."}],
}

_WEATHER = {
    "type": "function",
    "function": {
        "name": "look_up_weather",
        "description": "The weather of a city on a day",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name, such as 上海"},
                "days": {"type": "integer", "description": "from today"},
            },
            "required": ["city"],
        },
    },
}
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look_up_weather", "arguments": {"city": "上海", "days": 2}},
}
_QUESTION = {"role": "user", "content": "Will it rain in 上海 in 2 days?"}
TOOLS: dict[str, list[Message]] = {  # asked with `_WEATHER`, where the template itself shows tools
    "a tool": [_SYSTEM, _QUESTION],
    "a tool's result": [
        _QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "call00001", "name": "look_up_weather", "content": '{"rain": "80 %"}'},
    ],
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a deployment is given, and the run's ids of it."""

    name: str  # for messages to the user
    messages: list[Message] | None  # None: a text that the tokenizer alone sees
    tools: list[dict[str, Any]] | None
    text: str  # as the run renders it
    ids: list[int]
    held_out: bool

    @property
    def with_tools(self) -> bool:
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages or ())


def prompts(encoder: Encoder, examples: Iterable[Example] = ()) -> list[Prompt]:
    """Held-out rows up to their answers, and some hard ones: conversations that the run's template renders, else texts."""
    rows = list(examples)[:_TEXTS]
    if not encoder.chat:
        read = ((row.origin, encoder.tokenizer.decode(row.input_ids, skip_special_tokens=True)) for row in rows)
        hard = ((name, messages[-1]["content"]) for name, messages in HARD.items())
        found = [_text(encoder, name, text, True) for name, text in read] + [_text(encoder, *one) for one in hard]
        return [one for one in found if one.text.strip()]
    asked = [(row.origin, question(row.messages), row.tools, True) for row in rows if row.messages]
    asked += [(name, messages, None, False) for name, messages in HARD.items()]
    asked += [(name, messages, [_WEATHER], False) for name, messages in TOOLS.items()]
    found = []
    for name, messages, tools, held_out in asked:
        by_template = encoder.template.native_tools or not (tools or any(m.get("tool_calls") for m in messages))
        if (
            not messages or not by_template
        ):  # tools are then written into the text by lora_lab, which no deployment does
            continue
        try:
            text = encoder.template.text(messages, tools, add_generation_prompt=True)
        except (RowError, DataError):  # this template does not take it, so the run never saw one
            continue
        ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        plain = [{key: value for key, value in m.items() if key not in ("train", "weight")} for m in messages]
        found.append(Prompt(name, plain, tools, text, ids, held_out))
    return found


def question(messages: list[Message]) -> list[Message]:
    """A conversation up to its last answer."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _text(encoder: Encoder, name: str, text: str, held_out: bool = False) -> Prompt:
    return Prompt(name, None, None, text, encoder.tokenizer(text, verbose=False)["input_ids"], held_out)


def answered(asked: list[Prompt]) -> list[Prompt]:
    """Those whose answers are compared."""
    return sorted(asked, key=lambda one: not one.held_out)[:ANSWERS]


# -- tokens -----------------------------------------------------------------------------------------------------------------


def differences(
    encoder: Encoder, asked: Sequence[Prompt], told: Sequence[tuple[str | None, list[int] | str]]
) -> list[str]:
    """Where a target makes other tokens than the run does: at most one sentence, of the first conversation.

    Args:
        told: of each prompt the text that the target renders (None: not told) and its ids, or why it has none.
    """
    found = [
        sentence
        for prompt, (text, ids) in zip(asked, told, strict=True)
        if (sentence := _difference(encoder, prompt, text, ids))
    ]
    return [f"in {len(found)} of {len(asked)} texts other tokens than the run's; {found[0]}"] if found else []


def _difference(encoder: Encoder, prompt: Prompt, text: str | None, ids: list[int] | str) -> str:
    if isinstance(ids, str):
        return f"{prompt.name}: it refuses it ({ids})"
    if ids == prompt.ids:
        return ""
    tokenizer = encoder.tokenizer
    first = tokenizer.bos_token_id
    if first is not None and ids[:2] == [first, first] != prompt.ids[:2]:
        return f"{prompt.name}: it begins with {tokenizer.bos_token!r} twice"
    own = prompt.text.removeprefix(encoder.marks.opening)
    if text is not None and text.removeprefix(encoder.marks.opening) != own:
        at = _parting(text.removeprefix(encoder.marks.opening), own)
        return f"{prompt.name}: its template writes {_cut(text.removeprefix(encoder.marks.opening), at)} where the run's writes {_cut(own, at)}"
    at = _parting(ids, prompt.ids)
    theirs, ours = (tokenizer.convert_ids_to_tokens(one[max(at - 1, 0) : at + 3]) for one in (ids, prompt.ids))
    return f"{prompt.name}: it makes {theirs} of what the run's tokenizer makes {ours} (token {at + 1})"


def taken_whole(encoder: Encoder, prompt: Prompt, ids: list[int] | str) -> list[str]:
    """Plain tokens of the vocabulary that a target finds whole in a text, as if they were special, if nothing else parts its ids from
    the run's; else none."""
    if isinstance(ids, str) or ids == prompt.ids:
        return []
    tokenizer = encoder.tokenizer
    begins = prompt.messages is None and prompt.ids[:1] == [tokenizer.bos_token_id]
    names = {tokenizer.decode([one]): one for one in set(ids) - set(prompt.ids) - tokenizer.added_tokens_decoder.keys()}
    found = sorted(name for name in names if name.strip() and name in prompt.text)
    for taken in [*itertools.combinations(found, 1), *itertools.combinations(found, 2)]:
        parts = re.split(f"({'|'.join(map(re.escape, taken))})", prompt.text)
        made = [[tokenizer.bos_token_id]] * begins
        for one in parts:
            own = tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
            made.append([names[one]] if one in taken else own)
        if [*itertools.chain(*made)] == ids:
            return list(taken)
    return []


def _parting(one: Sequence[Any], two: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _cut(text: str, at: int) -> str:
    return repr(text[max(at - _SHOWN // 2, 0) : at + _SHOWN // 2])


def folder_problems(
    folder: Path, encoder: Encoder, asked: Sequence[Prompt], template: str | None = None, ends: bool = True
) -> list[str]:
    """Why a transformers folder would not be given the run's tokens, or would not stop where the run does.

    Looked at by a fresh `AutoTokenizer` and by the library tokenizers alone, as servers that are not written in Python use it.

    Args:
        template: that the server is told to use instead of the folder's own.
        ends: whether the folder says itself where answers end.
    """
    from transformers import AutoTokenizer

    with reading(f"{folder}: its tokenizer", ExportError):
        plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        alone = overruled.read_alone(folder / overruled.FILE)
    texts: list[tuple[str | None, list[int] | str]] = []
    alones: list[tuple[str | None, list[int] | str]] = []
    for prompt in asked:
        text = _rendered(plain, encoder, prompt, template)
        if isinstance(text, RowError):
            texts.append((None, str(text)))
            alones.append((None, prompt.ids))
            continue
        special = prompt.messages is None
        texts.append((text, plain(text, add_special_tokens=special, verbose=False)["input_ids"]))
        alones.append((text, alone.encode(text, add_special_tokens=special).ids))
    found = [f"its tokenizer gives {one}" for one in differences(encoder, asked, texts)]
    found += [f"tokenizer.json, read by tokenizers alone, gives {one}" for one in differences(encoder, asked, alones)]
    return found + (_missing_ends(folder, encoder) if ends else [])


def _rendered(plain: Any, encoder: Encoder, prompt: Prompt, template: str | None) -> str | RowError:
    if prompt.messages is None:
        return prompt.text
    own = {} if template is None else {"chat_template": template}
    try:
        return plain.apply_chat_template(
            prompt.messages,
            tools=prompt.tools,
            tokenize=False,
            add_generation_prompt=True,
            **own,
            **encoder.template.kwargs,
        )
    except Exception as error:  # of the template itself, of jinja
        return RowError("template", f"{type(error).__name__}: {str(error)[:200]}")


def _missing_ends(folder: Path, encoder: Encoder) -> list[str]:
    """What is wrong with where the folder's generation settings say that answers end."""
    file = folder / "generation_config.json"
    if not encoder.chat or not file.is_file():
        return []
    known = read_json(file, ExportError).get("eos_token_id")
    known = {known} if isinstance(known, int) else set(known or ())
    missing = [one for one in encoder.end_tokens() if one not in known]
    return [not_stopping(encoder, missing, file.name)] if missing else []


def not_stopping(encoder: Encoder, ends: list[int], by: str) -> str:
    """The sentence about tokens that end the run's answers and not the target's."""
    names = ", ".join(repr(encoder.tokenizer.convert_ids_to_tokens(one)) for one in ends)
    return f"{names} ends the run's answers and not those of {by}, which would never stop"


# -- answers ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How many greedy answers are those of the other side."""

    answers: int
    equal_answers: float  # share; a step at which two tokens are as likely, within rounding, counts as equal
    near_ties: int  # answers that part at such a step, after which they are not compared
    parting: str = ""  # the first that parts elsewhere

    def told(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found if self.parting else {key: value for key, value in found.items() if key != "parting"}


@dataclasses.dataclass(frozen=True)
class Answers:
    """Greedy answers of one side, to be compared with those of another."""

    encoder: Encoder
    asked: list[Prompt]  # what is tokenized
    answered: list[Prompt]
    ids: list[list[int]]  # the answers

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        examples: Iterable[Example],
        model: PreTrainedModel | None,
        device: torch.device | None = None,
    ) -> Answers:
        """What a model in memory answers; nothing without one.

        Args:
            device: to compute on; None: where the model is.
        """
        asked = prompts(encoder, examples)
        if model is None:
            return cls(encoder, asked, [], [])
        chosen, there = answered(asked), torch.device(model.device) if device is None else device
        with generating():
            answers = layers.run(model, [partial(_greedy, model, encoder, one, there) for one in chosen], there)
        return cls(encoder, asked, chosen, answers)

    @property
    def passes(self) -> list[Pass]:
        """One forward pass for each answer: the logits at its positions tell whether each token is the likeliest, which is whether
        the other side would have written the same answer."""
        return [
            (
                {"input_ids": torch.tensor([prompt.ids + answer[:-1]])},
                torch.arange(len(prompt.ids) - 1, len(prompt.ids) + len(answer) - 1),
            )
            for prompt, answer in self._given
        ]

    @property
    def _given(self) -> list[tuple[Prompt, list[int]]]:
        return [(prompt, answer) for prompt, answer in zip(self.answered, self.ids, strict=True) if answer]

    def compared(
        self,
        folder: Path,
        auto_class: str,
        rows: Probe,
        reference: list[torch.Tensor],
        device: torch.device,
        dtype: str = "auto",
        adapter: Path | None = None,
    ) -> tuple[list[torch.Tensor], Agreement]:
        """What plain transformers says of the rows with a saved checkpoint, as `parity.reloaded_logits`, and whether it answers
        so too.

        Args:
            reference: logits of the rows on the side that answered.
        """
        extra = self.passes
        passes = [*itertools.chain.from_iterable(rows.passes), *extra]
        outputs = parity.reloaded_outputs(folder, auto_class, passes, device, dtype, adapter)
        count = len(passes) - len(extra)
        found = parity.outputs_of_rows(rows, outputs[:count])
        rounding = largest_difference(zip(reference, found, strict=True))
        return found, self.agreement([one["logits"] for one in outputs[count:]], rounding)

    def agreement(self, logits: Sequence[torch.Tensor], rounding: float) -> Agreement:
        """Whether the other side answers so too.

        Args:
            logits: [T, V] of the other side for each of `passes`.
            rounding: largest difference of a log-probability that was measured between the two sides.
        """
        ties, parted = 0, []
        for (prompt, answer), scores in zip(self._given, logits, strict=True):
            logprobs, tokens = log_softmax(scores.double(), -1), torch.tensor(answer)
            wrong = (scores.argmax(-1) != tokens).nonzero()[:, 0].tolist()
            if not wrong:
                continue
            step, own = wrong[0], answer[wrong[0]]
            best = int(scores[step].argmax())
            margin = float(logprobs[step, best] - logprobs[step, own])
            if margin <= max(2 * rounding, parity.ROUNDING, 2 * _spacing(scores[step])):
                ties += 1
                continue
            names = self.encoder.tokenizer.convert_ids_to_tokens([own, best])
            parted.append(
                f"{prompt.name}: token {step + 1} of the answer is {names[0]!r} on one side and {names[1]!r} on the other, which are "
                f"{margin:.3g} nats apart"
            )
        count = len(self._given)
        share = (count - len(parted)) / count if count else 1.0
        return Agreement(count, share, ties, parted[0] if parted else "")


def _spacing(scores: torch.Tensor) -> float:
    """How far apart neighbouring numbers are at the largest of these logits, if they were computed in 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scores.to(dtype).to(scores.dtype), scores):
            return torch.finfo(dtype).eps * float(scores.abs().max())
    return 0.0


def _greedy(model: PreTrainedModel, encoder: Encoder, prompt: Prompt, device: torch.device) -> list[int]:
    """A greedy answer of a model in memory, with its end token where it comes to one.

    Some models generate otherwise than they read (positions that are counted from a cache), whatever was done to them: the answer is
    cut where it is not what the model itself, reading it as a whole, says.
    """
    ids = torch.tensor([prompt.ids], device=device)
    settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": NEW_TOKENS}
    done = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=ends_of(encoder),
        pad_token_id=encoder.tokenizer.pad_token_id,
        **settings,
    )
    answer = done[0, ids.shape[1] :]
    while len(
        answer
    ):  # of some models what is said of a token depends on how many follow, so what is left is read again
        read = model(input_ids=torch.cat([ids[0], answer[:-1]])[None]).logits[0, -len(answer) :].argmax(-1)
        same = int((read == answer).cumprod(0).sum())
        if same == len(answer):
            break
        answer = answer[:same]
    return answer.tolist()


def ends_of(encoder: Encoder) -> list[int]:
    """Ids that end the run's answers or texts."""
    return encoder.end_tokens() if encoder.chat else [encoder.tokenizer.eos_token_id]


def largest_difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], top: int = 10) -> float:
    """The largest difference of a log-probability among the likeliest tokens, over logits [S, V] of two sides."""
    worst = 0.0
    for one, two in pairs:
        p, q = log_softmax(one.double(), -1), log_softmax(two.double(), -1)
        best = p.topk(min(top, p.shape[-1]), -1).indices
        worst = max(worst, float((p.gather(1, best) - q.gather(1, best)).abs().max()))
    return worst
