"""The names of keys in a shared store, built here and nowhere else.

    <prefix>/v1/nodes/<node>             one record a node, under the node's lease
    <prefix>/v1/agents/<node>/<agent>    one small record an agent, under the same lease

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

    @property
    def agents(self) -> str:
        """The prefix of all agents' keys."""
        return f"{self.prefix}/v1/agents/"

    def node(self, name: str) -> str:
        """Return the key of a node's record."""
        return self.nodes + quote(name, safe="")

    def agents_of(self, node: str) -> str:
        """Return the prefix of the keys of one node's agents."""
        return f"{self.agents}{quote(node, safe='')}/"

    def agent(self, node: str, agent: str) -> str:
        """Return the key of an agent's record."""
        return self.agents_of(node) + quote(agent, safe="")

    def node_name(self, key: str) -> str | None:
        """Return the node whose record lies under a key, None for a key of another sort."""
        encoded = key.removeprefix(self.nodes)
        if encoded == key or not encoded or "/" in encoded:
            return None
        return unquote(encoded)
