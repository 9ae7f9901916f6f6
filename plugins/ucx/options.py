"""The configuration section ``[backends.ucx]``."""

from __future__ import annotations

from pydantic import Field, field_validator

from xferd.plugins.options import Nbytes, Options, Seconds

RNDV_THRESHOLD = "8000"
"""Larger messages are moved only once their receiver is ready (rendezvous). Smaller ones fit one fragment of every
transport, so that no receive is ever left half done by a sender that went away."""

HOST_TRANSPORTS = "^cuda"
"""All but those for GPUs, which would make a CUDA context in the daemon; what is moved here lies in host memory."""


class UcxOptions(Options):
    """``[backends.ucx]``: which fabric, and how its thread waits. UCX reads ``UCX_*`` of the environment as well."""

    library: str = Field("", description="path of libucp.so.0; empty: the system's, or else that of the extra")
    transports: str = Field("", description='UCX_TLS, such as "rc,sm,self" or "tcp"; empty: all for host memory')
    devices: str = Field("", description='UCX_NET_DEVICES, such as "mlx5_0:1"; empty: all')
    settings: dict[str, str] = Field({}, description='other settings of UCX by name without "UCX_"')
    slots: int = Field(4, ge=1, le=64, description="chunks at once to or from each peer")
    servers: int = Field(8, ge=1, le=256, description="chunks of peers served at once: threads")
    spin_us: int = Field(0, ge=0, le=1_000_000, description="how long the thread looks for events before it sleeps")
    bandwidth: Nbytes = Field(5 << 30, ge=1 << 20, description="bytes/s assumed of the fabric until it was measured")
    max_descriptors: int = Field(1 << 19, ge=1, le=1 << 19, description="most rows of one chunk, on either side")
    keepalive: Seconds = Field(2.0, gt=0, description="how often UCX looks whether a peer is still there")
    abort_grace: Seconds = Field(0.5, description="how long a cancelled chunk may go on before its endpoint is cut")
    quiesce_timeout: Seconds = Field(5.0, gt=0, description="how long a peer may take to confirm that a chunk rests")
    connect_timeout: Seconds = Field(5.0, gt=0, description="how long a peer may take to open an endpoint")

    @field_validator("settings")
    @classmethod
    def _names_are_bare(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name.startswith("UCX_") or not name.replace("_", "").isalnum():
                raise ValueError(f'{name!r} is no name of a setting of UCX, without "UCX_"')
        return value

    def ucx_settings(self) -> dict[str, str]:
        """Return the settings to give to UCX; those that only newer versions know are not among them."""
        chosen = {
            "TLS": self.transports or HOST_TRANSPORTS,
            "RNDV_THRESH": RNDV_THRESHOLD,
            "KEEPALIVE_INTERVAL": f"{int(self.keepalive * 1e6)}us",
        }
        if self.devices:
            chosen["NET_DEVICES"] = self.devices
        return chosen | self.settings
