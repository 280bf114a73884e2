"""Errors that a call to the Hugging Face Hub may raise: refused, unreachable, or malformed requests."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

HUB_ERRORS: tuple[type[Exception], ...] = (
    # the error of the HTTP library beneath, whichever that is (requests, httpx, httpx2): a host that is not reached
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    # offline, no token, not in the cache
    OSError,
    HFValidationError,
)
