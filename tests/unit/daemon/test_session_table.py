"""The session table: one live session an agent, tokens that die at once, names that come back when all is released."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xferd.api.errors import AlreadyExists, InvalidArgument, NotFound, Overloaded, Unauthenticated
from xferd.api.types import PeerCredentials, SessionId, Transport
from xferd.daemon.sessions.table import Session, SessionState, SessionTable, check_agent_name

CREDENTIALS = PeerCredentials(pid=41, uid=1000, gid=1000)


@pytest.fixture
def table():
    table = SessionTable(max_sessions=4)
    yield table
    table.check_invariants()


def open_session(table: SessionTable, agent: str = "a", ttl_s: float = 0.0, now: float = 10.0) -> tuple[Session, str]:
    return table.open(agent, Transport.SOCKET, CREDENTIALS, ttl_s, now)


def test_a_token_finds_its_session_and_no_other_does(table):
    session, token = open_session(table)
    assert table.by_token(token) == session
    assert len(token) >= 43  # 256 bits
    for wrong in ("", token[:-1], token + "x", token.upper(), "\udcff"):
        with pytest.raises(Unauthenticated):
            table.by_token(wrong)


def test_tokens_are_not_kept(table):
    _, token = open_session(table)
    assert token not in repr(vars(table))


def test_an_agent_has_one_session_until_it_has_let_go_of_everything(table):
    session, token = open_session(table)
    with pytest.raises(AlreadyExists, match=r"'a' has session .* of process 41"):
        open_session(table)
    assert table.begin_close(session.id, "killed")
    with pytest.raises(Unauthenticated):
        table.by_token(token)
    with pytest.raises(AlreadyExists, match="which is closing"):
        open_session(table)
    assert table.get(session.id).close_reason == "killed"
    assert table.find_agent("a") is None
    table.finish_close(session.id)
    assert open_session(table)[0].id != session.id


def test_closing_twice_tells_that_somebody_else_does_it(table):
    session, _ = open_session(table)
    assert table.begin_close(session.id, "one")
    assert not table.begin_close(session.id, "two")
    table.finish_close(session.id)
    table.finish_close(session.id)
    assert not table.begin_close(session.id, "three")
    with pytest.raises(NotFound, match=session.id):
        table.get(session.id)


def test_finish_without_begin_also_kills_the_token(table):
    session, token = open_session(table)
    table.finish_close(session.id)
    with pytest.raises(Unauthenticated):
        table.by_token(token)


@pytest.mark.parametrize("name", ["", "a" * 129, "a b", "ä", "a@node", "a\n", "a/b", "\0"])
def test_names_out_of_grammar_are_refused(name):
    with pytest.raises(InvalidArgument, match="1 to 128"):
        check_agent_name(name)


@given(st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True))
def test_names_in_grammar_are_taken(name):
    assert check_agent_name(name) == name


def test_a_chosen_name_says_the_process_and_never_collides(table):
    first, _ = open_session(table, "")
    assert first.agent == "agent-41-1"
    open_session(table, "agent-41-3")
    third, _ = open_session(table, "")
    assert third.agent == "agent-41-4"
    assert table.agents() == ["agent-41-1", "agent-41-3", "agent-41-4"]


def test_the_limit_is_named_and_nothing_is_changed(table):
    for number in range(4):
        open_session(table, f"a{number}")
    with pytest.raises(Overloaded, match="max_sessions = 4"):
        open_session(table, "one-more")
    assert len(table) == 4


def test_expiry_is_pushed_by_renewal_and_only_where_there_is_one(table):
    rest, _ = open_session(table, "rest", ttl_s=60.0, now=100.0)
    lasting, _ = open_session(table, "lasting", now=100.0)
    assert table.next_expiry() == 160.0
    assert table.expired(159.9) == []
    table.renew(rest.id, 150.0)
    table.renew(lasting.id, 150.0)
    assert table.get(lasting.id).expires_at == 0.0
    assert table.expired(160.0) == []
    assert table.expired(210.0) == [rest.id]
    table.begin_close(rest.id, "expired")
    table.renew(rest.id, 300.0)
    assert table.expired(1e9) == []
    assert table.next_expiry() is None


@pytest.mark.parametrize("ttl_s", [-1.0, float("nan")])
def test_a_time_to_live_that_is_none_is_refused(table, ttl_s):
    with pytest.raises(InvalidArgument):
        open_session(table, ttl_s=ttl_s)


class TableMachine(RuleBasedStateMachine):
    """Any order of calls keeps the indexes in agreement with a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SessionTable(max_sessions=3)
        self.tokens: dict[str, SessionId] = {}
        self.closing: dict[SessionId, None] = {}  # in order, so that a run can be repeated

    @rule(agent=st.sampled_from(["", "a", "b", "c"]), ttl=st.sampled_from([0.0, 5.0]), now=st.floats(1, 100))
    def open(self, agent: str, ttl: float, now: float) -> None:
        taken = {s.agent for s in self.table.live()}
        try:
            session, token = self.table.open(agent, Transport.REST, None, ttl, now)
        except AlreadyExists:
            assert agent in taken
        except Overloaded:
            assert len(taken) == 3
        else:
            assert session.agent not in taken
            self.tokens[token] = session.id

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(list(self.tokens)))
        session = self.tokens.pop(token)
        assert self.table.begin_close(session, "why")
        self.closing[session] = None

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(list(self.closing)))
        del self.closing[session]
        self.table.finish_close(session)

    @invariant()
    def agrees(self) -> None:
        self.table.check_invariants()
        assert {s.id for s in self.table.live()} == set(self.tokens.values()) | set(self.closing)
        assert {s.id for s in self.table.live() if s.state is SessionState.CLOSING} == set(self.closing)
        for token, session in self.tokens.items():
            assert self.table.by_token(token).id == session


TestTableMachine = TableMachine.TestCase
