"""Tables over sockets: every byte, in order, whatever the rows; what breaks is typed."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xferd.api.descriptors import coalesce
from xferd.api.errors import MoveFailed, PeerLost
from xferd.plugins import vectored
from xferd.plugins.tcp.streams import BlockingStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    with one, two:
        yield one, two


def table(memory: NDArray[np.uint8], sizes: list[int], gap: int) -> NDArray[np.uint64]:
    iov = np.empty((len(sizes), 2), dtype=np.uint64)
    iov[:, 1] = sizes
    iov[:, 0] = memory.ctypes.data + np.concatenate(([0], np.cumsum(np.array(sizes) + gap)[:-1]))
    return iov


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("rows", [1, 1024, 3000])
def test_tables_longer_than_a_call_and_buffers(tcp: tuple[socket.socket, socket.socket], rows: int) -> None:
    one, two = tcp
    sizes = [1 + (i * 7919) % 9000 for i in range(rows)]
    source = np.random.default_rng(1).integers(0, 256, sum(sizes) + 3 * rows, dtype=np.uint8)
    target = np.zeros(sum(sizes), dtype=np.uint8)
    sent = table(source, sizes, 3)
    sender = run(lambda: vectored.send_all(one.fileno(), sent))
    assert vectored.recv_all(two.fileno(), table(target, sizes[::-1], 0)) == sum(sizes)
    sender.join()
    want = np.concatenate([source[int(p) - source.ctypes.data :][: int(n)] for p, n in sent])
    np.testing.assert_array_equal(target, want)


def test_discarded_bytes_are_gone_and_the_rest_is_there(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    sender = run(lambda: one.sendall(bytes(5_000_000) + b"after"))
    assert vectored.discard(two.fileno(), 5_000_000) == 5_000_000
    assert two.recv(5, socket.MSG_WAITALL) == b"after"
    assert vectored.discard(two.fileno(), 0) == 0
    sender.join()


def test_an_end_in_the_middle_is_a_lost_peer(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    memory = np.zeros(100, dtype=np.uint8)
    one.sendall(bytes(60))
    one.close()
    with pytest.raises(PeerLost, match="after 60 of 100 bytes"):
        vectored.recv_all(two.fileno(), table(memory, [50, 50], 0))
    with pytest.raises(PeerLost, match="after 0 of 10 bytes"):
        vectored.discard(two.fileno(), 10)


def test_sending_to_nobody_is_a_lost_peer_and_no_signal(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    two.close()
    memory = np.zeros(8 << 20, dtype=np.uint8)
    with pytest.raises(PeerLost, match="sendmsg: E") as caught:
        vectored.send_all(one.fileno(), table(memory, [8 << 20], 0))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("call", [vectored.recv_all, vectored.send_all])
def test_a_blocked_call_ends_when_the_socket_is_shut_down(
    tcp: tuple[socket.socket, socket.socket], call: Callable[[int, NDArray[np.uint64]], int]
) -> None:
    one, _two = tcp
    memory = np.zeros(64 << 20, dtype=np.uint8)
    errors: list[PeerLost] = []

    def blocked() -> None:
        try:
            call(one.fileno(), table(memory, [64 << 20], 0))
        except PeerLost as exc:
            errors.append(exc)

    thread = run(blocked)
    one.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


def hurried(sock: socket.socket) -> socket.socket:
    """Have a socket's calls return when they could send nothing for 50 ms."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 50_000))
    return sock


