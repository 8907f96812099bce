"""Which addresses only this machine reaches, and its names: a server on others needs a key or a password."""

from __future__ import annotations

import ipaddress

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than `localhost` is taken for one that others do."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """An address as a URL has it: one of version 6 in brackets."""
    return f"[{host}]" if ":" in host else host


def names_of(host: str) -> list[str]:
    """What a request to a server without a key may call it in its `Host` header.

    A web page that has a name of its own lead to this machine (DNS rebinding) is known by that name.

    Args:
        host: The address that is served on.
    """
    return [*LOCAL_NAMES, in_url(host)]
