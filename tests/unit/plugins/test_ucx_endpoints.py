"""What becomes of ``ucx`` endpoints that are cut, never end, or were opened for somebody who has gone."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from check_backend import pattern
from ucx_rig import take_a_place, ucx_maker

from xferd.api.errors import Closed, MoveFailed, PeerLost, Unsupported
from xferd.plugins.base import Chunk, SpaceKind
from xferd.plugins.ucx import library as lib
from xferd.plugins.ucx.messages import Endpoint, Operation
from xferd.plugins.ucx.stalls import CERTAIN_S
from xferd.plugins.ucx.worker import Worker

NBYTES = 8 << 20
TRANSPORTS = ("tcp,self", "posix,sysv,cma,self")


@pytest.fixture(scope="module", autouse=True)
def ucp():
    try:
        return lib.load("")
    except Unsupported as exc:
        pytest.skip(str(exc))


@asynccontextmanager
async def rig_of(transports):
    async with ucx_maker(transports=transports, abort_grace=0.05)() as rig:
        await rig.start()
        yield rig


def arenas(rig, op):
    here, there = rig.arena(SpaceKind.MAPPED, NBYTES), rig.arena(SpaceKind.REMOTE, NBYTES)
    source, target = (there, here) if op == "READ" else (here, there)
    source.fill(pattern(NBYTES, 1))
    return source, target


def move(rig, source, target, nbytes=NBYTES):
    spans = [(0, nbytes)]
    return rig.backend.move(Chunk(source.extent(spans), target.extent(spans), nbytes, "t1", "cause", "agent"))


class Counted:
    """A node's transport; counts what is asked, and can hold the answers back."""

    def __init__(self, transport):
        self.asked = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.has_asked = asyncio.Event()
        self._transport = transport

    async def request(self, node, request, *, timeout_s):
        self.asked.append(request.WhichOneof("request"))
        self.has_asked.set()
        reply = await self._transport.request(node, request, timeout_s=timeout_s)
        await self.may_answer.wait()
        return reply


def counted(rig):
    transport = Counted(rig.calling_transport)
    rig.backend._links._transport = rig.backend._transport = transport
    return transport


@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize("transports", TRANSPORTS)
async def test_an_endpoint_that_the_peer_cut_is_opened_again_by_the_next_chunk(transports, op):
    async with rig_of(transports) as rig:
        source, target = arenas(rig, op)
        assert await move(rig, source, target, 10) == 10
        transport = counted(rig)
        (endpoint,) = rig.serving._serving._endpoints.values()
        rig.serving._worker.close(endpoint, "a test")
        await endpoint.closed()
        assert await move(rig, source, target) == NBYTES
        assert transport.asked.count("ucx_open") == 1
        assert np.array_equal(target.read(), pattern(NBYTES, 1))
        assert rig.backend.statistics().failures == 0


async def test_a_chunk_is_tried_twice_and_no_more():
    async with rig_of("tcp,self") as rig:
        source, target = arenas(rig, "READ")
        assert await move(rig, source, target, 10) == 10
        transport = counted(rig)

        async def lost(peer, request):
            raise PeerLost("no endpoint")

        rig.serving._serving.move = lost
        with pytest.raises(PeerLost, match="no endpoint"):
            await move(rig, source, target)
        assert transport.asked.count("ucx_move") == 2
        assert rig.backend.statistics().failures == 1


async def test_a_peer_that_has_gone_is_not_waited_for():
    async with rig_of("tcp,self") as rig:
        source, target = arenas(rig, "READ")
        assert await move(rig, source, target, 10) == 10
        await rig.serving.aclose()
        await rig.serving_transport.aclose()
        with pytest.raises(PeerLost):
            await asyncio.wait_for(move(rig, source, target), 3.0)


@pytest.mark.parametrize("transports", TRANSPORTS)
async def test_who_asked_for_an_endpoint_may_go_and_the_next_one_takes_it(transports):
    async with rig_of(transports) as rig:
        source, target = arenas(rig, "READ")
        transport = counted(rig)
        transport.may_answer.clear()
        moves = [asyncio.create_task(move(rig, source, target)) for _ in range(3)]
        await transport.has_asked.wait()
        for one in moves:
            one.cancel()
        await asyncio.wait(moves)
        assert all(one.cancelled() for one in moves)
        transport.may_answer.set()
        assert await move(rig, source, target) == NBYTES
        assert transport.asked.count("ucx_open") == 1


async def test_closing_does_not_wait_for_an_endpoint_that_is_being_opened():
    async with rig_of("tcp,self") as rig:
        source, target = arenas(rig, "READ")
        transport = counted(rig)
        transport.may_answer.clear()
        moving = asyncio.create_task(move(rig, source, target))
        await transport.has_asked.wait()
        await asyncio.wait_for(rig.backend.aclose(), 5.0)
        with pytest.raises(Closed):
            await moving


# ------------------------------------------------------------------------------------------ the worker alone


class Stuck:
    """UCX whose messages and closes never end, once it is told so: with a real library below."""

    def __init__(self, ucp):
        self.is_stuck = False
        self._ucp = ucp

    def __getattr__(self, name):
        return getattr(self._ucp, name)

    def request_check_status(self, request):
        return lib.IN_PROGRESS if self.is_stuck else self._ucp.request_check_status(request)

    def tag_recv_request_test(self, request, info):
        return lib.IN_PROGRESS if self.is_stuck else self._ucp.tag_recv_request_test(request, info)


