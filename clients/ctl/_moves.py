"""What ``cp``, ``explain`` and ``estimate`` do in a session: find or register both ends, check sizes, move.

Nothing is printed here. Files that are registered for the command belong to its session and go with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument, NotFound, Unsupported
from xferd.api.types import ENDED, TransferOp
from xferd.clients.ctl._places import Place, span_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.descriptors import DescriptorList
    from xferd.api.types import TransferStatus
    from xferd.clients.sync import Client, Region, Transfer

REFRESH_S = 0.1
"""How often progress is shown. The daemon answers at once when the transfer ends."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a move: a region, from an offset on."""

    place: Place
    region: Region
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes from the offset to the region's end; negative where the offset is past it."""
        return self.region.nbytes - self.offset

    def rows(self, nbytes: int) -> DescriptorList:
        """Return a list of the first bytes."""
        return self.region.rows(self.offset, nbytes)


@dataclass(frozen=True, slots=True)
class Move:
    """A transfer that is ready to be asked for: READ where the source is on another node, else WRITE."""

    op: TransferOp
    local: DescriptorList
    remote: DescriptorList
    nbytes: int


def existing(client: Client, place: Place, *, writable: bool = False) -> End:
    """Return an end that is there.

    Raises:
        NotFound: it is not there, or not shared with this command.
    """
    if place.store:
        return End(place, client.register_object(place.store, place.key, writable=writable), 0)
    if place.region is None:
        return End(place, client.register_file(place.path, writable=writable), 0)
    found = client.regions(node=place.node, ids=[place.region])
    if not found:
        raise NotFound(
            f"no {place} that this command may see",
            remedy="see `xferctl regions`; the owner must have shared it for reading or writing",
        )
    return End(place, found[0], place.offset)


def target_of(client: Client, place: Place, nbytes: int) -> End:
    """Return the target of a copy of so many bytes; a file is created, or extended to that size, an object replaced.

    Raises:
        InvalidArgument: the file is larger; what was in it past the copy would stay.
    """
    if place.store:
        region = client.register_object(place.store, place.key, nbytes=nbytes, writable=True, create=True)
        return End(place, region, 0)
    if not place.path:
        return existing(client, place)
    present = _file_nbytes(client, place)
    if present > nbytes:
        raise InvalidArgument(
            f"{place} has {present} bytes, and its end would stay",
            limit=f"at most the {nbytes} bytes that are copied",
            remedy="remove the file first, or name another",
        )
    return End(place, client.register_file(place.path, nbytes=nbytes, writable=True, create=True), 0)


def _file_nbytes(client: Client, place: Place) -> int:
    """Return a file's size; 0 where it is missing or empty, neither of which can be a region."""
    try:
        with client.register_file(place.path) as present:
            return present.nbytes
    except (NotFound, InvalidArgument):
        return 0


def move_between(client: Client, source: Place, target: Place, wanted: int | None) -> Move:
    """Return the move between two ends that are there, for questions about it."""
    start, end = existing(client, source), existing(client, target, writable=True)
    return _move(client, start, end, span_nbytes(start.nbytes, end.nbytes, wanted, source=source, target=target))


def copy_between(client: Client, source: Place, target: Place, wanted: int | None) -> Move:
    """Return the move for a copy; the target file is made here, once the source is known to be good."""
    start = existing(client, source)
    nbytes = span_nbytes(start.nbytes, start.nbytes, wanted, source=source, target=target)
    end = target_of(client, target, nbytes)
    return _move(client, start, end, span_nbytes(start.nbytes, end.nbytes, nbytes, source=source, target=target))


def _move(client: Client, start: End, end: End, nbytes: int) -> Move:
    here = client.grant.node
    if start.region.info.node == here:
        return Move(TransferOp.WRITE, start.rows(nbytes), end.rows(nbytes), nbytes)
    if end.region.info.node == here:
        return Move(TransferOp.READ, end.rows(nbytes), start.rows(nbytes), nbytes)
    raise Unsupported(
        f"neither {start.place} nor {end.place} is on node {here}",
        limit="one end of a transfer is on the node that is asked",
        remedy="ask one of the two nodes, with --socket or --grpc",
    )


def follow(client: Client, transfer: Transfer, moved: Callable[[int], None]) -> TransferStatus:
    """Return the status of a transfer when it has ended, after telling ``moved`` how far it came every so often."""
    while True:
        [status] = client.wait_many([transfer], REFRESH_S)
        moved(status.telemetry.moved_nbytes)
        if status.state in ENDED:
            return status
