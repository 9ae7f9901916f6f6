"""Keys of requests: the same key with the same request finds the same transfer, with another request it is refused."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from xferd.api.descriptors import PreparedRef
from xferd.api.errors import AlreadyExists

if TYPE_CHECKING:
    from xferd.api.descriptors import ListSpec
    from xferd.api.types import SessionId, TransferId, TransferRequest


class KeyBook:
    """Remembers which transfer a session's key made, and of which request."""

    def __init__(self) -> None:
        self._keys: dict[tuple[SessionId, str], tuple[TransferId, bytes]] = {}

    def known(self, session: SessionId, key: str, digest: bytes) -> TransferId | None:
        """Return the transfer that this key made before, None where it is new.

        Raises:
            AlreadyExists: it made one of another request.
        """
        entry = self._keys.get((session, key))
        if entry is None:
            return None
        if entry[1] != digest:
            raise AlreadyExists(
                f"key {key!r} was used for another request, transfer {entry[0]}",
                remedy="use a new key for a new request",
            )
        return entry[0]

    def enter(self, session: SessionId, key: str, transfer_id: TransferId, digest: bytes) -> None:
        """Remember what a key made."""
        self._keys[session, key] = transfer_id, digest

    def forget(self, session: SessionId, key: str) -> None:
        """Free a key; fine if it was never used."""
        self._keys.pop((session, key), None)


def digest_of(request: TransferRequest) -> bytes:
    """Return a hash over all that makes a request what it is, so that a key cannot name two requests."""
    state = hashlib.blake2b(digest_size=16)
    for spec in (request.local, request.remote):
        for part in _parts(spec):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
    rest = (
        request.op,
        request.timeout_s,
        request.priority,
        request.notification,
        request.backend,
        request.hold,
        request.verify,
        request.wait_event,
        request.done_event,
        request.durable,
    )
    state.update(repr(rest).encode())
    return state.digest()


def _parts(spec: ListSpec) -> tuple[bytes, ...]:
    if isinstance(spec, PreparedRef):
        return b"prepared", str(spec.handle).encode(), b"" if spec.index is None else spec.index.tobytes()
    columns = (column.tobytes() for column in (spec.region, spec.offset, spec.nbytes))
    return spec.node.encode(), str(spec.epoch).encode(), *columns
