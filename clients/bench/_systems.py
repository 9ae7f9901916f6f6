"""The systems that a run can have beside xferd, by name, and what to do where one is missing."""

from __future__ import annotations

import shutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xferd.api.errors import Unsupported
from xferd.clients.bench import _fio as fio
from xferd.clients.bench._cases import Case
from xferd.clients.bench._flows import regions_for
from xferd.clients.bench._gpu_copy import GpuCopy
from xferd.clients.bench._kinds import KINDS
from xferd.clients.bench._limits import Iperf3, Memcpy
from xferd.clients.bench._obstore import Obstore
from xferd.clients.bench._plan import stand_in_for
from xferd.clients.bench._preadv import Preadv
from xferd.clients.bench._standard import with_references
from xferd.clients.bench._store import Store
from xferd.clients.bench._xferd import Xferd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.clients.bench._probes import System

PEERS = {
    "nixl": "Nixl",
    "nixl-default": "NixlDefault",
    "nixl-posix": "NixlPosix",
    "nixl-vram": "NixlVram",
    "nixl-vram-get": "NixlVramGet",
    "mooncake": "Mooncake",
}
"""Other transfer engines: the module is named like the engine, and is loaded only when asked for."""

NAMES = (*PEERS, "memcpy", "iperf3", "fio", "preadv", "obstore", "gpu-copy")


def names_for(against: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the systems that are run beside xferd.

    Args:
        against: names; ("available",) for all that are installed, ("none",), or None for the limits of the machine.
    """
    if against is None:
        return tuple(name for name in ("memcpy", "iperf3") if not missing(name))
    if against == ("available",):
        return tuple(name for name in NAMES if not missing(name))
    return () if against == ("none",) else against


def missing(name: str) -> str:
    """Return what to install for a system, "" if it is there."""
    if name == "iperf3":
        return "" if shutil.which("iperf3") else "iperf3 is not installed: install your system's package iperf3"
    if name == "fio":
        return "" if shutil.which("fio") else fio.MISSING
    if name == "obstore":
        return KINDS["OBJECT"].refusal()
    if name in PEERS and _peer(name).installed() is None:
        return f"{name} is not installed: pip install 'xferd[peers]'"
    return ""


def systems_for(
    cases: Sequence[Case], names: Sequence[str], store: Store | None = None, settings: Sequence[str] = ()
) -> list[System]:
    """Return xferd and the named systems, with memory for these cases; none is started yet.

    Args:
        cases: all that will be asked for.
        names: of the systems beside xferd.
        store: where objects are; None takes a server of its own.
        settings: for xferd's daemons.

    Raises:
        Unsupported: one of them is not installed.
    """
    for name in names:
        if why := missing(name):
            raise Unsupported(why)
    xferd = Xferd(cases, store := store or Store(), settings)
    makers: dict[str, Callable[[], System]] = {
        "memcpy": lambda: Memcpy(region_for(cases)),
        "iperf3": Iperf3,
        "fio": lambda: fio.Fio(xferd.file_of),
        "preadv": lambda: _sized(Preadv, cases),
        "obstore": lambda: Obstore(store),
        "gpu-copy": lambda: _sized(GpuCopy, cases),
    }
    beside = [makers[name]() if name in makers else _sized(_peer(name), cases) for name in names]
    return [*beside, xferd]


def region_for(cases: Sequence[Case]) -> int:
    """Return the bytes of each region of a system that has one on each side: as xferd's largest, and the limits'."""
    own = max(regions_for(cases).values(), default=0)
    limits = max((case.nbytes for case in cases if not case.is_move), default=0)
    wanted = max(own, limits, 4096)
    return -(-wanted // 4096) * 4096


def _sized(make: Callable[[int], System], cases: Sequence[Case]) -> System:
    """Return a system with memory for the cases that it will run: what is large for another's sake costs it nothing."""
    system = make(0)
    able = [case for case in cases if isinstance(stand_in_for(system, case), Case)]
    return make(min(region_for(cases), region_for(with_references(able))))


def _peer(name: str) -> Any:  # a class of Peer's: loaded by name
    return getattr(import_module(f"xferd.clients.bench._{name.partition('-')[0]}"), PEERS[name])
