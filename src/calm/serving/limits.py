"""What one server takes on at most, so that no request can take it from the others (issue 5)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from calm.errors import CalmError
from calm.serving.errors import APIError

RETRY_AFTER = 5  # seconds; the queue has moved by then, or has not


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused with the reason, the same on every engine; none is cut short in silence.

    Attributes:
        batch_size: Rows that are generated together. A request is a row for each prompt and choice.
        queue: Rows that wait; more are refused with 429 and `Retry-After`.
        max_tokens: Tokens generated for a row.
        body_size: Bytes of a request's body.
        seconds: From a request's arrival to its last token, waiting included.

    Raises:
        CalmError: If one is no number, or out of range.
    """

    batch_size: int = 8
    queue: int = 64
    max_tokens: int = 1024
    body_size: int = 1 << 20
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("queue", 0), ("max_tokens", 1), ("body_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise CalmError(f"{name}={value!r}: expected a whole number, {least} or more")
        if type(self.seconds) not in (int, float) or not 0 < self.seconds <= sys.float_info.max:
            raise CalmError(f"seconds={self.seconds!r} (--timeout): expected a number, more than 0 and finite")

    def queue_full(self) -> APIError:
        """For a request whose rows would be more than may wait."""
        message = f"{self.queue} answers may wait here, and with this request more would: ask again later"
        return APIError(429, message, code="queue_full", retry_after=RETRY_AFTER)

    def too_many_tokens(self, param: str, asked: int) -> APIError:
        """For a request that asks for longer answers, by this parameter."""
        return APIError(400, f"{param}={asked}: this server generates {self.max_tokens} at most", param=param)

    def body_too_large(self) -> APIError:
        """For a body of more bytes, which are not read."""
        return APIError(413, f"the body is too large: this server reads {self.body_size} bytes at most")

    def out_of_time(self) -> APIError:
        """For a request whose time is over; what was generated of its answer may have been sent."""
        message = f"no answer within {self.seconds:g} s, the most that this server gives a request"
        return APIError(504, message, code="timeout")
