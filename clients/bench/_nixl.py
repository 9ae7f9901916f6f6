"""NIXL: two agents with the backend UCX, by shared memory or over TCP."""

from __future__ import annotations

from typing import Any, ClassVar

from xferd.clients.bench._cases import Place
from xferd.clients.bench._peers import Peer


class Nixl(Peer):
    """NIXL with UCX's own choice of transports on one machine, and with TCP alone between "nodes".

    Settings are the best known. The initiator has no progress thread: it polls for the end of its transfer anyway,
    which makes progress too, and the thread would take a core from it. Measured on two cores: up to twice as fast as
    with NIXL's defaults (``NixlDefault``).
    """

    name: ClassVar[str] = "nixl"
    driver: ClassVar[str] = "nixl"
    distributions: ClassVar[tuple[str, ...]] = ("nixl-cu12", "nixl-cu13")
    places: ClassVar[tuple[Place, ...]] = (Place.LOCAL, Place.TCP)

    def options(self, place: Place, role: str) -> dict[str, Any]:
        """Return the module of the wheel, and the agent's configuration."""
        name, _ = self.installed() or (self.distributions[0], "")
        return {"module": name.replace("-", "_"), "agent": self.agent(role)}

    def agent(self, role: str) -> dict[str, Any]:
        """Return the arguments of ``nixl_agent_config``."""
        return {"enable_prog_thread": role == "target"}

    def environ(self, place: Place) -> dict[str, str]:
        """Return UCX's transports: chosen by itself, which includes shared memory and CMA, or TCP on loopback."""
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"} if place is Place.TCP else {}


class NixlDefault(Nixl):
    """NIXL as it comes: nothing is set but ``UCX_TLS=tcp`` between "nodes"."""

    name: ClassVar[str] = "nixl-default"

    def agent(self, role: str) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def environ(self, place: Place) -> dict[str, str]:
        """Return UCX's transports, between "nodes" only."""
        return {"UCX_TLS": "tcp"} if place is Place.TCP else {}
