"""Who may ask: the API key, compared in constant time before anything of a request is read."""

from __future__ import annotations

import secrets

from fastapi.responses import JSONResponse
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.requests import HTTPConnection

from calm.serving.errors import APIError

OPEN = ("/health",)  # for load balancers, which have no key and learn nothing


class ApiKey(AuthenticationBackend):
    """Lets those in who send `Authorization: Bearer KEY`; for Starlette's authentication middleware."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        """Compare the key.

        Raises:
            AuthenticationError: If it is missing or wrong.
        """
        if conn.scope["path"] in OPEN:  # what is routed by, and no part of it is taken from a header
            return None
        scheme, _, key = conn.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.strip().encode(), self._key):
            raise AuthenticationError
        return AuthCredentials(["key"]), SimpleUser("key")


def refused(conn: HTTPConnection, error: AuthenticationError) -> JSONResponse:
    """The answer to everyone else."""
    message = "a wrong API key, or none: send the server's as `Authorization: Bearer KEY`"
    return APIError(401, message, code="invalid_api_key").response()
