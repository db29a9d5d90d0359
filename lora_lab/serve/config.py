"""The `serve` section."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Annotated, Literal

from pydantic import Field

from lora_lab.data.personal import Kind
from lora_lab.schema.sections import section


@section
class ServeConfig:
    """A server: where it listens, who may ask it, and how much it takes on. Only a command line says it, never a run's folder."""

    host: Annotated[str, Field(min_length=1, description="address to listen on; any but loopback needs serve.keys")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0: one that is free")] = 8000
    keys: Annotated[
        str | None,
        Field(min_length=1, description="file of keys, see lora-lab serve add_key=NAME; null: none is needed"),
    ] = None
    root: Annotated[
        str | None,
        Field(min_length=1, description="folder below which adapters may be loaded while serving; null: none may"),
    ] = None
    replicas: Annotated[
        int,
        Field(ge=1, le=256, description="processes that answer at the port, each with base and adapters of its own"),
    ] = 1
    training: Annotated[
        bool, Field(description="train over the base too, by the Tinker API; checkpoints lie below serve.root")
    ] = False
    max_models: Annotated[int, Field(ge=1, le=4096, description="adapters that clients train at once")] = 16
    engine: Annotated[
        Literal["llama", "vllm"] | None,
        Field(
            description="a program that answers instead of lora_lab, started with the runs' exports and compared with their "
            "probe rows: llama.cpp's server, or vLLM"
        ),
    ] = None
    engine_command: Annotated[
        list[str],
        Field(description="its program and further options; []: llama-server (else xllamacpp), or vllm serve"),
    ] = dataclasses.field(default_factory=list)
    engine_base: Annotated[
        str | None,
        Field(min_length=1, description="llama: GGUF file of the base; null: made in 16 bits, and kept in the cache"),
    ] = None
    certificate: Annotated[str | None, Field(min_length=1, description="PEM file of the TLS certificate")] = None
    certificate_key: Annotated[str | None, Field(min_length=1, description="PEM file of its private key")] = None
    max_rows: Annotated[int, Field(ge=1, le=4096, description="answers that are written together")] = 32
    cache_gib: Annotated[
        float | None,
        Field(
            gt=0,
            description="memory for keys and values of open answers; null: half of what is free at the start, shared by all replicas",
        ),
    ] = None
    max_waiting: Annotated[int, Field(ge=1, description="requests that wait; further ones are refused")] = 512
    max_tokens: Annotated[int, Field(ge=1, description="most tokens of an answer that a request may ask for")] = 4096
    max_texts: Annotated[int, Field(ge=1, description="most rows, prompts or texts of one request")] = 64
    max_body_bytes: Annotated[int, Field(ge=1024, description="largest body of a request")] = 2**20
    mask: Annotated[
        list[Kind],
        Field(description="personal data that the model does not see: marks such as [EMAIL] stand in its place"),
    ] = dataclasses.field(default_factory=list)
    presidio: Annotated[
        list[Annotated[str, Field(pattern="^[A-Z][A-Z0-9_]*$")]],
        Field(
            description="what presidio finds is masked too, as [PERSON]: PERSON, LOCATION, IP_ADDRESS and other entities of its"
        ),
    ] = dataclasses.field(default_factory=list)
    presidio_model: Annotated[
        str | None,
        Field(
            pattern="^[a-z][a-z0-9_]*$",
            description="spaCy's package by which presidio finds names and places; null: patterns alone",
        ),
    ] = None
    requests_per_minute: Annotated[int | None, Field(ge=1, description="of one key; null: no limit")] = None
    tokens_per_minute: Annotated[
        int | None, Field(ge=1, description="of one key, prompts and answers; null: no limit")
    ] = None
    concurrent_requests: Annotated[int | None, Field(ge=1, description="of one key at once; null: no limit")] = None
    stop_seconds: Annotated[
        float, Field(ge=0, le=3600, description="how long open answers may go on once the server is told to stop")
    ] = 30.0

    @property
    def on_loopback(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
