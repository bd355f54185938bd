"""What a client gets in place of an answer: OpenAI's error object, with a status that its libraries understand.

400  invalid_request_error   a parameter that is wrong or not supported; context_length_exceeded
401  invalid_api_key
403  a host or an origin that is not this machine's, where there is no key
404  model_not_found, or no such page
408  the request did not arrive in time
413  the request is too large
415  not JSON
429  too many requests wait; try again (Retry-After)
500  server_error
503  no engine answers just now, or it was lost; try again (Retry-After)
"""

from typing import Any

from hivegrpo.protocol.errors import WireError

RETRY_SECONDS = 2
"""What Retry-After says."""


class Refusal(WireError):
    """An answer that is an error; `str()` of it is the message for the client."""

    def __init__(
        self, status: int, code: str | None, message: str, hint: str = "", *, param: str | None = None
    ) -> None:
        """code, param: as OpenAI has them; the error's type follows from the status."""
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...}, as OpenAI writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "requests" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After where trying again helps, what HTTP wants beside 401, and no more of a body that is not read."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        if self.status in (401, 403, 408, 413, 415):
            return {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
        return {}


def invalid(message: str, hint: str = "", *, param: str | None = None, code: str | None = None) -> Refusal:
    """A request that will not do, however often it comes."""
    return Refusal(400, code, message, hint, param=param)


def unavailable(message: str) -> Refusal:
    """Nothing answers just now."""
    return Refusal(503, "engine_unavailable", message, "Try again in a moment.")
