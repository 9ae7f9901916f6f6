"""Whose session a call is made in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api.errors import Unauthenticated

if TYPE_CHECKING:
    from xferd.api.types import Caller, SessionId


def session_of(caller: Caller) -> SessionId:
    """Return the caller's session.

    Raises:
        Unauthenticated: an operator, who owns nothing.
    """
    if caller.session is None:
        raise Unauthenticated(
            "memory, lists, transfers and notifications belong to a session",
            remedy="open a session and send its token",
        )
    return caller.session
