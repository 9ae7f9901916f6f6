"""Who this daemon is: name, a random id, and an epoch that grows at each start."""

from __future__ import annotations

import contextlib
import time
import uuid
from importlib import metadata
from typing import TYPE_CHECKING

from xferd.api.types import MemoryKind, NodeInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

EPOCH_FILE = "epoch"
ID_FILE = "node-id"


def next_epoch(run_dir: Path, now_ms: int | None = None) -> int:
    """Return an epoch greater than that of the last start, and remember it.

    It is the present time in milliseconds, so that it grows also where the run directory was wiped by a reboot; the
    file covers a clock that was set back meanwhile.
    """
    path = run_dir / EPOCH_FILE
    last = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = int(path.read_text())
    epoch = max(last + 1, time.time_ns() // 1_000_000 if now_ms is None else now_ms)
    path.write_text(f"{epoch}\n")
    return epoch


def lasting_id(run_dir: Path) -> str:
    """Return the node's random id, made at its first start and kept in the run directory.

    It tells others a restart of this node, which may take its name over at once, from another node of the same name.
    """
    path = run_dir / ID_FILE
    with contextlib.suppress(FileNotFoundError, ValueError):
        return uuid.UUID(path.read_text().strip()).hex
    made = uuid.uuid4().hex
    path.write_text(f"{made}\n")
    return made


class Identity:
    """This node's record. Name, id and epoch never change; addresses, agents and whether it drains do.

    Args:
        node_id: what ``lasting_id`` gave; "" makes one for this start only.
        agents: the agents that are attached at present.
    """

    def __init__(
        self,
        name: str,
        epoch: int,
        backends: Iterable[str],
        agents: Callable[[], tuple[str, ...]],
        *,
        node_id: str = "",
    ) -> None:
        self.name = name
        self.id = node_id or uuid.uuid4().hex
        self.epoch = epoch
        self.draining = False
        self.addresses: tuple[str, ...] = ()
        self.kinds: tuple[MemoryKind, ...] = (MemoryKind.DRAM, MemoryKind.FILE)
        self.started_at = time.time()
        self._backends = tuple(backends)
        self._agents = agents
        self._version = metadata.version("xferd")

    def info(self) -> NodeInfo:
        """Return the record as it is now."""
        return NodeInfo(
            name=self.name,
            id=self.id,
            epoch=self.epoch,
            version=self._version,
            addresses=self.addresses,
            backends=self._backends,
            kinds=self.kinds,
            agents=self._agents(),
            started_at=self.started_at,
            draining=self.draining,
        )
