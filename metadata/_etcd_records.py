"""Between keys and values in etcd, and nodes: what is written for a node, and what others wrote, read with care."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import LimitExceeded
from xferd.metadata.records import MAX_RECORD_NBYTES, agent_from_bytes, agent_to_bytes, node_from_bytes, node_to_bytes

if TYPE_CHECKING:
    from xferd.api.types import NodeInfo
    from xferd.metadata.keys import Keys


MAX_TOLD = 4096
"""Skipped keys to remember, so that each is logged once and not at every reading."""

_log = structlog.get_logger(__name__)


def encode_node(keys: Keys, node: NodeInfo) -> dict[bytes, bytes]:
    """Return all keys of a node with their values, its record first.

    Raises:
        LimitExceeded: the record is larger than a reader takes.
    """
    record = node_to_bytes(replace(node, agents=()))
    if len(record) > MAX_RECORD_NBYTES:
        raise LimitExceeded(
            f"the record of node {node.name!r} has {len(record)} bytes",
            limit=f"{MAX_RECORD_NBYTES} bytes",
            remedy="give the node fewer addresses or backends",
        )
    found = {keys.node(node.name).encode(): record}
    for agent in node.agents:
        found[keys.agent(node.name, agent).encode()] = agent_to_bytes(node.name, agent)
    return found


def assemble(record: NodeInfo, agents: set[str]) -> NodeInfo:
    """Return the node as readers see it: its record with all its agents, by name."""
    return replace(record, agents=tuple(sorted({*record.agents, *agents})))


class Decoder:
    """Reads keys and values; what is not ours to understand is skipped, with one log line a key and change."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._told: OrderedDict[bytes, int] = OrderedDict()

    def decode(self, key: bytes, value: bytes, mod_revision: int) -> tuple[str, NodeInfo | str] | None:
        """Return the node's name and the key's content, None where it has none that can be used."""
        if self._told.get(key) == mod_revision:
            return None
        found = self._decode(key, value)
        if found is None:
            self._told[key] = mod_revision
            self._told.move_to_end(key)
            if len(self._told) > MAX_TOLD:
                self._told.popitem(last=False)
        return found

    def name_of(self, key: bytes) -> str | None:
        """Return the node that a key belongs to, None for a key of another sort."""
        parsed = self._keys.parse(key.decode(errors="replace"))
        return parsed[0] if parsed is not None else None

    def _decode(self, key: bytes, value: bytes) -> tuple[str, NodeInfo | str] | None:
        where = key.decode(errors="replace")
        parsed = self._keys.parse(where)
        if parsed is None:
            _log.warning("record_skipped", where=where, nbytes=len(value), problem="no key of this xferd")
            return None
        name, agent = parsed
        if agent:
            named = agent_from_bytes(value, where=where)
            if named is not None and named != parsed:
                _log.warning("record_skipped", where=where, problem=f"says it is {named[1]!r} of node {named[0]!r}")
                return None
            return (name, agent) if named is not None else None
        node = node_from_bytes(value, where=where)
        if node is not None and node.name != name:
            _log.warning("record_skipped", where=where, problem=f"says it is node {node.name!r}")
            return None
        return (name, node) if node is not None else None
