"""The session table: who is attached, under which name, with which token, until when.

Pure bookkeeping: no clock of its own, no I/O, no locks (it lives on the event loop). What a session *holds* is not
here: regions are in ``daemon/memory/regions.py``, transfers in ``daemon/engine``. Ending a session takes two steps,
because what it holds is let go in between: ``begin_close`` makes the token worthless at once, ``finish_close`` frees
the agent's name.
"""

from __future__ import annotations

import enum
import hashlib
import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xferd.api.errors import AlreadyExists, InvalidArgument, NotFound, Overloaded, Unauthenticated
from xferd.api.types import SessionId

if TYPE_CHECKING:
    from xferd.api.types import PeerCredentials, Transport

MAX_AGENT_CHARACTERS = 128
_AGENT_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_AGENT_CHARACTERS}}}")
_TOKEN_NBYTES = 32


class SessionState(enum.Enum):
    """OPEN takes calls; CLOSING lets go of what it holds and takes none."""

    OPEN = "OPEN"
    CLOSING = "CLOSING"


@dataclass(frozen=True, slots=True)
class Session:
    """One attached client. ``expires_at`` 0.0 means: lives as long as its connection. Times are UNIX times."""

    id: SessionId
    agent: str
    transport: Transport
    credentials: PeerCredentials | None
    opened_at: float
    ttl_s: float
    expires_at: float
    state: SessionState = SessionState.OPEN
    close_reason: str = ""

    @property
    def pid(self) -> int:
        """Process id of the client, 0 where the kernel did not tell it."""
        return self.credentials.pid if self.credentials else 0

    @property
    def uid(self) -> int:
        """User id of the client, or -1 where the kernel did not tell it."""
        return self.credentials.uid if self.credentials else -1


def check_agent_name(agent: str) -> str:
    """Return the name if it keeps the grammar.

    Raises:
        InvalidArgument: it does not.
    """
    if not _AGENT_NAME.fullmatch(agent):
        raise InvalidArgument(
            f"agent name {agent[:MAX_AGENT_CHARACTERS]!r} is not allowed",
            limit=f"1 to {MAX_AGENT_CHARACTERS} of [A-Za-z0-9._-]",
            remedy="choose another name, or leave it empty",
        )
    return agent


