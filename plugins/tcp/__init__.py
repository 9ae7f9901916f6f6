"""Node to node over TCP: framed protocol, authenticated handshake, lanes. ``docs/protocol.md`` describes it."""

from xferd.plugins.tcp.backend import TcpBackend
from xferd.plugins.tcp.options import TcpOptions

__all__ = ["TcpBackend", "TcpOptions"]
