"""Moved to ``xferd.clients.nodes`` (the benchmark starts daemons too): import it from there; this name will go."""

from xferd.clients.nodes import Cluster, Node, NodeFailed, NodeSpec, free_addresses

__all__ = ["Cluster", "Node", "NodeFailed", "NodeSpec", "free_addresses"]
