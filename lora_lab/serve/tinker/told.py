"""What the Tinker SDK's JSON requests say. Fields that are not known here are passed over, as the SDK's versions differ in them."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, TypeVar

from pydantic import Field

from lora_lab.schema.sections import section, unreadable
from lora_lab.serve import wishes
from lora_lab.serve.wishes import RequestError

Kind = TypeVar("Kind")

Id = Annotated[str, Field(min_length=1, max_length=200, description="of a session, model or future")]
Number = Annotated[int, Field(ge=0, lt=2**62, description="of a request, in order")]
Path = Annotated[str, Field(min_length=1, max_length=4096, description="tinker://MODEL/weights/NAME")]
Name = Annotated[str | None, Field(min_length=1, max_length=200, description="of a checkpoint")]
Seconds = Annotated[int | None, Field(ge=1, lt=2**40, description="until it is removed")]
Facts = Annotated[dict[str, Any] | None, Field(description="of the client's own")]
Base = Annotated[str | None, Field(min_length=1, max_length=4096, description="name of the base")]
Optimizer = Annotated[dict[str, Any] | None, Field(description="its type: adamw")]


@section
class Session:
    """`create_session`."""

    tags: Annotated[list[str], Field(description="of the client's own")] = dataclasses.field(default_factory=list)
    user_metadata: Facts = None


@section
class OfSession:
    """`session_heartbeat`."""

    session_id: Id


@section
class OfModel:
    """`get_info`, and what all requests to a model say."""

    model_id: Id


@section
class OfPath:
    """`weights_info`."""

    tinker_path: Path


@section
class OfFuture:
    """`retrieve_future`, `cancel_future`."""

    request_id: Id


@section
class Lora:
    """`lora_config`."""

    rank: Annotated[int, Field(ge=1, le=4096, description="rank of the update")] = 32
    seed: Annotated[int | None, Field(ge=0, lt=2**32, description="of its first weights")] = None
    train_unembed: Annotated[bool, Field(description="adapt the output layer")] = True
    train_mlp: Annotated[bool, Field(description="adapt layers of MLPs")] = True
    train_attn: Annotated[bool, Field(description="adapt layers of attention")] = True


@section
class CreateModel:
    """`create_model`."""

    session_id: Id
    model_seq_id: Number
    base_model: Annotated[str, Field(min_length=1, max_length=4096, description="name of the base")]
    user_metadata: Facts = None
    lora_config: Lora | None = None
    optimizer_config: Optimizer = None


@section
class Adam:
    """`adam_params`; the defaults are the SDK's."""

    learning_rate: Annotated[float, Field(ge=0, description="learning rate")] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1, description="of the gradient's mean")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="of its square's mean")] = 0.95
    eps: Annotated[float, Field(ge=0, description="added to the denominator")] = 1e-12
    weight_decay: Annotated[float, Field(ge=0, description="decoupled weight decay")] = 0.0
    grad_clip_norm: Annotated[float, Field(description="largest norm of the gradient; 0 or less: any")] = 0.0


@section
class OptimStep:
    """`optim_step`."""

    model_id: Id
    seq_id: Number
    adam_params: Adam | None = None
    optimizer_params: Optimizer = None


@section
class SaveWeights:
    """`save_weights`."""

    model_id: Id
    seq_id: Number
    path: Name = None
    ttl_seconds: Seconds = None
    overwrite: Annotated[bool, Field(description="replace a checkpoint of this name")] = False
    user_metadata: Facts = None


@section
class SaveForSampler:
    """`save_weights_for_sampler`."""

    model_id: Id
    seq_id: Number
    path: Name = None
    sampling_session_seq_id: Number | None = None
    ttl_seconds: Seconds = None
    user_metadata: Facts = None


@section
class LoadWeights:
    """`load_weights`, as a model's first request (`session_id`), or into one that is there (`model_id`)."""

    path: Path
    optimizer: Annotated[bool, Field(description="with the optimizer's state")]
    session_id: Id | None = None
    model_seq_id: Number | None = None
    model_id: Id | None = None
    seq_id: Number | None = None
    base_model: Base = None
    user_metadata: Facts = None
    optimizer_config: Optimizer = None


