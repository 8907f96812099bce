"""Which addresses only this machine reaches: a server on any other needs a key or a password."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than `localhost` is taken for one that others do."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
