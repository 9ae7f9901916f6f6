"""etcd's data as the store's modules pass it around, free of the client library (``_etcd_rpc.py``)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from urllib.parse import urlsplit

ALL_KEYS_END = b"\0"
"""As the end of a range, etcd reads this as "to the last key there is"."""


def prefix_range_end(prefix: bytes) -> bytes:
    """Return the first key after all those that begin with ``prefix``.

    The last byte that can grow grows, and what followed it goes: kept 0xff bytes would let foreign keys into the range.
    """
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return ALL_KEYS_END
    return stem[:-1] + bytes((stem[-1] + 1,))


def full_jitter(attempt: int, cap_s: float) -> float:
    """Return a random delay in seconds before the given attempt, so that nodes that failed together return apart."""
    return random.uniform(0.0, min(cap_s, 0.25 * 2.0 ** min(attempt, 16)))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one member of an etcd cluster listens. ``tls`` is None where the text does not say."""

    host: str
    port: int
    tls: bool | None = None

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read "host:port", "[v6]:port", "http://..." or "https://...".

        Raises:
            ValueError: it is none of these; the message names the text.
        """
        scheme, separator, rest = text.partition("://")
        tls = {"http": False, "https": True}.get(scheme) if separator else None
        parts = urlsplit(f"//{rest if separator else text}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if (separator and tls is None) or not parts.hostname or not port or parts.path or parts.query or "@" in text:
            raise ValueError(f"endpoint {text!r} is neither host:port, http://host:port nor https://host:port")
        return cls(parts.hostname, port, tls)

    def __str__(self) -> str:
        """Return "host:port", with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it lies in etcd. ``lease`` is 0 where it has none, and then nobody's death removes it."""

    key: bytes
    value: bytes
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a range at one revision of one cluster."""

    cluster_id: int
    revision: int
    items: tuple[KeyValue, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch; ``value`` is None where the key was deleted at ``mod_revision``."""

    key: bytes
    value: bytes | None
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """What etcd says about one watch. ``cancelled`` is "" unless etcd ended it, and then says why.

    ``compacted`` is the oldest revision that can still be watched, where that is the reason, else 0.
    """

    watch_id: int
    revision: int
    changes: tuple[Change, ...]
    cancelled: str = ""
    compacted: int = 0


@dataclass(frozen=True, slots=True)
class Guard:
    """A transaction goes ahead only if the key's last change was at this revision; 0: it is absent."""

    key: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class TxnResult:
    """``present`` is the guarded key as it is, where the guard did not hold; None: it is absent."""

    ok: bool
    revision: int
    present: KeyValue | None
