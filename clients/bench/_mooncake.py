"""Mooncake: two transfer engines over its TCP transport, the one that needs no RDMA device."""

from __future__ import annotations

from typing import Any, ClassVar

from xferd.clients.bench._cases import Place
from xferd.clients.bench._peers import LOOPBACK, Peer
from xferd.clients.processes import free_ports


class Mooncake(Peer):
    """Mooncake's transfer engine; the engines find each other without a metadata server."""

    name: ClassVar[str] = "mooncake"
    driver: ClassVar[str] = "mooncake"
    distributions: ClassVar[tuple[str, ...]] = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")
    places: ClassVar[tuple[Place, ...]] = (Place.TCP,)

    def options(self, place: Place, role: str) -> dict[str, Any]:
        """Return the transport, and a name of the engine's own."""
        return {"protocol": "tcp", "host": f"{LOOPBACK}:{free_ports(1)[0]}"}

    def environ(self, place: Place) -> dict[str, str]:
        """Return nothing: the defaults are the best known."""
        return {}
