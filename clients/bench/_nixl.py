"""NIXL: two agents with the backend UCX, by shared memory or over TCP."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from xferd.clients.bench._cases import Place
from xferd.clients.bench._flows import kinds_of
from xferd.clients.bench._kinds import nameless_file
from xferd.clients.bench._peers import Peer
from xferd.clients.bench._vram import has_driver

if TYPE_CHECKING:
    from xferd.clients.bench._cases import Case
    from xferd.clients.memory import ByteArray


class Nixl(Peer):
    """NIXL with UCX's own choice of transports on one machine, and with TCP alone between "nodes".

    Settings are the best known. The initiator has no progress thread: it polls for the end of its transfer anyway,
    which makes progress too, and the thread would take a core from it. NIXL's defaults are measured beside it
    (``NixlDefault``).
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


class NixlVram(NixlDefault):
    """NIXL as it comes, with memory of a GPU on either side or both: cupy's."""

    name: ClassVar[str] = "nixl-vram"
    places: ClassVar[tuple[Place, ...]] = (Place.LOCAL,)
    answer_timeout_s: ClassVar[float] = 120.0

    def kinds(self, case: Case) -> tuple[str, str]:
        """Return those of the case; without a GPU, memory of the host in their place."""
        names = kinds_of(case)
        return names if has_driver() else ("DRAM", "DRAM")

    def refusal(self, case: Case) -> str:
        """Take pairs of processes of which one has memory of a GPU at least."""
        kinds = {case.src, case.dst}
        if case.place is not Place.LOCAL or case.scheme != "pairwise" or kinds not in ({"VRAM"}, {"VRAM", "DRAM"}):
            return "it is measured for memory of a GPU on one node"
        return "" if self.installed() else self._missing()


class NixlVramGet(NixlVram):
    """The same with UCX's zero-copy get by CUDA IPC, which is off by default and makes its READ many times as fast."""

    name: ClassVar[str] = "nixl-vram-get"

    def environ(self, place: Place) -> dict[str, str]:
        """Return the one setting."""
        return {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}


class NixlPosix(Nixl):
    """NIXL's backend for files, with io_uring, which was the quickest of its three ways here. Needs one process only.

    The file is one without a name, in the directory of temporary files.
    """

    name: ClassVar[str] = "nixl-posix"
    driver: ClassVar[str] = "nixl-posix"
    places: ClassVar[tuple[Place, ...]] = (Place.LOCAL,)

    def options(self, place: Place, role: str) -> dict[str, Any]:
        """Return the module of the wheel, and the backend's parameters."""
        name, _ = self.installed() or (self.distributions[0], "")
        return {"module": name.replace("-", "_"), "backend": {"use_uring": "true"}}

    def environ(self, place: Place) -> dict[str, str]:
        """Return nothing: there is no transport."""
        return {}

    def refusal(self, case: Case) -> str:
        """Take what goes between a file in the page cache and memory of the host, as one prepared transfer."""
        if case.place is not Place.LOCAL or case.ends != ("DRAM", "FILE") or case.prepared != "transfer":
            return "it moves between a file in the page cache and memory, by prepared transfers"
        return "" if self.installed() else self._missing()

    def _make_far(self) -> tuple[int, ByteArray]:
        """Return a file in place of the other side's memory."""
        with nameless_file(self._region_nbytes) as (fd, memory):
            return os.dup(fd), memory
