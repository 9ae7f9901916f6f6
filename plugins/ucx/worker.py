"""The thread that makes UCX progress, so that endpoints open and close, and messages come and go.

One thread owns the UCX worker and makes every call to it; others give it work by ``post`` and hear of ends by
callbacks in that thread. It sleeps in ``poll`` on the worker's event descriptor: nothing is looked at while nothing
happens, unless ``spin_us`` says so.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import Closed, MoveFailed, PeerLost, XferdError
from xferd.plugins.ucx import library as lib
from xferd.plugins.ucx.stalls import Stall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from xferd.plugins.ucx.library import Ucp
    from xferd.plugins.ucx.messages import Endpoint, Operation

PATIENCE_S = 5.0
"""How long UCX may take to end what moves by an endpoint that was cut, unless it is told otherwise."""

CLOSED = "the ucx backend is closed"

STEPS = 64
"""Calls of progress between two looks at what has ended and what is new."""

log = structlog.get_logger("xferd.ucx")


class Worker:
    """UCX's context and worker with their thread. ``post`` may be called from any thread, all else is its own.

    What moves by an endpoint that was cut ends within ``patience_s``. UCX sees to that itself, but for faults of its
    own: with a peer's queue in shared memory full and the peer dead, it waits for room there for ever; and a peer that
    died while it wrote into our queue has closed it for all others (``stalls.py``). Then its worker is destroyed,
    after which it touches no memory, and another one takes its place: that ends what moves with other peers, too, and
    ``address`` is a new one.

    Raises ``Unsupported`` or ``ConfigError`` where UCX cannot start.
    """

    def __init__(
        self, ucp: Ucp, settings: Mapping[str, str], *, spin_us: int = 0, patience_s: float = PATIENCE_S
    ) -> None:
        self._ucp = ucp
        self._patience_s = patience_s
        self._spin_s = spin_us * 1e-6
        self._spin_until = 0.0
        self._context = ucp.open_context(settings)
        try:
            self._worker = ucp.open_worker(self._context)
        except XferdError:
            ucp.cleanup(self._context)
            raise
        self.address = ucp.address_of(self._worker)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(ucp.event_fd_of(self._worker), select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._posting = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._is_asleep = False
        self._is_stopping = False  # in the thread
        self._is_stopped = False
        self._endpoints: dict[int, Endpoint] = {}
        self._live: set[Operation] = set()
        self._closing: dict[int, Endpoint] = {}
        self._cut: dict[Endpoint, float] = {}  # those by which something may still move, and how long it may
        self._stall = Stall()
        self._on_error = lib.ErrorCallback(self._endpoint_failed)
        self._thread = threading.Thread(target=self._run, name="xferd-ucx", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------------------- from any thread

    def connect(self, endpoint: Endpoint) -> None:
        """Open an endpoint; messages may be posted to it at once. One that cannot be opened has its ``failure``."""
        if not self._post(lambda: self._connect(endpoint)):
            endpoint.failure = endpoint.failure or CLOSED
            endpoint.note_closed()

    def begin(self, operation: Operation) -> None:
        """Begin to send or to receive; ``on_end`` is called in the worker's thread.

        Raises:
            Closed: the worker was stopped.
        """
        if not self._post(lambda: self._begin(operation)):
            raise Closed(CLOSED)

    def cancel(self, operation: Operation) -> None:
        """End a receive for which nothing has come yet; others go on."""
        self._post(lambda: self._cancel(operation))

    def close(self, endpoint: Endpoint, reason: str) -> None:
        """Cut an endpoint: what moves by it ends, with ``reason``. Twice is fine."""
        endpoint.failure = endpoint.failure or reason
        self._post(lambda: self._close(endpoint))

    def stop(self) -> None:
        """Cut all endpoints, end the thread, give everything back. Blocks until then; twice is fine."""
        self._post(self._stop, is_last=True)
        self._thread.join()
        with self._posting:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _post(self, call: Callable[[], None], *, is_last: bool = False) -> bool:
        """Have the thread call something, and nothing after what ``is_last``; return whether it will."""
        with self._posting:  # so that the descriptor is not closed between the look and the write
            if self._is_stopped:
                return False
            self._is_stopped = is_last
            self._posted.append(call)
            if self._is_asleep:
                os.eventfd_write(self._wake_fd, 1)
            return True

    # ---------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            while not self._has_rested():
                self._turn()
        finally:
            with self._posting:
                self._is_stopped = True  # also where it ends by an error
            self._tell_lost(*self._destroy(), CLOSED)
            while self._posted:
                self._posted.popleft()()
            self._ucp.cleanup(self._context)

    def _has_rested(self) -> bool:
        return self._is_stopping and not self._live and not self._closing

    def _turn(self) -> None:
        """Do what was posted, make progress until there is none, look at what has ended, sleep."""
        progress, worker = self._ucp.worker_progress, self._worker
        while self._posted:
            self._posted.popleft()()
        steps = STEPS
        while steps and progress(worker):
            steps -= 1
        ended = self._reap()
        if self._cut:
            self._look_at_cut()
        if steps < STEPS:
            self._stall.moved()
        if ended or steps < STEPS or self._posted:
            if self._spin_s:
                self._spin_until = time.monotonic() + self._spin_s
        elif not self._has_rested() and not (self._spin_s and time.monotonic() < self._spin_until):
            self._sleep()

    def _sleep(self) -> None:
        self._is_asleep = True
        try:
            # In this order: who posts after the look sees that we sleep, and writes to the descriptor.
            if not self._posted:
                for fd, _ in self._poll.poll(self._arm()):
                    if fd == self._wake_fd:
                        os.eventfd_read(fd)
        finally:
            self._is_asleep = False
        if self._stall.is_certain:
            self._renew("a lost peer has left the queue of all peers blocked")

    def _arm(self) -> float | None:
        """Have UCX tell of what comes; returns for how many milliseconds to sleep at most, None: for ever."""
        if self._ucp.worker_arm(self._worker) != lib.OK:
            return self._stall.busy(time.monotonic()) * 1e3
        self._stall.armed()
        if not self._cut:
            return None
        return max(0.0, min(self._cut.values()) - time.monotonic()) * 1e3

    def _look_at_cut(self) -> None:
        """Forget cut endpoints that have ended; start UCX anew where one does not."""
        self._cut = {one: at for one, at in self._cut.items() if one.operations or one in self._closing.values()}
        if self._cut and min(self._cut.values()) <= time.monotonic():
            self._renew("what moved with a lost peer does not end")

    def _renew(self, reason: str) -> None:
        peers = self._stall.suspects | {endpoint.node for endpoint in self._cut}
        log.error("ucx starts anew", reason=reason, peers=sorted(peers))
        self._stall = Stall()
        self._poll.unregister(self._ucp.event_fd_of(self._worker))
        endpoints, operations = self._destroy()
        try:
            self._worker = self._ucp.open_worker(self._context)
            self.address = self._ucp.address_of(self._worker)
            self._poll.register(self._ucp.event_fd_of(self._worker), select.POLLIN)
        finally:  # who hears of it asks for the new address
            self._tell_lost(endpoints, operations, f"UCX was started anew: {reason}")

    def _destroy(self) -> tuple[set[Endpoint], set[Operation]]:
        """Destroy UCX's worker; returns what has ended with it and was not told."""
        worker, self._worker = self._worker, ctypes.c_void_p()
        endpoints = {*self._endpoints.values(), *self._closing.values(), *self._cut}
        operations = set(self._live)
        for operation in operations:
            self._ucp.request_free(operation.request)
            operation.request = None
        for request in self._closing:
            self._ucp.request_free(request)
        for table in (self._endpoints, self._closing, self._cut):
            table.clear()
        if worker.value is not None:
            self._ucp.worker_destroy(worker)
        return endpoints, operations

    def _tell_lost(self, endpoints: set[Endpoint], operations: set[Operation], reason: str) -> None:
        for endpoint in endpoints:
            endpoint.failure = endpoint.failure or reason
            endpoint.handle = None
            endpoint.note_closed()
        for operation in operations:
            operation.status = lib.ERR_CANCELED
            self._end(operation)

    def _reap(self) -> int:
        """End the operations and closes that UCX has ended; returns how many."""
        ended = 0
        for operation in [one for one in self._live if self._has_ended(one)]:
            ended += 1
            self._end(operation)
        for request in [one for one in self._closing if self._ucp.request_check_status(one) != lib.IN_PROGRESS]:
            ended += 1
            self._ucp.request_free(request)
            self._closing.pop(request).note_closed()
        return ended

    def _has_ended(self, operation: Operation) -> bool:
        if operation.is_send:
            operation.status = self._ucp.request_check_status(operation.request)
            operation.moved = operation.nbytes if operation.status == lib.OK else 0
        else:
            info = lib.TagInfo()
            operation.status = self._ucp.tag_recv_request_test(operation.request, ctypes.byref(info))
            operation.moved = info.length if operation.status == lib.OK else 0
        return operation.status != lib.IN_PROGRESS

    def _end(self, operation: Operation) -> None:
        self._live.discard(operation)
        operation.endpoint.operations.discard(operation)
        if operation.request is not None:
            self._ucp.request_free(operation.request)
            operation.request = None
        if operation.status != lib.OK:
            operation.error = self._error_of(operation)
        operation.on_end(operation)

    def _error_of(self, operation: Operation) -> XferdError:
        endpoint, words = operation.endpoint, self._ucp.describe(operation.status)
        if endpoint.failure or operation.status in lib.LOST:
            reason = endpoint.failure or f"UCX lost it: {words}"
            return PeerLost(f"node {endpoint.node!r}: {reason}", remedy="post it again")
        if operation.status == lib.ERR_CANCELED:
            return MoveFailed(f"a message of node {endpoint.node!r} was cancelled")
        what = "sent" if operation.is_send else "received"
        return MoveFailed(f"UCX: {operation.nbytes} bytes cannot be {what} (node {endpoint.node!r}): {words}")

    def _connect(self, endpoint: Endpoint) -> None:
        if endpoint.failure or self._worker.value is None:
            endpoint.failure = endpoint.failure or CLOSED
            endpoint.note_closed()
            return
        handle = ctypes.c_void_p()
        params = lib.EndpointParams(
            field_mask=lib.EP_REMOTE_ADDRESS | lib.EP_ERR_MODE | lib.EP_ERR_HANDLER,
            err_mode=lib.ERR_MODE_PEER,
            err_callback=self._on_error,
        )
        address = ctypes.create_string_buffer(endpoint.address, len(endpoint.address))
        params.address = ctypes.cast(address, ctypes.c_char_p)
        status = self._ucp.ep_create(self._worker, ctypes.byref(params), ctypes.byref(handle))
        if status != lib.OK:
            self._fail(endpoint, f"UCX cannot connect: {self._ucp.describe(status)}")
            endpoint.note_closed()
            return
        assert handle.value is not None
        endpoint.handle = handle.value
        self._endpoints[handle.value] = endpoint

    def _begin(self, operation: Operation) -> None:
        endpoint = operation.endpoint
        if endpoint.failure or endpoint.handle is None:
            operation.status = lib.ERR_CANCELED
            self._end(operation)
            return
        buffer, count = operation.span
        param = ctypes.byref(operation.param)
        if operation.is_send:
            found = self._ucp.tag_send_nbx(endpoint.handle, buffer, count, operation.tag, param)
        else:
            found = self._ucp.tag_recv_nbx(self._worker, buffer, count, operation.tag, lib.FULL_MASK, param)
        operation.status = lib.status_of(found)
        if operation.status == lib.IN_PROGRESS:
            operation.request = found
            endpoint.operations.add(operation)
            self._live.add(operation)
        else:
            self._end(operation)

    def _cancel(self, operation: Operation) -> None:
        if operation in self._live and not operation.is_send:
            self._ucp.request_cancel(self._worker, operation.request)

    def _endpoint_failed(self, _: int | None, handle: int, status: int) -> None:
        """UCX calls this from within progress; the endpoint must still be closed, which is not done in here."""
        endpoint = self._endpoints.get(handle)
        if endpoint is not None:
            self._fail(endpoint, f"UCX lost it: {self._ucp.describe(status)}")
            self._posted.append(lambda: self._close(endpoint))

    def _fail(self, endpoint: Endpoint, reason: str) -> None:
        if not endpoint.failure:
            endpoint.failure = reason
            log.info("endpoint lost", peer=endpoint.node, reason=reason)

    def _close(self, endpoint: Endpoint) -> None:
        handle, endpoint.handle = endpoint.handle, None
        if handle is None:
            if not any(one is endpoint for one in self._closing.values()):
                endpoint.note_closed()
            return
        for operation in list(endpoint.operations):
            self._cancel(operation)
        param = lib.RequestParam(op_attr_mask=lib.OP_FLAGS, flags=lib.EP_CLOSE_FORCE)
        found = self._ucp.ep_close_nbx(handle, ctypes.byref(param))
        self._endpoints.pop(handle, None)
        self._cut[endpoint] = time.monotonic() + self._patience_s
        self._stall.suspect(endpoint.node)
        if lib.status_of(found) == lib.IN_PROGRESS:
            self._closing[found] = endpoint
        else:
            endpoint.note_closed()

    def _stop(self) -> None:
        self._is_stopping = True
        for endpoint in list(self._endpoints.values()):
            endpoint.failure = endpoint.failure or CLOSED
            self._close(endpoint)
