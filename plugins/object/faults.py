"""Errors of obstore to ours. The texts of obstore never pass: a store's answer may hold what a request was signed with.

obstore tells most faults by one class and a text, in which the HTTP status and the store's own code stand. They are
looked for here, in one table; what is told on is only what the tables know.
"""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from xferd.api.errors import (
    AlreadyExists,
    InvalidArgument,
    MoveFailed,
    NotFound,
    Overloaded,
    PermissionDenied,
    ShortTransfer,
    Stale,
    Unauthenticated,
    Unsupported,
    XferdError,
)

FAULTS = (BaseError, OSError, ValueError, NotImplementedError)
"""What obstore raises."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
}
_BEYOND_END = re.compile(r"InvalidRange|Wanted range starting at|out of range|larger than length|Out of range")
_NO_CREDENTIALS = re.compile(r"169\.254\.|metadata\.google|credential provider|[Cc]redential|/oauth2/|/token")
_TIMED_OUT = re.compile(r"TimedOut|kind: Timeout|timed out")
_UNREACHABLE = re.compile(r"kind: Connect|ConnectionRefused|ConnectError|dns error")
_CUT = re.compile(r"kind: (Interrupted|Decode|Body|Unknown|Request)|IncompleteMessage|UnexpectedEof|decoding response")
_NAME_TOO_LONG = re.compile(r"File name too long|os error 36")
_NO_SPACE = re.compile(r"No space left|os error 28")


class StoreFault(Exception):
    """Stands as ``__cause__`` of our errors for one of obstore's: its class, and what of its text is no secret."""


def translate(exc: Exception, what: str, store: str) -> XferdError:
    """Return our error for one of obstore's, with a ``StoreFault`` as its cause.

    Args:
        exc: one of ``FAULTS``.
        what: the request, as in "get of 'key'".
        store: name of the store.
    """
    text = str(exc)
    status, code = _found(_STATUS, text), _found(_CODE, text)
    cls, why, remedy = _classify(exc, text, status, code)
    error = cls(f"{what} in store {store!r}: {why}", remedy=remedy)
    told = [type(exc).__name__, *([f"HTTP {status}"] if status else []), *([code] if code else [])]
    error.__cause__ = StoreFault(" ".join(told))
    return error


def _classify(exc: Exception, text: str, status: str, code: str) -> tuple[type[XferdError], str, str]:
    if code in _NO_BUCKET:
        return NotFound, "there is no such bucket or container", "create it, or correct the store's url"
    if code in _BAD_CREDENTIALS:
        return Unauthenticated, f"the credentials are wrong or have expired ({code})", "renew the credentials"
    if status == "416" or _BEYOND_END.search(text):
        return ShortTransfer, "the object is shorter than the read", "register it again for its present size"
    by_class = _by_class(exc, code)
    if by_class is not None:
        return by_class
    if status in ("429", "503"):
        return Overloaded, f"the store asks to slow down (HTTP {status} {code}".rstrip() + ")", "lower max_concurrency"
    if status in ("401", "403"):
        return Unauthenticated, f"the store refuses the credentials (HTTP {status})", "check the credentials"
    if status:
        return MoveFailed, f"the store answered HTTP {status} {code}".rstrip(), "see the store's own log"
    return _without_answer(exc, text)


def _by_class(exc: Exception, code: str) -> tuple[type[XferdError], str, str] | None:
    told = f" ({code})" if code else ""
    if isinstance(exc, FileNotFoundError):
        return NotFound, "there is no such object (or bucket)", "check the key, and the store's url"
    if isinstance(exc, PreconditionError | NotModifiedError):
        return Stale, "the object changed since it was registered", "register it again for its present version"
    if isinstance(exc, AlreadyExistsError):
        return AlreadyExists, "there is an object of this key", "delete it first, or choose another key"
    if isinstance(exc, PermissionDeniedError | PermissionError):
        return PermissionDenied, f"the store does not allow it{told}", "give the credentials the right to do it"
    if isinstance(exc, UnauthenticatedError):
        return Unauthenticated, f"no valid credentials{told}", "see docs/objects.md for where they are looked for"
    if isinstance(exc, NotSupportedError | NotImplementedError):
        return Unsupported, "the store cannot do it", "use another store"
    return None


def _without_answer(exc: Exception, text: str) -> tuple[type[XferdError], str, str]:
    if _NAME_TOO_LONG.search(text):
        return InvalidArgument, "a segment of the key is longer than the file system takes", "use shorter segments"
    if _NO_SPACE.search(text):
        return MoveFailed, "no space left", "make room on the file system"
    if _NO_CREDENTIALS.search(text):
        return Unauthenticated, "no credentials were found", "see docs/objects.md for where they are looked for"
    if _TIMED_OUT.search(text):
        return MoveFailed, "the store did not answer in time", "raise request_timeout, or see what is wrong with it"
    if _UNREACHABLE.search(text):
        return MoveFailed, "the store cannot be reached", "check endpoint and network"
    if _CUT.search(text):
        return MoveFailed, "the connection broke", "try again"
    if isinstance(exc, ValueError):
        return InvalidArgument, "the request is malformed", "check the key"
    return MoveFailed, "the request failed", "see the store's own log"


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""
