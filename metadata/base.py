"""The store interface: how nodes learn of each other. One module per store implements it; no implementation here.

A store carries node records and, as part of them, agents; it never carries regions, which are asked from their
node (``daemon/peers``). ``tests/conformance/check_store.py`` is what a store must pass.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from xferd.api.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from xferd.api.types import NodeInfo

    ExchangeRecords = Callable[[str, NodeInfo], Awaitable[NodeInfo]]
    """Gives the node at an address our record and returns its own; the daemon supplies it."""


@dataclass(frozen=True, slots=True)
class NodeChange:
    """What a watcher is told. ``node`` is None when the record has gone; then ``reason`` says why."""

    name: str
    node: NodeInfo | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """How long our lease has left: by our clock since we asked for its renewal, and as the store counts it.

    The store counts whole seconds, rounded down, and from a moment after ours: without a fault in a clock ``theirs_s``
    is from one second less than ``ours_s`` up to a request's time more; after a change of etcd's leader up to the TTL.
    """

    ttl_s: float
    ours_s: float
    theirs_s: float


class NodeWatch(Protocol):
    """Changes one by one; ends when it or the store is closed."""

    def __aiter__(self) -> NodeWatch:
        """Return itself."""
        ...

    async def __anext__(self) -> NodeChange:
        """Wait for the next change. Cancel-safe."""
        ...

    async def aclose(self) -> None:
        """Let go of it; it may cost the store something. Twice is fine."""
        ...


class Store(abc.ABC):
    """Records of nodes.

    Must meet its deadline, and may fail: ``publish``, ``withdraw``, ``get``, ``refresh``, ``list_nodes``.
    Must never fail, and heals itself: ``watch``.
    """

    watches_all: ClassVar[bool] = True
    """Whether watching all nodes costs nothing, because records come from the nodes themselves. A store that serves
    many nodes says False: then the daemon watches by name those that it deals with."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Connect. A store that is away at start is no error: ``health`` says so and the store goes on trying."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Withdraw what was published if that can be done quickly, and release everything. Twice is fine."""

    @abc.abstractmethod
    async def publish(self, node: NodeInfo) -> None:
        """Make this node's record known, and keep it so; a record equal to the last one costs nothing.

        Raises:
            AlreadyExists: another live node has the name.
        """

    @abc.abstractmethod
    async def withdraw(self) -> None:
        """Take the record back; peers see the node go at once."""

    @abc.abstractmethod
    async def get(self, name: str) -> NodeInfo:
        """Return a node's record.

        Raises:
            PeerUnknown: no node of this name is known; the message names those that are.
        """

    async def refresh(self, name: str) -> NodeInfo:
        """Return a node's record as it is now, past anything cached; called when a peer did not answer as recorded.

        A store that a watch keeps current need not override it. Raises like ``get``, and ``PeerLost`` where the
        node itself has to be asked and does not answer.
        """
        return await self.get(name)

    def learn(self, node: NodeInfo) -> None:  # noqa: B027 -- a store with a source of truth ignores it
        """Be told the record of a node that made contact and proved its name. Must not block."""

    def unlearn(self, name: str, reason: str) -> None:  # noqa: B027 -- as above
        """Be told that a node said goodbye. Must not block; a name that is not known is fine."""

    @abc.abstractmethod
    async def list_nodes(self) -> list[NodeInfo]:
        """Return all known records but our own, by name.

        A node that is known by name and address only, because it was not reached yet, has the epoch 0.
        """

    @abc.abstractmethod
    def watch(self, name: str = "") -> NodeWatch:
        """Yield the present record(s), then every change, until the store is closed; "" watches all nodes."""

    @abc.abstractmethod
    async def load(self, node: NodeInfo) -> None:
        """Take in a record that came by other means (a blob), replacing what was known of that node."""

    @abc.abstractmethod
    async def forget(self, name: str) -> None:
        """Drop a record that came by ``load``.

        Raises:
            PeerUnknown: there is none.
        """

    async def put_blob(self, label: str, blob: bytes) -> None:
        """Keep a blob under a label of this node for as long as the node lives; replaces an earlier one.

        Raises:
            Unsupported: this store keeps none.
        """
        raise _no_blobs(label)

    async def get_blob(self, node: str, label: str) -> bytes:
        """Return the blob that a node keeps under a label.

        Raises:
            Unsupported: this store keeps none.
            NotFound: the node keeps none under this label.
        """
        raise _no_blobs(label)

    async def drop_blob(self, label: str) -> None:
        """Take a blob of this node back.

        Raises:
            Unsupported: this store keeps none.
            NotFound: this node keeps none under this label.
        """
        raise _no_blobs(label)

    @abc.abstractmethod
    def health(self) -> str:
        """Return "" when the store works, else what is wrong and since when."""

    async def lease_view(self) -> LeaseView | None:
        """Compare clocks by means of our lease; None where the store has no leases or we hold none now.

        Raises:
            Unavailable: the store is away.
        """
        return None

    def statistics(self) -> Mapping[str, float]:
        """Return the store's own counters by name, for metrics; names are fixed and few."""
        return {}


def _no_blobs(label: str) -> Unsupported:
    return Unsupported(
        f"the metadata store keeps no blobs, so that none can be under the label {label[:80]!r}",
        remedy='set metadata.store = "etcd", or carry the blob of an export by other means',
    )
