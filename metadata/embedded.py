"""The default store: no service at all. Static peers exchange records directly; a node alone needs nothing.

Records come in three ways: from a static peer that was asked at its configured address, from a node that made
contact with us (``learn``), and from a blob (``load``). They live in this process only. How two nodes exchange
records is the daemon's business (``ExchangeRecords``); nothing here knows of connections.
"""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import (
    AlreadyExists,
    Closed,
    ConfigError,
    DeadlineExceeded,
    InvalidArgument,
    PeerLost,
    PeerUnknown,
    Unsupported,
)
from xferd.api.types import NodeInfo
from xferd.metadata._watching import Watch
from xferd.metadata.base import NodeChange, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.errors import XferdError
    from xferd.metadata.base import ExchangeRecords

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StaticPeer:
    """A peer of the configuration: its name, and the address ("tcp://host:port") where it is asked."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class _Entry:
    node: NodeInfo
    loaded: bool  # by a blob: stays until it is forgotten, also when the node says goodbye


class EmbeddedStore(Store):
    """Records of static peers, of nodes that made contact, and of loaded blobs.

    Args:
        peers: known by name and address before they are reached. One with this node's own name is this node, so
            that all nodes may share one list.
        exchange: gives the node at an address our record and returns its own. Without it no node can be asked.
    """

    def __init__(self, peers: Sequence[StaticPeer] = (), exchange: ExchangeRecords | None = None) -> None:
        self._exchange = exchange
        self._static = _addresses(peers)
        self._me: NodeInfo | None = None
        self._entries: dict[str, _Entry] = {}
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._closed = False

    # -- life

    async def start(self) -> None:
        """Nothing to connect to."""
        self._check_open()

    async def aclose(self) -> None:
        """End all watches and forget everything. Twice is fine."""
        self._closed = True
        self._me = None
        self._entries.clear()
        for watch in tuple(self._watches):
            watch.end()

    def health(self) -> str:
        """Return "closed" after ``aclose``; there is nothing else that could fail."""
        return "closed" if self._closed else ""

    def reload(self, peers: Sequence[StaticPeer]) -> None:
        """Replace the list of static peers; records that were exchanged stay until their node goes.

        Raises:
            ConfigError: a name twice; the list in force stays.
        """
        self._static = _addresses(peers)

    # -- our own record

    async def publish(self, node: NodeInfo) -> None:
        """Keep the record to give to whoever asks."""
        self._check_open()
        known = self._entries.get(node.name)
        if known is not None and known.node.id != node.id:
            raise AlreadyExists(
                f"node {node.name!r} is taken by the node {known.node.id} at {', '.join(known.node.addresses) or '?'}",
                remedy="give this node another node.name",
            )
        self._me = node

    async def withdraw(self) -> None:
        """Stop giving our record; that the node goes is told to peers by its connections."""
        self._check_open()
        self._me = None

    # -- the others' records

    async def get(self, name: str) -> NodeInfo:
        """Return a record, asking a static peer that was not reached yet."""
        known = self._entries.get(name)
        return known.node if known is not None else await self._ask(name, again=False)

    async def refresh(self, name: str) -> NodeInfo:
        """Ask the node itself, at its static address first and then at those of its record."""
        return await self._ask(name, again=True)

    async def list_nodes(self) -> list[NodeInfo]:
        """Return records and static peers not reached yet, by name."""
        self._check_open()
        nodes = {name: _unreached(name, address) for name, address in self._static.items()}
        nodes.update((name, entry.node) for name, entry in self._entries.items())
        if self._me is not None:
            nodes.pop(self._me.name, None)
        return [nodes[name] for name in sorted(nodes)]

    def watch(self, name: str = "") -> Watch:
        """Watch from now on; static peers appear once they were reached."""
        self._check_open()
        watch = Watch(name)
        self._watches.add(watch)
        for entry in self._entries.values():
            watch.tell(NodeChange(entry.node.name, entry.node))
        return watch

    def learn(self, node: NodeInfo) -> None:
        """Take in the record of a node that made contact; one with our own name is refused with a log line."""
        if self._closed:
            return
        if self._me is not None and node.name == self._me.name:
            _log.warning("namesake_refused", node=node.name, their_id=node.id, our_id=self._me.id)
            return
        known = self._entries.get(node.name)
        self._take(node, loaded=known is not None and known.loaded)

    def unlearn(self, name: str, reason: str) -> None:
        """Drop the record of a node that said goodbye; one that came by a blob stays."""
        known = self._entries.get(name)
        if known is not None and not known.loaded:
            self._drop(name, reason)

    async def load(self, node: NodeInfo) -> None:
        """Take in a record that came by a blob."""
        self._check_open()
        if self._me is not None and node.name == self._me.name:
            raise InvalidArgument(
                f"the record is one of {node.name!r}, which is this node", remedy="load it on another node"
            )
        self._take(node, loaded=True)

    async def forget(self, name: str) -> None:
        """Drop a record that came by a blob."""
        self._check_open()
        known = self._entries.get(name)
        if known is None or not known.loaded:
            loaded = sorted(name for name, entry in self._entries.items() if entry.loaded)
            raise PeerUnknown(
                f"no metadata of a node {name!r} was loaded",
                limit=f"loaded: {', '.join(loaded) or 'none'}",
                remedy="only what was loaded can be forgotten; static peers are taken out of the configuration",
            )
        self._drop(name, "forgotten")

    # -- inside

    async def _ask(self, name: str, *, again: bool) -> NodeInfo:
        self._check_open()
        if self._me is not None and name == self._me.name:
            return self._me
        if name not in self._entries and name not in self._static:
            raise self._unknown(name)
        asking = self._asking.setdefault(name, asyncio.Lock())
        async with asking:
            known = self._entries.get(name)
            if known is not None and not again:
                return known.node  # whoever held the lock has asked
            node = await self._ask_addresses(name, known.node if known is not None else None)
            self._check_open()
            if node is None:
                raise self._unknown(name)
            self.learn(node)
            return node

    async def _ask_addresses(self, name: str, known: NodeInfo | None) -> NodeInfo | None:
        """Exchange records with the first address that answers; falls back on ``known`` where nobody can be asked."""
        static = self._static.get(name)
        addresses = dict.fromkeys(([static] if static else []) + list(known.addresses if known is not None else ()))
        if not addresses or (self._exchange is None and known is not None):
            return known
        if self._exchange is None or self._me is None:
            raise Unsupported(
                f"peer {name!r} is configured, but this node has nothing to reach it with",
                remedy="configure [backends.tcp] with a secret_file",
            )
        failures: list[XferdError] = []
        for address in addresses:
            try:
                node = await self._exchange(address, self._me)
            except (PeerLost, DeadlineExceeded) as exc:
                failures.append(exc)
                continue
            if node.name == name:
                # The address that just answered goes first: what a node believes its address to be may not lead there.
                return replace(node, addresses=tuple(dict.fromkeys((address, *node.addresses))))
            failures.append(
                PeerUnknown(
                    f"the node at {address} is {node.name!r}, not {name!r}",
                    remedy="correct metadata.embedded.peers, or the node's node.name",
                )
            )
        if len(failures) == 1 and isinstance(failures[0], PeerUnknown):
            raise failures[0]
        told = "; ".join(failure.message for failure in failures)
        raise PeerLost(
            f"node {name!r} answers at none of its addresses: {told}", remedy="check that it runs and listens there"
        ) from failures[-1]

    def _take(self, node: NodeInfo, *, loaded: bool) -> None:
        entry = _Entry(node, loaded)
        known = self._entries.get(node.name)
        self._entries[node.name] = entry
        if known is None or known.node != node:
            self._tell(NodeChange(node.name, node))

    def _drop(self, name: str, reason: str) -> None:
        del self._entries[name]
        self._tell(NodeChange(name, None, reason))

    def _tell(self, change: NodeChange) -> None:
        for watch in tuple(self._watches):
            watch.tell(change)

    def _unknown(self, name: str) -> PeerUnknown:
        known = sorted({*self._entries, *self._static})
        return PeerUnknown(
            f"node {name!r} is not known here",
            limit=f"known nodes: {', '.join(known) or 'none'}",
            remedy="add it to metadata.embedded.peers, load its metadata, or let it make contact",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the metadata store is closed")


def _addresses(peers: Sequence[StaticPeer]) -> dict[str, str]:
    addresses: dict[str, str] = {}
    for peer in peers:
        if not peer.name or not peer.address:
            raise ConfigError(f"static peer {peer.name!r} at {peer.address!r} lacks a name or an address")
        if peer.name in addresses:
            raise ConfigError(
                f"static peer {peer.name!r} is configured twice: {addresses[peer.name]} and {peer.address}",
                remedy="keep one of them in metadata.embedded.peers",
            )
        addresses[peer.name] = peer.address
    return addresses


def _unreached(name: str, address: str) -> NodeInfo:
    return NodeInfo(
        name=name,
        id="",
        epoch=0,
        version="",
        addresses=(address,),
        backends=(),
        kinds=(),
        agents=(),
        started_at=0.0,
    )