class SessionTable:
    """Sessions by id, by agent and by the digest of their token.

    Tokens themselves are not kept: a dump of the table gives nobody a session. Looking a digest up in a dictionary
    tells by its timing at most something about the digest, from which no token follows.
    """

    def __init__(self, *, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self._sessions: dict[SessionId, Session] = {}
        self._agents: dict[str, SessionId] = {}
        self._digests: dict[bytes, SessionId] = {}
        self._digest_of: dict[SessionId, bytes] = {}
        self._opened = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, agent: str, transport: Transport, credentials: PeerCredentials | None, ttl_s: float, now: float
    ) -> tuple[Session, str]:
        """Add a session and return it with its token, which is not kept here.

        Args:
            agent: name; "" chooses one.
            transport: how the client is attached.
            credentials: of the client's process, where the kernel told them.
            ttl_s: 0.0: lives as long as its connection; else it expires when not renewed for so long.
            now: UNIX time.

        Raises:
            InvalidArgument: the name breaks the grammar, or ``ttl_s`` is negative.
            AlreadyExists: the agent has a session, perhaps one that is still closing.
            Overloaded: ``max_sessions`` are attached.
        """
        if not ttl_s >= 0.0:
            raise InvalidArgument(f"time to live {ttl_s} s", limit="at least 0", remedy="0 lives with its connection")
        if agent:
            self._check_free(check_agent_name(agent))
        if len(self._sessions) >= self.max_sessions:
            raise Overloaded(
                f"{len(self._sessions)} sessions are attached",
                limit=f"sessions.max_sessions = {self.max_sessions}",
                remedy="close one, or raise the setting",
            )
        self._opened += 1
        token = secrets.token_urlsafe(_TOKEN_NBYTES)
        session = Session(
            id=SessionId(f"s{self._opened}-{secrets.token_hex(4)}"),
            agent=agent or self._choose_name(credentials),
            transport=transport,
            credentials=credentials,
            opened_at=now,
            ttl_s=ttl_s,
            expires_at=now + ttl_s if ttl_s else 0.0,
        )
        self._sessions[session.id] = session
        self._agents[session.agent] = session.id
        self._digest_of[session.id] = _digest(token)
        self._digests[self._digest_of[session.id]] = session.id
        return session, token

    def get(self, session: SessionId) -> Session:
        """Return a session, open or closing.

        Raises:
            NotFound: it has ended, or never was.
        """
        try:
            return self._sessions[session]
        except KeyError:
            raise NotFound(f"session {session!r}", remedy="it has ended; list the live ones") from None

    def find_agent(self, agent: str) -> Session | None:
        """Return the agent's open session, if it has one."""
        session = self._agents.get(agent)
        found = self._sessions[session] if session is not None else None
        return found if found is not None and found.state is SessionState.OPEN else None

    def session_of_agent(self, agent: str) -> SessionId | None:
        """Return the id of the agent's open session, if it has one."""
        session = self.find_agent(agent)
        return None if session is None else session.id

    def by_token(self, token: str) -> Session:
        """Return the open session that has this token.

        Raises:
            Unauthenticated: none has.
        """
        session = self._digests.get(_digest(token))
        if session is None:
            raise Unauthenticated(
                "no live session has this token" if token else "the call carries no token",
                remedy="open a session and send its token as `authorization: Bearer <token>`",
            )
        return self._sessions[session]

    def renew(self, session: SessionId, now: float) -> None:
        """Push the expiry of an open session that has one; others are left alone."""
        found = self.get(session)
        if found.ttl_s and found.state is SessionState.OPEN:
            self._sessions[session] = replace(found, expires_at=now + found.ttl_s)

    def expired(self, now: float) -> list[SessionId]:
        """Return the open sessions whose time is over."""
        return [s.id for s in self._sessions.values() if s.expires_at and s.expires_at <= now and _is_open(s)]

    def next_expiry(self) -> float | None:
        """Return the earliest expiry of an open session, so that a timer can be set."""
        return min((s.expires_at for s in self._sessions.values() if s.expires_at and _is_open(s)), default=None)

    def live(self) -> list[Session]:
        """Return all sessions, closing ones too, in the order in which they were opened."""
        return list(self._sessions.values())

    def agents(self) -> list[str]:
        """Return the names of agents with an open session, sorted."""
        return sorted(s.agent for s in self._sessions.values() if _is_open(s))

    def begin_close(self, session: SessionId, reason: str) -> bool:
        """Make the token worthless; the name stays taken. False when it is closing already or has ended."""
        found = self._sessions.get(session)
        if found is None or not _is_open(found):
            return False
        del self._digests[self._digest_of.pop(session)]
        self._sessions[session] = replace(found, state=SessionState.CLOSING, close_reason=reason)
        return True

    def finish_close(self, session: SessionId) -> None:
        """Forget a closing session and give its name back. Twice is fine."""
        found = self._sessions.get(session)
        if found is None:
            return
        self.begin_close(session, "")
        del self._sessions[session]
        del self._agents[found.agent]

    def check_invariants(self) -> None:
        """Assert that the three indexes agree."""
        assert self._agents == {s.agent: s.id for s in self._sessions.values()}
        assert sorted(self._digests.values()) == sorted(s.id for s in self._sessions.values() if _is_open(s))
        assert self._digests == {digest: id_ for id_, digest in self._digest_of.items()}
        for session in self._sessions.values():
            assert bool(session.ttl_s) == bool(session.expires_at), session
            assert check_agent_name(session.agent)

    def _check_free(self, agent: str) -> None:
        taken = self._agents.get(agent)
        if taken is None:
            return
        session = self._sessions[taken]
        raise AlreadyExists(
            f"agent {agent!r} has session {session.id}"
            + (f" of process {session.pid}" if session.pid else "")
            + (", which is closing" if not _is_open(session) else ""),
            limit="one live session an agent",
            remedy="choose another name, or end that session",
        )

    def _choose_name(self, credentials: PeerCredentials | None) -> str:
        pid = credentials.pid if credentials else 0
        number = self._opened
        while (name := f"agent-{pid}-{number}") in self._agents:  # a client may have taken a name of this shape
            number += 1
        return name


def _is_open(session: Session) -> bool:
    return session.state is SessionState.OPEN


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
