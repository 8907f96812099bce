"""What one server takes on at most, so that no request can take it from the others (issue 5)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused with the reason; none is cut short in silence.

    Attributes:
        batch_size: Rows that are generated together. A request is a row for each prompt and choice.
        queue: Rows that wait; more are refused with 429 and `Retry-After`.
        max_tokens: Tokens generated for a row.
        body_size: Bytes of a request's body.
        seconds: From a request's arrival to its last token, waiting included.
    """

    batch_size: int = 8
    queue: int = 64
    max_tokens: int = 1024
    body_size: int = 1 << 20
    seconds: float = 600.0
