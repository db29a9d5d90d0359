"""Answers in OpenAI's shapes: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import Chosen, End, Event, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reply:
    """One request's answer."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk: ClassVar[str]

    def __init__(self, who: dict[str, Any], tokenizer: PreTrainedTokenizerBase, logprobs: bool):
        """
        Args:
            who: model, adapter and base.
        """
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._offsets: dict[int, int] = {}
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": who["model"],
            "system_fingerprint": f"{who['base'][:12]}-{(who['adapter'] or 'base')[:12]}",
            "lora_lab": who,
        }

    async def whole(self, events: AsyncGenerator[tuple[int, Event], None], count: int) -> dict[str, Any]:
        """The answers to `count` prompts, once they have ended."""
        texts, chosen, ends = [""] * count, [list[Chosen]() for _ in range(count)], dict[int, End]()
        async for place, event in events:
            if isinstance(event, Piece):
                texts[place] += event.text
                chosen[place] += event.chosen
            elif isinstance(event, End):
                ends[place] = event
        choices = [
            {**self._choice(place, texts[place], chosen[place]), "finish_reason": ends[place].reason}
            for place in range(count)
        ]
        return {"object": self.kind, **self._head, "choices": choices, "usage": _usage(list(ends.values()))}

    async def stream(self, events: AsyncGenerator[tuple[int, Event], None], usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events. What goes wrong on the way is told in one, because the status is out already."""
        ends: list[End] = []
        begun: set[int] = set()
        try:
            async for place, event in events:
                first = place not in begun
                begun.add(place)
                if isinstance(event, Piece):
                    if event.text or event.chosen or first:
                        yield self._event(
                            [{**self._delta(place, event.text, event.chosen, first), "finish_reason": None}], usage
                        )
                elif isinstance(event, End):
                    ends.append(event)
                    yield self._event([{**self._delta(place, "", (), first), "finish_reason": event.reason}], usage)
        except RequestError as error:
            yield _line(error.body())
            return
        finally:
            await events.aclose()
        if usage:
            yield _line({"object": self.chunk, **self._head, "choices": [], "usage": _usage(ends)})
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: bool) -> bytes:
        more = {"usage": None} if usage else {}
        return _line({"object": self.chunk, **self._head, "choices": choices, **more})

    def _choice(self, place: int, text: str, chosen: Sequence[Chosen]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, place: int, text: str, chosen: Sequence[Chosen], first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _shown(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class Chat(Reply):
    """`/v1/chat/completions`."""

    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, place: int, text: str, chosen: Sequence[Chosen]) -> dict[str, Any]:
        return {
            "index": place,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._told(chosen),
        }

    def _delta(self, place: int, text: str, chosen: Sequence[Chosen], first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else ({"content": text} if text or chosen else {})
        return {"index": place, "delta": delta, "logprobs": self._told(chosen) if chosen else None}

    def _told(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**self._one(one.token, one.logprob), "top_logprobs": [self._one(*other) for other in one.top]}
            for one in chosen
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._shown(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


class Completion(Reply):
    """`/v1/completions`."""

    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, place: int, text: str, chosen: Sequence[Chosen]) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": self._told(place, chosen)}

    def _delta(self, place: int, text: str, chosen: Sequence[Chosen], first: bool) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": self._told(place, chosen) if chosen else None}

    def _told(self, place: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [self._shown(one.token) for one in chosen]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(place, 0))
            self._offsets[place] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [{self._shown(token): value for token, value in one.top} for one in chosen],
            "text_offset": offsets,
        }


def _usage(ends: Sequence[End]) -> dict[str, int]:
    prompt, answer = sum(end.prompt_tokens for end in ends), sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _line(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
