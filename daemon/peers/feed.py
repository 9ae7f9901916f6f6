"""Tells who follows peers of every change: the newest state of each peer, however slow the reader is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.api.types import PeerInfo


class PeerFeed:
    """All readers; ``tell`` is called for each change, and costs nothing where nobody reads."""

    def __init__(self) -> None:
        self._readers: set[PeerReader] = set()
        self._closed = False

    def open(self, name: str, present: Iterable[PeerInfo]) -> PeerReader:
        """Return a reader of all peers or of one, which begins with those that are there. ``close`` it."""
        reader = PeerReader(name)
        for info in present:
            reader.tell(info)
        if self._closed:
            reader.end()
        else:
            self._readers.add(reader)
        return reader

    def close(self, reader: PeerReader) -> None:
        """Let go of a reader. Twice is fine."""
        self._readers.discard(reader)

    def names(self) -> set[str]:
        """Return the names that are followed one by one."""
        return {reader.name for reader in self._readers if reader.name}

    def __bool__(self) -> bool:
        return bool(self._readers)

    def tell(self, info: PeerInfo) -> None:
        """Hand a change to those who follow its peer."""
        for reader in self._readers:
            reader.tell(info)

    def end(self) -> None:
        """End all readers, after what they have not read yet."""
        self._closed = True
        for reader in self._readers:
            reader.end()
        self._readers.clear()


class PeerReader:
    """What one reader has not read yet: at most one entry a peer, which a later change replaces."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._unread: dict[str, PeerInfo] = {}
        self._news = asyncio.Event()
        self._ended = False

    def tell(self, info: PeerInfo) -> None:
        """Take a change, if it is of the peer that is followed."""
        if self.name in ("", info.node.name):
            self._unread[info.node.name] = info
            self._news.set()

    def end(self) -> None:
        """Nothing comes after what is unread."""
        self._ended = True
        self._news.set()

    async def next(self) -> PeerInfo | None:
        """Wait for the next change; None when there will be none. Cancel-safe."""
        while not self._unread:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._unread.pop(next(iter(self._unread)))
