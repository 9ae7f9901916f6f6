"""xferd measured: daemons of its own on loopback, and client processes that move bytes through them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Self

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import SCHEMES, Case, Place
from xferd.clients.bench._environment import available_nbytes
from xferd.clients.bench._flows import regions_for
from xferd.clients.bench._kinds import DIRECT, KINDS, POOLS, kind_of
from xferd.clients.bench._members import Members
from xferd.clients.bench._moves import MoveProbe
from xferd.clients.bench._probes import Probe, System
from xferd.clients.bench._vram import device_settings
from xferd.clients.bench._xferd_calls import LIST_REGION_NBYTES, Calls
from xferd.clients.nodes import Nodes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from xferd.clients.bench._flows import Need
    from xferd.clients.bench._store import Store
    from xferd.clients.nodes import Node

SLACK_NBYTES = 1 << 20
SLAB_NBYTES = 1 << 29


class Xferd(System):
    """Starts daemon "a", and "b" if cases need it, and for each case the client processes that it has.

    A transfer between nodes is asked of "b" ("decode" asks, as with a KV cache) and reaches into "a".

    Args:
        cases: all that will be asked for, so that there is memory for them.
        store: where objects are; entered and left here. None refuses them.
        settings: for the daemons, as ``xferd serve --set`` has them.
    """

    name: ClassVar[str] = "xferd"

    def __init__(self, cases: Sequence[Case], store: Store | None = None, settings: Sequence[str] = ()) -> None:
        self._store = store
        self._settings = list(settings)
        able = [case for case in cases if not self.refusal(case)]
        self._regions = regions_for(able)
        self._node_names = ["a", "b"] if any(case.place is Place.TCP for case in able) else ["a"]
        self._has_calls = any(case.place is Place.CONTROL for case in able)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        check_memory(self._regions)
        with ExitStack() as stack:
            nodes = stack.enter_context(Nodes())
            started: dict[str, Node] = {}
            for name in self._node_names:
                own = [*self._pools(name, nodes.root), *self._device_settings(), *self._store_settings(stack)]
                settings = [*own, *self._settings]
                started[name] = nodes.start(name, peers=list(started.values()), settings=settings)
            self._daemons = [node.pid for node in started.values()]
            sockets = {name: node.session_socket for name, node in started.items()}
            self._members = stack.enter_context(Members(sockets, self._regions))
            self._calls = stack.enter_context(Calls(sockets["a"], self._daemons))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def settings(self) -> dict[str, object]:
        """Return what the daemons run with: their defaults."""
        return {
            "version": self._calls.client.node().version,
            "configuration": self._settings or "defaults",
            "region_nbytes": max(self._regions.values(), default=0),
        }

    def refusal(self, case: Case) -> str:
        """Refuse what there is no such thing of."""
        if case.place is Place.LIMIT:
            return "a limit of the machine"
        if case.place is Place.CONTROL:
            return ""
        refusals = [KINDS[kind].refusal() for kind in (case.src, case.dst)]
        if any(refusals):
            return next(filter(None, refusals))
        if "OBJECT" in case.ends and self._store is None:
            return "OBJECT has no store: give one"
        if case.place is Place.TCP and case.ends[1] == "OBJECT":
            return "an OBJECT is not served to other nodes: each reaches the store by itself"
        if case.dst == "OBJECT" and case.prepared == "lists":
            return "an object is written as a whole, by lists that are of it alone"
        if case.scheme not in SCHEMES or case.op not in ("READ", "WRITE"):
            return f"{case.scheme} {case.op} is unknown"
        if case.control == "ring" and case.prepared == "no":
            return "whole lists go by gRPC"
        if case.control != "ring" and case.wait:
            return "only a ring can be waited for in several ways"
        return ""

    def probe(self, case: Case) -> Probe:
        """Return the probe of a case; starts the processes that it needs."""
        if case.place is Place.CONTROL:
            return self._calls.probe(case)
        return MoveProbe(case, self._members, self._daemons)

    def file_of(self, case: Case) -> str:
        """Return the path of the file that a case moves, which is made if it was not; "" where it moves none."""
        for need in regions_for([case]):
            if need.kind.startswith("FILE"):
                self._members.region(need)
                return str(self._members.call(need.member, "file", need.kind))
        return ""

    def _device_settings(self) -> list[str]:
        is_needed = any(kind_of(need.kind).is_device for need in self._regions)
        return device_settings() if is_needed else []

    def _store_settings(self, stack: ExitStack) -> list[str]:
        if self._store is None or not any(need.kind.startswith("OBJECT") for need in self._regions):
            return []
        return stack.enter_context(self._store).settings()

    def _pools(self, node: str, directory: Path) -> list[str]:
        """Return the settings of a daemon's pools; storage pools are in the run's directory, and go with it."""
        wanted = [f'pools=[{{name="host", nbytes={self._pool_nbytes(node)}}}]']
        here = [(need, nbytes) for need, nbytes in self._regions.items() if need.member.node == node]
        made, direct = [], []
        for name, more in POOLS.items():
            stored = sum(nbytes for need, nbytes in here if kind_of(need.kind).pool == name)
            if stored:
                path = directory / f"{node}-{name}"
                path.mkdir()
                size = f"nbytes={_slabs(stored)}, slab_nbytes={SLAB_NBYTES}"
                made.append(f'{{name="{name}", directories=[{{path="{path}"}}], {size}, {more}}}')
                direct += [f'"{path}"'] if name.endswith(DIRECT) else []
        wanted += [f"storage_pools=[{', '.join(made)}]"] if made else []
        wanted += [f"backends.posix.direct_below=[{', '.join(direct)}]"] if direct else []
        return wanted

    def _pool_nbytes(self, node: str) -> int:
        here = [(need, nbytes) for need, nbytes in self._regions.items() if need.member.node == node]
        own = sum(nbytes for need, nbytes in here if kind_of(need.kind).is_pooled)
        lists = 2 * LIST_REGION_NBYTES if self._has_calls and node == "a" else 0
        return -(-(own + lists + SLACK_NBYTES) // 4096) * 4096


def _slabs(nbytes: int) -> int:
    """Return the size of a storage pool that has room for so much, in slabs of any usual size."""
    return -(-nbytes // SLAB_NBYTES) * SLAB_NBYTES + SLAB_NBYTES


def check_memory(regions: Mapping[Need, int]) -> None:
    """Refuse to fill a machine's memory.

    Raises:
        InvalidArgument: the regions are larger than three quarters of what is free.
    """
    wanted, free = sum(regions.values()), available_nbytes()
    if wanted > free * 3 // 4:
        raise InvalidArgument(
            f"these cases need {wanted} bytes of memory",
            limit=f"three quarters of the {free} bytes that are free",
            remedy="choose smaller blocks or batches, or fewer clients or threads",
        )
