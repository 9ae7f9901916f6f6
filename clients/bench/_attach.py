"""Attaching by a chosen control plane: the shared-memory ring, or gRPC alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.clients.sync import Client

if TYPE_CHECKING:
    from pathlib import Path

SPIN_US = {"poll": 1e6, "block": 0.0}
"""How long a client looks at its ring before it sleeps; otherwise as long as the client does by itself."""


def attach(session_socket: Path, agent: str, control: str, wait: str = "") -> Client:
    """Attach, with prepared transfers over the ring or all over gRPC.

    Raises:
        Unsupported: the daemon gives no ring.
    """
    if control != "ring":
        return Client.connect(session_socket, agent, ring=False)
    if wait in SPIN_US:
        return Client.connect(session_socket, agent, ring=True, spin_us=SPIN_US[wait])
    return Client.connect(session_socket, agent, ring=True)
