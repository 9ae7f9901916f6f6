"""What a process knows of its run, from the changes of etcd's keys, and how values are cut to fit into keys."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xferd.clients.bench._coordination_etcd import Change

PART_NBYTES = 512 << 10
"""A value is written in parts of this size: etcd refuses requests above 1.5 MiB, and the gateway adds a third."""


class Board:
    """What is known of one run, from its keys in the order in which etcd changed them. No I/O: ``see`` is told.

    Args:
        prefix: of all runs of this name.
        run: id of this one.
    """

    def __init__(self, prefix: str, run: str) -> None:
        self._prefix, self._own = prefix, f"{prefix}{run}/"
        self.members: dict[str, str] = {}
        self.group: list[str] = []
        self.labels: list[str] = []
        self.is_leaderless = False
        self.lost: set[int] = set()
        self._parts: defaultdict[tuple[int, int], dict[int, bytes]] = defaultdict(dict)

    def see(self, change: Change) -> None:
        """Take in what happened to a key; keys of other runs are of no interest."""
        if change.key == f"{self._prefix}leader":
            self.is_leaderless |= change.value is None
        if not change.key.startswith(self._own):
            return
        kind, _, rest = change.key[len(self._own) :].partition("/")
        if kind == "members":
            self._see_member(rest, change.value)
        elif kind == "group" and change.value is not None:
            told = json.loads(change.value)
            self.group, self.labels = [member for member, _ in told], [label for _, label in told]
        elif kind == "steps" and change.value is not None:  # what was said stays said
            step, rank, part = (int(word) for word in rest.split("/"))
            self._parts[step, rank][part] = change.value

    def said(self, step: int, rank: int) -> tuple[str, Any] | None:
        """Return the name that a rank has for a step and what it says there, None if that has not arrived whole."""
        parts = self._parts[step, rank]
        if 0 not in parts:
            return None
        count, _, _ = parts[0].partition(b" ")
        if len(parts) < int(count):
            return None
        whole = parts[0][len(count) + 1 :] + b"".join(parts[number] for number in range(1, int(count)))
        name, value = json.loads(whole)
        return name, value

    def forget(self, step: int) -> None:
        """Drop what was said at a step."""
        for rank in range(len(self.group)):
            self._parts.pop((step, rank), None)

    def who(self, rank: int) -> str:
        """Return a rank and where it runs, for messages."""
        return f"rank {rank} ({self.labels[rank]})"

    def _see_member(self, member: str, value: bytes | None) -> None:
        if value is not None:
            self.members[member] = value.decode()
            return
        self.members.pop(member, None)
        if member in self.group:
            self.lost.add(self.group.index(member))


def parts_of(value: object, nbytes: int = PART_NBYTES) -> list[bytes]:
    """Return a value in parts, of which the first begins with their number."""
    data = json.dumps(value).encode()
    pieces = [data[start : start + nbytes] for start in range(0, len(data), nbytes)]
    return [f"{len(pieces)} ".encode() + pieces[0], *pieces[1:]]