def fill_up(sock: socket.socket) -> None:
    """Send until the other side's window is closed: what hangs up after that sends no reset."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 20), socket.MSG_DONTWAIT)


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, socket.SHUT_WR])
def test_a_side_that_hangs_up_and_takes_nothing_is_lost(tcp: tuple[socket.socket, socket.socket], how: int) -> None:
    one, two = tcp
    memory = np.zeros(64 << 20, dtype=np.uint8)
    fill_up(one)
    two.shutdown(how)
    with pytest.raises(PeerLost, match=r"has hung up, and takes no more after \d+ of 67108864"):
        vectored.send_all(hurried(one).fileno(), table(memory, [64 << 20], 0))


def test_a_side_that_is_slow_to_take_gets_it_all(
    tcp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tcp
    source = np.random.default_rng(1).integers(0, 256, 32 << 20, dtype=np.uint8)
    target = np.zeros_like(source)
    look, looked = vectored.has_hung_up, threading.Semaphore(0)

    def seen(sock_fd: int) -> bool:
        looked.release()
        return look(sock_fd)

    monkeypatch.setattr(vectored, "has_hung_up", seen)
    sender = run(lambda: vectored.send_all(hurried(one).fileno(), table(source, [32 << 20], 0), turn_nbytes=1 << 20))
    for _ in range(3):
        assert looked.acquire(timeout=10)  # it could send nothing for a while, and went on
    vectored.recv_all(two.fileno(), table(target, [32 << 20], 0))
    sender.join()
    np.testing.assert_array_equal(target, source)


def test_a_stream_does_not_wait_for_a_side_that_hung_up(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    memory = np.zeros(64 << 20, dtype=np.uint8)
    stream = BlockingStream(one, 1 << 20)
    fill_up(one)
    two.shutdown(socket.SHUT_RDWR)
    with pytest.raises(PeerLost, match="has hung up"):
        stream.send_rest(table(memory, [64 << 20], 0))


def test_memory_that_is_not_there_is_no_crash(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    hole = np.array([[4096, 100]], dtype=np.uint64)
    with pytest.raises(MoveFailed, match="EFAULT"):
        vectored.send_all(one.fileno(), hole)
    one.sendall(bytes(100))
    with pytest.raises(MoveFailed, match="EFAULT"):
        vectored.recv_all(two.fileno(), hole)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.data())
def test_split_keeps_every_byte_in_order(sizes: list[int], data: st.DataObject) -> None:
    memory = np.zeros(1000, dtype=np.uint8)
    iov = table(memory, sizes, 5)
    before = iov.copy()
    at = data.draw(st.integers(0, sum(sizes)))
    head, rest = vectored.split(iov, at)

    def places(part: NDArray[np.uint64]) -> list[int]:
        return [int(start) + i for start, nbytes in part for i in range(int(nbytes))]

    assert len(places(head)) == at
    assert places(head) + places(rest) == places(iov)
    assert head[:, 1].all()
    assert rest[:, 1].all()
    np.testing.assert_array_equal(iov, before)


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=3000),
    turn_nbytes=st.integers(1, 20_000),
)
def test_turns_are_the_table_in_bounded_parts(sizes: list[int], turn_nbytes: int) -> None:
    memory = np.empty(1, dtype=np.uint8)
    whole = table(memory, sizes, 3)
    parts = list(vectored.turns(whole, turn_nbytes))
    assert all(len(part) <= vectored.IOV_MAX and part.flags.c_contiguous for part in parts)
    assert all(0 < vectored.total_nbytes(part) <= turn_nbytes for part in parts)
    merged = np.concatenate(parts)
    _, position, nbytes = coalesce(np.zeros(len(merged), np.uint64), merged[:, 0].copy(), merged[:, 1].copy())
    np.testing.assert_array_equal(np.column_stack((position, nbytes)), whole)
    assert len(parts) <= len(sizes) + sum(sizes) // turn_nbytes + 1


def test_a_table_within_one_turn_is_not_copied() -> None:
    whole = table(np.empty(1, dtype=np.uint8), [4096] * 1024, 0)
    (only,) = vectored.turns(whole, 4 << 20)
    assert only is whole


@pytest.mark.parametrize("turn_nbytes", [1000, 70_000])
def test_turns_carry_every_byte(tcp: tuple[socket.socket, socket.socket], turn_nbytes: int) -> None:
    one, two = tcp
    source = np.random.default_rng(2).integers(0, 256, 300_000, dtype=np.uint8)
    target = np.zeros_like(source)
    sent, wanted = table(source, [100_000, 1, 199_999], 0), table(target, [7] * 20_000 + [160_000], 0)
    sender = run(lambda: vectored.send_all(one.fileno(), sent, turn_nbytes=turn_nbytes))
    assert vectored.recv_all(two.fileno(), wanted, turn_nbytes=turn_nbytes) == 300_000
    sender.join()
    np.testing.assert_array_equal(target, source)


def test_calls_that_do_not_wait_say_what_is_left(tcp: tuple[socket.socket, socket.socket]) -> None:
    one, two = tcp
    source, target = np.ones(16 << 20, dtype=np.uint8), np.zeros(16 << 20, dtype=np.uint8)
    unsent, unread = table(source, [source.nbytes], 0), table(target, [1 << 20] * 16, 0)
    assert vectored.recv_now(two.fileno(), unread) is unread  # nothing has come
    while len(unsent) or len(unread):
        if len(unsent):
            unsent = vectored.send_now(one.fileno(), unsent)
        unread = vectored.recv_now(two.fileno(), unread)
    assert target.all()
    one.close()
    with pytest.raises(PeerLost):
        vectored.recv_now(two.fileno(), table(target, [1], 0))
