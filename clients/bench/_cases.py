"""What is measured: cases as values. The named ones are in ``_standard.py``, sweeps in ``_sweeps.py``.

Who can run a case is for the systems to say (``_probes.py``).
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from xferd.api.units import format_nbytes
from xferd.clients.bench import _kinds as kinds


class Place(enum.Enum):
    """Where source and target are to each other."""

    LOCAL = "local"  # both on one node
    TCP = "tcp"  # on two nodes, over loopback
    CONTROL = "control"  # no payload to speak of: calls and lists
    LIMIT = "limit"  # what the machine can do without a daemon


HOST_KINDS = tuple(kind.name for kind in kinds.KINDS.values() if kind.is_host)
"""Memory of the host. Systems without a daemon know one kind of it alone."""

KINDS = tuple(kinds.KINDS)
SCHEMES = ("pairwise", "many-to-one", "one-to-many", "all-to-all")
PREPARED = ("transfer", "lists", "no")
CONTROLS = ("ring", "grpc")
WAITS = ("poll", "block")
FAIRNESS = "fairness"
ORDERS = ("random", "sequential")


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure; like cases of different systems are compared.

    Attributes:
        place: which road.
        op: READ, WRITE, or the name of a call or of a limit.
        block_nbytes: bytes a block; 0 where there are none.
        batch: blocks a request.
        src: memory kind that bytes come from.
        dst: memory kind that they go to.
        scheme: which clients reach whose memory; "pairwise" is one to one.
        prepared: "transfer" posts one held transfer again and again, "lists" sends index arrays into prepared lists
            with each request, "no" builds and sends whole lists.
        control: "ring" or "grpc"; "" for what has neither.
        wait: for completions of the ring: "poll" looks at it all the time, "block" sleeps at once, "" looks a moment
            before it sleeps.
        threads: of each client, each with requests of its own.
        clients: processes on the side that there are many of.
        order: where blocks lie, "random" or "sequential".
        load: transfers of 1 GiB, LOW, that run beside; where it is not 0, and in its idle twin, requests are HIGH.
        scenario: the named question that this case belongs to, "" for none.
    """

    place: Place
    op: str
    block_nbytes: int = 0
    batch: int = 1
    src: str = "DRAM"
    dst: str = "DRAM"
    scheme: str = "pairwise"
    prepared: str = "transfer"
    control: str = ""
    wait: str = ""
    threads: int = 1
    clients: int = 1
    order: str = "random"
    load: int = 0
    scenario: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes a request."""
        return self.block_nbytes * self.batch

    @property
    def size(self) -> str:
        """Block size and batch for people, "" where there are no blocks."""
        return f"{format_nbytes(self.block_nbytes)} x {self.batch}" if self.block_nbytes else ""

    @property
    def is_move(self) -> bool:
        """Whether bytes go from one region to another."""
        return self.place in (Place.LOCAL, Place.TCP)

    @property
    def is_alone(self) -> bool:
        """Whether one request is under way at a time, so that its time is what the road can do."""
        return self.clients == self.threads == 1

    @property
    def ends(self) -> tuple[str, str]:
        """Memory kinds of (initiators, partners): a READ brings bytes to the initiator, a WRITE takes them from it."""
        return (self.dst, self.src) if self.op == "READ" else (self.src, self.dst)

    @property
    def manner(self) -> str:
        """What is not as usual, for people: ``FILE to DRAM, lists, grpc, 4 threads``."""
        parts = [
            f"{self.src} to {self.dst}" if (self.src, self.dst) != ("DRAM", "DRAM") else "",
            {"transfer": "", "lists": "lists", "no": "unprepared"}[self.prepared] if self.is_move else "",
            f"{self.control} {self.wait}".strip(),
            f"{self.threads} threads" if self.threads > 1 else "",
            f"{self.clients} clients {self.scheme}" if self.clients > 1 else "",
            self.order if self.order != "random" else "",
            f"beside {self.load} x 1GiB" if self.load else "",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """What ``--cases`` is matched with, like ``tcp/READ/64KiB x 1024``."""
        parts = (self.scenario, self.place.value, self.op, self.size, self.manner)
        return "/".join(part for part in parts if part)

    def for_peer(self) -> Case:
        """Return the case as a system without daemon, ring and pools sees it."""
        return dataclasses.replace(
            self,
            control="",
            wait="",
            src="DRAM" if self.src in HOST_KINDS else self.src,
            dst="DRAM" if self.dst in HOST_KINDS else self.dst,
        )


KIB, MIB = 1 << 10, 1 << 20

LIST_ROWS, LIST_NBYTES = 100_000, 512

NODE, ECHO = Case(Place.CONTROL, "node"), Case(Place.CONTROL, "echo")
EXPLAIN = Case(Place.CONTROL, "explain", LIST_NBYTES, LIST_ROWS, prepared="no")
MEMCPY = Case(Place.LIMIT, "memcpy", 256 * MIB, 1)
STREAM = Case(Place.LIMIT, "stream")