@section
class SamplingSession:
    """`create_sampling_session`."""

    session_id: Id
    sampling_session_seq_id: Number
    base_model: Base = None
    model_path: Path | None = None


@section
class SamplingParams:
    """`sampling_params`."""

    max_tokens: Annotated[int | None, Field(ge=1, description="most tokens of an answer")] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63, description="of what is drawn")] = None
    stop: Annotated[str | list[int] | list[str] | None, Field(description="texts or tokens that end an answer")] = None
    temperature: Annotated[float, Field(ge=0, le=100, description="0: the likeliest token, always")] = 1.0
    top_k: Annotated[int, Field(ge=-1, description="so many likely tokens are drawn from; -1 and 0: all")] = -1
    top_p: Annotated[float, Field(gt=0, le=1, description="share of the probability that is drawn from")] = 1.0


@section
class Prompt:
    """`prompt`."""

    chunks: Annotated[list[dict[str, Any]], Field(description="encoded texts, one behind another")]


@section
class Sample:
    """`asample`."""

    sampling_session_id: Id
    seq_id: Number
    prompt: Prompt
    sampling_params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    num_samples: Annotated[int, Field(ge=1, description="answers")] = 1
    prompt_logprobs: Annotated[bool | None, Field(description="tell how likely the prompt's tokens are")] = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=20, description="and so many others in their place")] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=20, description="the same of each answer")] = 0
    prompt_logprobs_last_n: Annotated[int | None, Field(ge=1, description="only of so many tokens at the end")] = None
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: Annotated[int, Field(description="not here")] = 0


@section
class Ttl:
    """`PUT .../ttl`."""

    ttl_seconds: Seconds = None


def _known(kind: Any, tree: Any) -> Any:
    """A tree without fields that a section does not have."""
    if not isinstance(tree, dict):
        return tree
    found = {}
    for name, info in kind.__pydantic_fields__.items():
        if name not in tree:
            continue
        inner = [one for one in (info.annotation, *getattr(info.annotation, "__args__", ())) if _is_section(one)]
        found[name] = _known(inner[0], tree[name]) if inner else tree[name]
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request that a body holds.

    Raises:
        RequestError: not JSON, or fields that are missing, of a wrong type or out of range.
    """
    tree = _known(kind, wishes.tree_of(body))
    return wishes.checked(kind, tree, unreadable(tree))


def numbered(body: bytes) -> tuple[str, int] | None:
    """Which model a refused request was for, and its number in the model's line, where it says so."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model_id, number = (tree.get(name) if isinstance(tree, dict) else None for name in ("model_id", "seq_id"))
    return (model_id, number) if isinstance(model_id, str) and type(number) is int and 0 < number < 2**62 else None


def prompt_tokens(prompt: Prompt) -> list[int]:
    """The tokens of a prompt.

    Raises:
        RequestError: something else than encoded text, or nothing.
    """
    found: list[int] = []
    for place, chunk in enumerate(prompt.chunks):
        tokens = chunk.get("tokens")
        if chunk.get("type", "encoded_text") != "encoded_text" or not isinstance(tokens, list):
            raise RequestError(400, f"prompt.chunks[{place}]: only encoded text can be read here.")
        if not all(type(token) is int for token in tokens):
            raise RequestError(400, f"prompt.chunks[{place}].tokens: must be whole numbers.")
        found += tokens
    if not found:
        raise RequestError(400, "prompt: has no tokens.")
    return found


def stops(said: str | list[int] | list[str] | None) -> tuple[tuple[str, ...], frozenset[int], bool]:
    """Texts and tokens that end an answer, and whether the model's own end token does so too: not behind an empty list.

    Raises:
        RequestError: an empty text, or too many.
    """
    if said is None:
        return (), frozenset(), True
    told = [said] if isinstance(said, str) else list(said)
    if len(told) > 64 or "" in told:
        raise RequestError(400, "sampling_params.stop: must be at most 64 texts or tokens, and no text empty.")
    texts = tuple(one for one in told if isinstance(one, str))
    return texts, frozenset(one for one in told if isinstance(one, int)), bool(told)
