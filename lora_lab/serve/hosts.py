"""Whether a request names this machine: a page of somebody else in a browser reaches a local server by a name of its own (DNS rebinding)."""

from __future__ import annotations

_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def is_local(host: str, *others: str) -> bool:
    """Whether a `Host` header, with or without a port, names this machine; so does a request without one, which no browser sends.

    Args:
        others: further names that are taken.
    """
    name, _, port = host.rpartition(":")
    name = name if port.isdecimal() and not host.endswith("]") else host
    return not host or name.lower() in (*_LOCAL, *others)