class Message:
    """A message of ``nbytes`` and its end."""

    def __init__(self, worker, endpoint, nbytes, *, is_send, tag=7):
        self.bytes = np.full(nbytes, is_send, dtype=np.uint8)
        table = np.array([[self.bytes.ctypes.data, nbytes]], dtype=np.uint64)
        self._ended = threading.Event()
        self.operation = Operation(endpoint, table, tag, lambda _: self._ended.set(), is_send=is_send)
        worker.begin(self.operation)

    def wait(self):
        assert self._ended.wait(10.0), "it never ended"
        return self.operation


def pair(one, other):
    """Return endpoints of two workers to each other, which have been used."""
    there, back = Endpoint("other", other.address), Endpoint("one", one.address)
    one.connect(there)
    other.connect(back)
    for nbytes in (10, NBYTES):
        received = Message(other, back, nbytes, is_send=False)
        assert Message(one, there, nbytes, is_send=True).wait().error is None
        assert received.wait().moved == nbytes
        assert received.bytes.all()
    return there, back


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_what_never_ends_is_ended_by_another_start_of_ucx(ucp, transports):
    stuck = Stuck(ucp)
    one = Worker(stuck, {"TLS": transports}, patience_s=0.1)
    other, bystander = (Worker(ucp, {"TLS": transports}) for _ in range(2))
    try:
        there, _ = pair(one, other)
        aside, _ = pair(one, bystander)
        sent, awaited = (Message(one, there, NBYTES, is_send=way, tag=8) for way in (True, False))
        address, have_begun = one.address, threading.Event()
        one._post(have_begun.set)
        assert have_begun.wait(10.0)
        stuck.is_stuck = True
        one.close(there, "a test")
        for message in (sent, awaited):
            assert isinstance(message.wait().error, PeerLost)
            assert "a test" in str(message.operation.error)
        stuck.is_stuck = False
        for endpoint in (there, aside):  # it ends what moves with others, too
            asyncio.run(asyncio.wait_for(endpoint.closed(), 5.0))
        assert "anew" in aside.failure
        assert one.address != address
        late = Message(one, there, 10, is_send=True)
        assert isinstance(late.wait().error, PeerLost)
        renewed = Worker(ucp, {"TLS": transports})
        try:
            pair(one, renewed)
            pair(renewed, one)
        finally:
            renewed.stop()
    finally:
        for worker in (one, other, bystander):
            worker.stop()


def test_a_queue_that_a_dead_peer_left_blocked_is_given_up(ucp):
    one = Worker(ucp, {"TLS": "posix,self"})
    try:
        kept, lost = Endpoint("kept", one.address), Endpoint("lost", one.address)
        for endpoint in (kept, lost):
            one.connect(endpoint)
        awaited = Message(one, kept, 10, is_send=False)
        address = one.address
        take_a_place(os.getpid())
        threading.Event().wait(2 * CERTAIN_S)
        assert (one.address, awaited.operation.error) == (address, None)  # a sender that is slow looks like this, too
        one.close(lost, "its process has gone")
        assert isinstance(awaited.wait().error, PeerLost)
        assert "blocked" in kept.failure
        assert one.address != address
        other = Worker(ucp, {"TLS": "posix,self"})
        try:
            pair(one, other)
            pair(other, one)
        finally:
            other.stop()
    finally:
        one.stop()


def test_an_endpoint_that_ends_in_time_restarts_nothing(ucp):
    one, other = (Worker(ucp, {"TLS": "tcp,self"}, patience_s=0.05) for _ in range(2))
    try:
        address = one.address
        for _ in range(3):
            there, back = pair(one, other)
            for worker, endpoint in ((one, there), (other, back)):
                worker.close(endpoint, "a test")
            for endpoint in (there, back):
                asyncio.run(asyncio.wait_for(endpoint.closed(), 5.0))
        threading.Event().wait(0.1)  # past its patience
        assert one.address == address
        pair(one, other)
    finally:
        one.stop()
        other.stop()


def test_a_worker_can_be_stopped_by_many_while_others_post(ucp):
    before = open_fds()
    for _ in range(20):
        worker = Worker(ucp, {"TLS": "self"})
        endpoint = Endpoint("itself", worker.address)
        worker.connect(endpoint)
        begun: list[Message] = []
        is_busy = threading.Event()
        posting = (worker, endpoint, begun, is_busy)
        threads = [threading.Thread(target=post_until_closed, args=posting) for _ in range(2)]
        threads += [threading.Thread(target=worker.stop) for _ in range(3)]
        for thread in threads[:2]:
            thread.start()
        assert is_busy.wait(10.0)
        for thread in threads[2:]:
            thread.start()
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()
        for message in begun:
            assert isinstance(message.wait().error, PeerLost)
        late = Endpoint("late", worker.address)
        worker.connect(late)
        assert "closed" in late.failure
        asyncio.run(asyncio.wait_for(late.closed(), 5.0))
    assert open_fds() == before


def post_until_closed(worker, endpoint, begun, is_busy):
    while True:
        try:
            begun.append(Message(worker, endpoint, 8, is_send=False, tag=9))
        except Closed:
            return
        if len(begun) > 50:
            is_busy.set()


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_message_whose_endpoint_is_lost_says_so_before_the_endpoint_does(ucp):
    worker = Worker(ucp, {"TLS": "self"})
    try:
        operation = Operation(Endpoint("b", b""), np.zeros((1, 2), dtype=np.uint64), 1, lambda _: None, is_send=True)
        for status in lib.LOST:
            operation.status = status
            assert isinstance(worker._error_of(operation), PeerLost)
        operation.status = lib.ERR_MESSAGE_TRUNCATED
        assert isinstance(worker._error_of(operation), MoveFailed)
        assert "reset" in ucp.describe(lib.ERR_CONNECTION_RESET).lower()
    finally:
        worker.stop()
