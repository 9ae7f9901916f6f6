"""Which keys an object may have. What a store would take as another key than was meant is refused, not mended."""

from __future__ import annotations

import re

from xferd.api.errors import InvalidArgument

MAX_KEY_NBYTES = 1024
"""As S3 has it; Azure and Google take 1024 characters and bytes."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_key(key: str) -> str:
    """Return the key if every store can hold an object of exactly this key.

    Raises:
        InvalidArgument: empty or too long, a segment that is empty, "." or "..", a control character, or text that is
            no Unicode.
    """
    reason = _fault_of(key)
    if reason:
        raise InvalidArgument(
            f"object key {_shown(key)} {reason}",
            limit=f"1 to {MAX_KEY_NBYTES} bytes of UTF-8; segments between slashes that are not empty, '.' or '..'; "
            "no control characters",
            remedy="choose another key, or encode what you put into it",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return the beginning of keys to list by; "" is all of them.

    Raises:
        InvalidArgument: no key could begin so.
    """
    if prefix:
        check_key(prefix.removesuffix("/") or prefix)
    return prefix


def _fault_of(key: str) -> str:
    try:
        nbytes = len(key.encode())
    except UnicodeEncodeError:
        return "is no Unicode text"
    if not 0 < nbytes <= MAX_KEY_NBYTES:
        return f"has {nbytes} bytes"
    if _CONTROL.search(key):
        return "has a control character"
    segments = key.split("/")
    if "" in segments:
        return "begins or ends with a slash, or has two in a row"
    if "." in segments or ".." in segments:
        return "has a segment '.' or '..'"
    return ""


def _shown(key: str) -> str:
    text = ascii(key)
    return text if len(text) <= 100 else f"{text[:97]}...'"
