"""One get over plain HTTP, in a thread: ask, read the head of the answer, have the kernel put the bytes in place."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from xferd.api.errors import MoveFailed, PeerLost
from xferd.plugins import vectored
from xferd.plugins.object.digests import LEAF_NBYTES, leaves_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable

Address: TypeAlias = tuple[int, Any]
"""A family and what ``connect`` takes for it."""

MAX_HEAD_NBYTES = 32 << 10
_READ_NBYTES = 2048
"""What is read for the head: what follows it has to be copied to its places."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |$)")
_META = b"x-amz-meta-"


class Range(NamedTuple):
    """The bytes [start, stop) of an object, at least one, and the memory of this process that they fill, in order."""

    start: int
    stop: int
    places: IovTable


class Received(NamedTuple):
    """What came with a range that is in place.

    Attributes:
        attributes: the metadata of the object.
        leaves: u64, the digest of each MiB of the range; None where they were not wanted.
    """

    attributes: Mapping[str, str]
    leaves: NDArray[np.uint64] | None


class Head:
    """The head of an answer.

    Args:
        text: status line and fields, without the empty line at their end.

    Raises:
        ConnectionError: it is none of HTTP/1.
    """

    def __init__(self, text: bytes) -> None:
        first, *lines = text.split(b"\r\n")
        status = _STATUS.match(first)
        if status is None:
            raise ConnectionError("what answers does not speak HTTP/1")
        self.status = int(status[1])
        pairs = (line.partition(b":") for line in lines)
        self._fields = {name.lower(): value.strip() for name, _, value in pairs}
        self.is_last = b"close" in self._fields.get(b"connection", b"").lower() or first.startswith(b"HTTP/1.0")

    @property
    def attributes(self) -> dict[str, str]:
        """The metadata of the object."""
        fields = self._fields.items()
        return {k[len(_META) :].decode("latin-1"): v.decode("latin-1") for k, v in fields if k.startswith(_META)}

    def brings(self, start: int, stop: int) -> bool:
        """Whether exactly this range follows, as it is."""
        span = self._fields.get(b"content-range", b"").startswith(f"bytes {start}-{stop - 1}/".encode())
        is_whole = self._fields.get(b"content-length", b"") == str(stop - start).encode()
        is_coded = b"transfer-encoding" in self._fields or b"content-encoding" in self._fields
        return self.status == 206 and span and is_whole and not is_coded


class Fetch:
    """One request.

    Args:
        request: the head of it, whole.
        wanted: what it asks for.
        hashes: whether digests are wanted of an object with such metadata. Called in the thread.
        connect_timeout_s: for a new connection.
        timeout_s: for all of it.

    Attributes:
        received: what came; None where it did not, and some of the places may be filled then.
        nbytes: that are wanted.
        took_s: from the request to its last byte, a new connection left out.
        is_discouraging: how it ended says that the next one had better not be tried.
        is_refused: the server answered, and not with what was asked for.
    """

    def __init__(
        self,
        request: bytes,
        wanted: Range,
        hashes: Callable[[Mapping[str, str]], bool],
        *,
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._request = request
        self._wanted = wanted
        self._hashes = hashes
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._deadline = 0.0
        self._lock = threading.Lock()  # of the two that follow
        self._sock: socket.socket | None = None
        self._is_cut = False
        self.received: Received | None = None
        self.nbytes = wanted.stop - wanted.start
        self.took_s = 0.0
        self.is_discouraging = False
        self.is_refused = False

    def cut(self) -> None:
        """Have the thread end soon, wherever it is, or not begin. From any thread."""
        with self._lock:
            self._is_cut = True
            if self._sock is not None:
                with suppress(OSError):  # it is not connected yet, or not any more
                    self._sock.shutdown(socket.SHUT_RDWR)

    def run(self, sock: socket.socket | None, addresses: Sequence[Address]) -> socket.socket | None:
        """Ask and receive, in a thread; returns the connection if it is good for more.

        Args:
            sock: a connection that rests; None for a new one.
            addresses: of the server, tried in order for a new one.
        """
        is_new, is_reusable = sock is None, False
        self._deadline = time.monotonic() + self._timeout_s
        try:
            if sock is None:
                sock = self._connect(addresses)
            else:
                self._hold(sock)
            self.received, is_reusable = self._ask(sock)
        except (OSError, PeerLost, MoveFailed):
            # A connection that rested may have been closed by the server just now, which tells nothing of the next.
            self.is_discouraging = is_new and not self._is_cut
        finally:
            with self._lock:
                self._sock = None  # nobody shuts it down from now on
            if sock is not None and not is_reusable:
                sock.close()
        return sock if is_reusable else None

    def _connect(self, addresses: Sequence[Address]) -> socket.socket:
        failed: OSError = ConnectionError("no address")
        for family, address in addresses:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                self._hold(sock)
                sock.settimeout(self._connect_timeout_s)
                sock.connect(address)
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                failed = error
                with self._lock:
                    self._sock = None
                sock.close()
            else:
                return sock
        raise failed

    def _hold(self, sock: socket.socket) -> None:
        with self._lock:
            if self._is_cut:
                raise ConnectionAbortedError("it was broken off")
            self._sock = sock

    def _ask(self, sock: socket.socket) -> tuple[Received | None, bool]:
        """Return what came, and whether the connection is good for more."""
        self._bound(sock)
        began = time.monotonic()
        sock.sendall(self._request)
        head, more = self._head(sock)
        start, stop, places = self._wanted
        if not head.brings(start, stop) or len(more) > stop - start:
            self.is_refused = True
            self.is_discouraging = head.status < 400 or head.status >= 500 or head.status == 429
            return None, False
        attributes = head.attributes
        leaves: list[NDArray[np.uint64]] | None = [] if self._hashes(attributes) else None
        while len(places):
            part, places = vectored.split(places, min(LEAF_NBYTES, vectored.total_nbytes(places)))
            more = self._fill(sock, part, more)
            if leaves is not None:  # at once: it is in the processor's cache
                leaves.append(leaves_of(part))
        self.took_s = time.monotonic() - began
        return Received(attributes, None if leaves is None else np.concatenate(leaves)), not head.is_last

    def _head(self, sock: socket.socket) -> tuple[Head, bytes]:
        """Return the head of the answer, and what came after it with the same call."""
        text = b""
        while b"\r\n\r\n" not in text:
            self._bound(sock)
            got = sock.recv(_READ_NBYTES)
            if not got or len(text) + len(got) > MAX_HEAD_NBYTES:
                raise ConnectionResetError("the connection ended in the head, or the head does not end")
            text += got
        head, _, more = text.partition(b"\r\n\r\n")
        return Head(head), more

    def _fill(self, sock: socket.socket, part: IovTable, more: bytes) -> bytes:
        """Fill places with what has come and then from the connection; returns what is left of the former."""
        if more:
            nbytes = min(len(more), vectored.total_nbytes(part))
            first, part = vectored.split(part, nbytes)
            vectored.copy_local(vectored.iov_of(more[:nbytes]), first)
            more = more[nbytes:]
        if len(part):
            self._bound(sock)
            vectored.recv_all(sock.fileno(), part)
        return more

    def _bound(self, sock: socket.socket) -> None:
        """Let the next calls wait no longer than the time that is left."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time for the request is over")
        wait = struct.pack("@ll", int(left_s), max(1, int(left_s % 1 * 1e6)))  # struct timeval; two zeros are for ever
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
