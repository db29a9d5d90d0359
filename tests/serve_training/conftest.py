"""A tiny base that clients train over, behind the application, without a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")

from starlette.testclient import TestClient

from lora_lab.serve.app import Service
from tests.serve_training.asking import Tinker, client_of, end, serving


@pytest.fixture(scope="session")
def service(base, tmp_path_factory) -> Iterator[Service]:
    found = serving(base, tmp_path_factory.mktemp("training"))
    yield found
    end(found)


@pytest.fixture
def http(service) -> Iterator[TestClient]:
    with client_of(service) as found:
        yield found


@pytest.fixture
def client(http) -> Iterator[Tinker]:
    """A client, whose session is finished in the end."""
    with Tinker(http) as found:
        yield found
