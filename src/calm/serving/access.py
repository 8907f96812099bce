"""Who may ask: the API key, compared in constant time before anything of a request is read."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.requests import HTTPConnection

from calm.serving.errors import APIError

OPEN = ("/health",)  # for load balancers, which have no key and learn nothing


class ApiKey(AuthenticationBackend):
    """Lets those in who send `Authorization: Bearer KEY`; for Starlette's authentication middleware.

    Args:
        keys: Any of which will do.
        unlocked: Paths that take none.
    """

    def __init__(self, keys: Collection[str], unlocked: Collection[str] = OPEN) -> None:
        self._keys = [key.encode() for key in keys]
        self._unlocked = unlocked

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        """Compare the key with each of those that will do.

        Raises:
            AuthenticationError: If it is missing or wrong.
        """
        if conn.scope["path"] in self._unlocked:  # what is routed by, and no part of it is taken from a header
            return None
        scheme, _, key = conn.headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        if scheme.lower() != "bearer" or not any([secrets.compare_digest(given, one) for one in self._keys]):
            raise AuthenticationError
        return AuthCredentials(["key"]), SimpleUser("key")


def refused(conn: HTTPConnection, error: AuthenticationError) -> JSONResponse:
    """The answer to everyone else."""
    message = "a wrong API key, or none: send the server's as `Authorization: Bearer KEY`"
    return APIError(401, message, code="invalid_api_key").response()
