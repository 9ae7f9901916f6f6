"""A key names one request: whatever differs makes another, and is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import AlreadyExists
from xferd.api.types import Notification, Priority, SessionId, TransferId, TransferOp, TransferRequest
from xferd.daemon.engine.keys import KeyBook, digest_of

SPEC = DescriptorList.from_columns(1, [0], 8)
PLAIN = TransferRequest(TransferOp.READ, SPEC, SPEC, key="k")


@pytest.mark.parametrize(
    "changes",
    [
        {"op": TransferOp.WRITE},
        {"remote": DescriptorList.from_columns(1, [8], 8)},
        {"timeout_s": 1.0},
        {"priority": Priority.HIGH},
        {"notification": Notification("b", b"x")},
        {"backend": "tcp"},
        {"hold": True},
        {"verify": True},
        {"durable": True},
        {"wait_event": 1},
        {"done_event": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_differs_makes_another_request(changes: dict[str, object]) -> None:
    book, session = KeyBook(), SessionId("s")
    book.enter(session, "k", TransferId("t"), digest_of(PLAIN))
    assert book.known(session, "k", digest_of(replace(PLAIN))) == "t"
    with pytest.raises(AlreadyExists, match="another request"):
        book.known(session, "k", digest_of(replace(PLAIN, **changes)))  # type: ignore[arg-type]
