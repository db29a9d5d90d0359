"""Training requests and their results as the Tinker SDK's protobuf messages, by the numbers of its published schema.

Only `protobuf` itself is needed: the messages are made of the table below. An enumeration is a number on the wire, and a map is a list
of entries, so that both are declared as such.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from lora_lab.schema.sections import shown
from lora_lab.serve.wishes import RequestError

PROTOBUF = "application/x-protobuf"
_SCHEMA = {  # of each message: number, name, type; * is a list
    "SparseCsr": "1 values bytes, 2 crow_indices bytes, 3 col_indices bytes",
    "Tensor": "1 dense bytes, 2 sparse_csr SparseCsr, 3 dtype int32, 4 shape int64*",
    "TextChunk": "1 tokens bytes",
    "OtherChunk": "",
    "Chunk": "1 encoded_text TextChunk, 2 image OtherChunk, 3 dmel OtherChunk",
    "Input": "1 key string, 2 value Tensor",
    "Datum": "1 model_input Chunk*, 2 loss_fn_inputs Input*",
    "Number": "1 key string, 2 value double",
    "Value": "1 number double, 2 text string",
    "Setting": "1 key string, 2 value Value",
    "Request": "1 model_id string, 2 seq_id int32, 3 data Datum*, 4 loss_fn string, 5 loss_fn_config Number*, 6 forward_only bool, "
    "7 loss_fn_config_v2 Setting*",
    "Batched": "1 data bytes, 2 offsets bytes, 3 dtype int32, 4 trailing_shape int64*",
    "Field": "1 key string, 2 value Batched",
    "Record": "1 type_tag string, 2 fields Field*, 3 num_datums int64",
    "Output": "1 loss_fn_output_type string, 2 loss_fn_outputs Record*, 3 metrics Number*",
    "TopK": "1 token_ids bytes, 2 logprobs bytes, 3 k uint32, 4 length uint32",
    "Sequence": "1 stop_reason int32, 2 tokens bytes, 3 logprobs bytes, 4 topk_sampled_logprobs TopK",
    "Sample": "1 sequences Sequence*, 2 prompt_logprobs bytes, 3 topk_prompt_logprobs TopK",
}
_FLOAT32, _INT64, _INT32, _BFLOAT16 = 1, 2, 3, 4
_DTYPES: dict[int, np.dtype[Any]] = {_FLOAT32: np.dtype("<f4"), _INT64: np.dtype("<i8"), _INT32: np.dtype("<i4")}
_RECORD = "ArrayRecord"
_NO_TOKEN = -99999.0  # the log-probability of an empty place among the likeliest tokens
STOP, LENGTH = 0, 1  # why an answer ended


def _made() -> dict[str, Any]:
    """The classes of all messages."""
    file = descriptor_pb2.FileDescriptorProto(name="lora_lab/tinker.proto", package="lora_lab.tinker", syntax="proto2")
    kinds: Any = descriptor_pb2.FieldDescriptorProto
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field, kind, many in re.findall(r"(\d+) (\w+) (\w+)(\*?)", fields):
            label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=int(number), label=label)
            if kind in _SCHEMA:
                made.type, made.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{kind}"
            else:
                made.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles([file.name], pool)
    return {name: found[f"{file.package}.{name}"] for name in _SCHEMA}


MESSAGES = _made()


@dataclasses.dataclass(frozen=True)
class Datum:
    """What is read, and what a loss is given beside it."""

    tokens: np.ndarray  # [N] int64
    inputs: dict[str, np.ndarray]  # by name, [N] or [N, K]; int64 or float32


@dataclasses.dataclass(frozen=True)
class Learn:
    """A request for a forward pass, or a forward and a backward pass."""

    model_id: str
    seq_id: int
    data: list[Datum]
    loss: str
    settings: dict[str, float | str]
    backward: bool


def read_learn(body: bytes) -> Learn:
    """The request that a body holds. What its numbers must be beside each other, `losses.check` says.

    Raises:
        RequestError: it is no such message, or holds what is not text.
    """
    told = MESSAGES["Request"]()
    try:
        told.ParseFromString(body)
    except DecodeError as error:
        raise RequestError(400, "The body is not a ForwardBackwardRequest in protobuf.") from error
    settings: dict[str, float | str] = {one.key: one.value for one in told.loss_fn_config}
    for one in told.loss_fn_config_v2:
        settings[one.key] = one.value.text if one.value.HasField("text") else one.value.number
    data = [_datum(place, one) for place, one in enumerate(told.data)]
    return Learn(told.model_id, told.seq_id, data, told.loss_fn, settings, not told.forward_only)


def _datum(place: int, told: Any) -> Datum:
    parts = []
    for chunk in told.model_input:
        if not chunk.HasField("encoded_text"):
            raise RequestError(400, f"data[{place}].model_input: only encoded text can be read here.")
        parts.append(_numbers(f"data[{place}].model_input", chunk.encoded_text.tokens, _DTYPES[_INT32]))
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
    inputs = {
        one.key: _tensor(f"data[{place}].loss_fn_inputs.{shown(one.key)}", one.value) for one in told.loss_fn_inputs
    }
    return Datum(tokens, inputs)


def _numbers(what: str, content: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    if len(content) % dtype.itemsize:
        raise RequestError(400, f"{what}: {len(content)} bytes are no whole numbers of {dtype.itemsize} bytes.")
    return np.frombuffer(content, dtype=dtype)


def _tensor(what: str, told: Any) -> np.ndarray:
    """int64 or float32; of a sparse one what is absent is 0."""
    shape = [int(size) for size in told.shape]
    if told.dtype not in (*_DTYPES, _BFLOAT16):
        raise RequestError(400, f"{what}: dtype={told.dtype} is not one of float32, int64, int32, bfloat16.")
    sparse = told.HasField("sparse_csr")
    content = told.sparse_csr.values if sparse else told.dense
    if told.dtype == _BFLOAT16:  # the upper half of a float32
        values = (_numbers(what, content, np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)
    else:
        values = _numbers(what, content, _DTYPES[told.dtype])
    values = values.astype(np.float32 if told.dtype in (_FLOAT32, _BFLOAT16) else np.int64)
    if sparse:
        return _spread(what, values, shape, told.sparse_csr)
    shape = shape or [len(values)]
    if min(shape) < 0 or int(np.prod(shape, dtype=object)) != len(values):
        raise RequestError(400, f"{what}: {len(values)} numbers, and the shape is {shape}.")
    return values.reshape(shape)


_MOST_CELLS = 2**26  # of a sparse tensor once it is written out


def _spread(what: str, values: np.ndarray, shape: list[int], csr: Any) -> np.ndarray:
    rows, columns = (_numbers(what, part, _DTYPES[_INT64]) for part in (csr.crow_indices, csr.col_indices))
    fits = len(shape) == 2 and min(shape) >= 0 and shape[0] * shape[1] <= _MOST_CELLS
    fits = fits and len(rows) == shape[0] + 1 and rows[0] == 0 and rows[-1] == len(columns) == len(values)
    fits = fits and bool((np.diff(rows) >= 0).all() and (columns >= 0).all() and (columns < shape[1]).all())
    if not fits:
        raise RequestError(400, f"{what}: is no sparse matrix of the shape {shape}.")
    whole = np.zeros(shape, values.dtype)
    whole[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return whole


def learned(logprobs: Sequence[np.ndarray], metrics: Mapping[str, float]) -> bytes:
    """The result of a training request.

    Args:
        logprobs: of each datum, [N] or [N, K] float32.
        metrics: each named `name:reduction`.
    """
    output = MESSAGES["Output"](loss_fn_output_type=_RECORD)
    for name, value in metrics.items():
        output.metrics.add(key=name, value=value)
    begin = 0
    for end in range(1, len(logprobs) + 1):  # those of one shape behind the first dimension make a record
        if end == len(logprobs) or logprobs[end].shape[1:] != logprobs[begin].shape[1:]:
            _record(output, logprobs[begin:end])
            begin = end
    return bytes(output.SerializeToString())


def _record(output: Any, parts: Sequence[np.ndarray]) -> None:
    record = output.loss_fn_outputs.add(type_tag=_RECORD, num_datums=len(parts))
    field = record.fields.add(key="logprobs").value
    field.data = b"".join(part.astype("<f4").tobytes() for part in parts)
    field.offsets = np.cumsum([0, *(4 * part.size for part in parts)]).astype("<i8").tobytes()
    field.dtype = _FLOAT32
    field.trailing_shape.extend(parts[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Answered:
    """A sampled answer."""

    tokens: list[int]
    logprobs: list[float]
    reason: int  # STOP or LENGTH
    likeliest: list[list[tuple[int, float]]] | None = None  # of each place; None: not asked for


def sampled(
    answers: Sequence[Answered],
    prompt_logprobs: np.ndarray | None = None,
    likeliest: Sequence[Sequence[tuple[int, float]] | None] | None = None,
) -> bytes:
    """The result of a sampling request.

    Args:
        prompt_logprobs: [T] float32, NaN where there is none.
        likeliest: tokens of each place of the prompt; None of a place: none.
    """
    result = MESSAGES["Sample"]()
    for answer in answers:
        one = result.sequences.add(stop_reason=answer.reason)
        one.tokens = np.array(answer.tokens, "<i4").tobytes()
        one.logprobs = np.array(answer.logprobs, "<f4").tobytes()
        if answer.likeliest is not None:
            _put_likeliest(one.topk_sampled_logprobs, answer.likeliest)
    if prompt_logprobs is not None:
        result.prompt_logprobs = prompt_logprobs.astype("<f4").tobytes()
    if likeliest is not None:
        _put_likeliest(result.topk_prompt_logprobs, likeliest)
    return bytes(result.SerializeToString())


def blank(count: int) -> np.ndarray:
    """[T] float32: no log-probabilities yet."""
    return np.full(count, np.nan, np.float32)


def _put_likeliest(field: Any, rows: Sequence[Sequence[tuple[int, float]] | None]) -> None:
    most = max((len(row) for row in rows if row is not None), default=0)
    tokens, values = np.zeros((len(rows), most), "<i4"), np.full((len(rows), most), _NO_TOKEN, "<f4")
    for place, row in enumerate(rows):
        for rank, (token, value) in enumerate(row or ()):
            tokens[place, rank], values[place, rank] = token, value
    field.token_ids, field.logprobs, field.k, field.length = tokens.tobytes(), values.tobytes(), most, len(rows)
