"""The names of keys in a shared store, built here and nowhere else.

    <prefix>/v1/nodes/<node>/record            one record a node, under the node's lease
    <prefix>/v1/nodes/<node>/agents/<agent>    one small record an agent, under the same lease
    <prefix>/v1/blobs/<node>/<label>           metadata blobs that a node offers, under the same lease

All that a watcher of one node wants has one prefix, so it is one watch, and one change of a node is one message.
Names are percent-encoded, so that no node or agent can be named into another's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one prefix; two clusters share a store by having different prefixes."""

    prefix: str = "/xferd"

    @property
    def nodes(self) -> str:
        """The prefix of all nodes' keys."""
        return f"{self.prefix}/v1/nodes/"

    def of_node(self, name: str) -> str:
        """Return the prefix of a node's record and of its agents; "" gives that of all nodes."""
        return f"{self.nodes}{quote(name, safe='')}/" if name else self.nodes

    def node(self, name: str) -> str:
        """Return the key of a node's record."""
        return f"{self.of_node(name)}record"

    def agents_of(self, node: str) -> str:
        """Return the prefix of the keys of one node's agents."""
        return f"{self.of_node(node)}agents/"

    def agent(self, node: str, agent: str) -> str:
        """Return the key of an agent's record."""
        return self.agents_of(node) + quote(agent, safe="")

    def blob(self, node: str, label: str) -> str:
        """Return the key of a metadata blob."""
        return f"{self.prefix}/v1/blobs/{quote(node, safe='')}/{quote(label, safe='')}"

    def parse(self, key: str) -> tuple[str, str] | None:
        """Return (node, "") for a node's record and (node, agent) for an agent's; None for a key of another sort."""
        encoded = key.removeprefix(self.nodes)
        if encoded == key:
            return None
        match encoded.split("/"):
            case [node, "record"] if node:
                return unquote(node), ""
            case [node, "agents", agent] if node and agent:
                return unquote(node), unquote(agent)
        return None

    def node_name(self, key: str) -> str | None:
        """Return the node whose record lies under a key, None for a key of another sort."""
        parsed = self.parse(key)
        return parsed[0] if parsed is not None and not parsed[1] else None
