"""What the two sides of a hand-over tell each other by notification; JSON, so that any language can take part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from xferd.clients.demo.paging import Geometry


@dataclass(frozen=True, slots=True)
class CacheOffer:
    """Said once: here is my cache. ``regions`` are ids in the order of the layers, on the sender's node."""

    geometry: Geometry
    regions: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return json.dumps({"geometry": asdict(self.geometry), "regions": self.regions}).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the message; raises ``ValueError``, ``KeyError`` or ``TypeError`` if it is none."""
        message = json.loads(raw)
        return cls(Geometry(**message["geometry"]), tuple(int(region) for region in message["regions"]))


@dataclass(frozen=True, slots=True)
class Handover:
    """Said for each request: the KV of all but the last of ``tokens`` is ready.

    It is in the blocks of ``table``, or, where ``file`` is named, in that file: the same blocks, in the order of
    ``paging.block_rows``, without gaps.
    """

    tokens: tuple[int, ...]
    table: tuple[int, ...] = ()
    file: str = ""

    @property
    def cached_tokens(self) -> int:
        """Number of tokens whose keys and values are handed over."""
        return len(self.tokens) - 1

    def to_bytes(self) -> bytes:
        """Return the message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the message; raises ``ValueError``, ``KeyError`` or ``TypeError`` if it is none."""
        message = json.loads(raw)
        tokens, table = (tuple(int(number) for number in message[name]) for name in ("tokens", "table"))
        return cls(tokens, table, str(message["file"]))


TAKEN = b"taken"
"""Bound to the READ of a hand-over: its last byte has arrived, and the sender may use the blocks again."""
