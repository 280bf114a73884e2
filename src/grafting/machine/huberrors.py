"""Errors that a call to the Hugging Face Hub may raise: refused, unreachable, or malformed requests."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ._damage import cut

HUB_ERRORS: tuple[type[Exception], ...] = (
    # the error of the HTTP library beneath, whichever that is (requests, httpx, httpx2): a host that is not reached
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    # offline, no token, not in the cache
    OSError,
    HFValidationError,
)


def said(error: Exception) -> str:
    """What went wrong at the Hub, in one line of bounded length: its messages run over several."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return cut(lines[0], 200) if lines else type(error).__name__
