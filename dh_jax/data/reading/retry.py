"""Network faults: which of them pass, how long to wait, and what to say of those that stay."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from dh_jax.config import RetryConfig

T = TypeVar("T")

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP answers worth another attempt
# By name, because fsspec, aiohttp, botocore, httpx and huggingface_hub each bring their own.
DROPPED = frozenset(
    {
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ConnectionClosedError",  # botocore
        "ConnectionError",  # Python, requests
        "EndpointConnectionError",
        "FSTimeoutError",  # fsspec
        "HTTPClientError",
        "IncompleteRead",  # http.client, urllib3
        "ResponseStreamingError",
        "TimeoutError",
        "TransportError",  # httpx: timeouts, resets, refusals
    }
)
DENIED = frozenset({401, 403})
WITHOUT_KEYS = frozenset({"NoCredentialsError", "PartialCredentialsError"})  # botocore


class NetworkFault(OSError):
    """A remote file that cannot be read; the message is one line with the cure."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing  # it may be readable later


def patiently(action: Callable[[], T], retry: RetryConfig, what: str) -> T:
    """Do ``action``, again after faults that may pass: timeouts, resets, 429 and 5xx.

    Waits grow twofold from ``retry.first`` to ``retry.longest`` seconds, each shortened by a
    random part of up to a half so that many hosts do not come back at once. A server's
    ``Retry-After`` counts instead where it is longer.

    Raises:
        NetworkFault: an answer that will not change (401, 403, 404), or ``retry.attempts`` failed.
        Exception: what ``action`` raised, if it is no network fault at all.
    """
    for attempt in range(1, retry.attempts + 1):
        try:
            return action()
        except Exception as error:  # libraries raise what they like; unknown ones go on up
            if not is_network_fault(error):
                raise
            if not is_passing(error) or attempt == retry.attempts:
                raise NetworkFault(
                    explain_fault(error, what, attempt), passing=is_passing(error)
                ) from error
            time.sleep(wait_before(attempt + 1, retry, error))
    raise AssertionError("retry.attempts is at least 1")


def wait_before(attempt: int, retry: RetryConfig, error: BaseException) -> float:
    """Seconds to wait before an attempt (counted from 1) that follows ``error``."""
    grown = retry.first * 2.0 ** min(attempt - 2, 60)
    jittered = min(retry.longest, grown) * random.uniform(0.5, 1.0)
    return max(jittered, min(retry.longest, asked_wait(error)))


def is_network_fault(error: BaseException) -> bool:
    """Whether a server or the way to it is to blame."""
    kinds = (FileNotFoundError, PermissionError)
    found = any(isinstance(link, kinds) for link in chain_of(error)) or _without_keys(error)
    return found or is_passing(error) or status_of(error) is not None


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed. An HTTP answer decides before any class does."""
    for link in chain_of(error):
        if isinstance(link, NetworkFault):
            return link.passing
    status = status_of(error)
    if status is not None:
        return status in PASSING
    names = {kind.__name__ for link in chain_of(error) for kind in type(link).__mro__}
    return bool(names & DROPPED)


def explain_fault(error: BaseException, what: str, attempts: int) -> str:
    """One line: what could not be read, why, and what to do about it."""
    status = status_of(error)
    chain = list(chain_of(error))
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if _without_keys(error):
        cure = "no credentials; set storage_options (key, secret; or anon: true) or log in"
    elif status in DENIED or any(isinstance(link, PermissionError) for link in chain):
        cure = f"access denied ({status or 403}); check storage_options or your credentials"
    elif status in (404, 410) or any(isinstance(link, FileNotFoundError) for link in chain):
        cure = f"not found ({status or 404}); check the path"
    elif is_passing(error):
        why = f"answer {status}" if status else "no connection"
        cure = (
            f"{why} after {attempts} attempts; check the network and the server and resume, "
            "or raise retry.attempts"
        )
    else:
        cure = f"refused ({status}); check the path and storage_options"
    return f"{what}: {cure} [{said}]"


def _without_keys(error: BaseException) -> bool:
    return any(type(link).__name__ in WITHOUT_KEYS for link in chain_of(error))


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, wherever its library keeps it."""
    for link in chain_of(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):  # botocore
            found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None) or getattr(link, "status", None)
        if isinstance(found, int):
            return found
    return None


def asked_wait(error: BaseException) -> float:
    """Seconds of a ``Retry-After`` header, 0 if there is none (or it is a date)."""
    for link in chain_of(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            headers: Any = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(response, "headers", None) or getattr(link, "headers", None)
        if isinstance(headers, Mapping):
            asked = headers.get("retry-after") or headers.get("Retry-After") or ""
            if str(asked).strip().isdigit():
                return float(asked)
    return 0.0
