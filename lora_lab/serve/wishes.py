"""What a request may say, checked before anything is done for it; what it may not say is refused by name."""

from __future__ import annotations

import functools
import json
import re
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field

from lora_lab.errors import nearest
from lora_lab.schema.sections import adapter_of, describe, keys, section, shown, unreadable, validate

Kind = TypeVar("Kind")

Temperature = Annotated[
    float | None, Field(ge=0, le=2, description="0: the likeliest token, always; so it is if nothing is said")
]
TopP = Annotated[float | None, Field(gt=0, le=1, description="share of the probability that is drawn from")]
Seed = Annotated[int | None, Field(ge=0, lt=2**32, description="of what is drawn")]
Stop = Annotated[str | list[str] | None, Field(description="at most 4 texts that end an answer")]
Tokens = Annotated[int | None, Field(ge=1, description="most tokens of the answer")]
Model = Annotated[str, Field(min_length=1, max_length=200, description="a name of /v1/models")]
Neutral = Annotated[float | None, Field(ge=0, le=0, description="only 0, because it is not there")]
Rows = Annotated[
    list[dict[str, Any]], Field(min_length=1, description="rows with the columns of the training rows but the label")
]
User = Annotated[str | None, Field(description="not used, and written nowhere")]


class RequestError(Exception):
    """What a client is told in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@section
class StreamOptions:
    """`stream_options`."""

    include_usage: Annotated[bool, Field(description="count tokens at the end")] = False


@section
class ChatRequest:
    """`/v1/chat/completions`."""

    model: Model
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, description="the conversation so far")]
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    seed: Seed = None
    stop: Stop = None
    logprobs: Annotated[bool | None, Field(description="tell the probability of each token")] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20, description="and of so many others in its place")] = None
    stream: Annotated[bool | None, Field(description="send the answer as it is written")] = None
    stream_options: StreamOptions | None = None
    n: Annotated[Literal[1] | None, Field(description="answers")] = None
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    response_format: Annotated[dict[Literal["type"], Literal["text"]] | None, Field(description="only text")] = None
    user: User = None


@section
class CompletionRequest:
    """`/v1/completions`."""

    model: Model
    prompt: Annotated[str | list[str], Field(min_length=1, description="a text that is gone on with, or several")]
    max_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    seed: Seed = None
    stop: Stop = None
    logprobs: Annotated[
        int | None, Field(ge=0, le=20, description="tell the probability of each token and of so many others")
    ] = None
    stream: Annotated[bool | None, Field(description="send the answers as they are written")] = None
    stream_options: StreamOptions | None = None
    n: Annotated[Literal[1] | None, Field(description="answers to each")] = None
    best_of: Annotated[Literal[1] | None, Field(description="answers to choose from")] = None
    echo: Annotated[Literal[False] | None, Field(description="repeat the prompt")] = None
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    user: User = None


@section
class RowsRequest:
    """`/v1/classify`, `/v1/tokens`, `/v1/answer`, `/v1/rewards`."""

    model: Model
    rows: Rows
    user: User = None


@section
class EmbeddingRequest:
    """`/v1/embeddings`."""

    model: Model
    input: Annotated[str | list[str], Field(min_length=1, description="a text, or several")]
    encoding_format: Annotated[Literal["float", "base64"] | None, Field(description="of the numbers")] = None
    user: User = None


@section
class RerankRequest:
    """`/v1/rerank`, as Jina and Cohere have it."""

    model: Model
    query: Annotated[str, Field(min_length=1, description="what is looked for")]
    documents: Annotated[
        list[str | dict[Literal["text"], str]], Field(min_length=1, description="texts, or objects with a text")
    ]
    top_n: Annotated[int | None, Field(ge=1, description="so many of the best; nothing said: all")] = None
    return_documents: Annotated[bool | None, Field(description="repeat each document's text")] = None
    user: User = None


@section
class AdapterRequest:
    """`POST /v1/adapters`."""

    path: Annotated[str, Field(min_length=1, max_length=4096, description="a run folder below serve.root")]
    name: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="what it is asked by")
    ] = None


@functools.cache
def _adapter(kind: Any) -> Any:
    return adapter_of(kind)


def tree_of(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        RequestError: it holds something else.
    """
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The body is not valid JSON in UTF-8.") from error
    if not isinstance(tree, dict):
        raise RequestError(400, "The body must be a JSON object.")
    return tree


def checked(kind: type[Kind], tree: dict[str, Any], problems: list[str]) -> Kind:
    """A request of this kind.

    Args:
        problems: that were found in the tree before.

    Raises:
        RequestError: there are such, or fields that are missing, of a wrong type or out of range.
    """
    found = None
    if not problems:
        found, errors = validate(_adapter(cast(Any, kind)), tree)
        problems = describe(errors, keys(cast(Any, kind))) if found is None else []
    if found is None:
        raise RequestError(400, "; ".join(problems), param=re.split("[=:]", problems[0])[0].strip('"'))
    request: Kind = found
    return request


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request that a body holds.

    Raises:
        RequestError: not JSON, or fields that are unknown, missing, of a wrong type, or ask for what is not there.
    """
    tree = tree_of(body)
    fields = {name.partition(".")[0] for name in keys(kind)}
    unknown = [name for name in tree if name not in fields]
    problems = [f"{shown(name)}: unknown field.{nearest(name, fields)}" for name in unknown] or unreadable(tree)
    return checked(kind, tree, problems)


def stops(said: str | list[str] | None) -> tuple[str, ...]:
    """The texts that end an answer.

    Raises:
        RequestError: too many, or an empty one.
    """
    found = (said,) if isinstance(said, str) else tuple(said or ())
    if len(found) > 4 or not all(found):
        raise RequestError(400, "stop: must be at most 4 texts, none of them empty.", param="stop")
    return found
